"""Wall-clock time and peak GPU memory of the phases of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up seconds by phase, and keeps the most GPU memory that tensors took in it; `pop` hands them over and starts
    anew.

    On a GPU a phase ends with a synchronisation, so that its time is its own: five a step, next to nothing beside a
    generation.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._gib: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block under `name`."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                self._gib[name] = max(self._gib.get(name, 0.0), torch.cuda.max_memory_allocated() / 2**30)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Of each phase since the last call: seconds as `time/<phase>`, and on a GPU `memory/<phase>`, the peak in
        GiB."""
        told = {f"time/{name}": value for name, value in self._seconds.items()}
        told |= {f"memory/{name}": value for name, value in self._gib.items()}
        self._seconds, self._gib = {}, {}
        return told
