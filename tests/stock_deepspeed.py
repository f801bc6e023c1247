"""Lightning's own DeepSpeedStrategy on CPUs, for comparing: it refuses them, and DeepSpeed itself does not."""

import importlib
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy


def stock_on_cpu(stage: int) -> DeepSpeedStrategy:
    """The strategy at a stage of ZeRO. For a process of its own: who asks for a GPU there is content with a CPU from
    then on."""
    for name in ("lightning.pytorch.strategies.deepspeed", "prism_pl.strategy.checks"):
        asking: Any = importlib.import_module(name)
        asking.CUDAAccelerator = CPUAccelerator
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # an extension to compile that gloo does without
    return NumberedCPUs(stage=stage)


class NumberedCPUs(DeepSpeedStrategy):
    """Its devices have numbers, as GPUs have: DeepSpeed is told this rank's."""

    def setup_distributed(self) -> None:
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]
        super().setup_distributed()
