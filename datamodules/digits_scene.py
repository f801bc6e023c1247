"""Scenes of handwritten digits: what stands where, in which colour and whose handwriting, and how that is drawn.

The handwriting is scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" set: 1,797 digits of
8 x 8 pixels by 43 writers. A scene puts each digit into its own cell of a 3 x 3 grid.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Handwriting = Literal["train", "validation", "test"]

CELL = 32
GLYPH = 28
GRID = 3
CANVAS = CELL * GRID
COLOURS = {
    "red": (235, 45, 45),
    "green": (50, 205, 70),
    "blue": (65, 105, 255),
    "yellow": (245, 225, 40),
    "purple": (190, 60, 230),
    "white": (245, 245, 245),
}
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
ROWS = ("top", "middle", "bottom")

# Fixed, not an argument: the shipped base policy was trained on this split's training handwriting, and another
# permutation would put some of it into the test images.
_SPLIT_SEED = 20
_NUM_HELD_OUT = 300


class Item(TypedDict):
    """One digit of a scene. `row` and `col` count from the top left; `instance` is the row of scikit-learn's table;
    `dx` and `dy` place the glyph inside its cell, in pixels from the cell's top left corner."""

    digit: int
    colour: str
    row: int
    col: int
    place: str
    instance: int
    dx: int
    dy: int


Scene = list[Item]


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Glyphs (1797, 28, 28) in [0, 1] and their labels (1797,)."""
    from PIL import Image
    from sklearn.datasets import load_digits

    # 16 levels of grey.
    levels, labels = load_digits(return_X_y=True)
    small = (np.asarray(levels) * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
    size = (GLYPH, GLYPH)
    glyphs = np.stack([np.asarray(Image.fromarray(glyph).resize(size, Image.Resampling.BICUBIC)) for glyph in small])
    return glyphs.astype(np.float32) / 255, np.asarray(labels)


@lru_cache(maxsize=1)
def handwriting_instances() -> dict[Handwriting, list[np.ndarray]]:
    """For train, validation and test, the instances of each label 0..9. No instance stands in two of the three."""
    labels = _handwriting()[1]
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    test, validation, train = np.split(order, [_NUM_HELD_OUT, 2 * _NUM_HELD_OUT])
    parts: dict[Handwriting, np.ndarray] = {"train": train, "validation": validation, "test": test}
    return {name: [part[labels[part] == label] for label in range(10)] for name, part in parts.items()}


def sample_scene(rng: np.random.Generator, num_digits: int, handwriting: Handwriting) -> Scene:
    """A scene of `num_digits` digits in reading order. Half of the scenes use at most two colours, so that questions
    that filter by colour have something to collect."""
    instances = handwriting_instances()[handwriting]
    cells = np.sort(rng.choice(GRID * GRID, num_digits, replace=False))
    names = list(COLOURS)
    palette = rng.choice(len(names), 2 if rng.random() < 0.5 else len(names), replace=False)
    scene: Scene = []
    for cell in cells:
        digit = int(rng.integers(10))
        scene.append(
            Item(
                digit=digit,
                colour=names[rng.choice(palette)],
                row=int(cell) // GRID,
                col=int(cell) % GRID,
                place=PLACES[cell],
                instance=int(rng.choice(instances[digit])),
                dx=int(rng.integers(CELL - GLYPH + 1)),
                dy=int(rng.integers(CELL - GLYPH + 1)),
            )
        )
    return scene


def draw(scene: Sequence[Item]) -> "Image":
    """The scene as a 96 x 96 RGB image: glyphs tinted on a nearly black background."""
    from PIL import Image

    glyphs = _handwriting()[0]
    canvas = np.full((CANVAS, CANVAS, 3), 12, dtype=np.float32)
    for item in scene:
        top, left = item["row"] * CELL + item["dy"], item["col"] * CELL + item["dx"]
        window = canvas[top : top + GLYPH, left : left + GLYPH]
        window += glyphs[item["instance"]][:, :, None] * (np.array(COLOURS[item["colour"]], dtype=np.float32) - window)
    return Image.fromarray(canvas.round().astype(np.uint8))
