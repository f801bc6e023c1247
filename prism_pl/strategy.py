"""What the modules need of the training strategy, the same under `auto`, DDP and DeepSpeed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn


@contextmanager
def training_only(module: LightningModule, name: str) -> Iterator[nn.Module]:
    """Give gradients only to the network `module.<name>`; every other network of the module is frozen meanwhile.

    Parameters that were frozen before stay frozen, and all flags are restored afterwards.
    """
    network = module.get_submodule(name)
    own = {id(parameter) for parameter in network.parameters()}
    others = [p for p in module.parameters() if id(p) not in own and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def world_size() -> int:
    """Ranks of the run; 1 where nothing is distributed."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def global_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradient."""
    total = values.detach().clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


def global_min(value: Tensor) -> Tensor:
    """The smallest value of a tensor over all ranks, without gradient."""
    smallest = value.detach().clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    return smallest


def share(count: Tensor) -> Tensor:
    """What a rank divides its loss sum by, so that gradients averaged over ranks are those of the global mean: the
    global count divided by the number of ranks, at least 1 / ranks so that an empty batch gives zero and not NaN."""
    return global_sum(count.float()).clamp_min(1.0) / world_size()


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


def check_one_device(trainer: Trainer) -> None:
    """Refuse several processes for a stage that runs its own backward passes. ValueError.

    Plain DDP reduces the gradients of one backward pass through the whole module a step. Such a stage runs several, of
    micro-batches and of two players, each through a part of the module.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"trainer.devices and trainer.num_nodes make {trainer.world_size} processes, but this stage runs its own "
            "backward passes: its players would need an engine each, which plain DDP does not give. Set "
            "trainer.devices to 1"
        )
