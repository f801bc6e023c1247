"""The ledger of a pipeline: `ledger.json` in its run folder, what ran, from what, and what came out.

Written by the pipeline's one process after every change, to a temporary name that is renamed, so it is whole at any
moment. Light: no heavy imports. The format, with `null` where something is not known (yet):

    {
     "format": 1,
     "status": "running",               running, finished, failed or interrupted: the whole pipeline
     "command": "python -m prism_pl pipeline --config configs/pipeline.yaml",
     "started": "2026-01-31T12:00:00+00:00", "updated": "...",      of the folder's first start, of the last change
     "forked_from": {"folder": "../demo", "stage": "rlvr"},         or null; see --from
     "stages": {                        in the order of the pipeline; the keys are the stages' names
      "align": {
       "kind": "fit",                   fit, validate, test, predict or report
       "command": "python -m prism_pl fit --config configs/align.yaml --model.policy.path runs/demo/sft/export ...",
       "folder": "align",               the stage's run folder, relative to this file's ("../demo/align" in a fork)
       "log": "align/stage.log",        what it printed, all attempts, relative too
       "status": "finished",            pending, running, finished, failed or interrupted
       "started": "...", "ended": "...", "seconds": 214.1,          first start, last end; seconds over all attempts
       "resumed_from_step": null,       the step of the checkpoint that the last attempt went on from
       "exit_code": 0,                  of the last attempt; negative: the signal that ended it
       "attempts": [{"started", "ended", "seconds", "status", "exit_code", "resumed_from_step"}],
       "parents": {"sft": {"export": "<sha256>"}, "warmup": {...}}, what it reads of other stages, as it was read
       "inputs": {"model.init_args.policy.path": {"path": "...", "sha256": "..."}},   files and folders from outside
       "config": {...},                 complete and resolved; paths in a stage's folder are written "{sft}/export"
       "config_sha256": "...", "data_sha256": "...",                of config; of its data section and data inputs
       "versions": {"python": "3.11.7", "torch": ..., "lightning": ..., "transformers": ..., "vllm": ...,
                    "prism_pl": ..., "git": "<commit>, with changes"},
       "outputs": {"export": "<sha256>"},                           what it left, see OUTPUTS
       "results": {...},                what it measured, below
       "taken_from": null               in a fork: the folder of the pipeline that ran this stage
      }
     },
     "dropped": {name: entry},          stages that the YAML no longer has
     "earlier": [entry and "name"]      what `--update` ran anew; their folders lie below earlier/
    }

`results`, by kind:

    fit        {"step": 30, "metrics": {"align/val_accuracy": 0.61, ...}}     the last value of every logged scalar;
               with a difficulty filter "kept" too, the number of prompts
    test       {"name": "align", "tables": {split: {metric: {"mean", "low", "high"}}}}      over all families
    predict    {"prompts": 1280, "mean_pass_rate": 0.55, "none_right": 200, "all_right": 470, "keep": [0.2, 0.8],
               "kept": 610}                                                    by the bounds of the stage that reads it
    others     {}

Hashes: of a file its content's; of a folder the names and contents of all files in it; of a pattern the names and
hashes of what it matches. Data folders from outside, which may be large, are hashed by names and sizes.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypedDict

from prism_pl.errors import UsageError

FILE = "ledger.json"
LOCK = "pipeline.lock"
EARLIER = "earlier"
FORMAT = 1

Status = Literal["pending", "running", "finished", "failed", "interrupted"]


class Attempt(TypedDict):
    """One start of a stage's command."""

    started: str
    ended: str | None
    seconds: float | None
    status: Status
    exit_code: int | None
    resumed_from_step: int | None


class Entry(TypedDict):
    """What is known of one stage; the module's docstring explains each key."""

    kind: str
    command: str
    folder: str
    log: str
    status: Status
    started: str | None
    ended: str | None
    seconds: float | None
    resumed_from_step: int | None
    exit_code: int | None
    attempts: list[Attempt]
    parents: dict[str, dict[str, str]]
    inputs: dict[str, dict[str, str]]
    config: dict[str, Any]
    config_sha256: str
    data_sha256: str
    versions: dict[str, str | None]
    outputs: dict[str, str]
    results: dict[str, Any]
    taken_from: str | None


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Ledger:
    """The ledger of one run folder, in memory and on disk.

    Args:
        folder: the pipeline's run folder.
        content: what `ledger.json` holds.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder = folder
        self.content = content

    @classmethod
    def new(cls, folder: Path, command: str) -> "Ledger":
        """An empty ledger, not written yet."""
        content = {
            "format": FORMAT,
            "status": "running",
            "command": command,
            "started": now(),
            "updated": now(),
            "forked_from": None,
            "stages": {},
            "dropped": {},
            "earlier": [],
        }
        return cls(folder, content)

    @classmethod
    def read(cls, folder: Path) -> "Ledger | None":
        """The ledger in a run folder, or None where there is none.

        Raises:
            UsageError: the file is no ledger, or of another format.
        """
        file = folder / FILE
        if not file.exists():
            return None
        way_out = "Put back a copy of it, or choose another --run_folder; the stages' own folders are unharmed."
        try:
            content = json.loads(file.read_text())
            found, stages = content["format"], content["stages"]
            if not isinstance(stages, dict):
                raise TypeError("its stages are no object")
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file} is no whole ledger ({error!r}). {way_out}") from None
        if found != FORMAT:
            raise UsageError(f"{file} has format {found}, and this version reads {FORMAT}. {way_out}")
        return cls(folder, content)

    @property
    def stages(self) -> dict[str, Entry]:
        """Name -> entry."""
        return self.content["stages"]

    def path(self, entry: Entry, key: Literal["folder", "log"] = "folder") -> Path:
        """A path of an entry, as seen from the current folder."""
        return Path(os.path.normpath(self.folder / entry[key]))

    def write(self) -> None:
        """Write the ledger whole: to a temporary name, flushed to the disk, renamed."""
        self.content["updated"] = now()
        write_whole(self.folder / FILE, json.dumps(plain(self.content), indent=1, allow_nan=False) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, whatever happens meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, f"{error.strerror}; the earlier one is whole", str(file)) from error
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(content: Any) -> Any:
    """JSON's types only; NaN and infinities become null."""
    if isinstance(content, dict):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content if isinstance(content, str | int | float | bool | None) else str(content)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the run folder for this process; yields the lock's file descriptor.

    The lock is the system's: it ends with the process, however that ends. A stage inherits it, so that a folder whose
    pipeline was killed is free only when the stage it had started is gone too.

    Raises:
        UsageError: another pipeline holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("a+")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}). Choose another --run_folder.") from None
    with opened as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise UsageError(
                f"{folder} is in use: a pipeline runs there (process {holder}). Wait for it, stop it (kill -INT "
                f"{holder}), or choose another --run_folder."
            ) from None
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield handle.fileno()
