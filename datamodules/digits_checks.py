"""What a response says about a scene of digits, checked: the items of its caption and the steps of its reasoning.

Both supervision styles are understood, and whatever else a policy writes in the same few words. A step in other words
counts as stated and not correct.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.digits_scene import COLOURS, PLACES, ROWS, Item
from prism_pl.batch import Example

_COLOUR = "|".join(COLOURS)
_PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
_ITEM = re.compile(
    rf"(?:\b({_COLOUR}) )?(?<![\d.])(\d)(?!\d|\.\d| digits?\b)(?: (?:is )?(?:at|in|on) (?:the )?({_PLACE})\b)?"
)
_ITEM_PARTS = re.compile(rf"(?:({_COLOUR}) )?(\d)(?: ({_PLACE}))?")
_NUMBER = re.compile(r"^\s*\d+[.)]\s+")
_STEP_END = re.compile(r"\.(?:\s+|$)|\n")
_CLAUSE_END = re.compile(r",\s*so\s+|[,;]\s+")
_ARITHMETIC = re.compile(r"(\d+(?: [+-] \d+)+) = (\d+)")
_RELATION = re.compile(r"(\d+) ([<>=]) (\d+)")
_PARITY = re.compile(r"(\d+) is (even|odd)")
_TINT = re.compile(rf"(\d) is ({_COLOUR})")
_PLACED = re.compile(rf"({_COLOUR}) (\d) at ({_PLACE})")
_LIST = re.compile(r"([a-z][a-z0-9 ]*): ([a-z0-9 ]+)")
_CONCLUSION = re.compile(r"(?:the )?(?:sum|difference|largest|count|answer|order|place|digit|colour) is (.+)")


def caption_items(caption: str) -> list[str]:
    """The digits that a caption states, in its order, in one canonical form whatever its style: colour, digit, place,
    each only where it is stated. An overview such as "3 digits" is no item.

    Example:
        >>> caption_items("- 2 digits\\n- red 3 at top left\\n- a blue 4")
        ['red 3 top left', 'blue 4']
    """
    text = "\n".join(_NUMBER.sub("", line) for line in caption.lower().splitlines())
    return [" ".join(part for part in found.groups() if part) for found in _ITEM.finditer(text)]


def scene_items(scene: Sequence[Item]) -> list[str]:
    """The digits of a scene in the canonical form of `caption_items`, all attributes stated, in reading order."""
    return [f"{item['colour']} {item['digit']} {item['place']}" for item in scene]


@dataclass(frozen=True)
class Faithfulness:
    """Items of a caption against the scene: `stated` = `true` + `invented`; `missed`: digits that no true item
    names. An item is true when all it states fits one digit, and each digit makes at most one item true. `exact`: every
    digit is named with colour and place, and nothing else is."""

    stated: int
    true: int
    missed: int
    invented: int
    exact: bool


def faithfulness(caption: str, scene: Sequence[Item]) -> Faithfulness:
    """Compare a caption with the scene, each item with at most one digit, so that as many items as can be are true."""
    from scipy.optimize import linear_sum_assignment

    items, truth = caption_items(caption), scene_items(scene)
    fits = np.array([[_fits(item, digit) for digit in truth] for item in items], dtype=bool).reshape(-1, len(truth))
    true = int(fits[linear_sum_assignment(fits, maximize=True)].sum())
    return Faithfulness(len(items), true, len(truth) - true, len(items) - true, Counter(items) == Counter(truth))


def _fits(item: str, digit: str) -> bool:
    """Whether all that a canonical item states is so for the digit, given in full. Places are compared whole: "top"
    does not fit "top left"."""
    said, seen = _ITEM_PARTS.fullmatch(item), _ITEM_PARTS.fullmatch(digit)
    assert said is not None
    assert seen is not None
    return all(a is None or a == b for a, b in zip(said.groups(), seen.groups(), strict=True))


@dataclass(frozen=True)
class StepCheck:
    """Steps of a reasoning: `stated`, how many it has; `correct`, how many hold; `expected`, how many the full worked
    solution has (`meta["num_steps"]`)."""

    correct: int
    stated: int
    expected: int


def check_steps(reasoning: str, scene: Sequence[Item], meta: Mapping[str, Any]) -> StepCheck:
    """Verify each step of a reasoning against the scene.

    Readings must be the scene's, arithmetic must be right and use the digits that the question is about or earlier
    results, each at most once in additions; the conclusion must be the answer. `reasoning` is the think block.

    Args:
        meta: `relevant`, `number`, `answer` and `num_steps` of the row, as `make_example` writes them.

    Example:
        >>> red = Item(digit=3, colour="red", row=0, col=0, place="top left", instance=0, dx=0, dy=0)
        >>> blue = Item(digit=4, colour="blue", row=1, col=0, place="left", instance=0, dx=0, dy=0)
        >>> meta = {"relevant": [0, 1], "number": None, "answer": "7", "num_steps": 3}
        >>> check_steps("1. digits: 3 4\\n2. 3 + 4 = 8\\n3. the sum is 7", [red, blue], meta)
        StepCheck(correct=2, stated=3, expected=3)
    """
    claims = _Claims(scene, meta)
    steps = split_steps(reasoning)
    correct = sum(all([claims.holds(clause) for clause in _CLAUSE_END.split(step)]) for step in steps)
    return StepCheck(correct, len(steps), meta["num_steps"])


def split_steps(reasoning: str) -> list[str]:
    """Numbered lines, or else sentences, lower-case and without their numbers."""
    lines = [_NUMBER.sub("", line.strip()) for line in reasoning.lower().splitlines()]
    steps = [part.strip() for line in lines for part in _STEP_END.split(line)]
    return [step for step in steps if step]


class _Claims:
    """Judges one clause after the other; results of correct additions can be used later."""

    def __init__(self, scene: Sequence[Item], meta: Mapping[str, Any]) -> None:
        self.scene = scene
        self.answer = str(meta["answer"])
        digits = [scene[index]["digit"] for index in meta["relevant"]]
        self.said: set[str] = set()
        self.to_add = Counter(digits)
        self.known = {*digits, *([] if meta["number"] is None else [meta["number"]])}

    def holds(self, clause: str) -> bool:
        """Whether the clause is one of the known kinds of claim and true."""
        clause = clause.strip().removeprefix("so ").rstrip(".")
        relation = _RELATION.fullmatch(clause)
        # Said twice is one step. Not so for comparisons (digits of one value meet the largest one after the other) and
        # additions (of a 0; they spend their terms).
        if clause in self.said and relation is None and " + " not in clause:
            return False
        self.said.add(clause)
        if match := _ARITHMETIC.fullmatch(clause):
            return self._arithmetic(match[1].split(), int(match[2]))
        if relation:
            left, right = int(relation[1]), int(relation[3])
            order = "<" if left < right else ">" if left > right else "="
            return relation[2] == order and {left, right} <= self.known
        if match := _PARITY.fullmatch(clause):
            return int(match[1]) in self.known and int(match[1]) % 2 == (match[2] == "odd")
        if match := _TINT.fullmatch(clause):
            return any(item["digit"] == int(match[1]) and item["colour"] == match[2] for item in self.scene)
        if match := _PLACED.fullmatch(clause):
            return f"{match[1]} {match[2]} {match[3]}" in scene_items(self.scene)
        if match := _LIST.fullmatch(clause):
            return match[2].split() == self._listed(match[1], match[2])
        match = _CONCLUSION.fullmatch(clause)
        return match is not None and match[1] == self.answer

    def _arithmetic(self, terms: list[str], result: int) -> bool:
        """`terms` alternate numbers and signs. A sum spends its terms and adds its result to what can be added."""
        numbers, signs = [int(term) for term in terms[::2]], terms[1::2]
        total = numbers[0] + sum(n if sign == "+" else -n for n, sign in zip(numbers[1:], signs, strict=True))
        spent = Counter(numbers)
        if total != result or not spent <= self.to_add:
            return False
        if "-" not in signs:
            self.to_add = self.to_add - spent + Counter([total])
        self.known.add(total)
        return True

    def _listed(self, label: str, said: str) -> list[str] | None:
        """What a list with this label must say, in reading order; None for an unknown label."""
        if label in ("largest", "smallest"):
            digits = [item["digit"] for item in self.scene]
            return [str(max(digits) if label == "largest" else min(digits))]
        if label == "colours":
            return [item["colour"] for item in self.scene]
        kept = self._filter(label)
        if kept is None:
            return None
        in_colours = said.split()[0] in COLOURS
        return [item["colour"] if in_colours else str(item["digit"]) for item in kept] or ["none"]

    def _filter(self, label: str) -> list[Item] | None:
        """The digits that a label names, or None."""
        if label == "digits":
            return list(self.scene)
        if label in COLOURS:
            return [item for item in self.scene if item["colour"] == label]
        if label in PLACES:
            return [item for item in self.scene if item["place"] == label]
        if label in ("even", "odd"):
            return [item for item in self.scene if item["digit"] % 2 == (label == "odd")]
        if label.removesuffix(" row") in ROWS and label.endswith(" row"):
            row = ROWS.index(label.removesuffix(" row"))
            return [item for item in self.scene if item["row"] == row]
        if match := re.fullmatch(r"larger than (\d+)", label):
            return [item for item in self.scene if item["digit"] > int(match[1])]
        return None


class DigitsSceneChecker:
    """Checks responses to digits rows for the evaluation (`prism_pl.metrics.scene.SceneChecker`)."""

    def check_caption(self, caption: str, example: Example) -> Faithfulness:
        """The caption's items against the example's scene."""
        return faithfulness(caption, example.meta["scene"])

    def check_steps(self, reasoning: str, example: Example) -> StepCheck:
        """The reasoning's steps against the example's scene and question."""
        return check_steps(reasoning, example.meta["scene"], example.meta)
