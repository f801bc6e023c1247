"""Checkpoints of several engines: a resumed run is the whole one, on as many ranks to the last bit, on others nearly."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks
from tests.test_deepspeed import MIXED, assert_same_training

pytest.importorskip("deepspeed")

ZERO3 = {"strategy": 3}


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    """An uninterrupted run on two ranks; made once for each strategy."""
    told = {}

    def of(**options):
        key = repr(sorted(options.items()))
        if key not in told:
            told[key] = ranks(tmp_path_factory.mktemp("whole"), 2, optimizer="AdamW", **options)
        return told[key]

    return of


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": 2, "engines": MIXED},
        *(pytest.param({"strategy": stage}, marks=pytest.mark.slow) for stage in (0, 1, 2, 3)),
    ],
)
def test_after_a_kill_of_one_rank_all_end_and_the_next_start_is_the_whole_run(ranks, whole, tmp_path, options):
    expected = whole(**options)
    began = time.monotonic()
    codes, screen = ranks.codes(tmp_path, 2, optimizer="AdamW", saved=True, kill=(1, 2), **options)
    assert codes[1] == -9
    assert codes[0] not in (0, -9), screen
    assert time.monotonic() - began < 60 + 120  # the training before the kill included
    assert not (tmp_path / "told.pt").exists()

    told = ranks(tmp_path, 2, optimizer="AdamW", saved=True, ckpt="last", **options)
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
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("from_to", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(ranks, whole, tmp_path, stage, from_to):
    first, then = from_to
    ranks(tmp_path, first, optimizer="AdamW", strategy=stage, saved=True, num_steps=2)
    told = ranks(tmp_path, then, optimizer="AdamW", strategy=stage, saved=True, ckpt="last")
    expected = whole(strategy=stage)
    told["steps"] = expected["steps"][:2] + told["steps"]
    assert_same_training(told, expected, losses=1e-4, weights=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_at_another_stage(ranks, whole, tmp_path):
    ranks(tmp_path, 2, optimizer="AdamW", strategy=2, saved=True, num_steps=2)
    told = ranks(tmp_path, 2, optimizer="AdamW", saved=True, ckpt="last", **ZERO3)
    expected = whole(strategy=2)
    told["steps"] = expected["steps"][:2] + told["steps"]
    assert_same_training(told, expected, losses=1e-4, weights=1e-4)


def test_another_strategy_goes_on_with_the_networks_alone(ranks, tmp_path):
    # SGD has no state to lose: the run is the uninterrupted one all the same.
    expected = ranks(tmp_path / "whole", 1)
    ranks(tmp_path, 2, strategy=2, engines=MIXED, saved=True, num_steps=2)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    codes, screen = ranks.codes(tmp_path / "refused", 1, strategy=0, ckpt=last)
    assert codes == [1]
    assert "what stage 0 saves cannot be cut anew" in screen
    assert "--weights-only-resume" in screen
    told = ranks(tmp_path / "one", 1, ckpt=last, weights_only=True)
    assert len(told["steps"]) == 1
    told["steps"] = expected["steps"][:2] + told["steps"]
    assert_same_training(told, expected, losses=1e-5, weights=1e-5)


@pytest.mark.slow
def test_a_file_of_one_process_goes_on_under_engines_with_the_networks_alone(ranks, tmp_path):
    expected = ranks(tmp_path / "whole", 1)
    ranks(tmp_path, 1, saved=True, num_steps=2)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    codes, screen = ranks.codes(tmp_path / "refused", 2, ckpt=last, **ZERO3)
    assert codes == [1, 1]
    assert "written by another strategy, in one file" in screen
    told = ranks(tmp_path / "two", 2, ckpt=last, weights_only=True, **ZERO3)
    told["steps"] = expected["steps"][:2] + told["steps"]
    assert_same_training(told, expected, losses=1e-5, weights=1e-5)


@pytest.mark.slow
def test_a_pickle_among_the_shards_is_refused_and_not_run(ranks, tmp_path):
    ranks(tmp_path, 2, strategy=2, saved=True, num_steps=2)
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
