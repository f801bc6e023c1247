"""Weights that ZeRO-3 has sharded: their whole shapes, and making them whole for a while.

DeepSpeed leaves an empty tensor in a sharded parameter and notes on it what it was (`ds_shape`, `ds_numel`). It makes a
module's own parameters whole around the module's call, forward and backward, by hooks; each is a collective operation.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prism_pl.strategy.ranks import on_first_rank


def is_sharded(weights: nn.Module | Tensor) -> bool:
    """Whether a parameter, or any of a module, is sharded by ZeRO-3."""
    if isinstance(weights, nn.Module):
        return any(is_sharded(parameter) for parameter in weights.parameters())
    return hasattr(weights, "ds_shape")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, of all of it where it is sharded."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_numel(tensor: Tensor) -> int:
    """The number of elements of a tensor, of all of it where it is sharded."""
    return getattr(tensor, "ds_numel", tensor.numel())


def gathered(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """The sharded ones among these are whole, on every rank, for as long as the context lasts. Every rank must come
    here with the same tensors in the same order; what is written to them is lost."""
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


@contextmanager
def whole_construction() -> Iterator[None]:
    """What transformers builds inside is whole, also within `building` at ZeRO-3: for a network whose weights go into
    another one. It lies in each rank's CPU memory meanwhile."""
    from transformers.integrations import deepspeed as flag

    kept = flag._hf_deepspeed_config_weak_ref
    flag.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        flag._hf_deepspeed_config_weak_ref = kept


def is_first_rank() -> bool:
    """Whether this is the run's first process; True where nothing is distributed."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def gathered_state(state: Mapping[str, Tensor], dtype: torch.dtype, bucket: int = 50_000_000) -> dict[str, Tensor]:
    """A state dict cast to `dtype`, for a file. Whole tensors stay where they are. Sharded ones are made whole bucket
    by bucket, which every rank must come to, and kept on the first rank alone, in the CPU's memory.

    Args:
        state: parameters as such, not detached, so that sharded ones are known.
        bucket: elements gathered at once.

    Returns:
        The tensors by name; one that stands under two names is one tensor. Not for use on other ranks.
    """
    whole: dict[int, Tensor] = {}
    waiting: list[Tensor] = []
    distinct = list({id(tensor): tensor for tensor in state.values()}.values())
    for tensor, following in zip(distinct, [*distinct[1:], None], strict=True):
        if not is_sharded(tensor):
            whole[id(tensor)] = tensor.detach().to(dtype)
            continue
        waiting.append(tensor)
        size = sum(whole_numel(each) for each in waiting)
        if following is None or not is_sharded(following) or size + whole_numel(following) > bucket:
            with gathered(waiting):
                if is_first_rank():
                    whole.update({id(each): each.detach().to("cpu", dtype, copy=True) for each in waiting})
            waiting = []
    return {name: whole[id(tensor)] for name, tensor in state.items() if id(tensor) in whole}


@torch.no_grad()
def load_whole_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    names: Iterable[str] | None = None,
    sent_on: torch.device | None = None,
) -> None:
    """Load whole weights into a module, sharded or not. Every rank comes here with the same names; of sharded weights
    the first rank's values go to all.

    Args:
        names: what to load; None: all that is in `state`.
        sent_on: the first rank's values go to all of the other weights too, one at a time by way of this device. Other
            ranks' tensors need the dtypes and shapes alone. None: each rank has them.
    """
    wanted = set(state if names is None else names)
    for name, target in module.state_dict(keep_vars=True).items():
        if name not in wanted:
            continue
        if not is_sharded(target):
            target.copy_(state[name] if sent_on is None else _of_first_rank(state[name], sent_on))
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
            if is_first_rank():
                target.copy_(state[name])
            if target.dtype == torch.bfloat16:
                _keep_exact_part(target, state.get(name))


def _of_first_rank(value: Tensor, device: torch.device) -> Tensor:
    sent = torch.empty(value.shape, dtype=value.dtype, device=device)
    if is_first_rank():
        sent.copy_(value)
    torch.distributed.broadcast(sent, 0)
    return sent


EXACT = "prism_exact_part"  # on a sharded parameter: this rank's part of what it was loaded with, float32


def _keep_exact_part(target: Tensor, value: Tensor | None) -> None:
    """Leave on a bf16 parameter, which is whole now, this rank's part of the float32 values that it was loaded with,
    where they are finer, for the master weights to start from.

    Args:
        value: on the first rank; not looked at on others.
    """
    exact = torch.empty_like(target, dtype=torch.float32)
    if is_first_rank():
        assert value is not None
        exact.copy_(value)
    finer = (exact != target).any()  # on other ranks of nothing yet
    torch.distributed.broadcast(finer, 0)
    if not finer:
        return
    torch.distributed.broadcast(exact, 0)
    setattr(target, EXACT, _own_part(exact, target))


def _own_part(whole: Tensor, sharded: Any) -> Tensor:
    """This rank's part of whole values, padded with zeros as the parameter's is, in the CPU's memory."""
    size, rank = sharded.ds_tensor.numel(), torch.distributed.get_rank()
    mine = whole.flatten()[rank * size : (rank + 1) * size].cpu()
    return nn.functional.pad(mine, (0, size - len(mine)))


def finer_than_bf16(network: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Copies, in the CPU's memory, of whole float32 weights that are trained and that bf16 would round."""
    trained = (p for p in network.parameters() if p.requires_grad and p.dtype == torch.float32 and not is_sharded(p))
    return {p: p.detach().to("cpu", copy=True) for p in trained if bool((p.bfloat16() != p).any())}


def restore_masters(network: nn.Module, finer: Mapping[nn.Parameter, Tensor]) -> None:
    """Let the master weights of a bf16 engine start from what was loaded, not from its rounding.

    Args:
        finer: of `finer_than_bf16`; what was sharded before has its part on it.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for parameter in network.parameters():
        if parameter in finer and not is_sharded(parameter):
            safe_set_full_fp32_param(parameter, finer[parameter].to(parameter.device))
        elif parameter in finer:
            safe_set_local_fp32_param(parameter, _own_part(finer[parameter], parameter))
        elif hasattr(parameter, EXACT):
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, getattr(parameter, EXACT))
            delattr(parameter, EXACT)


def builds_sharded() -> bool:
    """Whether what transformers builds now comes into being sharded: inside `building` at ZeRO-3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def build_sharded(kind: Any, config: Any, weights: Callable[[], Mapping[str, Tensor]], **options: Any) -> Any:
    """A sharded model of transformers with whole weights that the first rank alone holds, in its CPU's memory.

    transformers itself would read all files on every rank, and looks at the shapes of weights that are sharded away:
    experts of a mixture come out transposed.

    Args:
        kind: the class.
        weights: gives a state dict; called on the first rank.
        options: of the class, such as `attn_implementation`.
    """
    whole: dict[str, Tensor] = {}
    with whole_construction():
        on_first_rank(lambda: whole.update(weights()))
    model = kind._from_config(config, dtype=torch.float32, **options)
    load_whole_state(model, whole, names=model.state_dict())
    return model


def inside(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` as the forward pass of `module`: the hooks on the module's call hold around all of it, once.

    For a function that reads the module's weights itself, or calls parts of the module. ZeRO-3 gathers weights in those
    hooks, and a function that calls the module as often as its rank's data is long would gather more often than on
    other ranks, which waits forever.
    """
    module.forward = function
    try:
        return module(*args)
    finally:
        del module.forward
