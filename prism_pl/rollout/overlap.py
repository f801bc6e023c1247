"""Work on finished groups of rollouts while the engine still generates."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from prism_pl.rollout.engine import Rollout

Result = TypeVar("Result")


class Overlap(Generic[Result]):
    """One thread beside the engine. An engine waits for its GPU most of the time, and parsing takes a CPU.

    Args:
        work: on the rollouts of one example, given its number.

    Example:
        with Overlap(reward_group) as overlap:
            rollouts = engine.generate(examples, 8, sampling, overlap.submit)
            rewards = overlap.results([rollouts[p * 8 : p * 8 + 8] for p in range(len(examples))])
    """

    def __init__(self, work: Callable[[int, list[Rollout]], Result]) -> None:
        self.work = work
        # A thread begins on the first GPU, whichever is this process's.
        here = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="overlap", initializer=here)
        self.futures: dict[int, Future[Result]] = {}

    def submit(self, p: int, rollouts: list[Rollout]) -> None:
        """Begin the work on a group."""
        self.futures[p] = self.pool.submit(self.work, p, rollouts)

    def results(self, groups: Sequence[list[Rollout]]) -> list[Result]:
        """The results of all groups in order; the work on those that the engine did not hand over is done now. Raises
        what the work raised."""
        for p, group in enumerate(groups):
            if p not in self.futures:
                self.submit(p, group)
        return [self.futures[p].result() for p in range(len(groups))]

    def __enter__(self) -> "Overlap[Result]":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)
