"""The smallest system that the command line can run: one weight, one policy specification, one optimiser."""

import os
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch.utils.data import DataLoader

from prism_pl.optim import lr_scheduler


@dataclass
class PolicySpec:
    path: str
    freeze: list[str] = field(default_factory=list)


class DummyModule(LightningModule):
    def __init__(
        self,
        policy: PolicySpec,
        optimizer: OptimizerCallable,
        alpha: float = 0.5,
        advantage: Literal["paper", "released"] = "paper",
        fail_at: int = -1,
        interrupt_at: int = -1,
        pause: float = 0.0,
        signals: dict[int, int] | None = None,
        twice: bool = False,
        cosine: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        if alpha < 0:
            raise ValueError(f"alpha is {alpha}; it must not be negative.")
        if policy.path == "gone":
            try:
                raise OSError("deep inside a library")
            except OSError as error:
                raise ValueError("policy.path is 'gone', which is no model.") from error
        self.policy, self.optimizer, self.fail_at, self.interrupt_at = policy, optimizer, fail_at, interrupt_at
        self.pause = pause  # seconds a step
        self.signals, self.twice, self.cosine = signals or {}, twice, cosine
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise ValueError("The loss is not finite at step 3, batch ['row-7'].")
        if self.global_step == self.interrupt_at:
            raise KeyboardInterrupt
        time.sleep(self.pause)
        for _ in range(self.signals.get(self.global_step, 0) and 1 + self.twice):
            os.kill(os.getpid(), self.signals[self.global_step])
        loss = self.layer(batch).mean()
        self.log("dummy/loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("dummy/test", self.layer(batch).mean())

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        if not self.cosine:
            return optimizer
        scheduler = lr_scheduler(optimizer, "cosine", 0, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class DummyData(LightningDataModule):
    def __init__(self, length: int = 4):
        super().__init__()
        self.length = length

    def train_dataloader(self):
        return DataLoader(torch.ones(self.length, 1))

    test_dataloader = train_dataloader
