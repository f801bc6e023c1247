"""Answers of several parts: coordinates, sets, lists; and assignments, `x = 3`."""

import re
from typing import NamedTuple

_OPEN, _CLOSE = "([{", ")]}"
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_COMMA_AND = re.compile(r"([,;])\s*and\s")  # separates once, not twice
_SPACED = re.compile(r"(?:[A-Za-z]+|[+-]?\d+)(?: (?:[A-Za-z]+|[+-]?\d+))+")
_NAME = re.compile(r"(?:\\?[A-Za-z]+|[ _'{}°]|(?<=_)\d|(?<=_\{)\d+|\([a-z]\))+")
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")


class Parts(NamedTuple):
    """The parts in order, and the brackets around them: "()", "[)", "{}" for a set, "" for none."""

    brackets: str
    items: list[str]


def split_parts(text: str, loose: bool = False) -> Parts:
    """Split a cleaned text at its top-level commas, semicolons and "and".

    Without brackets `1,200` is one number; inside them a comma always separates. With `loose` it also does without, and
    a list of words or integers may do without commas: `3 1 4`.

    Example:
        >>> split_parts("(1, 2)")
        Parts(brackets='()', items=['1', '2'])
    """
    brackets, inside = _brackets(_COMMA_AND.sub(r"\1 ", text))
    kept = {m.start() + i for m in _THOUSANDS.finditer(inside) for i, c in enumerate(m.group()) if c == ","}
    if brackets or loose:
        kept = set()
    if loose and _SPACED.fullmatch(inside):
        return Parts(brackets, inside.split(" "))
    items, depth, start, index = [], 0, 0, 0
    while index < len(inside):
        char = inside[index]
        depth += (char in _OPEN) - (char in _CLOSE)
        width = 0
        if depth == 0:
            width = 5 if inside.startswith(" and ", index) else int(char in ",;" and index not in kept)
        if width:
            items.append(inside[start:index])
            start = index + width
        index += width or 1
    return Parts(brackets, [item.strip() for item in [*items, inside[start:]]])


def _brackets(text: str) -> tuple[str, str]:
    """The outer brackets and what they hold; a LaTeX group `{...}` counts as none, `\\{...\\}` as a set."""
    for _ in range(4):
        escaped = text.startswith("\\{") and text.endswith("\\}")
        body = text[1:-2] + "}" if escaped else text
        if len(body) < 2 or body[0] not in _OPEN or not _closes_at_end(body):
            break
        if escaped:
            return "{}", text[2:-2].strip()
        inside = text[1:-1].strip()
        if text[0] != "{" and split_top(inside):
            return text[0] + text[-1], inside
        if text[0] == "[":
            break
        text = inside
    return "", text


def split_top(text: str) -> bool:
    """Whether a separator stands in `text` outside of any bracket."""
    depth = 0
    for char in text:
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0 and char in ",;":
            return True
    return False


def _closes_at_end(text: str) -> bool:
    depth = 0
    for index, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0:
            return index == len(text) - 1
    return False


def split_equation(text: str) -> tuple[str, list[str]]:
    """Split `x = 2 + 3 = 5` into the name on the left, or "", and the values: ("x", ["2 + 3", "5"])."""
    sides = [side.strip() for side in _EQUALS.split(text)]
    if len(sides) > 1 and is_name(sides[0]):
        return sides[0].replace(" ", ""), sides[1:]
    return "", sides


def is_name(text: str) -> bool:
    """Whether a text may name a value: `x`, `\\angle ABC`, `f(x)`."""
    return bool(_NAME.fullmatch(text))
