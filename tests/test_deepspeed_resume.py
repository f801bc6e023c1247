"""Checkpoints of several engines: a resumed run is the whole one, on as many ranks to the last bit."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from tests.test_deepspeed import MIXED, assert_same_training

pytest.importorskip("deepspeed")

ADAM = {"optimizer": "AdamW"}


@pytest.mark.parametrize(
    "options",
    [MIXED, *(pytest.param({"dropout": 0.1, "strategy": stage}, marks=pytest.mark.slow) for stage in (0, 1, 2, 3))],
)
def test_after_a_kill_of_one_rank_all_end_and_the_next_start_is_the_whole_run(ranks, told_of, tmp_path, options):
    codes, screen = ranks.codes(tmp_path, 2, saved=True, kill=(1, 2), **ADAM, **options)
    assert codes[1] == -9
    assert codes[0] not in (0, -9), screen
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 60
    assert not (tmp_path / "told.pt").exists()

    # Another seed than the first start's: what is drawn, such as dropout on each rank, comes from the checkpoint.
    told = ranks(tmp_path, 2, saved=True, ckpt="last", seed=7, **ADAM, **options)
    expected = told_of(2, **ADAM, **options)
    assert len(told["steps"]) in (1, 2)  # from step 1 or 2, as far as the checkpoint had come
    assert told["steps"][-1] == pytest.approx(expected["steps"][-1], abs=0, rel=0, nan_ok=True)
    for name, weight in expected["weights"].items():
        assert torch.equal(told["weights"][name], weight), name
    assert_whole_folder(tmp_path / "checkpoints" / "last.ckpt")


def assert_whole_folder(last: Path) -> None:
    names = {path.name for path in last.iterdir()}
    assert names == {"manifest.json", "rank-0.ckpt", "rank-1.ckpt", "policy", "discriminator"}
    assert not list(last.parent.glob("*.partial"))
    assert not list(last.parent.glob("*.universal"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["rank-1.ckpt", "optim_states"])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_they_do_not_wait(ranks, tmp_path, part):
    started = time.time()
    codes, screen = ranks.codes(tmp_path, 2, strategy=2, saved=True, full_disk=(1, part), **ADAM)
    assert codes == [1, 1]
    assert time.time() - started < 300  # the group's time-out is 30 minutes
    assert screen.count("could not be written (No space left on device)") >= 2
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(ranks, told_of, tmp_path, stage, before, after):
    ranks(tmp_path, before, strategy=stage, saved=True, stop_after=2, **ADAM)
    told = ranks(tmp_path, after, strategy=stage, saved=True, ckpt="last", **ADAM)
    assert_goes_on(told, told_of(2, strategy=stage, **ADAM), weights=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_masters_of_bf16_weights_and_their_moments_are_cut_anew(ranks, told_of, tmp_path, stage):
    options = {"strategy": stage, "precision": "bf16-mixed", "sparse": True, **ADAM}
    ranks(tmp_path, 2, saved=True, stop_after=2, **options)
    last, expected = str(tmp_path / "checkpoints" / "last.ckpt"), told_of(2, **options)["weights"]

    def distance(folder: str, **how) -> float:
        told = ranks(tmp_path / folder, 1, ckpt=last, **options, **how)
        return sum(float((told["weights"][name] - w).abs().mean()) for name, w in expected.items()) / len(expected)

    assert distance("on") < 1e-5 < distance("moments-lost", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_a_run_goes_on_at_another_stage(ranks, told_of, tmp_path, before, after):
    ranks(tmp_path, 2, strategy=before, saved=True, stop_after=2, **ADAM)
    told = ranks(tmp_path, 2, strategy=after, saved=True, ckpt="last", **ADAM)
    assert_goes_on(told, told_of(2, strategy=2, **ADAM), weights=1e-4)


def assert_goes_on(told, expected, weights: float) -> None:
    """From the second step on, as the uninterrupted run."""
    assert len(told["steps"]) == 1
    told["steps"] = expected["steps"][:2] + told["steps"]
    assert_same_training(told, expected, losses=1e-5, weights=weights)


@pytest.mark.slow
def test_another_strategy_goes_on_with_the_networks_alone(ranks, told_of, tmp_path):
    # SGD has no state to lose: the run is the uninterrupted one all the same.
    ranks(tmp_path, 2, saved=True, stop_after=2, **MIXED)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    codes, screen = ranks.codes(tmp_path / "refused", 1, strategy=0, ckpt=last)
    assert codes == [1]
    assert "what stage 0 saves cannot be cut anew" in screen
    assert "--weights-only-resume" in screen
    for num_ranks, options in ((1, {}), (2, {"strategy": 0})):
        told = ranks(tmp_path / f"on-{num_ranks}", num_ranks, ckpt=last, weights_only=True, **options)
        assert_goes_on(told, told_of(1), weights=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_master_weights_start_from_the_float32_ones_and_not_from_their_rounding(ranks, told_of, tmp_path, stage):
    # Upcycled experts with noise and fresh heads, which bf16 rounds; steps of no size; read back in float32.
    options = {"sparse": True, "optimizer": "still"}
    ranks(tmp_path, 2, strategy=stage, precision="bf16-mixed", saved=True, stop_after=1, **options)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    told, expected = ranks(tmp_path / "one", 1, ckpt=last, weights_only=True, **options), told_of(1, **options)
    rounded = [name for name, weight in expected["weights"].items() if not torch.equal(weight.bfloat16(), weight)]
    assert any("heads" in name for name in rounded)
    assert any("experts" in name for name in rounded)
    for name, weight in expected["weights"].items():
        assert torch.equal(told["weights"][name], weight), name


@pytest.mark.slow
def test_a_file_of_one_process_goes_on_under_engines_with_the_networks_alone(ranks, told_of, tmp_path):
    ranks(tmp_path, 1, saved=True, stop_after=2)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    codes, screen = ranks.codes(tmp_path / "refused", 2, ckpt=last, strategy=3)
    assert codes == [1, 1]
    assert "written by another strategy, in one file" in screen
    told = ranks(tmp_path / "two", 2, ckpt=last, weights_only=True, strategy=3)
    assert_goes_on(told, told_of(1), weights=1e-5)


@pytest.mark.slow
def test_a_pickle_among_the_shards_is_refused_and_not_run(ranks, tmp_path):
    ranks(tmp_path, 2, strategy=2, saved=True, stop_after=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    shard = next((last / "policy" / "shards").glob("*optim_states.pt"))
    mark = tmp_path / "ran"
    state = torch.load(shard, weights_only=False)
    torch.save({**state, "planted": Planted(str(mark))}, shard)
    codes, screen = ranks.codes(tmp_path, 2, strategy=2, ckpt=str(last))
    assert codes != [0, 0]
    assert "Weights only load failed" in screen
    assert not mark.exists()


class Planted:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_is_not_whole_is_one_message(tmp_path, ranks):
    (tmp_path / "last.ckpt").mkdir()
    codes, screen = ranks.codes(tmp_path, 1, strategy=1, ckpt=str(tmp_path / "last.ckpt"))
    assert codes == [1]
    assert "is no checkpoint folder: it has no manifest.json" in screen
    shutil.rmtree(tmp_path / "last.ckpt")
