"""Rows as `data pairs` and `data distill` write them: images as files, and one JSON object a line."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_pl.batch import Example

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = "images"


def store_images(example: Example, folder: Path) -> list[str]:
    """Paths of an example's images: of those that are files where they lie, absolute; of others a copy below `folder`,
    relative to it and named by what it holds."""
    return [_stored(image, folder) for image in example.images]


def _stored(image: "Image | Path | str | bytes", folder: Path) -> str:
    from PIL import Image

    if isinstance(image, str | Path):
        return str(Path(image).resolve())
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, format="PNG")
        image = file.getvalue()
    with Image.open(io.BytesIO(image)) as opened:
        suffix = (opened.format or "png").lower()
    path = Path(IMAGES) / f"{hashlib.sha256(image).hexdigest()[:24]}.{suffix}"
    if not (folder / path).exists():
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(image)
    return path.as_posix()


class Journal:
    """A file that grows by a line for each row that is done, so that a start after a kill goes on behind them.

    Args:
        file: of one process.
        settings: what the lines were made with, in plain values.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            with file.open("r+") as lines:
                text = lines.read()
                lines.seek(0)
                lines.truncate(len(text[: text.rfind("\n") + 1].encode()))  # half a line is what a kill leaves
        if not file.exists() or not file.stat().st_size:
            self.append({"settings": settings})

    def append(self, entry: dict[str, Any]) -> None:
        """Write a line, at once."""
        with self.file.open("a") as lines:
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_journals(folder: Path, pattern: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of all processes' journals. ValueError where they were made with other settings."""
    for file in sorted(folder.glob(pattern)):
        # Not splitlines: a text may hold U+2028 or U+0085 as they are. What follows the last end is half a line.
        whole = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
        if whole and whole[0]["settings"] != json.loads(json.dumps(settings)):
            raise ValueError(
                f"{file} was begun with other settings than these: bring them back, or remove the file to begin anew"
            )
        yield from whole[1:]
