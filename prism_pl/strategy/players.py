"""One network trains at a time: how it is built, which one gets gradients, and its step. The modules call these under
every strategy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from prism_pl.optim import check_finite, clip_gradients
from prism_pl.strategy.checks import check_strategy
from prism_pl.strategy.multi_engine import MultiEngineDeepSpeedStrategy


@contextmanager
def building(module: LightningModule, name: str, frozen: bool = False) -> Iterator[None]:
    """Around what builds the network `module.<name>` in `configure_model`: at ZeRO-3 it comes into being sharded,
    unless it is never trained and `frozen`. Nothing without a trainer. ValueError
    where the strategy cannot train a module that runs its own backward passes."""
    trainer = module._trainer
    if trainer is None:
        yield
        return
    if trainer.state.fn == TrainerFn.FITTING and not module.automatic_optimization:
        check_strategy(trainer.strategy)
    if isinstance(trainer.strategy, MultiEngineDeepSpeedStrategy):
        with trainer.strategy.building(name, frozen):
            yield
    else:
        yield


@contextmanager
def training_only(module: LightningModule, name: str) -> Iterator[nn.Module]:
    """Give gradients only to the network `module.<name>`; every other network of the module is frozen meanwhile.

    Parameters that were frozen before stay frozen, and all flags are restored afterwards. The flags also tell the
    DeepSpeed strategy whose engine a backward pass belongs to.
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


def check_gradients(module: LightningModule, name: str, ids: Sequence[str]) -> None:
    """ValueError naming the rows where the norm of the gradients of `module.<name>` is not finite. For the stages with
    automatic optimisation, in `on_before_optimizer_step`, which runs before Lightning clips.

    Gradients of an engine are this rank's own until its step: one rank would stop here and the others wait for it. The
    strategy checks after the step, which takes none with such a norm.
    """
    if isinstance(module.trainer.strategy, MultiEngineDeepSpeedStrategy):
        return
    gradients = [p.grad for p in module.get_submodule(name).parameters() if p.grad is not None]
    check_finite(nn.utils.get_total_norm(gradients), f"the {name}'s gradient norm", ids)


def step_network(
    module: LightningModule, name: str, optimizer: Any, max_norm: float | None, ids: Sequence[str]
) -> Tensor:
    """Clip the gradients of `module.<name>`, check their norm, step, and forget them.

    Args:
        optimizer: of this network. Through Lightning's wrapper the step counts in `trainer.global_step`; the raw one's
            does not.
        max_norm: None only measures.
        ids: the batch's rows, for the message.

    Returns:
        The norm from before clipping. A non-finite one is a ValueError that names the rows, with nothing stepped.
    """
    what = f"the {name}'s gradient norm"
    strategy = module.trainer.strategy
    if isinstance(strategy, MultiEngineDeepSpeedStrategy):
        strategy.clip(name, max_norm)
        if isinstance(optimizer, LightningOptimizer):
            optimizer.step()
        else:
            strategy.step(name)
        norm = strategy.gradient_norm(name)
        check_finite(norm, what, ids)  # an engine takes no step with such a norm
        return norm
    norm = clip_gradients(module.get_submodule(name).parameters(), max_norm)
    check_finite(norm, what, ids)
    optimizer.step()
    optimizer.zero_grad()
    return norm
