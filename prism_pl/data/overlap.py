"""Rows that stand twice in a set, and what sets share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from prism_pl.data.facts import Facts

WHAT = ("questions", "images", "images that look alike", "rows")
ALIKE = 0.1  # of the places where brightness rises in either image, the most that may differ
CHUNK = 1000  # rows that are compared at once


@dataclass
class Split:
    """A set of rows by name."""

    name: str
    facts: list[Facts] = field(default_factory=list)

    @property
    def shows_images(self) -> bool:
        """Whether there are pixels to compare: of some image they were read, or no row has an image."""
        return any(row.images for row in self.facts) or not any(row.num_images for row in self.facts)


@dataclass
class Found:
    """What is shared.

    Attributes:
        duplicates: split -> row -> the earlier row that asks the same about the same images.
        shared: (split, other) -> what -> how many rows of the split share it with the other; None: no row was
            found, and one of them shows no image.
        examples: the same -> a row of each.
        shared_rows: training row -> (the other set, what): rows whose images stand there, or whose whole row does.
    """

    duplicates: dict[str, dict[int, int]] = field(default_factory=dict)
    shared: dict[tuple[str, str], dict[str, int | None]] = field(default_factory=dict)
    examples: dict[tuple[str, str, str], tuple[str, str]] = field(default_factory=dict)
    shared_rows: dict[int, tuple[str, str]] = field(default_factory=dict)


def overlap(splits: Mapping[str, Split], others: Mapping[str, Split]) -> Found:
    """Duplicates within each split and set, and what the training rows share with the others."""
    found = Found()
    sets = {**splits, **others}
    for name, split in sets.items():
        found.duplicates[name] = _duplicates(split.facts)
    train = splits.get("train")
    for name, other in sets.items():
        if train is not None and name != "train":
            _compare(train, other, found)
    return found


def _duplicates(facts: list[Facts]) -> dict[int, int]:
    first: dict[tuple[str, ...], int] = {}
    again = {}
    for number, row in enumerate(facts):
        if row.row_key and first.setdefault(row.row_key, number) != number:
            again[number] = first[row.row_key]
    return again


def _compare(train: Split, other: Split, found: Found) -> None:
    pair = (train.name, other.name)
    counts = found.shared[pair] = dict.fromkeys(WHAT)
    compared = train.shows_images and other.shows_images
    for what in WHAT:
        hits = list(_hits(train.facts, other.facts, what))
        counts[what] = len(hits) if hits or compared or what == "questions" else None
        for number, there in hits:
            found.examples.setdefault((*pair, what), (train.facts[number].id, other.facts[there].id))
            if what != "questions":
                said = "the question and images" if what == "rows" else "an image"
                found.shared_rows.setdefault(number, (other.name, said))


def _hits(here: list[Facts], there: list[Facts], what: str) -> Iterator[tuple[int, int]]:
    """Rows here that share something with a row there, with the first such row, once each."""
    if what == "images that look alike":
        yield from _alike(here, there)
        return
    first: dict[object, int] = {}
    for number, row in enumerate(there):
        for key in _keys(row, what):
            first.setdefault(key, number)
    for number, row in enumerate(here):
        hits = [first[key] for key in _keys(row, what) if key in first]
        if hits:
            yield number, hits[0]


def _keys(row: Facts, what: str) -> list[object]:
    if what == "images":
        return list(row.images)
    key = row.question if what == "questions" else row.row_key
    return [key] if key else []


def _alike(here: list[Facts], there: list[Facts]) -> Iterator[tuple[int, int]]:
    bits_here, rows_here = _bits(here)
    bits_there, rows_there = _bits(there)
    found: dict[int, int] = {}
    for start in range(0, len(bits_here) if len(bits_there) else 0, CHUNK):
        chunk = bits_here[start : start + CHUNK]
        differing = np.bitwise_count(chunk[:, None] ^ bits_there[None]).sum(-1, dtype=np.int32)
        counts = np.maximum(_num_bits(chunk)[:, None], _num_bits(bits_there)[None])
        for image, other in np.argwhere((differing <= ALIKE * counts) & (counts > 0)).tolist():
            found.setdefault(rows_here[start + image], rows_there[other])
    yield from sorted(found.items())


def _bits(facts: list[Facts]) -> tuple[np.ndarray, list[int]]:
    """(images, 4) words of 64 bits, and the row of each image."""
    rows = [number for number, row in enumerate(facts) for _ in row.looks]
    joined = b"".join(bits for row in facts for bits in row.looks)
    return np.frombuffer(joined, dtype=np.uint64).reshape(len(rows), 4), rows


def _num_bits(words: np.ndarray) -> np.ndarray:
    return np.bitwise_count(words).sum(-1, dtype=np.int32)
