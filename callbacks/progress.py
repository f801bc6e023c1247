"""A Rich progress bar that shows what a PRISM run is judged by."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Shows the policy's optimiser steps so far (in RLVR a rollout batch may make several) and, as far as the stage
    logs them: the reward gap (mean over experts), the accuracy, tokens a second, and whatever the module logs with
    `prog_bar=True`.

    Read from the logged metrics: `*/reward_gap/<expert>`, `*/accuracy` or else `*/val_accuracy`, and `*/tokens`, the
    tokens that all ranks handled in the step.
    """

    def __init__(self, refresh_rate: int = 4) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=True)
        self._started = 0.0
        self._seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seconds = time.perf_counter() - self._started
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown: dict[str, Any] = {"step": str(trainer.global_step)}
        gaps = [value for name, value in logged.items() if "/reward_gap/" in name]
        if gaps:
            shown["gap"] = sum(gaps) / len(gaps)
        endings = ("/accuracy", "/val_accuracy")
        accuracy = next((name for ending in endings for name in logged if name.endswith(ending)), None)
        if accuracy is not None:
            shown["accuracy"] = logged[accuracy]
        tokens = [value for name, value in logged.items() if name.endswith("/tokens")]
        if tokens and self._seconds > 0:
            shown["tokens/s"] = f"{sum(tokens) / self._seconds:,.0f}"
        others = super().get_metrics(trainer, pl_module)
        others.pop("v_num", None)
        return shown | {
            name: value for name, value in others.items() if name != accuracy and not name.endswith("/tokens")
        }

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch; Lightning's count leaves out those before a resume, which the bar has behind it."""
        num_batches = self.trainer.num_training_batches
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done >= num_batches:  # an earlier epoch's
            done = 0
        return min(num_batches, super().total_train_batches + done)

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs == -1:  # as many as the steps take, which Lightning writes as "/-2"
            return f"Epoch {current_epoch}".ljust(len(self.validation_description))
        return super()._get_train_description(current_epoch)
