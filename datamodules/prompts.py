"""Prompts for alignment, RLVR and evaluation: verl's parquet with the authors' columns.

A row of `rl_training_data_5.9k.parquet`, as the release reads it; RLVR's rows lack the teacher's columns:

    {"prompt": [{"role": "system", "content": "..."}, {"role": "user", "content": "<image>\\nWhat is the area?"}],
     "images": [{"bytes": b"...", "path": None}], "data_source": "geometry",
     "reward_model": {"style": "rule", "ground_truth": "12", "equivalent_answers": ["12 cm^2"]},
     "extra_info": {"index": 7, "split": "train"},
     "teacher_caption": "...", "teacher_cot": "<think>...</think><answer>12</answer>", "teacher_response": "..."}

Plain rows (`question`, `image`, `answer`, `response`) are read too. In YAML:

    data:
      class_path: datamodules.PromptsDataModule
      init_args:
        train: {path: prism-vlm/rl_dataset, only: rl_training_data_filtered_2k.parquet}
"""

from pathlib import Path
from typing import Any

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

COLUMNS: Columns = {
    "question": ("prompt", "messages", "question", "problem"),
    "images": IMAGES,
    "answers": ("reward_model.ground_truth", "answers", "answer", "solution"),
    "equivalent_answers": ("reward_model.equivalent_answers", "equivalent_answers"),
    "caption": ("teacher_caption",),
    "cot": ("teacher_cot",),
    "response": ("teacher_response", "response"),
    "system": ("system",),
    "family": ("data_source", "family"),
    "split": ("extra_info.split", "split"),
    "id": (),
}


def read_prompt(fields: Fields, folder: Path) -> Example:
    """A row as an Example with `answers` and, where a teacher answered, a `response`. ValueError says what is
    missing."""
    chat = read_chat(fields.need("question"))
    images = read_images(chat.images or fields.get("images"), folder)
    meta: dict[str, Any] = {name: fields.text(name) for name in ("family", "split")}
    return Example(
        id="",
        question=without_leading_marks(chat.question, len(images)),
        images=list(images),
        response=joined(fields.text("caption"), fields.text("cot"), fields.text("response") or chat.response),
        answers=read_answers(fields.get("answers"), fields.get("equivalent_answers")),
        system=chat.system or fields.text("system"),
        meta={name: value for name, value in meta.items() if value is not None},
    )


class PromptsDataModule(FilesDataModule):
    __doc__ = FilesDataModule.__doc__
    COLUMNS = COLUMNS
    read_row = staticmethod(read_prompt)
