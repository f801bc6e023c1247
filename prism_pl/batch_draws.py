"""What training itself draws, dropout above all: the same in a resumed run as in the whole one."""

from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class BatchDraws(Callback):
    """Makes the draws of a training batch a function of the run's seed, the rank and the batch's number over all
    epochs, as the rollout engine's are of its own count.

    The seed is torch's at the start of the run (so `seed_everything` sets it) and lies in the checkpoint. Saved
    generator states would not do: a sanity check, a validation or a loader's workers draw from the same generators, and
    a resumed run may have them at other times.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.seed is None:
            self.seed = torch.initial_seed()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.seed is not None
        # The last number tells these draws from the engine's, which start from the same seed.
        entropy = [self.seed, trainer.global_rank, trainer.fit_loop.total_batch_idx, 1]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.seed is not None
        torch.manual_seed(self.seed)  # whatever runs next in this process finds the run's seed, not the last batch's

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]
