"""Questions about a scene of digits: eight families, each with its answer and the steps that lead to it.

A question is made together with a worked solution: what to read, the operations, the conclusion. The teacher writes
its reasoning from these steps and `datamodules.digits_checks` verifies the same language. Words are kept few and
digits are set apart by spaces, so that each is one token for a small tokenizer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from datamodules.digits_scene import COLOURS, ROWS, Item, Scene


@dataclass(frozen=True)
class Question:
    """A question with its solution.

    Attributes:
        relevant: indices of the digits that the question is about, in reading order of the scene.
        reads, operations: worked steps; the conclusion follows them.
        number: the number that the question itself names (a threshold), if any.

    Example:
        >>> Question("sum", "Sum of all digits?", "7", (0, 1), ("digits: 3 4",), ("3 + 4 = 7",), "the sum is 7").answer
        '7'
    """

    family: str
    text: str
    answer: str
    relevant: tuple[int, ...]
    reads: tuple[str, ...]
    operations: tuple[str, ...]
    conclusion: str
    number: int | None = field(default=None)


def ask(family: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question of `family` about `scene`, or None where the kind drawn has no unambiguous question about it."""
    kinds = _KINDS[family]
    return kinds[rng.integers(len(kinds))](scene, rng)


# What the kinds below are made of -----------------------------------------------------------------------------------


def _digits(scene: Sequence[Item]) -> str:
    return " ".join(str(item["digit"]) for item in scene) or "none"


def _all(scene: Scene) -> tuple[int, ...]:
    return tuple(range(len(scene)))


def _name(scene: Scene, index: int, rng: np.random.Generator) -> str:
    """What to call the digit without doubt: its colour where no other digit shares it (mostly), else its place."""
    colour = scene[index]["colour"]
    alone = sum(item["colour"] == colour for item in scene) == 1
    return colour if alone and rng.random() < 0.75 else scene[index]["place"]


def _pair(scene: Scene, rng: np.random.Generator) -> list[tuple[str, int, int]] | None:
    """Two digits as (name, digit, index), in random order."""
    if len(scene) < 2:
        return None
    chosen = (int(index) for index in rng.choice(len(scene), 2, replace=False))
    return [(_name(scene, index, rng), scene[index]["digit"], index) for index in chosen]


def _some_colour(scene: Scene, rng: np.random.Generator, at_least: int) -> tuple[str, tuple[int, ...]] | None:
    """A colour that at least `at_least` digits share, and those digits."""
    held = {c: tuple(i for i, item in enumerate(scene) if item["colour"] == c) for c in COLOURS}
    shared = [colour for colour, indices in held.items() if len(indices) >= at_least]
    if not shared:
        return None
    colour = shared[rng.integers(len(shared))]
    return colour, held[colour]


def _sign(left: int, right: int) -> str:
    return f"{left} {'<' if left < right else '>' if left > right else '='} {right}"


def _additions(digits: Sequence[int]) -> tuple[str, ...]:
    """The running sum, one step an addition."""
    totals = np.cumsum(digits).tolist()
    return tuple(f"{a} + {d} = {b}" for a, d, b in zip(totals, digits[1:], totals[1:], strict=False))


# The kinds -----------------------------------------------------------------------------------------------------------


def _sum_of(scene: Scene, text: str, relevant: tuple[int, ...], reads: tuple[str, ...]) -> Question:
    digits = [scene[index]["digit"] for index in relevant]
    total = sum(digits)
    return Question("sum", text, str(total), relevant, reads, _additions(digits), f"the sum is {total}")


def _sum_all(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene) < 2:
        return None
    return _sum_of(scene, "Sum of all digits?", _all(scene), (f"digits: {_digits(scene)}",))


def _sum_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    found = _some_colour(scene, rng, at_least=2)
    if found is None:
        return None
    colour, held = found
    return _sum_of(scene, f"Sum of the {colour} digits?", held, (f"{colour}: {_digits([scene[i] for i in held])}",))


def _sum_pair(scene: Scene, rng: np.random.Generator) -> Question | None:
    pair = _pair(scene, rng)
    if pair is None:
        return None
    (one, _, i), (two, _, j) = pair
    reads = tuple(f"{name}: {digit}" for name, digit, _ in pair)
    return _sum_of(scene, f"Sum of {one} and {two}?", (i, j), reads)


def _difference_pair(scene: Scene, rng: np.random.Generator) -> Question | None:
    pair = _pair(scene, rng)
    if pair is None:
        return None
    (one, a, i), (two, b, j) = pair
    high, low = max(a, b), min(a, b)
    reads = (f"{one}: {a}", f"{two}: {b}")
    text = f"Difference of {one} and {two}?"
    return _difference(text, (i, j), reads, high, low)


def _difference_extremes(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene) < 2:
        return None
    digits = [item["digit"] for item in scene]
    high, low = max(digits), min(digits)
    reads = (f"digits: {_digits(scene)}", f"largest: {high}", f"smallest: {low}")
    return _difference("Difference of largest and smallest?", _all(scene), reads, high, low)


def _difference(text: str, relevant: tuple[int, ...], reads: tuple[str, ...], high: int, low: int) -> Question:
    operations = (f"{high} - {low} = {high - low}",)
    conclusion = f"the difference is {high - low}"
    return Question("difference", text, str(high - low), relevant, reads, operations, conclusion)


def _largest_steps(digits: Sequence[int]) -> tuple[str, ...]:
    """Each digit against the largest before it."""
    leaders = np.maximum.accumulate(digits).tolist()
    return tuple(_sign(leader, digit) for leader, digit in zip(leaders, digits[1:], strict=False))


def _maximum_all(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene) < 2:
        return None
    return _maximum(scene, "Largest digit?", _all(scene), f"digits: {_digits(scene)}")


def _maximum_some(scene: Scene, rng: np.random.Generator) -> Question | None:
    found = _some_colour(scene, rng, at_least=2)
    if found is None:
        return None
    colour, held = found
    return _maximum(scene, f"Largest {colour} digit?", held, f"{colour}: {_digits([scene[i] for i in held])}")


def _maximum(scene: Scene, text: str, relevant: tuple[int, ...], read: str) -> Question:
    digits = [scene[index]["digit"] for index in relevant]
    high = max(digits)
    return Question("maximum", text, str(high), relevant, (read,), _largest_steps(digits), f"the largest is {high}")


def _maximum_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    digits = [item["digit"] for item in scene]
    if len(scene) < 2 or digits.count(max(digits)) > 1:
        return None
    winner = scene[digits.index(max(digits))]
    steps = (*_largest_steps(digits), f"{winner['digit']} is {winner['colour']}")
    reads, conclusion = (f"digits: {_digits(scene)}",), f"the colour is {winner['colour']}"
    return Question("maximum", "Colour of the largest?", winner["colour"], _all(scene), reads, steps, conclusion)


def _count_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene) < 2:
        return None
    # A quarter of the questions ask for any colour, mostly one that is not there, so that 0 is an answer too.
    colour = str(rng.choice(list(COLOURS)) if rng.random() < 0.25 else scene[rng.integers(len(scene))]["colour"])
    reads = ("colours: " + " ".join(item["colour"] for item in scene),)
    return _count("count", f"How many {colour} digits?", scene, colour, lambda item: item["colour"] == colour, reads)


def _count_larger(scene: Scene, rng: np.random.Generator) -> Question | None:
    number = int(rng.integers(1, 8))
    label, reads = f"larger than {number}", (f"digits: {_digits(scene)}",)
    return _count(
        "count", f"How many digits {label}?", scene, label, lambda item: item["digit"] > number, reads, number
    )


def _count(
    family: str,
    text: str,
    scene: Scene,
    label: str,
    keep: Callable[[Item], bool],
    reads: tuple[str, ...],
    number: int | None = None,
) -> Question:
    kept = [item for item in scene if keep(item)]
    operations = (f"{label}: {_digits(kept)}",)
    total = str(len(kept))
    return Question(family, text, total, _all(scene), reads, operations, f"the count is {total}", number)


def _comparison_yes_no(scene: Scene, rng: np.random.Generator) -> Question | None:
    pair = _pair(scene, rng)
    if pair is None or pair[0][1] == pair[1][1]:
        return None
    (one, a, _), (two, b, _) = pair
    answer = "yes" if a > b else "no"
    return _comparison(f"Is {one} larger than {two}?", answer, pair)


def _comparison_which(scene: Scene, rng: np.random.Generator) -> Question | None:
    pair = _pair(scene, rng)
    if pair is None or pair[0][1] == pair[1][1]:
        return None
    (one, a, _), (two, b, _) = pair
    return _comparison(f"Which is larger, {one} or {two}?", one if a > b else two, pair)


def _comparison(text: str, answer: str, pair: list[tuple[str, int, int]]) -> Question:
    (one, a, i), (two, b, j) = pair
    reads = (f"{one}: {a}", f"{two}: {b}")
    return Question("comparison", text, answer, (i, j), reads, (_sign(a, b),), f"the answer is {answer}")


def _reading_order(scene: Scene, what: str) -> Question | None:
    if len(scene) < 2:
        return None
    values = [str(item["digit"]) if what == "digits" else item["colour"] for item in scene]
    lines = [
        f"{name} row: " + " ".join(value for value, item in zip(values, scene, strict=True) if item["row"] == row)
        for row, name in enumerate(ROWS)
        if any(item["row"] == row for item in scene)
    ]
    answer = " ".join(values)
    text = f"Read the {what} in order."
    return Question("reading_order", text, answer, _all(scene), (), tuple(lines), f"the order is {answer}")


def _order_digits(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _reading_order(scene, "digits")


def _order_colours(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _reading_order(scene, "colours")


def _position_where(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = scene[index := int(rng.integers(len(scene)))]
    if sum(other["digit"] == item["digit"] and other["colour"] == item["colour"] for other in scene) > 1:
        return None
    return _position(f"Where is the {item['colour']} {item['digit']}?", item["place"], "place", item, index)


def _position_where_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = scene[index := int(rng.integers(len(scene)))]
    if sum(other["colour"] == item["colour"] for other in scene) > 1:
        return None
    return _position(f"Where is the {item['colour']} digit?", item["place"], "place", item, index)


def _position_digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = scene[index := int(rng.integers(len(scene)))]
    return _position(f"Which digit is at {item['place']}?", str(item["digit"]), "digit", item, index)


def _position_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = scene[index := int(rng.integers(len(scene)))]
    return _position(f"Which colour is at {item['place']}?", item["colour"], "colour", item, index)


def _position(text: str, answer: str, what: str, item: Item, index: int) -> Question:
    operations = (f"{item['colour']} {item['digit']} at {item['place']}",)
    return Question("position", text, answer, (index,), (), operations, f"the {what} is {answer}")


def _parity_word(value: int, rng: np.random.Generator) -> tuple[str, str, str]:
    """The word that the question asks for (even or odd, a coin), the true one, and yes or no."""
    asked, true = ("even", "odd")[rng.integers(2)], ("even", "odd")[value % 2]
    return asked, true, "yes" if asked == true else "no"


def _parity_sum(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene) < 2:
        return None
    digits = [item["digit"] for item in scene]
    asked, true, answer = _parity_word(sum(digits), rng)
    operations = (*_additions(digits), f"{sum(digits)} is {true}")
    reads, text = (f"digits: {_digits(scene)}",), f"Is the sum {asked}?"
    return Question("parity", text, answer, _all(scene), reads, operations, f"the answer is {answer}")


def _parity_one(scene: Scene, rng: np.random.Generator) -> Question | None:
    index = int(rng.integers(len(scene)))
    name, digit = _name(scene, index, rng), scene[index]["digit"]
    asked, true, answer = _parity_word(digit, rng)
    reads, operations = (f"{name}: {digit}",), (f"{digit} is {true}",)
    return Question("parity", f"Is {name} {asked}?", answer, (index,), reads, operations, f"the answer is {answer}")


def _parity_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    asked = ("even", "odd")[rng.integers(2)]
    wanted, reads = int(asked == "odd"), (f"digits: {_digits(scene)}",)
    text = f"How many {asked} digits?"
    return _count("parity", text, scene, asked, lambda item: item["digit"] % 2 == wanted, reads)


_Kind = Callable[[Scene, np.random.Generator], Question | None]
_KINDS: dict[str, tuple[_Kind, ...]] = {
    "sum": (_sum_all, _sum_colour, _sum_pair),
    "difference": (_difference_pair, _difference_extremes),
    "maximum": (_maximum_all, _maximum_some, _maximum_colour),
    "count": (_count_colour, _count_larger),
    "comparison": (_comparison_yes_no, _comparison_which),
    "reading_order": (_order_digits, _order_colours),
    "position": (_position_where, _position_where_colour, _position_digit, _position_colour),
    "parity": (_parity_sum, _parity_one, _parity_count),
}
FAMILIES = tuple(_KINDS)
