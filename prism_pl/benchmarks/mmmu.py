"""MMMU (arXiv 2311.16502): 900 college questions of 30 subjects in the validation split, 47 of them open.

Sources:
    columns, split   hub lmms-lab/MMMU (the 30 subsets of hub MMMU/MMMU in one), split validation; truths of open
                     questions that are lists: MMMU-Benchmark/MMMU@bb0b95a mmmu/answer_dict_val.json
    prompt           question, then options by letter: EvolvingLMMs-Lab/lmms-eval@75571cf lmms_eval/tasks/mmmu/utils.py
                     construct_prompt; pictures first, in the order of their marks; the last sentence is ours
    rule             MMMU-Benchmark/MMMU@51ce7f3 eval/eval_utils.py (kept in the task above): the letter or the option's
                     text; open answers by number to two decimals or by the truth inside the answer. Theirs draws a
                     random option where it can read none, and finds "cat" in "concatenate"; ours does neither
    families         the six disciplines of DOMAIN_CAT2SUB_CAT in the same file

A row: {"id": "validation_Art_1", "question": "Who painted <image 1>?", "options": "['Goya', 'Klee']", "answer": "A",
"question_type": "multiple-choice", "image_1": {...}, ..., "image_7": null}
"""

import re
from typing import Any

from prism_pl.batch import Example
from prism_pl.benchmarks.base import Benchmark, Row
from prism_pl.benchmarks.options import CHOOSE, as_list, lettered, picked
from prism_pl.rewards import accuracy, same_when_rounded

OPEN = "Give a number, a word or a short phrase as the final answer."
DECIMALS = 2
DISCIPLINES = {
    "art & design": "Art Art_Theory Design Music",
    "business": "Accounting Economics Finance Manage Marketing",
    "science": "Biology Chemistry Geography Math Physics",
    "health & medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "humanities & social science": "History Literature Psychology Sociology",
    "tech & engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()}
_MARK = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"[^_]+_(.+)_\d+")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?")


class MMMU(Benchmark):
    """A multiple-choice answer that names no option is wrong."""

    name = "mmmu"
    hub, hub_split = "lmms-lab/MMMU", "validation"
    columns = ("id", "question", "options", "answer", "question_type", "image_1")

    def example(self, row: Row) -> Example:
        id = f"{self.name}/{row['id']}"
        choice = row["question_type"] == "multiple-choice"
        options = as_list(row["options"], id) if choice else []
        text = self.asked(row["question"], lettered(options) if options else None, CHOOSE if choice else OPEN)
        question, images = numbered(text, row)
        subject = _SUBJECT.fullmatch(row["id"])
        return Example(
            id=id,
            question=question,
            images=self.images(*images),
            answers=truths(row["answer"]),
            meta=self.meta(DISCIPLINE_OF.get(subject[1] if subject else "", "other"), options=options),
        )

    def is_right(self, answer: str, example: Example) -> bool:
        if example.meta["options"]:
            return picked(answer, example.meta["options"]) == example.answers[0].strip()
        return bool(answer.strip()) and any(says(answer, truth) for truth in example.answers)


def numbered(text: str, row: Row) -> tuple[str, list[Any]]:
    """A question and its pictures in the order of their columns, its marks `<image 3>` counting only those it shows."""
    shown = sorted({int(mark) for mark in _MARK.findall(text)})
    place = {number: n + 1 for n, number in enumerate(shown)}
    missing = [number for number in shown if row.get(f"image_{number}") is None]
    if missing:
        raise ValueError(f"row {row['id']!r} shows <image {missing[0]}> and has no image_{missing[0]}")
    return _MARK.sub(lambda mark: f"<image {place[int(mark[1])]}>", text), [row[f"image_{n}"] for n in shown]


def truths(answer: Any) -> list[str]:
    """The accepted answers: one, or the list that the column holds as text."""
    listed = isinstance(answer, list) or str(answer).strip().startswith("[")
    return as_list(answer, "answer") if listed else [str(answer)]


def says(answer: str, truth: str) -> bool:
    """Whether an open answer is its truth, holds it as whole words, or holds its number and no other one."""
    if accuracy(answer, truth) == 1.0 or same_when_rounded(answer, truth, DECIMALS):
        return True
    if _NUMBER.fullmatch(truth.strip()):
        numbers = [found for found in _NUMBER.findall(answer) if any(char.isdigit() for char in found)]
        return len(numbers) == 1 and same_when_rounded(numbers[0], truth, DECIMALS)
    words = re.escape(truth.strip())
    return len(truth.strip()) > 1 and re.search(rf"(?<!\w){words}(?!\w)", answer, re.IGNORECASE) is not None
