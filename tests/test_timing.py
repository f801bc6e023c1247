"""What a step's phases took."""

import torch

from prism_pl.timing import PhaseTimer

GIB = 1 << 30


def test_a_phase_on_a_gpu_tells_its_peak_and_what_the_device_has_in_use_at_its_end(monkeypatch):
    peaks, free = iter([5 * GIB, 3 * GIB, 7 * GIB]), iter([60 * GIB, 70 * GIB, 80 * GIB])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 100 * GIB))
    timer = PhaseTimer()
    for name in ("policy", "sync", "policy"):
        with timer.phase(name):
            pass
    told = timer.pop()
    tags = ("time", "memory", "memory_used")
    assert told.keys() == {f"{tag}/{phase}" for tag in tags for phase in ("policy", "sync")}
    assert (told["memory/policy"], told["memory/sync"]) == (7.0, 3.0)
    assert (told["memory_used/policy"], told["memory_used/sync"]) == (40.0, 30.0)
    assert timer.pop() == {}
