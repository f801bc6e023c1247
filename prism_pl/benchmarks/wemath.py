"""We-Math (arXiv 2407.01284): 525 problems of two or three steps, each asked whole and step by step (1,740 rows).

Sources:
    columns, split   We-Math/We-Math@a57a0e8 data/testmini.json; with pictures in `image_path`: hub We-Math/We-Math
    prompt           question, then the column `option`: EvolvingLMMs-Lab/lmms-eval@75571cf
                     lmms_eval/tasks/wemath/reasoning/utils.py wemath_doc_to_text_cot; the last sentence is ours
    rule             the option's letter: We-Math/We-Math@a57a0e8 evaluation/four_dimensional_metrics.py
                     load_and_process_data. Theirs takes the first letter behind "Answer" and knows no "(C)"; ours reads
                     the answer block, by the letter or the option's text
    scores           strict and loose: the same file, `update_main_results_df`; see `unit_scores`
    families         one-step questions (S1), whole problems of two and three steps (S2, S3): evaluation/accuracy.py

A row: {"ID": "2steps_1", "key": "2steps_multi", "question": "...", "option": "A. 4; B. 3; C. No correct answer",
"answer": "B", "image_path": "2steps/image/1-multi.png", "knowledge concept": "...", "question number": 721}
"""

import re

from prism_pl.batch import Example
from prism_pl.benchmarks.base import Benchmark, Row
from prism_pl.benchmarks.options import CHOOSE, picked

_LABEL = re.compile(r"(?:^|;)\s*([A-H])\.\s*")
FAMILIES = {"2steps_multi": "S2", "3steps_multi": "S3"}


class WeMath(Benchmark):
    """A problem is a unit: its steps and its whole are scored, and resampled, together."""

    name = "wemath"
    hub, hub_split = "We-Math/We-Math", "testmini"
    columns = ("ID", "key", "question", "option", "answer", "image_path")
    units = ("strict", "loose")

    def example(self, row: Row) -> Example:
        return Example(
            id=f"{self.name}/{row['ID']}/{row['key']}",
            question=self.asked(row["question"], row["option"], CHOOSE),
            images=self.images(row["image_path"]),
            answers=[str(row["answer"])],
            meta=self.meta(
                FAMILIES.get(row["key"], "S1"), unit=row["ID"], part=row["key"], options=options_of(row["option"])
            ),
        )

    def is_right(self, answer: str, example: Example) -> bool:
        return picked(answer, example.meta["options"]) == example.answers[0].strip()


def options_of(text: str) -> list[str]:
    """`A. 4; B. 3` -> ["4", "3"]. Eight empty ones where they do not count up from A: then letters alone pick."""
    pieces = _LABEL.split(text)
    letters, options = pieces[1::2], [piece.strip(" ;") for piece in pieces[2::2]]
    return options if letters == [chr(ord("A") + n) for n in range(len(letters))] and letters else [""] * 8
