"""Checkpoint folders of several engines: what a failure, a kill or another number of ranks leaves of them."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism_pl.checkpoint_files import CheckpointNotWritten, LastCheckpoints, put_in_place
from prism_pl.strategy import folder_checkpoint
from prism_pl.strategy.engines import save_shards
from prism_pl.strategy.folder_checkpoint import FolderCheckpoint


class Engine:
    """Writes two files as DeepSpeed does, with the ranks waiting for each other around each."""

    def __init__(self, failing: dict[str, Exception]) -> None:
        self.checkpoint_engine = Writer(failing)
        self.waited = 0

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.makedirs(f"{folder}/{tag}")
        for name in ("model", "optimizer"):
            self.waited += 1
            self.checkpoint_engine.save({}, f"{folder}/{tag}/{name}")
        self._copy_recovery_script(folder)
        self.waited += 1

    def _copy_recovery_script(self, folder: str) -> None:
        raise OSError(28, "No space left on device")


class Writer:
    def __init__(self, failing: dict[str, Exception]) -> None:
        self.failing = failing

    def makedirs(self, folder: str) -> None:
        os.makedirs(folder)

    def save(self, state: dict[str, Any], file: str) -> None:
        if raised := self.failing.get(Path(file).name):
            raise raised
        Path(file).touch()


def strategy_of(engines: dict[str, Any], world_size: int = 1) -> Any:
    stages = SimpleNamespace(stage=2)
    return SimpleNamespace(
        engines=engines, world_size=world_size, global_rank=0, is_global_zero=True, options_of=lambda name: stages
    )


@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), TypeError("cannot pickle")])
def test_a_rank_that_cannot_write_a_file_waits_for_the_others_all_the_same(tmp_path, raised):
    engine = Engine({"model": raised})
    with pytest.raises(type(raised)):
        save_shards(engine, str(tmp_path), "shards")
    assert engine.waited == 3
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"optimizer"}
    assert vars(engine.checkpoint_engine).keys() == {"failing"}  # as it was before


def test_a_full_disk_names_the_checkpoint_and_leaves_the_one_before(tmp_path):
    last = tmp_path / "last.ckpt"
    engine = Engine({})
    saved = FolderCheckpoint(strategy_of({"policy": engine}))
    saved.save({"step": 1}, last)
    for raised, error in ((OSError(28, "No space left on device"), CheckpointNotWritten), (TypeError("no"), TypeError)):
        engine.checkpoint_engine.failing["optimizer"] = raised
        with pytest.raises(error, match=r"last\.ckpt could not be written \(No space|no"):
            saved.save({"step": 2}, last)
        assert torch.load(last / "rank-0.ckpt", weights_only=True) == {"step": 1}


def test_what_stopped_another_rank_stops_this_one_with_its_words(tmp_path, monkeypatch):
    saved = FolderCheckpoint(strategy_of({}))
    for not_on_disk, error in ((True, CheckpointNotWritten), (False, RuntimeError)):
        monkeypatch.setattr(
            folder_checkpoint, "gathered_values", lambda words, kind=not_on_disk: [words, (kind, "rank 1 says so")]
        )
        with pytest.raises(error, match="rank 1 says so"):
            saved.save({}, tmp_path / "last.ckpt")
        assert not (tmp_path / "last.ckpt").exists()


def test_a_kill_while_a_name_is_given_anew_leaves_the_older_one_whole(tmp_path, monkeypatch):
    name, finished = tmp_path / "best.ckpt", tmp_path / "best.ckpt.partial"
    for content in ("first", "second"):
        finished.mkdir()
        (finished / "weights").write_text(content)
        put_in_place(finished, name)
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]
    assert (name / "weights").read_text() == "second"

    finished.mkdir()
    (finished / "weights").write_text("third")
    replace, calls = os.replace, []

    def killed(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(finished, name)
    whole = {(path / "weights").read_text() for path in tmp_path.iterdir()}
    assert whole == {"second", "third"}


def folder_of(path: Path, ranks: int, stage: int = 2) -> None:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"ranks": ranks, "stages": {"policy": stage}}))
    for rank in range(ranks):
        buffer = {"groups": [f"a group of {rank}"], "refills": 2, "barren": 1}
        torch.save({"rlvr": {"buffer": buffer, "shuffle_seed": 3}}, path / f"rank-{rank}.ckpt")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_groups_held_back_are_kept_by_as_many_ranks_and_others_are_told_that_they_are_lost(
    tmp_path, monkeypatch, ranks
):
    told: list[str] = []
    monkeypatch.setattr(folder_checkpoint, "rank_zero_info", told.append)
    path = tmp_path / "last.ckpt"
    folder_of(path, ranks=2)
    state = FolderCheckpoint(strategy_of({"policy": Engine({})}, world_size=ranks)).load(path)
    kept = ranks == 2
    buffer = {"groups": ["a group of 0"], "refills": 2} if kept else {"groups": [], "refills": 0}
    assert ["held back are lost" in line for line in told] == ([] if kept else [True])
    assert state["rlvr"] == {"buffer": buffer | {"barren": 1}, "shuffle_seed": 3}


def test_a_kill_while_shards_are_cut_anew_leaves_nothing_after_the_next_start(tmp_path, monkeypatch):
    last = tmp_path / "checkpoints" / "last.ckpt"
    folder_of(last, ranks=2)

    def killed(source: Path, target: Path, *_: Any) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_checkpoint, "convert", killed)
    saved = FolderCheckpoint(strategy_of({"policy": Engine({})}))
    saved.load(last)
    with pytest.raises(KeyboardInterrupt):
        saved.load_networks({})
    assert len(list(last.parent.iterdir())) == 2
    LastCheckpoints(tmp_path).begin(last, 1, 2)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("precision", ["", "bf16_"])
def test_stage_1_shards_are_put_together_to_the_float32_master_weights(tmp_path, precision):
    """A weight may lie on several ranks, and a partition end with padding; of what is not trained there is no master,
    and of one that has two names one."""
    fragment_address = pytest.importorskip("deepspeed.utils.tensor_fragment").fragment_address
    shards = tmp_path / "policy" / "shards"
    shards.mkdir(parents=True)
    (tmp_path / "manifest.json").write_text(json.dumps({"ranks": 2, "stages": {"policy": 1}}))
    torch.save({"state_dict": {"own": torch.ones(1)}}, tmp_path / "rank-0.ckpt")
    masters = {"a": torch.randn(2, 3), "b": torch.randn(1)}
    module = {name: weight.bfloat16() for name, weight in masters.items()} | {
        "tied": masters["a"].bfloat16(),
        "frozen": torch.tensor([0.5]).bfloat16(),
        "counts": torch.tensor([3]),
    }
    torch.save({"module": module, "shared_params": {"tied": "a"}}, shards / "mp_rank_00_model_states.pt")
    flat = masters["a"].flatten()
    parts = [flat[:4], torch.cat([flat[4:], masters["b"], torch.zeros(1)])]
    places = [{"a": fragment_address(4, 0)}, {"a": fragment_address(2, 0), "b": fragment_address(1, 2)}]
    for rank in range(2):
        state = {"param_slice_mappings": [places[rank]], "single_partition_of_fp32_groups": [parts[rank]]}
        file = shards / f"{precision}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, file)

    read = folder_checkpoint.consolidated(tmp_path)["state_dict"]
    expected = {f"policy.{name}": weight for name, weight in (module | masters | {"tied": masters["a"]}).items()}
    assert read.keys() == expected.keys() | {"own"}
    for name, weight in expected.items():
        assert torch.equal(read[name], weight.float() if weight.is_floating_point() else weight), name
        assert read[name].dtype != torch.bfloat16

    file.unlink()  # of the second rank
    with pytest.raises(FileNotFoundError, match="no part of rank 1: the checkpoint is not whole"):
        folder_checkpoint.consolidated(tmp_path)
