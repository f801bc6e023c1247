"""A checkpoint of several engines: one folder, written whole or not at all.

last.ckpt/
    manifest.json       ranks, and the ZeRO stage of each engine
    rank-0.ckpt ...     Lightning's state on each rank: loops, callbacks, random numbers, what is in no engine
    policy/shards/      DeepSpeed's files of that engine: weights, and the optimiser's state of each rank
    discriminator/shards/
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from prism_pl.checkpoint_files import (
    PARTIAL,
    CheckpointNotWritten,
    not_written,
    put_in_place,
    remove,
    sync_folder,
    whole_file,
)
from prism_pl.errors import UsageError
from prism_pl.strategy import stage_1_shards
from prism_pl.strategy.engines import save_shards
from prism_pl.strategy.other_ranks import convert, forget_held_back
from prism_pl.strategy.ranks import gathered_values

if TYPE_CHECKING:
    from prism_pl.strategy.multi_engine import MultiEngineDeepSpeedStrategy

MANIFEST = "manifest.json"
TAG = "shards"
UNIVERSAL = f".universal{PARTIAL}"  # a kill while cutting anew leaves it to the next start to remove


class FolderCheckpoint:
    """Saves and loads the checkpoint folders of a strategy.

    Args:
        strategy: whose engines.
    """

    def __init__(self, strategy: "MultiEngineDeepSpeedStrategy") -> None:
        self.strategy = strategy
        self.loaded: Path | None = None
        self.recut = False  # whether the shards are of another number of ranks, or other stages

    def other_weights(self) -> dict[str, Any]:
        """The module's state outside of the engines."""
        assert self.strategy.lightning_module is not None
        own = self.strategy.lightning_module.state_dict()
        return {key: value for key, value in own.items() if key.partition(".")[0] not in self.strategy.engines}

    def save(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Write `path`, every rank its part. CheckpointNotWritten on all ranks where one of them failed."""
        partial = path.with_name(path.name + PARTIAL)
        self._together(path, lambda: self._begin(partial), only_first=True)
        self._together(path, lambda: self._write(checkpoint, partial))
        for name, engine in self.strategy.engines.items():
            self._together(path, lambda folder=str(partial / name), engine=engine: save_shards(engine, folder, TAG))
        self._together(path, lambda: _put_in_place(partial, path), only_first=True)

    def _begin(self, partial: Path) -> None:
        remove(partial)
        partial.mkdir(parents=True)
        stages = {name: self.strategy.options_of(name).stage for name in self.strategy.engines}
        manifest = {"ranks": self.strategy.world_size, "stages": stages}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def _write(self, checkpoint: dict[str, Any], partial: Path) -> None:
        with whole_file(partial / _rank_file(self.strategy.global_rank)) as file:
            torch.save(checkpoint, file)

    def _together(self, path: Path, act: Callable[[], None], only_first: bool = False) -> None:
        """Act on every rank, or the first alone, and go on when all have. One that failed is an error on all; `act`
        must not wait for other ranks where it may fail."""
        failure: Exception | None = None
        if self.strategy.is_global_zero or not only_first:
            try:
                act()
            except (OSError, RuntimeError) as error:  # torch.save wraps what the file system says in a RuntimeError
                failure = not_written(path, error)
            except Exception as error:
                failure = error
        # The words alone: not every error can be sent.
        words = None if failure is None else (isinstance(failure, CheckpointNotWritten), str(failure) or repr(failure))
        failed = [each for each in gathered_values(words) if each is not None]
        if failure is not None:
            raise failure
        if failed:
            not_on_disk, said = failed[0]
            raise CheckpointNotWritten(said) if not_on_disk else RuntimeError(f"another process stopped: {said}")

    def load(self, path: Path) -> dict[str, Any]:
        """Lightning's state of this rank. The networks are loaded by `load_networks`. UsageError where this is no
        checkpoint that such a run can go on from."""
        manifest = read_manifest(path)
        world = self.strategy.world_size
        stages = {name: self.strategy.options_of(name).stage for name in manifest["stages"]}
        self.recut = manifest["ranks"] != world or manifest["stages"] != stages
        if self.recut and 0 in (*stages.values(), *manifest["stages"].values()):
            raise UsageError(
                f"{path} is of {manifest['ranks']} processes with {_shown(manifest['stages'])}, and this run has "
                f"{world} with {_shown(stages)}: what stage 0 saves cannot be cut anew. Start as the run was, or go on "
                "with --weights-only-resume, which begins the optimisers anew"
            )
        self.loaded = path
        rank = min(self.strategy.global_rank, manifest["ranks"] - 1)
        state = torch.load(path / _rank_file(rank), map_location="cpu", weights_only=True)
        if manifest["ranks"] != world and forget_held_back(state):
            rank_zero_info(
                f"{path} is of {manifest['ranks']} processes, and this run has {world}: the groups that dynamic "
                "sampling held back are lost, and it fills up anew"
            )
        return state

    def load_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Once there are engines: weights and optimisers' states from the folder that `load` was given, if any."""
        if self.loaded is None:
            return
        source = self.loaded
        with only_tensors():
            if self.recut:
                source = self.loaded.with_name(self.loaded.name + UNIVERSAL)
                self._together(source, lambda: self._convert(source), only_first=True)
            for name, engine in self.strategy.engines.items():
                found, _ = engine.load_checkpoint(str(source / name), tag=TAG, load_lr_scheduler_states=False)
                if found is None:
                    raise UsageError(f"{source / name} holds no shards: the checkpoint is not whole")
        if self.recut:
            self._together(source, lambda: remove(source), only_first=True)

    def _convert(self, target: Path) -> None:
        assert self.loaded is not None
        rank_zero_info(f"{self.loaded} was written by other ranks or stages: cutting it anew.")
        before = read_manifest(self.loaded)["stages"]
        stages: dict[str, Any] = {n: (before[n], self.strategy.options_of(n).stage) for n in self.strategy.engines}
        convert(self.loaded, target, stages, TAG)

    def remove(self, path: Path) -> None:
        """Remove a checkpoint; the first rank does."""
        if self.strategy.is_global_zero:
            remove(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint folder says of itself. UsageError for something else."""
    if path.is_file():
        raise UsageError(
            f"{path} was written by another strategy, in one file: start the run as it was, or go on with "
            "--weights-only-resume, which begins the optimisers anew"
        )
    file = path / MANIFEST
    if not file.is_file():
        raise UsageError(f"{path} is no checkpoint folder: it has no {MANIFEST}")
    return json.loads(file.read_text())


def consolidated(path: Path) -> dict[str, Any]:
    """Lightning's state of the first rank, with the engines' whole weights in `state_dict`: float32, in the CPU's
    memory. Needs no process group."""
    manifest = read_manifest(path)
    state = torch.load(path / _rank_file(0), map_location="cpu", weights_only=True)
    with only_tensors():
        for name, stage in manifest["stages"].items():
            weights = _whole(path / name, stage, manifest["ranks"])
            state["state_dict"] |= {f"{name}.{key}": weight for key, weight in weights.items()}
    return state


def _whole(folder: Path, stage: int, num_ranks: int) -> Mapping[str, Any]:
    """The whole weights of an engine's folder."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if stage == 0:
        return torch.load(folder / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]
    if stage == 1:
        return stage_1_shards.merged(folder / TAG, num_ranks)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    assert weights is not None
    return weights


def _shown(stages: Mapping[str, int | None]) -> str:
    return ", ".join(f"{name} at stage {stage}" for name, stage in stages.items())


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.ckpt"


def _put_in_place(partial: Path, path: Path) -> None:
    """Give a finished folder its name, in the place of an older one. All of it is on the disk before."""
    for file in partial.rglob("*"):
        if file.is_dir():
            sync_folder(file)
        else:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    put_in_place(partial, path)


@contextmanager
def only_tensors() -> Iterator[None]:
    """DeepSpeed reads its files as pickles; inside this, torch reads tensors and plain values out of them, and the few
    of DeepSpeed's own classes that its files hold, and runs nothing."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
