"""MathVista (arXiv 2310.02255): 1,000 questions over charts, geometry and natural images (testmini).

Sources:
    columns, split   lupantech/MathVista@53d5258 data/testmini.json; with pictures as `decoded_image`: hub
                     AI4Math/MathVista
    prompt           lupantech/MathVista@53d5258 evaluation/build_query.py, in the order of lmms-eval's step-by-step
                     form (EvolvingLMMs-Lab/lmms-eval@75571cf lmms_eval/tasks/mathvista/mathvista_evals.py
                     create_one_query); the sentence on the answer's form is ours: it stands in a block of its own
    rule             lupantech/MathVista@53d5258 evaluation/calculate_score.py normalize_extracted_answer, safe_equal
    families         column `metadata.task`

A row: {"pid": "7", "question": "What is the sum of the bars?", "image": "images/7.jpg", "choices": null, "unit": null,
"precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float", "metadata": {"task": ...}}
"""

import re

from prism_pl.batch import Example
from prism_pl.benchmarks.base import Benchmark, Row
from prism_pl.benchmarks.options import CHOOSE, lettered, picked
from prism_pl.rewards import accuracy

FORMS = {
    "text": CHOOSE,
    "integer": "Give an integer as the final answer.",
    "list": "Give a Python list, such as [1, 2, 3], as the final answer.",
}
MAX_COMPARED = 256  # characters of an answer; the time goes with them, and what is longer is no misspelled option
_LETTER = re.compile(r"\(([a-zA-Z])\)")


class MathVista(Benchmark):
    """Options are picked by letter or text, and any other text counts as the option nearest to it by edit distance, as
    published; numbers are cut to integers or rounded to the row's precision, as published. Beyond that an answer is
    right where `rewards.accuracy` says so: the published rule is applied to what a language model has extracted, which
    no longer holds units and signs."""

    name = "mathvista"
    hub, hub_split = "AI4Math/MathVista", "testmini"
    columns = ("pid", "question", "image", "answer", "question_type", "answer_type", "choices", "precision", "metadata")

    def example(self, row: Row) -> Example:
        choices = list(row["choices"] or [])
        kind, digits = row["answer_type"], int(row["precision"] or 0)
        form = FORMS.get(kind, f"Give a number with {digits} decimal places as the final answer.")
        unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
        options = "Choices:\n" + lettered(choices, "({letter}) {option}") if choices else None
        return Example(
            id=f"{self.name}/{row['pid']}",
            question=self.asked(f"Question: {row['question']}{unit}", options, form),
            # The hub holds the path in `image` and the picture beside it.
            images=self.images(row["decoded_image"] if row.get("decoded_image") else row["image"]),
            answers=[str(row["answer"])],
            meta=self.meta(row["metadata"]["task"], kind=kind, digits=digits, choices=choices),
        )

    def is_right(self, answer: str, example: Example) -> bool:
        answer, truth, meta = answer.strip(), example.answers[0], example.meta
        if not answer:
            return False
        if meta["choices"]:
            return chosen(answer, meta["choices"]) == truth
        return as_published(answer, meta["kind"], meta["digits"]) == truth or accuracy(answer, truth) == 1.0


def chosen(answer: str, choices: list[str]) -> str:
    """The text of the option that an answer picks, or else of the one nearest to it."""
    found = _LETTER.findall(answer)
    pick = found[0].upper() if found else picked(answer, choices)
    if pick is not None and ord(pick) - ord("A") < len(choices):
        return choices[ord(pick) - ord("A")]
    from torchmetrics.functional.text import edit_distance

    return min(choices, key=lambda choice: float(edit_distance(answer[:MAX_COMPARED], choice)))


def as_published(answer: str, kind: str, digits: int) -> str | None:
    """An answer in the form that the truth has; None where it is no number."""
    if kind == "list":
        return answer
    try:
        return str(int(float(answer))) if kind == "integer" else str(round(float(answer), digits))
    except (ValueError, OverflowError):
        return None
