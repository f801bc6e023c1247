"""Work on finished groups while the engine still generates."""

import threading

import pytest
import torch

from prism_pl.rewards.accuracy_format import RewardOutput
from prism_pl.rollout import Rollout
from prism_pl.rollout.overlap import Overlap
from tests.conftest import make_examples
from tests.stubs import RIGHT, WRONG, Rows, ScriptedEngine, fit, make_rlvr


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


class HandingOver(ScriptedEngine):
    """Hands each group over, the last one first, and goes on when it has been rewarded."""

    def __init__(self, texts, rewarded: list[tuple[str, list[str]]], told: threading.Semaphore) -> None:
        super().__init__(texts)
        self.rewarded, self.told = rewarded, told

    def generate(self, examples, num_samples, sampling, on_group=None):
        rollouts = super().generate(examples, num_samples, sampling)
        assert on_group is not None, "RLVR gave the engine nobody to hand finished groups to"
        for p in reversed(range(len(examples))):
            group = rollouts[p * num_samples : (p + 1) * num_samples]
            on_group(p, group)
            assert self.told.acquire(timeout=10), "a finished group waits for the others"
            assert self.rewarded[-1] == (examples[p].id, [rollout.text for rollout in group])
        return rollouts


def test_rlvr_rewards_a_group_while_its_engine_goes_on_and_once(random_policy, tmp_path):
    rewarded: list[tuple[str, list[str]]] = []
    told = threading.Semaphore(0)

    def reward(responses, examples):
        rewarded.append((examples[0].id, responses))
        told.release()
        return RewardOutput(torch.tensor([float("10" in response) for response in responses]))

    module = make_rlvr(random_policy, [RIGHT, WRONG, WRONG, WRONG], reward=reward)
    module.rollout = HandingOver([RIGHT, WRONG, WRONG, WRONG], rewarded, told)
    rows = make_examples(2)
    _, record = fit(module, Rows(rows), tmp_path)
    assert [row for row, _ in rewarded] == [rows[1].id, rows[0].id]
    assert record.outputs[0]["rewards"].tolist() == [[1.0, 0.0], [0.0, 0.0]]  # in the batch's order again


def test_rewards_of_groups_are_joined_in_order():
    parts = [RewardOutput(torch.tensor([p, p + 0.5]), {"accuracy": torch.tensor([0.0, p])}) for p in (1.0, 2.0)]
    whole = RewardOutput.joined(parts)
    assert whole.rewards_B.tolist() == [1.0, 1.5, 2.0, 2.5]
    assert whole.parts["accuracy"].tolist() == [0.0, 1.0, 0.0, 2.0]
    with pytest.raises(ValueError, match=r"the parts \['accuracy'\] for one prompt and \[\] for another"):
        RewardOutput.joined([parts[0], RewardOutput(torch.zeros(2))])
