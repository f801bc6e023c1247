"""Pairs for the discriminator's warm start: a demonstration and a response of the policy to the same question.

A row as the authors publish it (`warmup_pairwise.jsonl`) and as `python -m prism_pl data pairs` writes it; `prompt` may
be `question`, and `image` several `images`. The chain of thought ends with the answer block:

    {"prompt": "What is the area?", "image": "images/0001.png",
     "teacher_caption": "- a rectangle, 3 by 4", "teacher_cot": "<think>3 x 4 = 12</think>\\n<answer>12</answer>",
     "student_caption": "- a rectangle", "student_cot": "<think>3 + 4 = 7</think>\\n<answer>7</answer>"}

Legacy rows have `teacher_response` and `student_response`. In YAML:

    data: {class_path: datamodules.PairsDataModule, init_args: {train: pairs.jsonl, num_validation: 256}}
"""

from pathlib import Path

from datamodules.fields import (
    IMAGES,
    Columns,
    Fields,
    joined,
    read_answers,
    read_chat,
    read_images,
    without_leading_marks,
)
from datamodules.files import FilesDataModule
from prism_pl.batch import Example

SIDES = ("teacher", "student")
PARTS = ("caption", "cot", "response")
COLUMNS: Columns = {
    "question": ("prompt", "question"),
    "images": IMAGES,
    **{f"{side}_{part}": (f"{side}_{part}",) for side in SIDES for part in PARTS},
    "answers": ("answers", "answer"),
    "system": ("system",),
    "id": (),
}


def read_pair(fields: Fields, folder: Path) -> Example:
    """A row as an Example with a `response` and a `rejected`. ValueError says what is missing."""
    chat = read_chat(fields.need("question"))
    teacher, student = (joined(*(fields.text(f"{side}_{part}") for part in PARTS)) for side in SIDES)
    for side, text in zip(SIDES, (teacher, student), strict=True):
        if text is None:
            raise ValueError(
                f"no {side} side: give {side}_caption and {side}_cot, or {side}_response. Columns: "
                f"{', '.join(fields.row)}"
            )
    images = read_images(chat.images or fields.get("images"), folder)
    return Example(
        id="",
        question=without_leading_marks(chat.question, len(images)),
        images=list(images),
        response=teacher,
        rejected=student,
        answers=read_answers(fields.get("answers")),
        system=chat.system or fields.text("system"),
    )


class PairsDataModule(FilesDataModule):
    __doc__ = FilesDataModule.__doc__
    COLUMNS = COLUMNS
    read_row = staticmethod(read_pair)
