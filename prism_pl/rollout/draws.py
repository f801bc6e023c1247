"""Which random numbers a call of an engine draws: the same in a resumed run as in the whole one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from prism_pl.rollout.engine import Sampling


class Draws:
    """Draws as a function of (seed, rank, number of earlier draws).

    The seed is torch's when this is made, so `seed_everything` sets it. A call with `Sampling.seed` depends on that
    seed and the rank alone and counts as no draw.

    Args:
        rank: whose draws; ranks that share one engine share one.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.seed = torch.initial_seed()
        self.num_draws = 0

    @contextmanager
    def seeded(self, sampling: Sampling, device: torch.device) -> Iterator[None]:
        """Engines draw from the global generators: seed them for one call, and put them back after it."""
        seed = int(self._next(sampling).generate_state(1, np.uint64)[0])
        numpy_state = np.random.get_state()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # vLLM's newer model runner takes its requests' seeds from numpy
            try:
                yield
            finally:
                np.random.set_state(numpy_state)

    def seeds(self, sampling: Sampling, num: int) -> list[int]:
        """Seeds of `num` requests of one call, for an engine that draws elsewhere. Below 2^62: vLLM counts on from a
        request's seed for its further samples, within 64 bits."""
        return [int(seed) >> 2 for seed in self._next(sampling).generate_state(num, np.uint64)]

    def _next(self, sampling: Sampling) -> np.random.SeedSequence:
        """What the numbers of the next call come from."""
        if sampling.seed is not None:
            # The last entry keeps the two kinds apart: numpy pads what is shorter with zeros.
            return np.random.SeedSequence([sampling.seed, self.rank, 0, 1])
        self.num_draws += 1
        return np.random.SeedSequence([self.seed, self.rank, self.num_draws - 1, 2])

    def state_dict(self) -> dict[str, Any]:
        """What the next draws depend on. The rank is not in it: every rank may load the first one's."""
        return {"seed": self.seed, "num_draws": self.num_draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on drawing where `state` was saved."""
        self.seed, self.num_draws = state["seed"], state["num_draws"]
