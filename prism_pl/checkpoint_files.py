"""Checkpoints as files: written whole or not at all, and the last two of a run.

    checkpoints/
        last.ckpt              what a run goes on from
        previous.ckpt          the one before it
        next.ckpt              whole, and to become last.ckpt once the logs of its step are on the disk
        *.partial              being written, or passed over; a kill leaves it behind, and the next start removes it

`last.ckpt` may be a folder, of several engines (`prism_pl.strategy.folder_checkpoint`). Not one of these names ever
stands for half a checkpoint.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from prism_pl.errors import UsageError

LAST = Path("checkpoints") / "last.ckpt"
PREVIOUS = "previous.ckpt"
PARTIAL = ".partial"
PASSED_OVER = f"passed-over{PARTIAL}"
PROGRESS = "progress.json"
STARTS = "starts.jsonl"
ZIP = b"PK\x03\x04"  # how a file of torch.save begins


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; the message names the file, the reason and the way out."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own writes a temporary file in /tmp and moves it, which across file systems is a copy that a kill can
    cut in the middle. This one writes beside the checkpoint, syncs, and renames; and it holds no second copy in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, a file here or an address that Lightning knows. Raises CheckpointNotWritten."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch.save wraps what the file system says in a RuntimeError
            raise not_written(path, error) from error


def intact(last: Path) -> str:
    """What is left to go on from, for messages."""
    return f"{last} is intact, and the same command goes on from it" if last.exists() else "there is no checkpoint yet"


def not_written(path: Path, error: BaseException) -> CheckpointNotWritten:
    """What to raise where `path` could not be written."""
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, OSError):
        reason = reason.__cause__ or reason.__context__
    said = (reason.strerror or str(reason)) if isinstance(reason, OSError) else str(error).splitlines()[0]
    return CheckpointNotWritten(
        f"the checkpoint {path} could not be written ({said}): free space there or make it writable; "
        f"{intact(path.parent / LAST.name)}. "
        "Another place is --trainer.default_root_dir."
    )


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` only once all of it is on the disk; a failure leaves nothing."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a renamed file is there after a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(finished: Path, folder: Path) -> None:
    """Rename a finished folder to its own name, in the place of an older one, or of a file.

    A kill between the two renames leaves the older one as `.old` and the finished one under its temporary name; a kill
    after them leaves an outdated `.old`, which the next call removes.
    """
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        remove(old)
        os.replace(folder, old)
    os.replace(finished, folder)
    sync_folder(folder.parent)
    remove(old)


class LastCheckpoints:
    """The last two checkpoints of a run and what is known about them. For the first rank alone.

    The older one goes before a new one is begun, so that there are never more than two, the one being made included.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.last = run / LAST
        self.previous = self.last.with_name(PREVIOUS)
        self.next = self.last.with_name("next.ckpt")
        self.passed_over = self.last.with_name(PASSED_OVER)
        # Whether `last` is this run's: one that is broken, or was passed over, must not take the previous one's place.
        self.own_last = False

    def to_go_on_from(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        if not self.last.exists() and self.next.exists() and (self.previous.exists() or self.passed_over.exists()):
            return self.next  # killed between the two renames of `publish`
        return next((path for path in (self.last, self.previous) if path.exists()), None)

    def begin(self, resumed_from: Path | None, step: int, max_steps: int) -> None:
        """Note a start, made from a checkpoint or (None) anew, and clear away what a kill left behind."""
        self.last.parent.mkdir(parents=True, exist_ok=True)
        if resumed_from is not None and _same(resumed_from, self.next):
            os.replace(self.next, self.last)
            resumed_from = self.last
        self.own_last = resumed_from is not None and _same(resumed_from, self.last)
        remove(self.next)
        for partial in self.last.parent.glob(f"*{PARTIAL}"):
            remove(partial)
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "checkpoint": None if resumed_from is None else str(resumed_from),
            "max_steps": max_steps,
        }
        with open(self.run / STARTS, "a") as file:
            file.write(json.dumps(start) + "\n")

    def make_room(self) -> None:
        """Before `next` is written."""
        remove(self.next)
        if self.own_last:
            remove(self.previous)

    def publish(self, step: int) -> None:
        """Let `next` be the last checkpoint. A kill at any point leaves one to go on from."""
        if self.own_last and self.last.exists():
            os.replace(self.last, self.previous)
        elif self.last.is_dir() or (self.last.exists() and self.next.is_dir()):
            # A file takes a file's name at once; a name cannot pass from or to a folder so.
            os.replace(self.last, self.passed_over)
        os.replace(self.next, self.last)
        sync_folder(self.last.parent)
        remove(self.passed_over)
        self.own_last = True
        self._note(step, finished=False)

    def finish(self, step: int) -> None:
        """Note that the fit has ended in order, what its callbacks export included."""
        self._note(step, finished=True)

    def _note(self, step: int, finished: bool) -> None:
        with whole_file(self.run / PROGRESS) as file:
            file.write(json.dumps({"step": step, "checkpoint": str(LAST), "finished": finished}).encode())


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


@dataclass(frozen=True)
class Summary:
    """What a checkpoint says of itself.

    Attributes:
        step: optimiser steps taken; None where it cannot be told without loading all of it.
        num_batches: training batches, which the logs count; None likewise.
    """

    step: int | None = None
    num_batches: int | None = None

    def __str__(self) -> str:
        return "" if self.step is None else f" at step {self.step}"


def read_summary(path: Path) -> Summary:
    """Look into a checkpoint without reading its weights. UsageError where the file is cut off; an UnpicklingError
    where it holds more than tensors and plain values."""
    if (path / "checkpoint").is_dir():
        raise UsageError(
            f"{path} was written by Lightning's DeepSpeedStrategy, as pickles, which are not read here: a run under it "
            "cannot be gone on with. --fresh starts anew; --config strategy/zero2.yaml makes one that can"
        )
    if path.is_dir():  # of several engines: the networks lie beside a file of each rank
        path = path / "rank-0.ckpt"
    if not path.is_file():
        raise UsageError(f"{path.parent} is no checkpoint: it has no {path.name}. {_way_out(path.parent)}")
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True) if is_zip else None
    except RuntimeError:  # the zip's directory, at its end, is missing
        state = None
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch seeks to a place that it worked out from half a directory
            raise
        state = None
    if state is None:
        raise UsageError(f"{path} is cut off or no checkpoint. {_way_out(path)}")
    progress = state.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return Summary(state.get("global_step"), progress.get("total", {}).get("processed"))


def _way_out(broken: Path) -> str:
    files = LastCheckpoints(broken.parent.parent)
    if _same(broken, files.last) and files.previous.exists():
        try:
            older = read_summary(files.previous)
        except UsageError:
            pass
        else:
            return (
                f"The one before it, {files.previous}{older}, is whole: the same command with --ckpt_path "
                f"{files.previous} goes on from there (in a pipeline: delete {files.last}, and the same command does); "
                "--fresh starts anew."
            )
    return "Bring it back from a copy; --ckpt_path goes on from another one, --fresh starts anew."


def _noted_step(run: Path) -> int | None:
    file = run / PROGRESS
    return json.loads(file.read_text())["step"] if file.is_file() else None


def was_finished(run: Path) -> bool:
    """Whether the last fit in a run's folder ended in order."""
    file = run / PROGRESS
    return file.is_file() and json.loads(file.read_text()).get("finished", False)


def refuse_lost_checkpoint(run: Path) -> None:
    """UsageError where a run has had a checkpoint that is not there any more: starting anew in its folder, without
    being told so, would put two experiments into one curve."""
    step = _noted_step(run)
    if step is not None:
        raise UsageError(
            f"{run / LAST} is gone, and so is the one before it; the run had reached step {step}. Bring it back, or "
            "start anew beside it with --fresh; --ckpt_path goes on from another checkpoint."
        )
