"""MMMU-Pro (arXiv 2409.02813): 1,730 questions of MMMU with ten options, or as one screenshot of all of it.

Sources:
    columns, split   hub MMMU/MMMU_Pro, subsets "standard (10 options)" and "vision", split test
    prompt           MMMU-Benchmark/MMMU@bb0b95a mmmu-pro/infer/infer_gpt.py construct_prompt: question, options by
                     letter, instruction; in the vision setting the instruction alone. The instructions (mmmu-pro/
                     prompts.yaml) are in our words, because the answer stands in a block of its own
    rule             MMMU-Benchmark/MMMU@bb0b95a mmmu-pro/evaluate.py: the letter. Theirs draws a random option where it
                     can read none; ours counts that as wrong
    families         column `subject`, by discipline as MMMU's

A row: {"id": "test_Art_1", "question": "Who painted <image 1>?", "options": "['Goya', ...]", "answer": "J",
"subject": "Art", "image_1": {...}}; in the vision setting {"id", "image", "options", "answer", "subject"}
"""

from typing import Literal

from prism_pl.batch import Example
from prism_pl.benchmarks.base import Benchmark, Row
from prism_pl.benchmarks.mmmu import DISCIPLINE_OF, numbered
from prism_pl.benchmarks.options import CHOOSE, as_list, lettered, picked

SUBSETS = {"standard": "standard (10 options)", "vision": "vision"}
IN_THE_IMAGE = f"Answer the multiple-choice question in the image. {CHOOSE}"


class MMMUPro(Benchmark):
    """One of the two settings; the benchmark's score is the mean of both, each named in a list of benchmarks.

    Args:
        setting: `standard`: question and ten options as text; `vision`: all of it in one picture.
    """

    hub, hub_split = "MMMU/MMMU_Pro", "test"
    columns = ("id", "options", "answer", "subject")

    def __init__(
        self,
        setting: Literal["standard", "vision"] = "standard",
        path: str | None = None,
        split: str | None = None,
        subset: str | None = None,
        image_folder: str | None = None,
        limit: int | None = None,
        instructions: bool = True,
    ) -> None:
        super().__init__(path, split, subset or SUBSETS[setting], image_folder, limit, instructions)
        self.name = f"mmmu_pro_{setting}"
        self.setting = setting

    def example(self, row: Row) -> Example:
        id = f"{self.name}/{row['id']}"
        options = as_list(row["options"], id)
        told: dict[str, str] = {}
        if self.setting == "vision":
            question, images = IN_THE_IMAGE, [row["image"]]
            told["asked"] = f"{IN_THE_IMAGE}\n{lettered(options)}"  # a judge does not see the image
        else:
            question, images = numbered(self.asked(row["question"], lettered(options), CHOOSE), row)
        return Example(
            id=id,
            question=question,
            images=self.images(*images),
            answers=[str(row["answer"])],
            meta=self.meta(DISCIPLINE_OF.get(row["subject"], "other"), options=options, **told),
        )

    def is_right(self, answer: str, example: Example) -> bool:
        return picked(answer, example.meta["options"]) == example.answers[0].strip()
