"""Learning-rate schedules, gradient clipping, and the checks before an optimiser steps."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "cosine", "linear"]


def build_optimizer(make: OptimizerCallable, network: nn.Module, option: str = "optimizer") -> Optimizer:
    """An optimiser over what is trained of a network.

    Args:
        option: what it is called in a YAML.

    Raises:
        ValueError: the optimiser does not take its settings, or nothing is trained.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            f"model.{option}: every weight is frozen, so nothing is trained. Give model.freeze fewer patterns"
        )
    try:
        return make(trained)
    except ValueError as error:
        raise ValueError(f"model.{option}: {error}. Set it there, as in --model.{option}.lr 1e-4") from error


def lr_scheduler(optimizer: Optimizer, schedule: Schedule, warmup: float, num_steps: float) -> Any:
    """A learning-rate schedule stepped once an optimiser step.

    Args:
        warmup: linear warm-up; below 1 a share of `num_steps`, else a number of steps.
        num_steps: of the whole run; only `constant` works for an unlimited one.
    """
    from transformers import get_scheduler

    if warmup < 0:
        raise ValueError(f"warmup is {warmup}: below 1 a share of the run, else a number of steps, give 0 or more")
    if schedule == "constant":
        if 0 < warmup < 1 and num_steps == float("inf"):
            raise ValueError(f"warmup={warmup} is a share of the run: set trainer.max_steps, or warmup to a step count")
        warmup_steps = int(warmup * num_steps) if warmup < 1 and num_steps != float("inf") else int(warmup)
        return get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=warmup_steps)
    if num_steps == float("inf"):
        raise ValueError(f"schedule={schedule!r} needs an end: set trainer.max_steps or trainer.max_epochs")
    warmup_steps = int(warmup * num_steps) if warmup < 1 else int(warmup)
    return get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=int(num_steps))


def rate_jumps(configs: Iterable[Any]) -> list[str]:
    """What to say of schedulers that were resumed with another length of the run: a rate that is no longer the one of
    the step before. Empty where all go on as they were."""
    said = []
    for config in configs:
        scheduler = config.scheduler
        if not isinstance(scheduler, LambdaLR):
            continue
        groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, base, scale in groups:
            now = base * scale(scheduler.last_epoch)
            if now != group["lr"]:
                said.append(
                    f"The learning rate jumps from {group['lr']:.3g} to {now:.3g} after the next step: its schedule is "
                    "laid over the new length of the run (--trainer.max_steps). schedule: constant has no length."
                )
    return list(dict.fromkeys(said))


def check_finite(value: Tensor, what: str, ids: Sequence[str]) -> None:
    """Stop before an optimiser step that would ruin the weights: ValueError naming what is not finite and the batch."""
    if not bool(torch.isfinite(value.detach()).all()):
        shown = ", ".join(dict.fromkeys(ids))
        raise ValueError(
            f"{what} is not finite ({value.detach().tolist()}) on the batch of rows {shown[:400]}. This network took "
            "no step with it and the last checkpoint is intact: lower the learning rate, or look at these rows"
        )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clip to a total norm (None: only measure it) and return the norm from before."""
    parameters = [p for p in parameters if p.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
