"""Wall-clock time and peak GPU memory of the phases of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up seconds by phase, and keeps the most GPU memory that tensors took in it, and what was in use at its end;
    `pop` hands them over and starts anew.

    The peak is torch's count. It takes a sleeping vLLM's memory for allocated, which vLLM has given back to the device,
    and does not see what other processes or NCCL hold; what is in use is the device's own word, which sees all of it,
    blocks that torch keeps for later included, and no peak.

    On a GPU a phase ends with a synchronisation, so that its time is its own: five a step, next to nothing beside a
    generation.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._gib: dict[str, float] = {}
        self._used: dict[str, float] = {}

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
                free, total = torch.cuda.mem_get_info()
                self._used[name] = max(self._used.get(name, 0.0), (total - free) / 2**30)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Of each phase since the last call: seconds as `time/<phase>`, and on a GPU in GiB `memory/<phase>`, the peak,
        and `memory_used/<phase>`, in use at the end."""
        told = {f"time/{name}": value for name, value in self._seconds.items()}
        told |= {f"memory/{name}": value for name, value in self._gib.items()}
        told |= {f"memory_used/{name}": value for name, value in self._used.items()}
        self._seconds, self._gib, self._used = {}, {}, {}
        return told
