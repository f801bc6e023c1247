"""The TensorBoard writers of a run, for what is no scalar: text and images."""

from typing import TYPE_CHECKING

from lightning import Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def tensorboard_writers(trainer: Trainer) -> "list[SummaryWriter]":
    """Writers of the trainer's TensorBoard loggers on the first rank; none on the others."""
    from lightning.pytorch.loggers import TensorBoardLogger

    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
