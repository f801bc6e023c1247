"""Rows of the embedded default: each a function of (split, index, seed, recipe) alone.

So data sets hold no images and the same seed gives the same bytes; handwriting never crosses between training,
validation and test.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from datamodules import digits_teacher as teacher
from datamodules.digits_questions import FAMILIES, Question, ask
from datamodules.digits_scene import Handwriting, Scene, draw, sample_scene
from prism_pl.batch import Example

Split = Literal["pretrain", "sft", "warmup", "align", "rlvr", "validation", "test", "hard"]

SYSTEM_PROMPT = "Write <caption>, <think>, <answer>."
BRIEF_PROMPT = "Answer."
CAPTION_QUESTION = "Describe the image."
EXPLAIN = "Explain."
EXPLAIN_IN_LINES = "Explain in lines."

# The position is the split's code in the seed of each row: never reorder.
_SPLITS: tuple[Split, ...] = ("pretrain", "sft", "warmup", "align", "rlvr", "validation", "test", "hard")


@dataclass(frozen=True)
class Recipe:
    """What rows are made of. Shares are in [0, 1].

    Attributes:
        max_digits: training, validation and test scenes hold 1 to `max_digits` digits.
        hard_digits: least and most digits of the hard split.
        curated: share of curated rows in `sft`; the others are public.
        imprecise, skipped: shares of public rows with an imprecise caption, or without the operations.
        captions: share of `pretrain` rows that ask for a plain caption.
        told: share of `pretrain` rows that tell the scene in words, without an image, and are answered step by step.
        explained: share of the other `pretrain` rows that ask for an explanation: what is seen, then the steps.
        instructed: share of `pretrain` rows under `system_prompt`; the others stand under "Answer.". The base policy
            so answers briefly whichever of the two it is given.
        system_prompt: the same at every stage and in evaluation; None is `prism_pl.chat.SYSTEM_PROMPT`.
        families: question families, in turn by index.
    """

    max_digits: int = 3
    hard_digits: tuple[int, int] = (4, 5)
    curated: float = 0.25
    imprecise: float = 0.3
    skipped: float = 0.3
    captions: float = 0.4
    told: float = 0.0
    explained: float = 0.0
    instructed: float = 0.5
    system_prompt: str | None = SYSTEM_PROMPT
    families: Sequence[str] = FAMILIES

    def __post_init__(self) -> None:
        """Raises ValueError for an option that is not allowed."""
        if not 2 <= self.max_digits <= 8:
            raise ValueError(f"max_digits is {self.max_digits}: give 2 to 8, half of the questions compare digits")
        low, high = self.hard_digits
        if not self.max_digits < low <= high <= 9:
            raise ValueError(
                f"hard_digits is ({low}, {high}): give least and most digits, more than max_digits "
                f"({self.max_digits}) and at most 9, the number of cells"
            )
        shares = {
            "curated": self.curated,
            "imprecise": self.imprecise,
            "skipped": self.skipped,
            "captions": self.captions,
            "told": self.told,
            "explained": self.explained,
            "instructed": self.instructed,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}: it is a share, give 0 to 1")
        unknown = [family for family in self.families if family not in FAMILIES]
        if unknown or not self.families:
            raise ValueError(f"families is {list(self.families)}: give at least one of {', '.join(FAMILIES)}")


def make_example(
    split: Split, index: int, seed: int, recipe: Recipe | None = None, *, brief: bool = False, with_image: bool = True
) -> Example:
    """Row `index` of a split, a function of the arguments alone.

    The validation, test and hard rows carry the curated demonstration as the supervision to compare with; `rlvr` rows
    carry none. `brief` gives any split the responses of `pretrain` (for the base policy's validation). `meta` holds
    family, split, scene (a list of `Item`), answer, relevant, number, num_digits, num_steps, style, imprecise, skipped.

    Example:
        >>> make_example("rlvr", 0, seed=0).meta["family"]
        'sum'
    """
    recipe = recipe or Recipe()
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}: give one of {', '.join(_SPLITS)}")
    rng = np.random.default_rng([seed, _SPLITS.index(split), index])
    family = recipe.families[index % len(recipe.families)]
    scene, question = _scene_and_question(split, family, rng, recipe)
    row = Example(
        id=_row_id(split, seed, index, recipe),
        question=question.text,
        images=[draw(scene)] if with_image else [],
        answers=[question.answer],
        system=recipe.system_prompt,
        meta=_meta(split, scene, question),
    )
    if brief or split == "pretrain":
        _make_brief(row, question, rng, recipe)
    elif split == "sft" and rng.random() >= recipe.curated:
        made = teacher.public(scene, question, rng, imprecise=recipe.imprecise, skipped=recipe.skipped)
        row.response = made.response
        row.meta.update(style="public", imprecise=made.imprecise, skipped=made.skipped)
    elif split != "rlvr":
        row.response = teacher.curated(scene, question)
        row.meta.update(style="curated")
    return row


def _scene_and_question(split: Split, family: str, rng: np.random.Generator, recipe: Recipe) -> tuple[Scene, Question]:
    """Scenes are drawn until one has an unambiguous question of the family."""
    handwriting: dict[str, Handwriting] = {"validation": "validation", "test": "test", "hard": "test"}
    low, high = recipe.hard_digits if split == "hard" else (1, recipe.max_digits)
    while True:
        scene = sample_scene(rng, int(rng.integers(low, high + 1)), handwriting.get(split, "train"))
        question = ask(family, scene, rng)
        if question is not None:
            return scene, question


def _meta(split: Split, scene: Scene, question: Question) -> dict[str, Any]:
    return {
        "family": question.family,
        "split": split,
        "scene": scene,
        "answer": question.answer,
        "relevant": list(question.relevant),
        "number": question.number,
        "num_digits": len(scene),
        "num_steps": len(question.reads) + len(question.operations) + 1,
        "style": None,
        "imprecise": False,
        "skipped": False,
    }


def _make_brief(row: Example, question: Question, rng: np.random.Generator, recipe: Recipe) -> None:
    """Turn a row into one of the base policy's: the bare answer; a plain caption, for another question; the steps to
    the answer, where the scene is told in words; or an explanation, where one is asked for. So the base can see, reckon
    and explain, and knows no three blocks."""
    if rng.random() >= recipe.instructed:
        row.system = BRIEF_PROMPT
    row.response = row.meta["answer"]
    row.meta.update(style="brief")
    if recipe.told and rng.random() < recipe.told:
        row.images, row.question = [], f"{teacher.plain_caption(row.meta['scene'])} {row.question}"
        row.response = teacher.worked(question)
        row.meta.update(style="told", family="told")
        return
    if recipe.explained and rng.random() < recipe.explained:
        in_lines = bool(rng.random() < 0.5)
        row.question = f"{EXPLAIN_IN_LINES if in_lines else EXPLAIN} {row.question}"
        row.response = teacher.explained(row.meta["scene"], question, in_lines=in_lines)
        row.meta.update(style="explained", family="explained")
        return
    if rng.random() < recipe.captions:
        row.question, row.response = CAPTION_QUESTION, teacher.plain_caption(row.meta["scene"])
        row.answers = [row.response]
        row.meta.update(style="caption", family="caption", answer=row.response)


def corpus(num: int, seed: int = 0, recipe: Recipe | None = None) -> Iterator[str]:
    """The texts of `num` training rows of all styles, to train a tokenizer on: a chat's turns, each with its role."""
    splits: tuple[Split, ...] = ("pretrain", "sft", "align")
    for index in range(num):
        row = make_example(splits[index % 3], index // 3, seed, recipe, with_image=False)
        yield from (f"system\n{row.system or ''}", f"user\n{row.question}", "assistant\n", row.response or "")


class DigitsDataset(Dataset[Example]):
    """The first `num_rows` rows of a split, made when they are asked for."""

    def __init__(
        self, split: Split, num_rows: int, seed: int = 0, recipe: Recipe | None = None, *, brief: bool = False
    ) -> None:
        self.split: Split = split
        self.num_rows = num_rows
        self.seed = seed
        self.recipe = recipe or Recipe()
        self.brief = brief

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows} in {self.split}")
        return make_example(self.split, index, self.seed, self.recipe, brief=self.brief)

    @property
    def ids(self) -> list[str]:
        """The rows' ids, without making the rows."""
        return [_row_id(self.split, self.seed, index, self.recipe) for index in range(self.num_rows)]


def _row_id(split: Split, seed: int, index: int, recipe: Recipe) -> str:
    """What asks other questions has another id: one prompt's pass rate must not be taken for another's."""
    asked, default = (
        (r.max_digits, tuple(r.hard_digits), tuple(r.families), r.system_prompt) for r in (recipe, Recipe())
    )
    other = "" if asked == default else "-" + hashlib.sha256(repr(asked).encode()).hexdigest()[:8]
    return f"digits-{split}-{seed}-{index}{other}"
