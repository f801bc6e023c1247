"""MathVerse (arXiv 2403.14624): 788 problems in five versions that move text into the diagram (testmini).

Sources:
    columns, split   ZrrSkywalker/MathVerse@937b090 output_templates/output_testmini.json (the columns of
                     data/testmini.json); hub AI4Math/MathVerse, subset and split testmini
    prompt           column `query_wo`, which lmms-eval asks too (EvolvingLMMs-Lab/lmms-eval@75571cf
                     lmms_eval/tasks/mathverse/mathverse_testmini.yaml: query_type)
    rule             published is a judge alone (ZrrSkywalker/MathVerse@937b090 evaluation/score_answer_s2.py);
                     XIAO4579/PRISM@6079044 scripts/eval/tasks/mathverse/utils.py compares letters and texts before
                     it. Ours: letters or texts of options, else `rewards.accuracy`
    families         column `problem_version`; the five together are the score (README.md, "Dataset Usage")

A row: {"sample_index": "9", "problem_index": "2", "problem_version": "Vision Only", "question": "", "image":
"images/2.png", "answer": "B", "question_type": "multi-choice", "query_wo": "Please ...", "question_for_eval": "..."}
"""

import re

from prism_pl.batch import Example
from prism_pl.benchmarks.base import Benchmark, Row
from prism_pl.benchmarks.options import picked
from prism_pl.rewards import accuracy

_OPTION = re.compile(r"^\s*([A-H])\s*[:.]\s*(.*?)\s*$", re.MULTILINE)
LETTERS = 8  # where a question does not say its options, because they stand in the image


class MathVerse(Benchmark):
    """The versions of a problem are resampled together. `Text Only` rows are another file of the authors' and no part
    of the score."""

    name = "mathverse"
    hub, hub_split = "AI4Math/MathVerse", "testmini"
    hub_subset = "testmini"
    columns = ("sample_index", "problem_index", "problem_version", "question", "query_wo", "answer", "question_type")

    def example(self, row: Row) -> Example:
        # The whole question stands in `question_for_eval` also where a version shows it in the image alone.
        options = options_of(row.get("question_for_eval") or row["question"])
        choice = row["question_type"] == "multi-choice"
        bare = row["question"] or "Answer the question in the image."
        return Example(
            id=f"{self.name}/{row['sample_index']}",
            question=row["query_wo"] if self.instructions else bare,
            images=self.images(row.get("image")),
            answers=[str(row["answer"])],
            meta=self.meta(
                row["problem_version"],
                unit=str(row["problem_index"]),
                options=(options or [""] * LETTERS) if choice else None,
                asked=row.get("question_for_eval") or row["question"],
            ),
        )

    def is_right(self, answer: str, example: Example) -> bool:
        truth = example.answers[0].strip()
        if example.meta["options"] is None:
            return bool(answer.strip()) and accuracy(answer, truth) == 1.0
        return picked(answer, example.meta["options"]) == truth


def options_of(question: str) -> list[str]:
    """The options that a question lists at its end as `A:40`, one a line; empty where they do not count up from A."""
    found = _OPTION.findall(question.partition("Choices:")[2])
    in_order = [letter for letter, _ in found] == [chr(ord("A") + n) for n in range(len(found))]
    return [text for _, text in found] if in_order else []
