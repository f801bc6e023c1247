"""Counts and groups over all ranks of a run. Where nothing is distributed there is one rank."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SUM, MIN, MAX = (getattr(torch.distributed.ReduceOp, name) for name in ("SUM", "MIN", "MAX"))


def world_size() -> int:
    """Ranks of the run; 1 where nothing is distributed."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def global_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradient."""
    return _reduced(values, SUM)


def global_min(values: Tensor) -> Tensor:
    """The smallest value of a tensor over all ranks, element by element, without gradient."""
    return _reduced(values, MIN)


def global_max(values: Tensor) -> Tensor:
    """The largest value of a tensor over all ranks, element by element, without gradient."""
    return _reduced(values, MAX)


def share(count: Tensor) -> Tensor:
    """What a rank divides its loss sum by, so that gradients averaged over ranks are those of the global mean: the
    global count divided by the number of ranks, at least 1 / ranks so that an empty batch gives zero and not NaN."""
    return global_sum(count.float()).clamp_min(1.0) / world_size()


def _reduced(values: Tensor, op: torch.distributed.ReduceOp.RedOpType) -> Tensor:
    reduced = values.detach().clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(reduced, op=op)
    return reduced


def metrics_over_ranks(metrics: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks' metrics are together, the same on each: of ranks what `aggregation.combine_metrics` is of
    micro-batches, in one collective, and one more where there are extremes.

    `num_*` add up, `*_min` and `*_max` are the extremes, all others means weighted by their counts: exact for means and
    fractions; percentiles become an average of percentiles. A rank whose count is 0 is left out, whatever its value
    (NaN); where all are, the metric is NaN, and so it is where a rank that counts has NaN.

    Args:
        metrics: scalars on the module's device, the same names in the same order on every rank.
        counts: of each metric, what it is taken over on this rank.
    """
    if world_size() == 1 or not metrics:
        return dict(metrics)
    values_K = torch.stack([value.detach().double() for value in metrics.values()])
    ones = torch.ones_like(values_K[0])
    counts_K = torch.stack([ones if name.startswith("num_") else counts[name].double() for name in metrics])
    signs_K = values_K.new_tensor([-1.0 if name.endswith("_min") else 1.0 for name in metrics])
    filled_K = counts_K > 0
    weighted_K = torch.where(filled_K, values_K * counts_K, torch.zeros_like(values_K))
    totals_K, whole_K = global_sum(torch.stack([weighted_K, counts_K]))
    means_K = extremes_K = totals_K / whole_K
    if any(name.endswith(("_min", "_max")) for name in metrics):
        largest_K = signs_K * global_max(torch.where(filled_K, signs_K * values_K, -torch.inf))
        extremes_K = torch.where(means_K.isnan(), means_K, largest_K)  # which keeps NaN, as a maximum need not
    reduced = {}
    for k, (name, own) in enumerate(metrics.items()):
        extreme = name.endswith(("_min", "_max"))
        of = totals_K if name.startswith("num_") else extremes_K if extreme else means_K
        reduced[name] = of[k].to(own.dtype)
    return reduced


def sums_over_ranks(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor summed over all ranks, all in one collective; the same names and shapes on every rank."""
    if world_size() == 1 or not sums:
        return dict(sums)
    whole = global_sum(torch.cat([value.detach().double().flatten() for value in sums.values()]))
    parts = whole.split([value.numel() for value in sums.values()])
    return {n: part.view_as(v).to(v.dtype) for part, (n, v) in zip(parts, sums.items(), strict=True)}


def whole_groups(values_PG: Tensor, num_ranks: int) -> Tensor:
    """The groups that this rank shares with its neighbours, (P, num_ranks * G), of its own part, (P, G): ranks 0 to
    num_ranks - 1 hold the same P prompts, the next num_ranks others. Without gradient."""
    if num_ranks == 1:
        return values_PG
    parts = [torch.empty_like(values_PG) for _ in range(world_size())]
    torch.distributed.all_gather(parts, values_PG.detach().contiguous())
    first = torch.distributed.get_rank() // num_ranks * num_ranks
    return torch.cat(parts[first : first + num_ranks], dim=1)


def own_part(values_PG: Tensor, num_ranks: int) -> Tensor:
    """Undo `whole_groups`: this rank's own rollouts of each group, (P, G)."""
    if num_ranks == 1:
        return values_PG
    return values_PG.chunk(num_ranks, dim=1)[torch.distributed.get_rank() % num_ranks]


def on_first_rank(act: Callable[[], Any]) -> Any:
    """Act on the first rank alone, once all have come here and while they wait for it.

    Returns:
        A plain value of `act`, on every rank. What stops the first is an error on all of them.
    """
    if not torch.distributed.is_initialized():
        return act()
    gathered_values(None)
    value, error = None, None
    if torch.distributed.get_rank() == 0:
        try:
            value = act()
        except Exception as raised:
            error = raised
    value, reason = gathered_values((value, None if error is None else f"{type(error).__name__}: {error}"))[0]
    if error is not None:
        raise error
    if reason is not None:
        raise RuntimeError(f"the first process of the run stopped: {reason}")
    return value


def gathered_values(value: Any) -> list[Any]:
    """A plain value of every rank, in order; of this one alone where nothing is distributed."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
