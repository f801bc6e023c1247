"""The policy in Hugging Face format: `export/` at the end of a fit, `export-best/` at each best checkpoint."""

from pathlib import Path
from typing import Any, Protocol, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Exportable(Protocol):
    """A module that can write its policy to a folder, whole or not at all. All ranks call it, the first writes."""

    def export(self, folder: Path) -> None: ...


class Export(Callback):
    """Writes below the run's folder:

    * `export/`: the policy as the fit left it;
    * `export-best/`: the policy at the best value so far of the first ModelCheckpoint with a `monitor`. Without such a
      checkpoint there is no best, and no such folder.

    A checkpoint is written by hooks that run after every other callback's, so a new best is seen, and exported, before
    the next batch changes the weights.
    """

    def __init__(self) -> None:
        self._best: tuple[str, float | None] = ("", None)
        self._exported: tuple[str, float | None] | None = None  # the best of a resumed run that was exported

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run knows its best checkpoint, but its weights may be later ones: unless its checkpoint was taken
        # between finding a new best and exporting it.
        self._best = _best(trainer) if self._exported is None else self._exported

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._export_new_best(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export_new_best(trainer, pl_module)
        _export(trainer, pl_module, "export")

    def state_dict(self) -> dict[str, Any]:
        return {"exported": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path, score = state_dict["exported"]
        self._exported = (path, score)

    def _export_new_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        best = _best(trainer)
        if best != self._best:
            self._best = best
            _export(trainer, pl_module, "export-best")


def _best(trainer: Trainer) -> tuple[str, float | None]:
    """Path and value of the best checkpoint: a fixed file name is overwritten, so the path alone would not tell."""
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    if not checkpoints or checkpoints[0].best_model_score is None:
        return "", None
    return checkpoints[0].best_model_path, float(checkpoints[0].best_model_score)


def _export(trainer: Trainer, pl_module: LightningModule, name: str) -> None:
    """Every rank comes here: a strategy may hold a share of the weights on each."""
    folder = Path(trainer.default_root_dir) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    cast(Exportable, pl_module).export(folder)
    trainer.strategy.barrier(name)
