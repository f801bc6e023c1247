"""Lightning's own DeepSpeedStrategy on CPUs, for comparing: it refuses them, and DeepSpeed itself does not."""

import importlib
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy


class StockOnCPU(DeepSpeedStrategy):
    """As Lightning has it, but for the questions that only a GPU answers."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # past the check for a GPU

    def setup_distributed(self) -> None:
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # an extension to compile that gloo does without
        assert self.parallel_devices is not None
        # Numbered, as GPUs are: DeepSpeed is told the number.
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]
        super().setup_distributed()
