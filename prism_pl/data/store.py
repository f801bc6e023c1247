"""Rows as `data pairs` and `data distill` write them: images as files, and one JSON object a line."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_pl.batch import Example
from prism_pl.fingerprint import differences

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
            with file.open("r+b") as lines:
                lines.truncate(_whole_lines(lines.read()))
        if not file.exists() or not file.stat().st_size:
            self.append({"settings": settings})

    def append(self, entry: dict[str, Any]) -> None:
        """Write a line, at once."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_journals(folder: Path, pattern: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of all processes' journals. ValueError where they were made with other settings."""
    for file in sorted(folder.glob(pattern)):
        content = file.read_bytes()
        # Not splitlines: a text may hold U+2028 or U+0085 as they are.
        whole = [json.loads(line) for line in content[: _whole_lines(content)].decode().split("\n")[:-1]]
        if whole and (changed := list(differences(whole[0]["settings"], json.loads(json.dumps(settings))))):
            raise ValueError(
                f"{file} was begun with other settings ({'; '.join(changed)}): bring them back, name another folder, "
                "or remove the file to begin anew"
            )
        yield from whole[1:]


def _whole_lines(content: bytes) -> int:
    """Bytes of the lines that have an end. A kill leaves half a line behind them, and maybe half a character."""
    return content.rfind(b"\n") + 1
