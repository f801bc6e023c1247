"""Numbers as exact fractions: `1,000`, `-3.0`, `2.5e3`, `3 \\times 10^{4}`, `1/2`, `\\frac{1}{2}`, `1 1/2`, `three`."""

import re
from fractions import Fraction

MAX_DIGITS = 400  # longer than any answer, short enough that exact arithmetic stays instant

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
# Three digits of exponent: an exact 10**999999999 would not fit into memory.
_EXPONENT = r"(?:[eE](?P<e>[+-]?\d{1,3})|\s*(?:\\times|\\cdot|\*|x)\s*10\^\{?(?P<ten>[+-]?\d{1,3})\}?)"
_SIGN = r"(?P<sign>[+-]?)\s*"
_PLAIN = re.compile(rf"{_SIGN}(?P<value>{_DECIMAL})(?:{_EXPONENT})?")
_RATIO = re.compile(rf"{_SIGN}(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>-?{_DECIMAL})")
_FRAC = re.compile(rf"{_SIGN}\\frac\s*\{{\s*(?P<top>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>-?{_DECIMAL})\s*\}}")
_MIXED = re.compile(
    rf"{_SIGN}(?P<whole>\d+)(?:\s+(?P<top>\d+)\s*/\s*(?P<bottom>\d+)|\s*\\frac\s*\{{(?P<ltop>\d+)\}}\s*\{{(?P<lbottom>\d+)\}})"
)
_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
}  # fmt: skip


def number(text: str) -> Fraction | None:
    """The exact value of a cleaned text that is one number and nothing else, or None."""
    text = text.strip()
    if not text or len(text) > MAX_DIGITS:
        return None
    if text.lower() in _WORDS:
        return Fraction(_WORDS[text.lower()])
    if match := _PLAIN.fullmatch(text):
        value = _decimal(match["value"]) * Fraction(10) ** int(match["e"] or match["ten"] or 0)
    elif match := _RATIO.fullmatch(text) or _FRAC.fullmatch(text):
        value = _ratio(_decimal(match["top"]), _decimal(match["bottom"]))
    elif match := _MIXED.fullmatch(text):
        part = _ratio(_decimal(match["top"] or match["ltop"]), _decimal(match["bottom"] or match["lbottom"]))
        value = None if part is None else int(match["whole"]) + part
    else:
        return None
    if value is None:
        return None
    return -value if match["sign"] == "-" else value


def same_number(a: Fraction, b: Fraction) -> bool:
    """Equality; a fraction without a finite decimal form (1/3) also equals its decimal of six significant digits."""
    if a == b:
        return True
    return _terminates(a) != _terminates(b) and abs(a - b) * 10**6 <= max(abs(a), abs(b))


def _decimal(text: str) -> Fraction:
    plain = text.replace(",", "").replace(" ", "")
    return Fraction(f"{plain}0" if plain.endswith(".") else plain)


def _ratio(top: Fraction, bottom: Fraction) -> Fraction | None:
    return top / bottom if bottom else None


def _terminates(value: Fraction) -> bool:
    """Whether the decimal form ends: no prime factors in the denominator but 2 and 5."""
    # Such a denominator of k digits divides 10**(4 k), because 2**(4 k) > 10**k.
    return pow(10, 4 * len(str(value.denominator)), value.denominator) == 0
