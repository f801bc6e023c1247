"""Runs that kill themselves at a stated point, and what is compared of two runs afterwards.

A SIGKILL of the run's own process is as real as one from outside, nothing is flushed and no handler runs, and it comes
at the same point every time.
"""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prism_pl import checkpoint_files
from prism_pl.batch import Example
from prism_pl.chat import render
from prism_pl.rollout import TransformersEngine
from prism_pl.rollout.engine import GroupDone, Rollout, Sampling

ROOT = Path(__file__).parent.parent
KILLED = "killed"
# In a checkpoint, and not compared: ModelCheckpoint's record of its last score, which Lightning does not load; and two
# of Lightning's counts that differ after a resume at an epoch's end. Those of validation batches serve going on in the
# middle of a validation, where no checkpoint is taken; those of epochs begun a further resume sets right (there is a
# test).
UNREAD = ["/current_score", "epoch_loop.val_loop.batch_progress"]
UNREAD += [f"fit_loop/epoch_progress/{span}/{count}" for span in ("total", "current") for count in ("ready", "started")]
Moment = Literal["start", "step", "end", "validation", "writing", "renaming", "published"]


class Kill(Callback):
    """Sends a signal to its own process at the first stated moment from a training batch on. Only at the first start in
    a run's folder: it leaves a file there.

    Args:
        batch: number of the batch over all epochs, from 0.
        moment: `start` or `end` of a batch, before its optimiser's `step`, in a `validation`; or while a checkpoint is
            half-way in `writing`, in `renaming` (the older one has given up its name, the new one has not yet taken
            it), or just `published`.
        waiting: only while groups wait in dynamic sampling's buffer.
        by: SIGKILL ends the process at once, SIGINT and SIGTERM ask it to stop.
    """

    def __init__(self, batch: int, moment: Moment = "end", waiting: bool = False, by: str = "SIGKILL") -> None:
        self.batch, self.moment, self.waiting, self.by = batch, moment, waiting, by

    def on_train_start(self, trainer, pl_module):
        self.trainer = trainer
        self.mark = Path(trainer.default_root_dir) / KILLED
        checkpoint_files.os = Watched(os, self)  # type: ignore[assignment]
        checkpoint_files.torch = Watched(torch, self)  # type: ignore[assignment]

    def at(self, moment: Moment) -> None:
        batch = self.trainer.fit_loop.total_batch_idx
        if moment != self.moment or batch < self.batch or self.mark.exists():
            return
        if self.waiting and not self.trainer.lightning_module.buffer._groups:
            return
        self.mark.write_text(str(self.trainer.global_step))
        os.kill(os.getpid(), signal.Signals[self.by])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.at("start")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.at("step")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.at("end")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.at("validation")


class Watched:
    """A module as prism_pl.checkpoint_files sees it, with a kill on the way through two of its functions."""

    def __init__(self, module: Any, killer: Kill) -> None:
        self.module, self.killer = module, killer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def replace(self, source: Path, target: Path) -> None:
        if Path(source).name == "next.ckpt":
            self.killer.at("renaming")
        os.replace(source, target)
        if Path(source).name == "next.ckpt":
            self.killer.at("published")

    def save(self, state: Any, file: Any) -> None:
        if self.killer.moment == "writing":
            whole = io.BytesIO()
            torch.save(state, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            self.killer.at("writing")
            file.seek(0)
        torch.save(state, file)


class ShortEngine(TransformersEngine):
    """Real draws, but few tokens of them; the text is then made from the tokens, well formed, right or wrong."""

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        rollouts = super().generate(examples, num_samples, replace(sampling, max_tokens=6))
        return [_told(rollout, examples[b // num_samples].answers[0]) for b, rollout in enumerate(rollouts)]


def _told(rollout: Rollout, answer: str) -> Rollout:
    total = sum(rollout.response_ids)
    return replace(rollout, text=render(f"- red {total % 10}", f"1. it is {total}", answer if total % 2 else "none"))


def environment() -> dict[str, str]:
    """Of a run: one thread, so that sums are in one order whatever else the machine does."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """`python -m prism_pl COMMAND` in a folder, its screen in `screen.txt` there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "screen.txt", "ab") as screen:
        arguments = [sys.executable, "-m", "prism_pl", *command]
        return subprocess.Popen(arguments, cwd=folder, env=environment(), stdout=screen, stderr=screen)


class Runner:
    """Runs commands one after another, each in a process of its own that is forked from one that has imported what they
    all import: half of a short run is that."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.killing"],
            cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, command: list[str], folder: Path) -> int:
        """Run `python -m prism_pl COMMAND` in a folder. Returns its exit code, or minus the signal that ended it."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        self.server.stdin.write(json.dumps([command, str(folder)]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.communicate()


def serve() -> None:
    """The process that `Runner` forks from."""
    from prism_pl.__main__ import main
    from prism_pl.cli import import_systems

    import_systems()
    for module in ("torch.utils.tensorboard", "prism_pl.metrics", "transformers.models.qwen3_vl.modeling_qwen3_vl"):
        importlib.import_module(module)
    for line in sys.stdin:
        command, folder = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            screen = os.open("screen.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(screen, 1)
            os.dup2(screen, 2)
            code = main(command)
            sys.stdout.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def starts(folder: Path) -> list[dict[str, Any]]:
    """What the run's starts noted down."""
    return [json.loads(line) for line in (folder / "run" / "starts.jsonl").read_text().splitlines()]


def killed_at(folder: Path) -> int:
    """The optimiser step at which `Kill` struck."""
    return int((folder / "run" / KILLED).read_text())


def saved(folder: Path) -> tuple[int, int]:
    """Optimiser steps and training batches of the newest checkpoint that is published, as it lies there; 0 without."""
    last, older, newer = (folder / "run/checkpoints" / f"{name}.ckpt" for name in ("last", "previous", "next"))
    # Killed in renaming: the last one has just become the previous one.
    file = last if last.exists() else newer
    if not file.exists() or (file == newer and not older.exists()):
        return 0, 0
    state = torch.load(file, weights_only=True)
    return state["global_step"], state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: every scalar but the times, as (step, value)."""
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in _of_steps(events)}


def first_logged_step(folder: Path) -> int:
    """The first step that the newest event file holds: where the last start really began."""
    newest = max((folder / "run").glob("events.out.*"), key=lambda file: file.stat().st_mtime)
    events = EventAccumulator(str(newest), size_guidance={"scalars": 0}).Reload()
    return min(events.Scalars(tag)[0].step for tag in _of_steps(events))


def _of_steps(events: EventAccumulator) -> list[str]:
    """Tags of what steps log, but for the times: Lightning's `hp_metric` is of a start."""
    return [tag for tag in events.Tags()["scalars"] if not tag.startswith(("time/", "hp_metric"))]


def contents(folder: Path) -> dict[str, Any]:
    """Everything in the last checkpoint and in the exported networks, flat, under its place, without the folder's own
    name."""
    flat: dict[str, Any] = {}
    _flatten(torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True), "checkpoint", str(folder), flat)
    flat = {key: value for key, value in flat.items() if not any(part in key for part in UNREAD)}
    for file in sorted((folder / "run").glob("export*/*.safetensors")):
        _flatten(load_file(file), f"{file.parent.name}/{file.name}", str(folder), flat)
    return flat


def _flatten(value: Any, key: str, folder: str, flat: dict[str, Any]) -> None:
    if isinstance(value, dict):
        flat[f"{key}/keys"] = sorted(str(name).replace(folder, "") for name in value)
        for name, part in value.items():
            _flatten(part, f"{key}/{str(name).replace(folder, '')}", folder, flat)
    elif isinstance(value, list | tuple) and not all(isinstance(part, int) for part in value):
        flat[f"{key}/length"] = len(value)
        for i, part in enumerate(value):
            _flatten(part, f"{key}/{i}", folder, flat)
    else:
        flat[key] = value.replace(folder, "") if isinstance(value, str) else value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Places at which two contents are not equal to the last bit."""
    keys = sorted(one.keys() | other.keys())
    return [key for key in keys if key not in one or key not in other or not _equal(one[key], other[key])]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        # Bytes, so that NaN equals itself and 0 is not -0.
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
        return same_kind and torch.equal(*bits)
    return type(one) is type(other) and (one == other or (one != one and other != other))


if __name__ == "__main__":
    serve()
