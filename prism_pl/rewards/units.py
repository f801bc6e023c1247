"""Units of measure: split a quantity into its value and its unit, and compare units by dimension and size.

A table, not a physics engine: what visual question answering asks for (lengths, areas, masses, times, speeds, angles,
temperatures, money, percentages). Temperatures and angles are not converted into one another.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from prism_pl.rewards.numbers import number

_PREFIXES = {"n": -9, "µ": -6, "u": -6, "m": -3, "c": -2, "": 0, "k": 3, "M": 6, "G": 9}
_PREFIX_WORDS = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "": 0, "kilo": 3, "mega": 6, "giga": 9}
_METRIC_SYMBOLS = {"m": "m", "g": "g", "s": "s", "L": "L", "l": "L", "N": "N", "J": "J", "W": "W", "V": "V"} | {
    "A": "A", "Pa": "Pa", "Hz": "Hz", "mol": "mol", "cal": "cal", "eV": "eV", "Ω": "ohm"
}  # fmt: skip
_METRIC_WORDS = {"meter": "m", "metre": "m", "gram": "g", "second": "s", "liter": "L", "litre": "L", "newton": "N"} | {
    "joule": "J", "watt": "W", "volt": "V", "ampere": "A", "amp": "A", "pascal": "Pa", "hertz": "Hz", "mole": "mol",
    "calorie": "cal", "ohm": "ohm"
}  # fmt: skip
# base unit: {names: size in that base}
_OTHERS: dict[str, dict[str, str]] = {
    "m": {"in inch inches": "0.0254", "ft foot feet": "0.3048", "yd yard yards": "0.9144", "dm": "0.1",
          "mi mile miles": "1609.344"},
    "g": {"lb lbs pound pounds": "453.59237", "oz ounce ounces": "28.349523125", "ton tons tonne tonnes": "1000000"},
    "s": {"sec secs": "1", "min mins minute minutes": "60", "h hr hrs hour hours": "3600", "day days": "86400",
          "week weeks": "604800"},
    "year": {"year years yr yrs": "1", "month months": "1/12"},
    "°": {"° deg degree degrees": "1"},
    "rad": {"rad radian radians": "1"},
    "°C": {"°C celsius": "1"},
    "°F": {"°F fahrenheit": "1"},
    "K": {"K kelvin": "1"},
    "USD": {"$ USD dollar dollars": "1", "cent cents ¢": "0.01"},
    "EUR": {"€ EUR euro euros": "1"},
    "GBP": {"£ GBP": "1"},
    "JPY": {"¥ JPY yen": "1"},
    "count": {"unit units item items people person persons times point points digit digits": "1"},
    "": {"% percent pct": "0.01", "hundred": "100", "thousand": "1000", "million": "1000000", "billion": "1000000000",
         "dozen": "12"},
}  # fmt: skip
_COMPOUND_NAMES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h"}
_WORD = r"(?:°[CF]|[°%$€£¥¢]|[A-Za-zµΩ]+)"
_FACTOR = re.compile(rf"({_WORD})(?:\^\{{?([+-]?\d)\}}?|([23]))?")
_JOIN = re.compile(r"\s*(/|\\cdot|\*|\bper\b|\s)\s*")
_POWER_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_CURRENCY = re.compile(r"([+-]?)\s*([$€£¥])\s*(?=[\d.])(.+)")
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
_MAX_UNIT = 40  # characters


@dataclass(frozen=True)
class Unit:
    """`size` in base units of `dimension`, a set of (base unit, power). Percent has no dimension and size 1/100."""

    dimension: frozenset[tuple[str, int]]
    size: Fraction


def _table() -> dict[str, tuple[str, Fraction]]:
    table = {
        n: (base, Fraction(s)) for base, group in _OTHERS.items() for names, s in group.items() for n in names.split()
    }
    for symbol, base in _METRIC_SYMBOLS.items():
        for prefix, power in _PREFIXES.items():
            table.setdefault(prefix + symbol, (base, Fraction(10) ** power))
    for word, base in _METRIC_WORDS.items():
        for prefix, power in _PREFIX_WORDS.items():
            table[prefix + word] = table[f"{prefix}{word}s"] = (base, Fraction(10) ** power)
    return table


_TABLE = _table()


@lru_cache(maxsize=4096)
def unit(text: str) -> Unit | None:
    """Read `cm`, `m/s^2`, `km per hour`, `square meters`, `%`; None when any part is not in the table."""
    text = _COMPOUND_NAMES.get(text.strip(), text.strip())
    powers: dict[str, int] = {}
    size, sign, next_power, last = Fraction(1), 1, 1, None
    for index, piece in enumerate(_JOIN.split(text)):
        if index % 2:
            sign = -1 if piece in ("/", "per") else 1
            continue
        if piece.lower() in _POWER_WORDS:
            power = _POWER_WORDS[piece.lower()]
            if piece.lower().endswith("ed") and last is not None:
                # "meters squared": the word raises what stands before it.
                powers[last[0]] = powers.get(last[0], 0) + last[2] * (power - 1)
                size *= last[1] ** (last[2] * (power - 1))
            next_power = 1 if piece.lower().endswith("ed") else power
            continue
        match = _FACTOR.fullmatch(piece)
        found = _lookup(match[1]) if match else None
        if match is None or found is None:
            return None
        base, one = found
        power = sign * int(match[2] or match[3] or next_power)
        powers[base] = powers.get(base, 0) + power
        size *= one**power
        last, next_power = (base, one, sign), 1
    if last is None:
        return None
    return Unit(frozenset((base, power) for base, power in powers.items() if base and power), size)


def _lookup(name: str) -> tuple[str, Fraction] | None:
    """Symbols are case-sensitive (mW is not MW), words of four letters and more are not."""
    return _TABLE.get(name) or (_TABLE.get(name.lower()) if len(name) > 3 else None)


def split_quantity(text: str) -> tuple[str, Unit | None, bool]:
    """Split a cleaned text into (value, unit, plain): `12 cm^2` -> ("12", cm^2, True); no unit -> (text, None, True).

    `plain` is False for one letter glued to the value, `3m`, or after a variable, `x + 3 m`: that letter may be a
    variable too, so the quantity never equals its bare value.
    """
    if match := _CURRENCY.fullmatch(text):
        return match[1] + match[3], unit(match[2]), True
    for start in range(max(1, len(text) - _MAX_UNIT), len(text)):
        if not _may_split(text, start):
            continue
        found = unit(text[start:])
        if found is not None:
            letter = len(text) - start == 1 and text[start].isalpha()
            glued = not text[start - 1].isspace() or _VARIABLE.search(text[:start]) is not None
            return text[:start].strip(), found, not (letter and glued)
    return text, None, True


def _may_split(text: str, start: int) -> bool:
    """Whether a unit can begin at `start`: after a digit or a closing bracket, or, where the value is mathematics or a
    number word, after a space ("come in" is no quantity)."""
    before = text[start - 1]
    if text[start].isspace() or text[start].isdigit() or text[start] in "^}":
        return False
    if before.isdigit() or before in "}).!":
        return True
    value = text[:start].strip()
    return before.isspace() and (any(c.isdigit() for c in value) or "\\" in value or number(value) is not None)
