"""How often each resample of a bootstrap draws each prompt.

All numbers of as many prompts are resampled alike, and an evaluation has hundreds of them: what was drawn last is kept.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

# Counts held in memory at once (32 MB as float64).
CHUNK = 4_000_000


def times_drawn(num_prompts: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Counts (R, P), in blocks of rows: prompts drawn one after the other. Not to be written to."""
    if num_prompts * num_resamples <= CHUNK:
        yield _drawn_at_once(num_prompts, num_resamples, seed)
        return
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // num_prompts)
    for first in range(0, num_resamples, rows):
        yield _draw(generator, num_prompts, min(rows, num_resamples - first))


def times_drawn_together(num_prompts: int, num_resamples: int, seed: int) -> np.ndarray:
    """The same distribution drawn at once, for what needs all resamples side by side. Not to be written to."""
    made = _multinomial if num_prompts * num_resamples <= CHUNK else _multinomial.__wrapped__
    return made(num_prompts, num_resamples, seed)


@lru_cache(maxsize=4)
def _drawn_at_once(num_prompts: int, num_resamples: int, seed: int) -> np.ndarray:
    return _read_only(_draw(np.random.default_rng(seed), num_prompts, num_resamples))


@lru_cache(maxsize=4)
def _multinomial(num_prompts: int, num_resamples: int, seed: int) -> np.ndarray:
    shares = [1 / num_prompts] * num_prompts
    counts_RP = np.random.default_rng(seed).multinomial(num_prompts, shares, num_resamples)
    return _read_only(counts_RP.astype(np.float64))


def _draw(generator: np.random.Generator, num_prompts: int, num_resamples: int) -> np.ndarray:
    drawn_RP = generator.integers(num_prompts, size=(num_resamples, num_prompts))
    drawn_RP += np.arange(num_resamples)[:, None] * num_prompts
    counts = np.bincount(drawn_RP.ravel(), minlength=drawn_RP.size)
    return counts.reshape(drawn_RP.shape).astype(np.float64)


def _read_only(counts_RP: np.ndarray) -> np.ndarray:
    counts_RP.flags.writeable = False
    return counts_RP
