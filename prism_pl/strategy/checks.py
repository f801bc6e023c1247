"""Refusals of what would train wrongly, or stop in another library's words. Each is one line that names the way out."""

from collections.abc import Sized
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy

from prism_pl.optim import check_finite

OURS = "prism_pl.strategy.MultiEngineDeepSpeedStrategy"


def check_trainer(trainer: Trainer) -> None:
    """Refuse trainer options that would train wrongly without a sign of it. ValueError names the option.

    Plain half-precision weights: at learning rates near 1e-6 an AdamW step is smaller than the gap between neighbouring
    bf16 numbers, so nearly every weight would stay where it is. `16-mixed`: its gradients are scaled, and neither the
    clipping of `max_grad_norm` nor the discriminator's own optimiser step takes the scale off. Accumulated batches:
    Lightning averages their losses, however many tokens or pairs each has.
    """
    if trainer.precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision is {trainer.precision!r}: small steps on half-precision weights round to nothing. Use "
            "'bf16-mixed', which keeps fp32 master weights"
        )
    if trainer.precision == "16-mixed":
        raise ValueError(
            "trainer.precision is '16-mixed': its scaled gradients would be clipped and stepped as they stand. Use "
            "'bf16-mixed', which needs no scale"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "trainer.accumulate_grad_batches would weigh short and long batches alike: raise the batch size and set "
            "model.init_args.micro_batch_tokens, which splits a batch exactly"
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that cannot train a stage with its own backward passes. ValueError names one that can.

    Such a stage runs several backward passes a step, of micro-batches and of two players, each through a part of the
    module. Lightning's DeepSpeedStrategy has one engine, for one optimiser, and counts backward passes; DDP waits for
    gradients of all parameters unless it is told to find those that a pass does not touch.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            "trainer.strategy is Lightning's DeepSpeedStrategy, with one engine for one optimiser: this stage runs "
            f"backward passes of its own, for each of its players. Use {OURS} (--config strategy/zero2.yaml)"
        )
    if isinstance(strategy, DDPStrategy) and _finds_unused(strategy):
        return
    if isinstance(strategy, SingleDeviceStrategy) or type(strategy).__name__ == OURS.rpartition(".")[2]:
        return
    raise ValueError(
        f"trainer.strategy is {type(strategy).__name__}, and this stage runs backward passes of its own through parts "
        "of the module. Use --config strategy/ddp.yaml (which finds unused parameters), or --config "
        f"strategy/zero2.yaml ({OURS})"
    )


def prepare_stock(trainer: Trainer, module: LightningModule) -> None:
    """Make Lightning's own DeepSpeedStrategy ready for a stage with automatic optimisation. ValueError with the way out
    where it cannot train the stage.

    It asks the data loader for its batch size, for a log of throughput, before the module has what makes batches; it
    casts what it finds in a batch, and knows only plain collections; and it passes over steps whose gradients are not
    finite.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, DeepSpeedStrategy)
    assert isinstance(strategy.config, dict)
    stock = "trainer.strategy is Lightning's DeepSpeedStrategy"
    if not module.automatic_optimization:
        check_strategy(strategy)
    if not isinstance(trainer.accelerator, CUDAAccelerator):
        raise ValueError(f"{stock}, which runs on GPUs alone. Use --config strategy/zero2.yaml ({OURS}), or auto")
    if strategy.zero_stage_3:
        raise ValueError(
            f"{stock} at stage 3: it shards weights while transformers still sets them. Use --config "
            f"strategy/zero3.yaml ({OURS})"
        )
    strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)
    strategy.precision_plugin.convert_input = lambda data: data  # the networks cast what they take
    trainer.callbacks.insert(0, FiniteSteps())  # pyright: ignore[reportAttributeAccessIssue]  # before any checkpoint


class FiniteSteps(Callback):
    """ValueError naming the rows where a step's gradients were not finite, under Lightning's DeepSpeedStrategy: their
    norm is known only once the engine has reduced them, in its step. (At stage 0 it is not told; there the gradients
    are whole before the step, and `check_gradients` sees them.)"""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(trainer.strategy, DeepSpeedStrategy)
        norm = trainer.strategy.deepspeed_engine.get_global_grad_norm()
        if norm is not None:
            check_finite(torch.as_tensor(norm), "the gradient norm", batch.ids)


def _finds_unused(strategy: DDPStrategy) -> bool:
    return bool(strategy._ddp_kwargs.get("find_unused_parameters"))


def check_equal_batches(batch: Any, device: torch.device) -> None:
    """ValueError where ranks were given batches of different sizes: their losses are averaged over ranks, and a step
    has as many backward passes on each."""
    if not isinstance(batch, Sized) or not torch.distributed.is_initialized():
        return
    size = torch.tensor([len(batch), -len(batch)], device=device)
    torch.distributed.all_reduce(size, op=torch.distributed.ReduceOp.MAX)
    largest, smallest = int(size[0]), -int(size[1])
    if largest != smallest:
        raise ValueError(
            f"the processes of the run have batches of {smallest} to {largest} rows in one step: each needs as many. "
            "Give every process the same data.batch_size and let it drop an incomplete last batch"
        )
