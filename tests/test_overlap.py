"""Work on finished groups while the engine still generates."""

import threading

import pytest

from prism_pl.rewards.accuracy_format import RewardOutput
from prism_pl.rollout import Rollout
from prism_pl.rollout.overlap import Overlap


def group(p: int) -> list[Rollout]:
    return [Rollout([], [p], [0.0], f"response {p}", "stop")]


def test_the_work_on_a_group_is_done_while_the_engine_goes_on():
    worked = threading.Event()

    def work(p: int, rollouts: list[Rollout]) -> str:
        worked.set()
        return f"{p}: {rollouts[0].text}"

    with Overlap(work) as overlap:
        overlap.submit(1, group(1))
        # The engine is still busy with the others: it would wait here for good if the work only began when it returns.
        assert worked.wait(timeout=10)
        assert overlap.results([group(0), group(1), group(2)]) == ["0: response 0", "1: response 1", "2: response 2"]


def test_what_the_work_raises_is_raised():
    def work(p: int, rollouts: list[Rollout]) -> None:
        if p == 1:
            raise ValueError("row-1 has no answer")

    with Overlap(work) as overlap, pytest.raises(ValueError, match="row-1 has no answer"):
        overlap.results([group(0), group(1)])


def test_the_thread_ends_with_the_step():
    overlap = Overlap(lambda p, rollouts: p)
    with overlap:
        overlap.submit(0, group(0))
    with pytest.raises(RuntimeError, match="after shutdown"):
        overlap.submit(1, group(1))


def test_rewards_of_groups_are_joined_in_order():
    import torch

    parts = [RewardOutput(torch.tensor([p, p + 0.5]), {"accuracy": torch.tensor([0.0, p])}) for p in (1.0, 2.0)]
    whole = RewardOutput.joined(parts)
    assert whole.rewards_B.tolist() == [1.0, 1.5, 2.0, 2.5]
    assert whole.parts["accuracy"].tolist() == [0.0, 1.0, 0.0, 2.0]
    with pytest.raises(ValueError, match=r"the parts \['accuracy'\] for one prompt and \[\] for another"):
        RewardOutput.joined([parts[0], RewardOutput(torch.zeros(2))])
