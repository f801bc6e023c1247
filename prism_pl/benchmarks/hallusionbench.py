"""HallusionBench (arXiv 2310.14566): yes-or-no questions over figures, some of them edited to say the opposite.

Sources:
    columns, split   tianyi-lab/HallusionBench@744007c HallusionBench.json (1,129 rows, 178 without a figure); with
                     pictures as `image`: hub lmms-lab/HallusionBench, split image (951 rows, those that lmms-eval and
                     PRISM's release ask), split non_image
    prompt           the question: tianyi-lab/HallusionBench@744007c README.md; the sentence on yes and no is ours
    rule             published is a judge that says right, wrong or unclear (utils.py); before it XIAO4579/PRISM@6079044
                     scripts/eval/tasks/hallusion_bench/evaluate_hb.py reads yes and no. Ours: the first word of
                     the answer; unclear is wrong, but right where a question that the figure only supplements (VS) is
                     asked without it (utils.py assign_correctness)
    scores           aAcc, fAcc, qAcc: utils.py get_eval_all, get_eval_fig, get_eval_pair_all; see `unit_scores`
    families         column `category` (VD: depends on the figure, VS: is supplemented by it) and `subcategory`

A row: {"category": "VD", "subcategory": "math", "set_id": "3", "figure_id": "1", "question_id": "0", "question": "Is
the left line longer?", "gt_answer": "1", "gt_answer_details": "...", "visual_input": "1", "filename": "./VD/3_1.png"}
"""

import re

from prism_pl.batch import Example
from prism_pl.benchmarks.base import Benchmark, Row
from prism_pl.metrics.unit_scores import NO_FIGURE
from prism_pl.rewards.text import clean

YES = ("yes", "true", "correct", "right")
NO = ("no", "false", "incorrect", "wrong")
NAMES = {"1": "yes", "0": "no"}
UNCLEAR_IS_RIGHT = "The figure is left out here: an answer that it cannot be told counts as right, too."
_WORD = re.compile(r"[a-z]+")


class HallusionBench(Benchmark):
    """The questions of a set (`set_id`) share figures and wordings, so a set is what is resampled."""

    name = "hallusionbench"
    hub, hub_split = "lmms-lab/HallusionBench", "image"
    columns = ("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer")
    units = ("aAcc", "fAcc", "qAcc")

    def example(self, row: Row) -> Example:
        kind = f"{row['category']}_{row['subcategory']}"
        unit, figure, number = f"{kind}_{row['set_id']}", str(row["figure_id"]), str(row["question_id"])
        bare = row["category"] == "VS" and figure == "0"
        asked = f"{row['question']} (In words: {row.get('gt_answer_details')})"
        return Example(
            id=f"{self.name}/{unit}_{figure}_{number}",
            question=self.asked(row["question"], "Answer yes or no."),
            images=self.images(row["image"] if row.get("image") else row.get("filename")),
            answers=[NAMES[str(row["gt_answer"])]],
            meta=self.meta(
                f"{row['category']} {row['subcategory']}",
                unit=unit,
                part=f"{NO_FIGURE if bare else figure}/{number}",
                unclear_is_right=bare,
                asked=f"{asked}\n{UNCLEAR_IS_RIGHT}" if bare else asked,
            ),
        )

    def is_right(self, answer: str, example: Example) -> bool:
        if not answer.strip():
            return False
        said = yes_or_no(answer)
        return example.meta["unclear_is_right"] if said is None else said == example.answers[0]


def yes_or_no(answer: str) -> str | None:
    """What an answer says: by itself where it is one word, else by its first word. None where that is unclear: "there
    is no difference" may be either."""
    words = _WORD.findall(clean(answer).lower())
    if not words or words[0] not in (YES + NO if len(words) == 1 else ("yes", "no")):
        return None
    return "yes" if words[0] in YES else "no"
