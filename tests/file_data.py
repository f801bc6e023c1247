"""Small data files in each published schema, made in a folder, and a data module's rows without a run."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
from PIL import Image

from prism_pl.bad_rows import ReadsBadRows
from prism_pl.chat import render

CAPTION, COT = "- a triangle, 3 by 4", "<think>\n1. 3 x 4 / 2 = 6\n</think>\n<answer>\n6\n</answer>"
RESPONSE = render(CAPTION, "1. 3 x 4 / 2 = 6", "6")
WORSE = render("- a square", "1. 3 x 4 = 12", "12")
WORSE_COT = WORSE[WORSE.index("<think>") :]


def picture(number: int = 0, size: tuple[int, int] = (32, 48)) -> Image.Image:
    """A picture of noise, another for each number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8))


def png(number: int = 0) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, format="PNG")
    return file.getvalue()


def write_images(folder: Path, num: int = 4) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(num):
        (folder / "images" / f"{number}.png").write_bytes(png(number))


def write_lines(file: Path, rows: list[Any]) -> Path:
    """One JSON object a line; text is written as it is."""
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def sharegpt(number: int = 0, **columns: Any) -> dict[str, Any]:
    """A row in LLaMA-Factory's form."""
    messages = [
        {"role": "user", "content": f"<image>\nWhat is the area of triangle {number}?"},
        {"role": "assistant", "content": RESPONSE},
    ]
    return {"messages": messages, "images": [f"images/{number}.png"], **columns}


def pair(number: int = 0, **columns: Any) -> dict[str, Any]:
    """A row of the authors' warm-start pairs."""
    sides = {"teacher_caption": CAPTION, "teacher_cot": COT, "student_caption": "- a square", "student_cot": WORSE_COT}
    return {"prompt": f"Area of triangle {number}?", "image": f"images/{number}.png", **sides, **columns}


def prompt(number: int = 0, **columns: Any) -> dict[str, Any]:
    """A row of the authors' parquet for alignment."""
    return {
        "prompt": [
            {"role": "system", "content": "Write XML."},
            {"role": "user", "content": f"<image>\nWhat is the area of triangle {number}?\n"},
        ],
        "images": [{"bytes": png(number), "path": None}],
        "data_source": "geometry",
        "reward_model": {"style": "rule", "ground_truth": "6", "equivalent_answers": ["6 cm^2", "6"]},
        "extra_info": {"index": number, "split": "train"},
        "teacher_response": RESPONSE,
        "teacher_caption": f"<caption>\n{CAPTION}\n</caption>",
        "teacher_cot": COT,
        **columns,
    }


def write_parquet(file: Path, rows: list[dict[str, Any]], images: bool = False) -> Path:
    """With `images`, the column `images` says that it holds images, as sets made by `datasets` do."""
    table = datasets.Dataset.from_list(rows)
    if images:
        table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(file)
    return file


class Rows(list, ReadsBadRows):
    """A collator that passes rows on, bad ones too."""

    def __call__(self, rows: list[Any]) -> list[Any]:
        return rows


def opened(data: Any, collator: Any = list, folder: Path = Path("run")) -> Any:
    """The data module as a run would set it up on one process."""
    module = SimpleNamespace(collator=collator, hparams={}, processor=None)
    data.trainer = SimpleNamespace(
        is_global_zero=True, default_root_dir=str(folder), world_size=1, global_rank=0, lightning_module=module
    )
    data.prepare_data()
    data.setup("fit")
    return data


def rows_of(data: Any, collator: Any = list) -> list[Any]:
    """All training rows in order."""
    return [row for batch in opened(data, collator).predict_dataloader() for row in batch]
