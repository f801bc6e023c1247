"""From per-token values to one number that micro-batches and ranks can add up.

B sequences, T response tokens. A loss is a sum over what is trained, divided once by a count over the whole optimiser
step: the caller adds `count` over micro-batches, all-reduces it, and hands it to every call as `denominator`. The parts
then sum to the loss of the whole batch in one piece, however it was split into sequences.

One denominator for everything: it counts what is trained. A sequence masked away (truncated, `mask_truncated`) adds
nothing to the sum and nothing to the count, so leaving it out neither shrinks the step nor changes the weight of the
others; the policy loss, the KL term and the entropy of one step share that count.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
Metrics = dict[str, Tensor]


def check_aggregation(aggregation: str, constant_length: int | None = None) -> None:
    """Raise ValueError for an aggregation that does not exist or a `constant_length` that is not a positive number."""
    if aggregation not in get_args(Aggregation):
        allowed = ", ".join(get_args(Aggregation))
        raise ValueError(f"aggregation: {aggregation!r} is not one of {allowed}.")
    if constant_length is not None and constant_length < 1:
        raise ValueError(f"constant_length: {constant_length!r} must be at least 1 (the longest response, in tokens).")


def count(mask_BT: Tensor, aggregation: Aggregation, constant_length: int | None = None) -> Tensor:
    """What `aggregate` divides by: int64, a scalar, additive over micro-batches and ranks.

    Args:
        mask_BT: True (or 1) where a token is trained.
        aggregation: `token_mean` counts tokens, `sequence_mean` sequences with at least one token, `constant` those
            sequences times `constant_length`.
        constant_length: tokens; needed by `constant` (Dr. GRPO, arXiv 2503.20783, divides by the generation budget).

    Raises:
        ValueError: unknown aggregation, or `constant` without a `constant_length`.
    """
    check_aggregation(aggregation, constant_length)
    mask_BT = mask_BT.bool()
    if aggregation == "token_mean":
        return mask_BT.sum()
    num_sequences = mask_BT.any(-1).sum()
    if aggregation == "sequence_mean":
        return num_sequences
    if constant_length is None:
        raise ValueError(
            "constant_length: None, but aggregation 'constant' divides by it. "
            "Set it to the largest number of new tokens a rollout may have."
        )
    return num_sequences * constant_length


def divide(total: Tensor, denominator: Tensor | float) -> Tensor:
    """`total / denominator`, and `total` itself where the denominator is 0: an empty batch keeps a backward-able 0."""
    denominator = torch.as_tensor(denominator, device=total.device, dtype=total.dtype).detach()
    return total / torch.where(denominator == 0, torch.ones_like(denominator), denominator)


def aggregate(
    values_BT: Tensor,
    mask_BT: Tensor,
    aggregation: Aggregation,
    denominator: Tensor | float | None = None,
    constant_length: int | None = None,
) -> Tensor:
    """Sum the values of the masked-in tokens and divide once.

    Args:
        values_BT: anything at masked-out positions, NaN included: it reaches neither the sum nor the gradient.
        mask_BT: True (or 1) where a token is trained.
        aggregation: `token_mean` sum of tokens / number of tokens; `sequence_mean` sum of per-sequence token means /
            number of sequences; `constant` sum of tokens / (number of sequences x `constant_length`).
        denominator: `count` over the whole optimiser step (all micro-batches, all ranks). None: of these values.
        constant_length: tokens; only for `constant` with no denominator given.

    Returns:
        A scalar. With an empty mask a 0 that can be run backward, so that ranks stay in step.
    """
    check_aggregation(aggregation, constant_length)
    mask_BT = mask_BT.bool()
    assert values_BT.shape == mask_BT.shape, f"values {tuple(values_BT.shape)} against mask {tuple(mask_BT.shape)}"
    values_BT = at_least_float32(values_BT)
    total_B = torch.where(mask_BT, values_BT, torch.zeros_like(values_BT)).sum(-1)
    if aggregation == "sequence_mean":
        total_B = total_B / mask_BT.sum(-1).clamp(min=1)
    if denominator is None:
        denominator = count(mask_BT, aggregation, constant_length)
    return divide(total_B.sum(), denominator)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision up to float32, before differences and sums are taken; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where the mask is True, for logs: no gradient, and NaN (never a made-up 0) where nothing is masked in."""
    return values.detach()[mask.bool()].mean()


def combine_metrics(parts: Sequence[Metrics], weight: str = "num_tokens") -> Metrics:
    """Merge the metrics of micro-batches into those of the batch.

    `num_*` add up, `*_min` and `*_max` are the extremes, all others are means weighted by the count `weight`. Exact for
    means and fractions; the percentiles `*_p05`, `*_p95` become an average of percentiles. A part whose count is 0 has
    NaN means and is left out; when all counts are 0 the result is NaN.
    """
    assert parts, "combine_metrics needs at least one part"
    counts = torch.stack([part[weight] for part in parts])
    filled = counts > 0
    merged: Metrics = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        if name.startswith("num_"):
            merged[name] = values.sum()
        elif not filled.any():
            merged[name] = torch.full_like(values[0], torch.nan)
        elif name.endswith("_min"):
            merged[name] = values[filled].min()
        elif name.endswith("_max"):
            merged[name] = values[filled].max()
        else:
            merged[name] = (values[filled] * counts[filled]).sum() / counts.sum()
    return merged


def quantile(values: Tensor, q: float) -> Tensor:
    """The smallest of the values that a share `q` of them does not exceed; `torch.quantile` refuses more than 2^24.
    NaN where there are none."""
    if values.numel() == 0:
        return values.new_full((), torch.nan)
    return values.kthvalue(math.ceil(q * values.numel())).values
