"""Dynamic sampling: what is trained on, what a shortfall does, and going on while the buffer waits."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch

from modules.rlvr import RLVRModule
from prism_pl.groups import Group, GroupBuffer
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.updates import KLPenalty
from tests.conftest import make_examples
from tests.stubs import RIGHT, WRONG, Rows, SaveAfter, equal, fit, weights
from tests.stubs import make_rlvr as make

R, W = RIGHT, WRONG


def trained_ids(module: RLVRModule, monkeypatch) -> list[list[str]]:
    """Fills up with the prompts of each batch of groups that the module trains on."""
    found: list[list[str]] = []
    train = module._train
    monkeypatch.setattr(module, "_train", lambda groups: (found.append([g.prompt.id for g in groups]), train(groups)))
    return found


def test_dynamic_sampling_waits_for_groups_with_variance_and_cuts_the_surplus(random_policy, tmp_path, monkeypatch):
    # Batches of two prompts: one mixed group, none, two: three mixed groups of which two are trained on.
    module = make(random_policy, [R, R, R, W, W, W, W, W, R, W, W, R], dynamic_sampling=True)
    trained = trained_ids(module, monkeypatch)
    saved = SaveAfter(1, tmp_path / "waiting.ckpt")
    trainer, record = fit(module, Rows(make_examples(6)), tmp_path, [saved])
    assert trained == [["row-1", "row-4"]]
    assert trainer.global_step == 1
    assert "rlvr/policy_loss" not in record.steps[1]
    assert record.steps[2]["rlvr/refills"] == 2
    assert record.steps[2]["rlvr/shortfall"] == 0
    # Logged of every sampled batch, before the choice: 3 of 4 right, so 0.75, then 0, then 0.5.
    assert [step["rlvr/accuracy"] for step in record.steps] == [0.75, 0.0, 0.5]
    assert [step["rlvr/zero_std_groups"] for step in record.steps] == [1, 2, 0]
    state = torch.load(tmp_path / "waiting.ckpt", weights_only=True)["state_dict"]
    fresh = build_policy(PolicySpec(random_policy)).state_dict()
    assert all(torch.equal(state[f"policy.{name}"], value) for name, value in fresh.items())


def test_used_up_refills_train_on_what_there_is_and_log_the_shortfall(random_policy, tmp_path, monkeypatch):
    module = make(random_policy, [R, R, R, W, W, W, W, W], dynamic_sampling=True, max_refills=1)
    trained = trained_ids(module, monkeypatch)
    trainer, record = fit(module, Rows(make_examples(4)), tmp_path)
    assert trained == [["row-1"]]
    assert (record.steps[1]["rlvr/refills"], record.steps[1]["rlvr/shortfall"]) == (1, 1)
    assert trainer.global_step == 1


def test_without_any_variance_the_step_is_skipped_and_counted(random_policy, tmp_path):
    module = make(random_policy, [W], dynamic_sampling=True, max_refills=0)
    module.configure_model()
    before = weights(module.policy)
    trainer, record = fit(module, Rows(make_examples(4)), tmp_path, max_epochs=1, max_steps=-1)
    assert trainer.global_step == 0
    assert [step["rlvr/skipped"] for step in record.steps] == [1, 1]
    assert [step["rlvr/shortfall"] for step in record.steps] == [2, 2]
    assert equal(weights(module.policy), before)


def test_a_buffer_of_another_size_than_the_batch(random_policy, tmp_path, monkeypatch):
    module = make(random_policy, [R, W, R, W], dynamic_sampling=True, num_prompts=1)
    trained = trained_ids(module, monkeypatch)
    fit(module, Rows(make_examples(4)), tmp_path, max_steps=2)
    assert trained == [["row-0"], ["row-2"]]


@pytest.mark.parametrize("saved_after", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(random_policy, tmp_path, saved_after):
    # Every second batch has no variance, so the first checkpoint falls where the buffer waits.
    texts = [R, W, W, W, R, R, R, W]
    options: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "dynamic_sampling": True,
        "num_minibatches": 2,
        "kl": KLPenalty(0.01),
    }
    rows = make_examples(8)
    whole = make(random_policy, texts, **options)
    file = tmp_path / "step.ckpt"
    torch.manual_seed(3)
    trainer, _ = fit(whole, Rows(rows, resumable=True), tmp_path, [SaveAfter(saved_after, file)], max_steps=6)
    state = torch.load(file, weights_only=True)
    assert bool(state["rlvr"]["buffer"]["groups"]) == (saved_after == 2)
    assert not any(name.startswith("reference.") for name in state["state_dict"])
    torch.manual_seed(4)
    resumed = make(random_policy, texts, **options)
    again, _ = fit(resumed, Rows(rows, resumable=True), tmp_path, ckpt=file, max_steps=6)
    assert again.global_step == trainer.global_step
    assert resumed.shuffle_seed == whole.shuffle_seed == 3
    assert equal(weights(resumed.policy), weights(whole.policy))


def test_a_run_without_any_variance_stops_and_says_why(random_policy, tmp_path):
    # Two refills a window: the fourth batch is in the second one.
    module = make(random_policy, [W], dynamic_sampling=True, max_refills=2, max_barren=4)
    file = tmp_path / "third.ckpt"
    with pytest.raises(ValueError, match=r"no group to train on in 4 batches \(max_barren\).*num_rollouts"):
        fit(module, Rows(make_examples(2)), tmp_path, [SaveAfter(2, file)], max_epochs=-1)
    # The count goes on in a resumed run, and a group worth training ends it.
    resumed = make(random_policy, [W], dynamic_sampling=True, max_refills=2, max_barren=4)
    with pytest.raises(ValueError, match="in 4 batches"):
        fit(resumed, Rows(make_examples(2)), tmp_path, ckpt=file, max_epochs=-1)
    assert resumed.trainer.fit_loop.total_batch_idx == 3
    module = make(random_policy, [W] * 12 + [R, W, W, W] + [W] * 12, dynamic_sampling=True, max_refills=0, max_barren=4)
    with pytest.raises(ValueError, match="in 4 batches"):
        fit(module, Rows(make_examples(2)), tmp_path, max_epochs=-1, max_steps=9)
    assert module.trainer.fit_loop.total_batch_idx == 3 + 1 + 3


@pytest.mark.parametrize("max_steps", [1, 3, 4])
def test_a_run_stops_at_max_steps_in_the_middle_of_a_batch_too(random_policy, tmp_path, max_steps):
    module = make(random_policy, [R, W], updates_per_batch=2)
    trainer, _ = fit(module, Rows(make_examples(4)), tmp_path, max_steps=max_steps)
    assert trainer.global_step == max_steps


def test_two_ranks_wait_train_and_fall_short_together(monkeypatch):
    # What each rank finds worth training on, batch by batch; two groups are wanted, at most two refills.
    counts = ([2, 0, 1, 3, 0, 0, 0], [1, 1, 2, 0, 1, 1, 3])
    meeting, own = Barrier(2, timeout=20), threading.local()
    met: list[Any] = [None, None]

    def smallest(value: torch.Tensor) -> torch.Tensor:
        met[own.rank] = value
        meeting.wait()
        result = torch.minimum(*met)
        meeting.wait()
        return result

    monkeypatch.setattr("prism_pl.groups.global_min", smallest)

    def decisions(rank: int) -> list[Any]:
        own.rank, buffer = rank, GroupBuffer(max_refills=2)
        told = []
        for count in counts[rank]:
            buffer.add([Group(None, [], torch.zeros(1))] * count)  # type: ignore[arg-type]
            draw = buffer.take(2, torch.device("cpu"))
            told.append(None if draw is None else (len(draw.groups), draw.refills, draw.shortfall))
        return told

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(decisions, range(2))
    # Held together: min(2, 1) = 1, min(2, 2) = 2; then anew min(1, 2) = 1, min(4, 2) = 2; then nothing,
    # though the second rank has 1, 2 and 5 groups: without refills left no step is taken.
    assert first == second == [None, (2, 1, 0), None, (2, 1, 0), None, None, (0, 2, 2)]
