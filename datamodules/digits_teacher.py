"""The teacher: writes responses about a scene, in the two supervision styles of PRISM and in the base policy's.

* `curated`: dense and precise. An overview and one item a digit with colour and place; one numbered step an operation.
* `public`: terse and varied. Items as one sentence, as short sentences or as bullets; fewer steps, numbered or not; a
  stated share of captions is imprecise and a stated share of solutions skips the operations. The answer is right.
* brief: the bare answer, a plain caption, or an explanation when asked for one, without the three blocks: what the base
  policy knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.digits_questions import Question
from datamodules.digits_scene import COLOURS, PLACES, Item, Scene
from prism_pl import chat


@dataclass(frozen=True)
class Demonstration:
    """A public response and what was done to it: `imprecise`, the caption does not say the scene exactly; `skipped`,
    the operations are left out."""

    response: str
    imprecise: bool
    skipped: bool


def curated(scene: Scene, question: Question) -> str:
    """The dense, precise style.

    Example:
        <caption>
        - 2 digits
        - red 3 at top left
        - blue 4 at right
        </caption>
        <think>
        1. digits: 3 4
        2. 3 + 4 = 7
        3. the sum is 7
        </think>
        <answer>
        7
        </answer>
    """
    overview = f"{len(scene)} digit{'s' if len(scene) > 1 else ''}"
    caption = _bullets([overview, *(_phrase(item) for item in scene)])
    steps = (*question.reads, *question.operations, question.conclusion)
    return chat.render(caption, _numbered(steps), question.answer)


def public(
    scene: Scene, question: Question, rng: np.random.Generator, *, imprecise: float, skipped: float
) -> Demonstration:
    """The terse, varied style. `imprecise` and `skipped` are shares in [0, 1] of the rows; a question without
    operations has none to skip.

    Example:
        <caption>
        red 3 at top left and blue 4 at right.
        </caption>
        <think>
        3 + 4 = 7, so the sum is 7.
        </think>
        <answer>
        7
        </answer>
    """
    is_imprecise = bool(rng.random() < imprecise)
    is_skipped = bool(rng.random() < skipped) and len(question.operations) > 0
    phrases = _imprecise_phrases(scene, rng) if is_imprecise else [_phrase(item) for item in scene]
    caption = (_one_sentence, _sentences, _bullets)[rng.integers(3)](phrases)
    operations = () if is_skipped else _merged(question.operations) if rng.random() < 0.5 else question.operations
    reasoning = (_so, _sentences, _numbered)[rng.integers(3)]((*operations, question.conclusion))
    return Demonstration(chat.render(caption, reasoning, question.answer), is_imprecise, is_skipped)


def plain_caption(scene: Scene) -> str:
    """The base policy's caption: sentences without any block.

    Example:
        >>> from datamodules.digits_scene import Item
        >>> plain_caption([Item(digit=3, colour="red", row=0, col=0, place="top left", instance=0, dx=0, dy=0)])
        'red 3 at top left.'
    """
    return _sentences([_phrase(item) for item in scene])


def worked(question: Question) -> str:
    """The steps to an answer as sentences, without any block: `digits: 3 4. 3 + 4 = 7. the sum is 7.`"""
    return _sentences((*question.reads, *question.operations, question.conclusion))


def explained(scene: Scene, question: Question, *, in_lines: bool) -> str:
    """What is seen, then the steps to the answer, without any block: in sentences, or as bullets and numbered lines."""
    if not in_lines:
        return f"{plain_caption(scene)} {worked(question)}"
    steps = (*question.reads, *question.operations, question.conclusion)
    return f"{_bullets([_phrase(item) for item in scene])}\n{_numbered(steps)}"


def _phrase(item: Item) -> str:
    return f"{item['colour']} {item['digit']} at {item['place']}"


def _imprecise_phrases(scene: Scene, rng: np.random.Generator) -> list[str]:
    """One of: all places left out, all colours left out, one wrong colour, one wrong place, one digit missed."""
    kind = rng.integers(5 if len(scene) > 1 else 4)
    if kind == 0:
        return [f"{item['colour']} {item['digit']}" for item in scene]
    if kind == 1:
        return [f"{item['digit']} at {item['place']}" for item in scene]
    victim = int(rng.integers(len(scene)))
    item = scene[victim]
    if kind == 2:
        said = [_phrase({**item, "colour": str(rng.choice([c for c in COLOURS if c != item["colour"]]))})]
    elif kind == 3:
        said = [_phrase({**item, "place": str(rng.choice([p for p in PLACES if p != item["place"]]))})]
    else:
        said = []
    phrases = [_phrase(item) for item in scene]
    return phrases[:victim] + said + phrases[victim + 1 :]


def _merged(operations: Sequence[str]) -> tuple[str, ...]:
    """A chain of additions as one: "3 + 4 = 7", "7 + 2 = 9" become "3 + 4 + 2 = 9". Other operations stay."""
    chain = [operation for operation in operations if " + " in operation]
    if len(chain) < 2:
        return tuple(operations)
    terms = [chain[0].split(" = ")[0], *(operation.split(" = ")[0].split(" + ")[1] for operation in chain[1:])]
    return (f"{' + '.join(terms)} = {chain[-1].split(' = ')[1]}", *operations[len(chain) :])


def _bullets(phrases: Sequence[str]) -> str:
    return "\n".join(f"- {phrase}" for phrase in phrases)


def _numbered(phrases: Sequence[str]) -> str:
    return "\n".join(f"{number}. {phrase}" for number, phrase in enumerate(phrases, start=1))


def _sentences(phrases: Sequence[str]) -> str:
    return " ".join(f"{phrase}." for phrase in phrases)


def _one_sentence(phrases: Sequence[str]) -> str:
    return " and ".join(phrases) + "."


def _so(phrases: Sequence[str]) -> str:
    return ", so ".join(phrases) + "."
