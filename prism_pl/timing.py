"""Wall-clock time of the phases of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up seconds by phase; `pop` hands them over and starts anew.

    On a GPU a phase ends with a synchronisation, so that its time is its own: five a step, next to nothing beside a
    generation.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Seconds of each phase since the last call, as `time/<phase>`."""
        seconds = {f"time/{name}": value for name, value in self._seconds.items()}
        self._seconds = {}
        return seconds
