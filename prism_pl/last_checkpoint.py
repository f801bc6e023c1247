"""The callback that keeps what a run goes on from. A run that was killed and started again is the uninterrupted one."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from prism_pl.checkpoint_files import LastCheckpoints
from prism_pl.optim import rate_jumps
from prism_pl.stop_request import StopRequest
from prism_pl.tensorboard import tensorboard_writers


class LastCheckpoint(Checkpoint):
    """Keep `checkpoints/last.ckpt` at most `every_n_steps` steps old, or a quarter of the run, and exact at the end.

    Lightning's ModelCheckpoint keeps the best and leaves `last.ckpt` where its own cadence last fell; this one serves
    going on only. It does not save when a run breaks: the state may be half-way through a step. On Ctrl+C and SIGTERM
    the step is finished and saved first.

    A checkpoint is taken when a step is done, its validation included, and becomes `last.ckpt` when the step's logs are
    on the disk: whatever happens in between, nothing is left out and nothing is done twice.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"LastCheckpoint.every_n_steps is {every_n_steps}; it must be at least 1.")
        self.every_n_steps = every_n_steps
        self.started = False
        self.stop = StopRequest()
        self._saved_at = 0
        self._due_after_validation = False
        self._unpublished: int | None = None  # the step of a checkpoint that is not yet the last one
        self._stopping = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True
        self._saved_at = trainer.global_step
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]  # Lightning sets it from outside
            return
        self.files = LastCheckpoints(Path(trainer.default_root_dir))
        resumed_from = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        if trainer.is_global_zero:
            self.files.begin(resumed_from, trainer.global_step, trainer.max_steps)
        if resumed_from is not None:
            rank_zero_info(f"Begins at step {trainer.global_step} of {trainer.max_steps}.")
            for jump in rate_jumps(trainer.lr_scheduler_configs):
                rank_zero_info(jump)
        self.stop.install()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._publish(trainer)
        if self._stopping:
            raise KeyboardInterrupt  # Lightning closes down in order

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stopping = self._asked_to_stop(trainer)
        if not self._due(trainer):
            return
        loop = trainer.fit_loop
        # Lightning passes over a validation that was due when a checkpoint was taken: taken after it, it counts. (Taken
        # in on_train_epoch_end, a run goes on with other batches: an epoch's last batch is no exception.)
        self._due_after_validation = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # pyright: ignore[reportArgumentType]
        if not self._due_after_validation:
            self._take(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.started or trainer.sanity_checking:
            return
        self._stopping = self._asked_to_stop(trainer)
        if self._due_after_validation or self._stopping:
            self._due_after_validation = False
            self._take(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_at:
            self._take(trainer)
        self._publish(trainer)
        self.stop.restore()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning calls checkpoint callbacks last: what others export is there.
        if self.started and trainer.is_global_zero and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            self.files.finish(trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._publish(trainer)
        if not isinstance(exception, KeyboardInterrupt):  # Lightning ignores Ctrl+C from there on
            self.stop.restore()

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        """Whether any rank was: all of them save, or none."""
        return trainer.strategy.reduce_boolean_decision(self.stop.asked, all=False)

    def _due(self, trainer: Trainer) -> bool:
        # A short run is saved four times, so that a break never costs more than a quarter of it. The end is saved in
        # the middle of its epoch, not after it, so that a run with more steps goes on with the next batch.
        quarter = trainer.max_steps // 4 if trainer.max_steps > 0 else self.every_n_steps
        steps = trainer.global_step - self._saved_at
        at_end = steps > 0 and trainer.global_step == trainer.max_steps
        return self._stopping or at_end or steps >= max(1, min(self.every_n_steps, quarter))

    def _take(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        if trainer.is_global_zero:
            self.files.make_room()
        trainer.save_checkpoint(self.files.next, weights_only=False)
        self._saved_at = self._unpublished = trainer.global_step

    def _publish(self, trainer: Trainer) -> None:
        if self._unpublished is None:
            return
        for writer in tensorboard_writers(trainer):
            writer.flush()
        if trainer.is_global_zero:
            self.files.publish(self._unpublished)
        self._unpublished = None
