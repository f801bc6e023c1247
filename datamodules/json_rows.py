"""Rows of JSON, one object a line or the items of a list, as text first: a row that is no JSON spoils no other."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

TEXT = "text"  # the column of a table of JSON lines
LONGEST_ROW = 1 << 26  # characters of one item of a JSON list
_SEPARATORS = re.compile(r"[\s,]*")


def read_line(text: str) -> dict[str, Any]:
    """The columns of a row. ValueError where the line is no JSON object."""
    if not text.strip():
        raise ValueError("the line is empty")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no whole JSON object ({error.msg} at character {error.pos + 1})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} where an object is expected")
    _check_characters(row)
    return row


def read_line_or_nothing(text: str) -> dict[str, Any]:
    """The columns of a row, none where the line is no JSON object. Texts go unchecked: many lines are read at once."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return row if isinstance(row, dict) else {}


def _check_characters(row: dict[str, Any]) -> None:
    """ValueError for half of a surrogate pair, which JSON can spell out and no tokenizer reads."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ValueError(
            f"a text holds {half}, half of a character: write the character whole, or leave it out"
        ) from None


def array_lines(stamps: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    """Each object of JSON files that hold one list, as a line of JSON."""
    for file, *_ in stamps:
        yield from ({TEXT: text} for text in array_items(file))


def array_items(file: str, chunk: int = 1 << 20) -> Iterator[str]:
    """The items of a JSON list as text, a piece of the file at a time. ValueError names the item that is damaged: what
    follows it cannot be told apart."""
    decoder = json.JSONDecoder()
    with open(file, encoding="utf-8") as stream:
        text = stream.read(chunk).lstrip()
        if not text.startswith("["):
            raise ValueError(f"{file} is no JSON list: name a file of one object a line .jsonl")
        start, count, more = 1, 0, True
        while True:
            start = _SEPARATORS.match(text, start).end()  # pyright: ignore[reportOptionalMemberAccess]
            if text[start : start + 1] == "]":
                return
            try:
                _, end = decoder.raw_decode(text, start)
                yield text[start:end]
                start, count = end, count + 1
            except json.JSONDecodeError as error:
                if not more or len(text) - start > LONGEST_ROW:
                    raise ValueError(
                        f"row {count + 1} of the list is no whole JSON ({error.msg}), and rows behind it cannot be "
                        "told apart: mend it, or write one object a line (.jsonl)"
                    ) from None
                piece = stream.read(max(chunk, len(text) - start))
                text, start, more = text[start:] + piece, 0, bool(piece)
