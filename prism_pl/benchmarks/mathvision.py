"""MATH-Vision (arXiv 2402.14804): competition problems; 304 in testmini, which PRISM's release asks, 3,040 in test.

Sources:
    columns, split   mathllm/MATH-V@a1f5cc3 data/testmini.jsonl, data/test.jsonl; with pictures as `decoded_image`:
                     hub MathLLMs/MathVision
    prompt           question, then options by letter: mathllm/MATH-V@a1f5cc3 models/GPT4V.py geninput (options that are
                     the letters themselves are not listed); the sentence on the answer's form is ours
    rule             mathllm/MATH-V@a1f5cc3 evaluation/evaluate.py and utils.py is_equal: the letter or the option's
                     value; values are evaluated and rounded to two decimals
    families         column `subject`

A row: {"id": "4", "question": "How many dots?\\n<image1>", "options": [], "answer": "6", "image": "images/4.jpg",
"level": 1, "subject": "counting", "solution": null}
"""

from prism_pl.batch import Example
from prism_pl.benchmarks.base import Benchmark, Row
from prism_pl.benchmarks.options import CHOOSE, letter, lettered, picked
from prism_pl.rewards import accuracy, same_when_rounded

DECIMALS = 2
OPEN = "Give a number or an expression as the final answer."


class MathVision(Benchmark):
    """Every question has one picture file; its marks `<image1>`, ... say where in it one is meant, and stay."""

    name = "mathvision"
    hub, hub_split = "MathLLMs/MathVision", "testmini"
    columns = ("id", "question", "options", "answer", "image", "subject")

    def example(self, row: Row) -> Example:
        options = [str(option) for option in row["options"]]
        told = options != [letter(n) for n in range(len(options))]
        listed = lettered(options, "({letter}) {option}") if told else None
        return Example(
            id=f"{self.name}/{row['id']}",
            question=self.asked(row["question"], listed, CHOOSE if options else OPEN),
            images=self.images(row["decoded_image"] if row.get("decoded_image") else row["image"]),
            # A few truths hold a form feed where LaTeX's \f was read as an escape.
            answers=[str(row["answer"]).replace("\x0c", "\\f")],
            meta=self.meta(row["subject"], options=options),
        )

    def is_right(self, answer: str, example: Example) -> bool:
        truth, options = example.answers[0], example.meta["options"]
        if not answer.strip():
            return False
        if options:
            pick, right = picked(answer, options), picked(truth, options)
            value = options[ord(right) - ord("A")] if right else truth
            return pick == right if pick and right else same_value(answer, value)
        return same_value(answer, truth)


def same_value(answer: str, truth: str) -> bool:
    """The same by `rewards.accuracy`, or once both are rounded."""
    return accuracy(answer, truth) == 1.0 or same_when_rounded(answer, truth, DECIMALS)
