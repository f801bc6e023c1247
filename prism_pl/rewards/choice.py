"""Multiple choice, by letter: `B`, `(B)`, `B.`, `b)`, `B) cat`. A list of several options is no choice."""

import re
from functools import lru_cache
from typing import NamedTuple

_FORMS = {
    "bare": r"[(\[]?\s*([A-Z])\s*[)\]]?\s*[.:]?",
    "labelled": r"(?:\(\s*([A-Z])\s*\)\s*[.:]?|([A-Z])[.):])\s*(\S.*)",
    # A second label ("A. cat B. dog", "(A) 3 (B) 4"), or a second letter hung on ("(A) and (B)", "A. cat, B").
    "second_label": r"(?:^|[\s,;/])(?:\([A-Z]\)|[A-Z][.):](?=\s|$))",
    "second_letter": r"(?:^|[,;/&]|\b(?:or|and)\b)\s*\(?[A-Z]\)?$",
}


class Choice(NamedTuple):
    """The letter in upper case, and the text of the option, or ""."""

    letter: str
    text: str


@lru_cache
def _patterns(last: str) -> dict[str, re.Pattern[str]]:
    letters = f"[A-{last}a-{last.lower()}]"
    return {name: re.compile(form.replace("[A-Z]", letters)) for name, form in _FORMS.items()}


def read_choice(text: str, last: str = "H") -> Choice | None:
    """Read one option out of a cleaned text; None when it is no option or more than one.

    Args:
        last: the letter of the last option there is.

    Example:
        >>> read_choice("C. cat")
        Choice(letter='C', text='cat')
    """
    patterns = _patterns(last)
    if match := patterns["bare"].fullmatch(text):
        return Choice(match[1].upper(), "")
    match = patterns["labelled"].fullmatch(text)
    if match is None or patterns["second_label"].search(match[3]) or patterns["second_letter"].search(match[3]):
        return None
    return Choice((match[1] or match[2]).upper(), match[3])
