"""Is an answer right? `accuracy(answer, truth)` on extracted text, by rules first and math-verify last.

The rules are exact and cheap (microseconds); the first one that can read both texts decides:

1. the same text once spelled alike (`text.clean`);
2. multiple choice A to H by its letter, and by the numbers where both texts have one behind it (`B. 5` is not `B. 7`);
   several options are never one (`choice`);
3. numbers as exact fractions, with percentages (`50%` is `0.5`, not `50`) and units. A unit on one side only is let
   pass (`5 kg` for `5`), two units are converted (`100 cm` is `1 m`), other dimensions differ (`12 cm^2`, `12 cm`);
4. words, whatever their case;
5. parts: as many, in order (sets in any order), each by these same rules;
6. assignments: `x = 3` for `3`, but not for `y = 3`; each side of `3 + 4 = 7` has to be right, and of
   `2\\sqrt{3} \\approx 3.46` the right one has to be the left one rounded;
7. mathematics: math-verify, in a process of its own (`symbolic`).

What is left to be worked out is wrong, for the question was its value: sums and products (`3 + 4`, `3(4)`), and what
picks from or runs over several numbers (`\\max(3, 7)`, `\\int`). Functions, powers and roots are taken at their value
(`4!` is `24`): they are how some numbers are written.
"""

import re
from fractions import Fraction

from prism_pl.rewards.choice import read_choice
from prism_pl.rewards.numbers import number, same_number
from prism_pl.rewards.parts import is_name, split_equation, split_parts
from prism_pl.rewards.symbolic import symbolically_equal
from prism_pl.rewards.text import clean
from prism_pl.rewards.units import Unit, split_quantity

MAX_LENGTH = 1000  # characters an answer may have beyond twice its truth
MAX_NESTING = 12  # brackets inside brackets; math-verify's parser slows down with each
MAX_POWER = 10_000  # exponents beyond it are not worked out

_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_FUNCTION = re.compile(
    r"(?<![a-zA-Z])(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|lim|max|min)(?![a-zA-Z])|\\(?:begin|end)\{\w+\}"
)
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
_PROSE = re.compile(r"(?<![\\a-zA-Z])(?:[a-zA-Z]{4,}|[a-zA-Z]{2,}\s+[a-zA-Z0-9]|[a-zA-Z]\s+[a-zA-Z]{2,})")
# math-verify reads "3 4" as 3 + 4, "3:4" as a fraction, "3_4" as 3, and passes over quotation marks.
_NOT_MATHS = re.compile(r"(?<!_)\d\s+[\d.]|\d\s*[:_]|[\"'?#@&;`]|\.\.")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_OPERATION = re.compile(r"\\(?:max|min|gcd|lcm|sup|inf|det|lim|i*int|sum|prod)(?![a-zA-Z])")
_WORKED_OUT = re.compile(
    # The range is Unicode's operators, some of which math-verify multiplies by.
    r"[\d.}\])!]\s*(?:[-+*\u2200-\u22ff]|\\times|\\cdot|\\div)\s*[-+]?[\d.\\({\[]"
    # Products without a sign: `3(4)`, but neither `\log_2(8)` nor `3(10^4)`; `(3)(4)`; `3\sqrt{16}`; `\frac{7}{8}8`.
    r"|(?<![_\d])\d+\s*\((?!\s*10\b)|\)\s*[\d(]|\d\s*\\sqrt"
    r"|\\(?:frac\s*\{[^{}]*\}\s*|sqrt\s*(?:\[\d+\]\s*)?)\{[^{}]*\}\s*[\d(\\]"
)
_APPROX = re.compile(r"\\approx(?![a-zA-Z])")
_LARGE_FACTORIAL = re.compile(r"\d{5,}\)?\s*!")
_REGION = re.compile(r"[<>]|\\(?:le|ge|cup|cap|in|begin)(?![a-zA-Z])")
_TOWER = re.compile(r"\d+(?:\s*\^\s*\{?\s*\(?\s*\d+)+")


def accuracy(answer: str, truth: str) -> float:
    """1.0 when `answer` is right, else 0.0. Both are the text of an answer, not a response (`prism_pl.chat.parse`).

    An empty answer, and one far longer than its truth, is wrong. Raises ValueError for an empty truth.

    Example:
        >>> accuracy("12 cm", "12 mm"), accuracy("1,000", "1000")
        (0.0, 1.0)
    """
    if not truth.strip():
        raise ValueError("the truth is empty, so no answer can be right: give the row its answer or leave it out")
    if len(answer) > MAX_LENGTH + 2 * len(truth):
        return 0.0
    cleaned = clean(answer)
    return float(bool(cleaned) and _equal(cleaned, clean(truth)))


def same_when_rounded(answer: str, truth: str, decimals: int) -> bool:
    """Whether two answers are values that agree once both are rounded: `12.57` and `4\\pi`, to 2 decimals. A unit
    may be left out on one side; two different ones are not converted, and a text that is no value equals nothing."""
    (value, unit, _), (true_value, true_unit, _) = split_quantity(clean(answer)), split_quantity(clean(truth))
    if unit is not None and true_unit is not None and unit != true_unit:
        return False
    a, b = number(value), number(true_value)
    if a is not None and b is not None:
        return round(a, decimals) == round(b, decimals)
    if not (value and _is_maths(value) and _is_maths(true_value)) or _is_huge(value) or _is_huge(true_value):
        return False
    return symbolically_equal(value, true_value, decimals)


def _equal(answer: str, truth: str) -> bool:
    """The rules, in order, on cleaned texts. Each of them returns None when it cannot read both."""
    if answer == truth:
        return True
    for rule in (_equal_choice, _equal_quantity, _equal_words, _equal_parts, _equal_assignment, _equal_rounded):
        verdict = rule(answer, truth)
        if verdict is not None:
            return verdict
    return _equal_maths(answer, truth)


def _equal_choice(answer: str, truth: str) -> bool | None:
    expected = read_choice(truth)
    if expected is None:
        return None
    chosen = read_choice(answer)
    if chosen is None:
        # The option's text without its letter: "cat" for "C. cat".
        return bool(expected.text) and _equal(answer, expected.text)
    # Words after the letter may be put otherwise; another number is another answer.
    contradicts = bool(chosen.text and expected.text) and _equal_quantity(chosen.text, expected.text) is False
    return chosen.letter == expected.letter and not contradicts


def _equal_quantity(answer: str, truth: str) -> bool | None:
    (value, unit, plain), (true_value, true_unit, true_plain) = split_quantity(answer), split_quantity(truth)
    a, b = number(value), number(true_value)
    if a is not None and b is not None:
        return _same_quantity(a, unit, b, true_unit, plain and true_plain)
    if (unit or true_unit) and a is None and b is None:
        # `2\sqrt{3} cm`: the other rules compare the values; here units are not converted.
        one_sided = (unit is None or true_unit is None) and _ignorable(unit) and _ignorable(true_unit)
        alike = unit == true_unit or (one_sided and plain and true_plain)
        return True if alike and _equal(value, true_value) else None
    return None


def _same_quantity(a: Fraction, unit: Unit | None, b: Fraction, true_unit: Unit | None, plain: bool) -> bool:
    if unit is None and true_unit is None:
        return same_number(a, b)
    one_sided = unit is None or true_unit is None
    if one_sided and _ignorable(unit) and _ignorable(true_unit):
        return plain and same_number(a, b)
    size, dimension = (unit.size, unit.dimension) if unit else (Fraction(1), frozenset())
    true_size, true_dimension = (true_unit.size, true_unit.dimension) if true_unit else (Fraction(1), frozenset())
    return dimension == true_dimension and same_number(a * size, b * true_size)


def _ignorable(unit: Unit | None) -> bool:
    """No unit, or one that may be left out. A percent sign may not: it has no dimension but a size."""
    return unit is None or bool(unit.dimension)


def _equal_words(answer: str, truth: str) -> bool | None:
    if "\\" in truth or not (_WORD.search(truth) or (len(truth) == 1 and truth.isalpha())):
        return None
    return True if answer.casefold() == truth.casefold() else None


def _equal_parts(answer: str, truth: str) -> bool | None:
    given, expected = split_parts(answer), split_parts(truth)
    if len(given.items) != len(expected.items):
        # "100,200" can be one number or two, "3 1 4" a list: the other side tells.
        if len(given.items) == 1:
            given = split_parts(answer, loose=True)
        elif len(expected.items) == 1:
            expected = split_parts(truth, loose=True)
    if len(given.items) == len(expected.items) == 1:
        (a,), (b,) = given.items, expected.items
        unwrapped = (a, b) != (answer, truth)
        return _equal(a, b) if unwrapped and given.brackets == expected.brackets else None
    if len(given.items) != len(expected.items):
        # `x > 3` is `(3, \infty)`: an interval's comma separates no answers.
        return None if _REGION.search(answer) or _REGION.search(truth) else False
    if given.brackets != expected.brackets and {given.brackets, expected.brackets} - {"", "()", "{}"}:
        return False
    if given.brackets and expected.brackets and given.brackets != expected.brackets:
        return False
    if "{}" not in (given.brackets, expected.brackets):
        return all(_equal(a, b) for a, b in zip(given.items, expected.items, strict=True))
    return _same_set(given.items, expected.items)


def _same_set(given: list[str], expected: list[str]) -> bool:
    left = list(expected)
    for item in given:
        found = next((other for other in left if _equal(item, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _equal_assignment(answer: str, truth: str) -> bool | None:
    (name, values), (true_name, true_values) = split_equation(answer), split_equation(truth)
    if len(true_values) > 1 or (len(values) == 1 and not name and not true_name):
        return None  # the truth is an equation itself, or there is nothing to take off
    if name and true_name and name != true_name:
        return False
    # Arithmetic may stand before the last sign, as a way to the value that stands after it.
    steps = all(_equal(value, true_values[0]) or _equal_maths(value, true_values[0], True) for value in values[:-1])
    return steps and _equal(values[-1], true_values[0])


def _equal_rounded(answer: str, truth: str) -> bool | None:
    """`2\\sqrt{3} \\approx 3.46` and `x \\approx 3.46`, where the truth is one of the sides."""
    sides = [side.strip() for side in _APPROX.split(answer)]
    if len(sides) == 1 or _APPROX.search(truth):
        return None
    exact, rounded = sides[0], sides[-1]
    if len(sides) > 2 or not exact or not rounded:
        return False
    value = split_quantity(rounded)[0]
    decimals = len(value.partition(".")[2]) if number(value) is not None else 0
    if same_when_rounded(exact, rounded, decimals):
        return _equal(exact, truth) or _equal(rounded, truth)
    return is_name(exact) and _equal(rounded, truth)


def _equal_maths(answer: str, truth: str, arithmetic: bool = False) -> bool:
    if not (_is_maths(answer) and _is_maths(truth)):
        return False
    if not arithmetic and number(split_quantity(truth)[0]) is not None and _is_arithmetic(answer):
        return False
    variables, true_variables = set(_VARIABLE.findall(answer)), set(_VARIABLE.findall(truth))
    if variables != true_variables and {v.lower() for v in variables} == {v.lower() for v in true_variables}:
        return False  # math-verify reads X and x as one
    answer, truth = answer.replace("**", "^"), truth.replace("**", "^")
    if _is_huge(answer) or _is_huge(truth):
        return False
    return symbolically_equal(answer, truth)


def _is_maths(text: str) -> bool:
    """Whether a text may be an expression. Words may not: as products of letters, "red" and "der" would be equal."""
    only_letters = len(text) > 1 and text.replace(" ", "").isalpha()
    if only_letters or _PROSE.search(_FUNCTION.sub(" ", text)) or _NOT_MATHS.search(text):
        return False
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return depth == 0 and deepest <= MAX_NESTING


def _is_arithmetic(text: str) -> bool:
    """Whether plain numbers are left to be added, multiplied or chosen from: `3 + 4`, `3(4)`, `\\max(3, 7)`."""
    if _OPERATION.search(text):
        return True
    return not re.search(r"[a-zA-Z]", _COMMAND.sub("", text)) and bool(_WORKED_OUT.search(text))


def _is_huge(text: str) -> bool:
    """Whether literal numbers are too large to work out: `100000!`, or `9^{9^{9}}`, worked from its top down."""
    if _LARGE_FACTORIAL.search(text):
        return True
    for tower in _TOWER.findall(text.replace("**", "^")):
        levels = [int(level[:10]) for level in re.findall(r"\d+", tower)]
        exponent = 1
        for base in reversed(levels[1:]):
            if exponent > 64 or base**exponent > MAX_POWER:
                return True
            exponent = base**exponent
    return False
