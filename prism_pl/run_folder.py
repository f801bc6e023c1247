"""A run's folder: which one, its `config.yaml`, and whether a start goes on with what is in it.

    runs/align/
        config.yaml         the configuration of the newest start; earlier ones are kept as config-1.yaml, config-2.yaml
        starts.jsonl        a line for each start: time, the step it began at, and the checkpoint or null
        progress.json       the step of the last checkpoint, and whether the fit ended with it
        .fit.lock           held by the process that trains there
        events.out.tfevents...
        checkpoints/last.ckpt, previous.ckpt

The same command in the same folder goes on from `last.ckpt`. With other settings of the model or the data it stops
instead: two experiments would end in one curve.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from prism_pl.checkpoint_files import LAST, whole_file
from prism_pl.errors import UsageError
from prism_pl.folders import free_folder
from prism_pl.requested import Complete, requested
from prism_pl.shipped import shipped_configs

# Lightning starts the processes of further ranks with the same command line and environment: they take the folder the
# first one chose.
FOLDER_VARIABLE = "PRISM_RUN_FOLDER"
LOCK = ".fit.lock"


class SaveConfig(SaveConfigCallback):
    """Write the configuration into the run's folder; an earlier, different one is kept under the next free number."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        # An evaluation in the folder of a training run must not hide the settings the training goes on with.
        command = TrainerFn(stage)
        name = (
            f"config-{command.value}.yaml"
            if command != TrainerFn.FITTING and (folder / "checkpoints").is_dir()
            else "config.yaml"
        )
        write_config(folder / name, self.parser.dump(self.config, skip_none=False))
        self.already_saved = True


def write_config(path: Path, text: str) -> None:
    """Write `text` to `path`, after copying a different content there to `NAME-1.yaml` or the next free number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        if path.read_text() == text:
            return
        number = 1
        while (aside := path.with_stem(f"{path.stem}-{number}")).exists():
            number += 1
        shutil.copy2(path, aside)
    with whole_file(path) as file:  # a kill in between must not lose what the next start compares itself with
        file.write(text.encode())


def default_folder(command: str, names: Sequence[str], checkpoint: str | None = None) -> Path:
    """`runs/<names of the configs>`; of an evaluation `runs/<names>-<checkpoint>`, for each checkpoint has its own.

    Args:
        command: fit, validate, test or predict; the name of a run without a config.
        names: of the configs, as `shipped.stage_of` gives them.
        checkpoint: what an evaluation calls its policy.
    """
    # How a run is spread over devices is no other run: its folder is the same, and it is told where it cannot go on.
    first, *others = [name for name in names if not name.startswith("strategy/")] or [command]
    stage = "+".join([first, *(Path(name).name for name in others)])
    of = "" if checkpoint is None else "-" + checkpoint.replace("/", "-")
    return Path("runs") / (stage + of)


def fresh_folder(folder: Path) -> Path:
    """`folder` where it is new or empty, else the first free of `folder-2`, `folder-3`, ...; ranks agree on it."""
    if _started_beside_others():
        if FOLDER_VARIABLE not in os.environ:
            raise UsageError(
                "--fresh cannot choose a folder in processes that were started from outside (torchrun, SLURM): they "
                "would not agree. Give --trainer.default_root_dir a new one."
            )
        return Path(os.environ[FOLDER_VARIABLE])
    chosen = free_folder(folder, LOCK)
    os.environ[FOLDER_VARIABLE] = str(chosen)
    return chosen


def _started_beside_others() -> bool:
    """Whether Lightning, torchrun or srun has started this process as one of several."""
    return "LOCAL_RANK" in os.environ or (SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run's folder for this process: two fits in it would remove each other's checkpoints.

    The lock is the system's and of this process alone: it ends with it, however that ends, and no worker inherits it.

    Raises:
        UsageError: another process trains there.
    """
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # systems differ in what they raise
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UsageError(
                f"{folder} is in use: process {holder} trains there. Wait for it, stop it (kill -INT {holder}), or "
                "choose another --trainer.default_root_dir."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def remove_unused(folder: Path) -> None:
    """Remove a run's folder that holds nothing but the lock, which is this process's."""
    if all(path.name == LOCK for path in folder.iterdir()):
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def check_writable(folder: Path) -> None:
    """Make the run's folder and write to it; UsageError where that cannot be done, before an hour of training."""
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))  # on a full disk a name finds room and its content none
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise UsageError(
            f"the run folder {folder} cannot be written to ({error.strerror}): free space there or make it writable, "
            "or choose another with --trainer.default_root_dir."
        ) from error


def say_finished(folder: Path, step: int | None, already: bool, beside: str = "") -> None:
    """Tell the end of a fit and what comes next, with the configuration of that name.

    Args:
        beside: the name of the run's own configuration (`shipped.stage_of`). The next stage's is looked for in its
            folder first: after `qwen3vl-4b/sft` comes `qwen3vl-4b/evaluate.yaml`.
    """
    told = "was finished already" if already else "is finished"
    further = " More steps: --trainer.max_steps; a new run: --fresh." if already else ""
    rank_zero_info(f"{folder} {told}, at step {step}.{further}")
    export = folder / "export"
    next_command = ""
    if (export / "discriminator.json").exists():
        # The policy whose rollouts it learned to tell apart; without it align.yaml's own would play.
        policy = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["policy"]["path"]
        next_command = (
            f"python -m prism_pl fit --config {_shipped_beside(beside, 'align.yaml')} --model.policy.path {policy} "
            f"--model.discriminator.path {export}; "
        )
    elif (export / "config.json").exists():
        config = _shipped_beside(beside, "evaluate.yaml")
        next_command = f"python -m prism_pl test --config {config} --model.policy.path {export}; "
    rank_zero_info(f"Next: {next_command}tensorboard --logdir {folder}")


def _shipped_beside(stage: str, name: str) -> str:
    own = str(Path(stage).parent / name)
    return own if own in shipped_configs() else name


def nameless_write_error(error: OSError) -> bool:
    """Whether a full or read-only disk is behind an error that does not say where, as TensorBoard's writer raises."""
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def hush_writer_threads() -> None:
    """TensorBoard's thread passes such an error on to the run, whose message is enough: no traceback of its own."""

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not (isinstance(raised.exc_value, OSError) and nameless_write_error(raised.exc_value)):
            threading.__excepthook__(raised)

    threading.excepthook = hook


def refuse_other_settings(folder: Path, config: dict[str, Any], complete: Complete) -> list[str]:
    """Compare a start with the one before in the same folder. Options that the code has gained or lost since are no
    other settings.

    Args:
        folder: the run's folder.
        config: the configuration of this start, as plain values.
        complete: how today's code completes a configuration.

    Returns:
        What differs outside of model, data and seed, as `trainer.max_steps: 100 -> 200`.

    Raises:
        UsageError: the model's, the data's or the seed's settings differ from those of the run to go on with.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    earlier = yaml.safe_load(path.read_text())
    changes, _ = requested(earlier, config, complete)
    essential = [str(change) for change in changes if change.key.split(".")[0] in ("model", "data", "seed_everything")]
    if essential:
        raise UsageError(
            f"{folder} holds a run with other settings: {'; '.join(essential)}. Start anew with --fresh, or choose "
            f"another --trainer.default_root_dir, or go on all the same with --ckpt_path {folder / LAST}."
        )
    return [str(change) for change in changes]
