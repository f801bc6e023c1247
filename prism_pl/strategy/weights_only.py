"""Going on with the networks of a checkpoint where the rest of it does not fit: another strategy, other ranks."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from prism_pl.strategy.folder_checkpoint import consolidated
from prism_pl.strategy.other_ranks import forget_held_back
from prism_pl.strategy.ranks import on_first_rank

LOST = (
    "Lost: the optimisers' states, which begin anew; the random draws of ranks other than the first; the groups that "
    "dynamic sampling held back"
)


def take_networks_only(trainer: Trainer) -> None:
    """Let a trainer go on with the networks of its checkpoint and the position in the data and in the schedules."""
    trainer.strategy.checkpoint_io = NetworksOnly(trainer.strategy.checkpoint_io)
    trainer.callbacks.insert(0, ScheduledRates())  # pyright: ignore[reportAttributeAccessIssue]


class ScheduledRates(Callback):
    """A scheduler's state says where the schedule is; the rate itself lies in the optimiser's state. Without that the
    first step would be taken with the rate that the schedule begins with, 0 where it warms up."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate


def networks_only(path: Path) -> dict[str, Any]:
    """Lightning's state of the first rank, with all weights in `state_dict` and no optimiser's state."""
    state = consolidated(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
    state["optimizer_states"] = []
    forget_held_back(state)
    return state


def networks_on_first_rank(path: Path) -> dict[str, Any]:
    """`networks_only` where the ranks of one machine cannot each hold all weights in float32: the first rank reads
    for all and keeps them. On other ranks tensors of the meta device stand in `state_dict`. Every rank comes here."""
    weights: dict[str, Tensor] = {}

    def read() -> dict[str, Any]:
        state = networks_only(path)
        weights.update(state["state_dict"])
        return state | {"state_dict": {name: weight.to("meta") for name, weight in weights.items()}}

    state = on_first_rank(read)
    return state | {"state_dict": state["state_dict"] | weights}


class NetworksOnly(CheckpointIO):
    """Reads a checkpoint, a file or a folder, as one without optimisers' states, whoever wrote it. Writes as `inner`.

    Args:
        inner: how the run's own checkpoints are written.
    """

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's state of the first rank, with all weights in `state_dict`."""
        return networks_only(Path(path))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
