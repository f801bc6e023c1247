"""Options of multiple choice: how they are lettered in a question, and which one an answer picks."""

import ast
from collections.abc import Sequence
from typing import Any

from prism_pl.rewards import accuracy
from prism_pl.rewards.choice import read_choice
from prism_pl.rewards.text import clean

CHOOSE = "Choose one option and give its letter as the final answer."


def letter(index: int) -> str:
    """The letter of an option: 0 is A."""
    return chr(ord("A") + index)


def lettered(options: Sequence[str], form: str = "{letter}. {option}") -> str:
    """The options under their letters, one a line."""
    return "\n".join(form.format(letter=letter(n), option=option) for n, option in enumerate(options))


def as_list(written: Any, where: str) -> list[str]:
    """A list of options that a column holds as such, or as the text of a Python list (MMMU's do)."""
    try:
        found = ast.literal_eval(written) if isinstance(written, str) else written
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"row {where!r}: options are {written!r}, not a list: is it the file of this benchmark?")
    return [str(option) for option in found]


def picked(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer picks: by the letter, by the option's text, or by an equal value (`145` for `145°`).
    None where it picks none, or several: a guess is no answer.

    Example:
        >>> picked("(b)", ["3", "4"]), picked("4", ["3", "4"]), picked("3 or 4", ["3", "4"])
        ('B', 'B', None)
    """
    text = clean(answer)
    choice = read_choice(text, last=letter(max(len(options), 1) - 1)) if text else None
    if choice is not None:
        return choice.letter
    same = [n for n, option in enumerate(options) if text and text.casefold() == clean(option).casefold()]
    equal = same or [n for n, option in enumerate(options) if option.strip() and accuracy(answer, option) == 1.0]
    return letter(equal[0]) if len(equal) == 1 else None
