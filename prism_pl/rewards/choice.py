"""Multiple choice, A to H: `B`, `(B)`, `B.`, `b)`, `B) cat`. A list of several options is no choice."""

import re
from typing import NamedTuple

_BARE = re.compile(r"[(\[]?\s*([A-Ha-h])\s*[)\]]?\s*[.:]?")
_LABELLED = re.compile(r"(?:\(\s*([A-Ha-h])\s*\)\s*[.:]?|([A-Ha-h])[.):])\s*(\S.*)")
# A second label ("A. cat B. dog", "(A) 3 (B) 4"), or a second letter hung on ("(A) and (B)", "A. cat, B").
_SECOND_LABEL = re.compile(r"(?:^|[\s,;/])(?:\([A-Ha-h]\)|[A-Ha-h][.):](?=\s|$))")
_SECOND_LETTER = re.compile(r"(?:^|[,;/&]|\b(?:or|and)\b)\s*\(?[A-Ha-h]\)?$")


class Choice(NamedTuple):
    """The letter in upper case, and the text of the option, or ""."""

    letter: str
    text: str


def read_choice(text: str) -> Choice | None:
    """Read one option out of a cleaned text; None when it is no option or more than one.

    Example:
        >>> read_choice("C. cat")
        Choice(letter='C', text='cat')
    """
    if match := _BARE.fullmatch(text):
        return Choice(match[1].upper(), "")
    match = _LABELLED.fullmatch(text)
    if match is None or _SECOND_LABEL.search(match[3]) or _SECOND_LETTER.search(match[3]):
        return None
    return Choice((match[1] or match[2]).upper(), match[3])
