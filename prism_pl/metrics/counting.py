"""Counting rules for the structural proxies: how many items a text holds.

PRISM plots the number of descriptive items and of reasoning steps, and says nowhere how they are counted. So the rule
is an argument everywhere, and `describe_rule` puts it in words for tables and logs.

What the rules share:
    * a line break is structure: no item runs over it (`prism_pl.chat.normalise` keeps line breaks for the same reason);
    * an item holds at least one letter or digit, so rules such as `---` and empty bullets count nothing;
    * text without any such character has 0 items.
"""

import difflib
import re
from typing import Literal, get_args

from prism_pl.chat import parse

Rule = Literal["bullets_or_sentences", "bullets", "sentences", "lines"]
Segment = Literal["caption", "reasoning"]
DEFAULT_RULE: Rule = "bullets_or_sentences"

_WORDS: dict[str, str] = {
    "bullets_or_sentences": "bullets or numbered lines, else sentences",
    "bullets": "bullets or numbered lines",
    "sentences": "sentences",
    "lines": "lines that are not empty",
}

_BULLET_LINE = re.compile(
    r"""^[ \t]*(?:
        [-*+•·–—][ \t][^\n]*\w                               # - a red 3
      | [*_\#]*[ \t]*\(?\d{1,3}[.)](?=[\s*_])[^\n]*\w        # 1. read 3     1) read 3     (1) read 3    **1.** read 3
      | [*_\#]*[ \t]*step[ \t]+\d{1,3}[ \t]*(?:[.:)*–—-]|$)  # Step 1: read 3     ### Step 1
    )""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
# White space must follow a Latin full stop, which keeps 3.5 and x.y whole; the full-width ones stand without it.
_SENTENCE_END = re.compile(r"""[.!?]+["'”’)\]}$*_]*(?=\s|$)|[。！？]+""")
_ABBREVIATIONS = frozenset(
    (
        "e.g",
        "i.e",
        "cf",
        "vs",
        "approx",
        "resp",
        "ca",
        "al",
        "mr",
        "mrs",
        "dr",
        "prof",
        "st",
        "fig",
        "figs",
        "eq",
        "eqs",
    )
)
_ABBREVIATIONS_BEFORE_DIGITS = frozenset(("no", "nos", "p", "pp", "vol", "ch", "sec"))
_ABBREVIATIONS_THAT_MAY_END = frozenset(("etc", "a.m", "p.m", "u.s"))


def count_items(text: str, rule: Rule = DEFAULT_RULE) -> int:
    """Number of items in `text` under `rule`.

    * `bullets`: lines that open with a bullet (`-`, `*`, `+`, `•`, `·`, a dash, then a space), a number (`1.`, `1)`,
      `(1)`) or `Step 1`. Nested ones count too. Numbers inside a line do not: `1. read 3; 2. add` on one line is one.
    * `sentences`: full stops, question and exclamation marks before white space, and line ends. Not: decimal points,
      common English abbreviations, list numbers (`1.` at the start of a line or sentence, or after a semicolon).
    * `bullets_or_sentences`: `bullets` when the text has any, else `sentences`. So prose around a list is not counted.
    * `lines`: lines that hold a letter or a digit.

    Raises:
        ValueError: an unknown rule.

    Example:
        >>> count_items("- a red 3\\n- a blue 5"), count_items("I read 3. Then 3 + 0.5 = 3.5.")
        (2, 2)
    """
    check_rule(rule)
    if rule == "lines":
        return sum(_has_word(line) for line in text.splitlines())
    num_bullets = 0 if rule == "sentences" else len(_BULLET_LINE.findall(text))
    if rule == "bullets" or num_bullets:
        return num_bullets
    return sum(_count_sentences(line) for line in text.splitlines())


def count_segment(response: str, segment: Segment, rule: Rule) -> int | None:
    """Items in one segment of a full three-block response (the think block for `reasoning`, the answer not counted),
    or None when the response is malformed."""
    parsed = parse(response)
    if not parsed.valid:
        return None
    return count_items(parsed.caption if segment == "caption" else parsed.reasoning, rule)


def describe_rule(rule: Rule) -> str:
    """The rule in words, for the caption of a table or a log line."""
    check_rule(rule)
    return _WORDS[rule]


def check_rule(rule: str) -> None:
    """ValueError unless `rule` is one of the counting rules."""
    _check_choice("rule", rule, get_args(Rule))


def check_segment(segment: str) -> None:
    """ValueError unless `segment` is one that responses have."""
    _check_choice("segment", segment, get_args(Segment))


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(choices)}.{hint}")


def _count_sentences(line: str) -> int:
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(line):
        if _ends_sentence(line, start, end):
            count += _has_word(line[start : end.end()])
            start = end.end()
    return count + _has_word(line[start:])


def _ends_sentence(line: str, start: int, end: re.Match[str]) -> bool:
    """Whether the mark `end` closes the sentence begun at `start`, or belongs to an abbreviation or list number."""
    sentence, following = line[start : end.start()].strip(), line[end.end() :].lstrip()
    if not end.group().startswith(".") or not sentence or not following:
        return True
    before, _, word = sentence.rpartition(" ")
    word = word.lstrip("([\"'“‘").lower()
    if word.isdigit() and (not before or before.rstrip().endswith(";")):
        return False
    if word in _ABBREVIATIONS_BEFORE_DIGITS:
        return not following[0].isdigit()
    if word in _ABBREVIATIONS_THAT_MAY_END:
        return following[0].isupper()
    return word not in _ABBREVIATIONS


def _has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)
