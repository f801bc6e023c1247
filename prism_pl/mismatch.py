"""The gap between the sampler's probabilities and the trainer's, measured always and corrected where asked.

A rollout engine with other kernels, or in bf16, draws from a slightly other distribution than the trainer computes, so
the policy gradient is of the wrong one. The remedy is importance sampling: each token's loss is multiplied by
`w = pi_trainer / pi_sampler`, both at the rollout's weights, detached, and bounded, because a product of many ratios
has no small variance. `pi_trainer` is `old_logps_BT`, so the correction stands beside the policy loss's own ratio
`pi / pi_old` and never replaces it.

* `tis`, truncated: `min(w, high)`. Biased low for tokens that the sampler hardly ever draws, and nothing is lost.
* `mis`, masked: `w` inside `[low, high]`, 0 outside: what the sampler should not have drawn teaches nothing.

Both by token, or by sequence with the product of a response's ratios. What is masked here still counts in the loss's
denominator: it was sampled, and its weight is 0.
Sources: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al., 2025) for TIS;
"Every Step Evolves" (arXiv 2510.18855, IcePop) for masking on both sides.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from prism_pl.aggregation import Metrics, at_least_float32, masked_mean, quantile
from prism_pl.policy_gradient import MAX_LOG_RATIO

Kind = Literal["auto", "off", "tis", "mis"]
Level = Literal["token", "sequence"]

# Ratios inside this band are what kernels of one precision differ by; the share outside is logged.
BAND = (0.9, 1.1)


class Correction(NamedTuple):
    """`weights_BT` for a policy loss, (B, T) by token and (B, 1) by sequence; None where nothing is corrected."""

    weights_BT: Tensor | None
    metrics: Metrics


@dataclass(frozen=True)
class MismatchCorrection:
    """How the sampler's mismatch is corrected, see the module's docstring.

    Attributes:
        kind: `auto` is `tis` where the sampler runs below float32, else `off`, and where the trainer runs in float32
            too it stops a run whose rollouts are not the trainer's own; `off` only measures.
        level: a weight for each token, or one for each sequence: the product of its tokens' ratios.
        low: `mis` only: ratios below are masked.
        high: ratios above are truncated (`tis`) or masked (`mis`).
    """

    kind: Kind = "auto"
    level: Level = "token"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        """Raises ValueError for an option that is not allowed."""
        for name, value, allowed in (("kind", self.kind, Kind), ("level", self.level, Level)):
            if value not in get_args(allowed):
                raise ValueError(f"mismatch.{name}: {value!r} is not one of {', '.join(get_args(allowed))}.")
        if not 0 <= self.low < 1:
            raise ValueError(f"mismatch.low: {self.low!r} must lie in [0, 1): a ratio of 1 is a perfect match.")
        if not self.high > 1:
            raise ValueError(f"mismatch.high: {self.high!r} must be above 1: a ratio of 1 is a perfect match.")

    def resolve(self, sampler_dtype: torch.dtype) -> "MismatchCorrection":
        """`auto` decided by the precision that the sampler runs in."""
        if self.kind != "auto":
            return self
        return replace(self, kind="off" if sampler_dtype in (torch.float32, torch.float64) else "tis")

    def __call__(self, trainer_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor) -> Correction:
        """Weights and measurements of one piece of a batch.

        Args:
            trainer_logps_BT: of the sampled tokens at the rollout's weights, `old_logps_BT` of the policy loss.
            sampler_logps_BT: the engine's own of the same tokens.
            mask_BT: response tokens that are trained.

        Returns:
            The weights, and `mismatch_p50|p95|max` (of the absolute difference of log-probabilities, nats),
            `mismatch_outside` (share of tokens whose ratio lies outside [0.9, 1.1]), `mismatch_truncated` and
            `mismatch_masked` (share of tokens whose weight was); NaN without tokens.
        """
        assert self.kind != "auto", "resolve the correction with the sampler's dtype first"
        mask_BT = mask_BT.bool()
        difference_BT = at_least_float32(trainer_logps_BT.detach()) - at_least_float32(sampler_logps_BT)
        difference_BT = torch.where(mask_BT, difference_BT, torch.zeros_like(difference_BT))
        metrics = _measure(difference_BT, mask_BT)
        if self.kind == "off":
            return Correction(None, metrics)
        log_ratio = difference_BT if self.level == "token" else difference_BT.sum(-1, keepdim=True)
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        above = ratio > self.high
        if self.kind == "tis":
            metrics["mismatch_truncated"] = masked_mean(above.expand_as(mask_BT).float(), mask_BT)
            return Correction(ratio.clamp(max=self.high), metrics)
        outside = above | (ratio < self.low)
        metrics["mismatch_masked"] = masked_mean(outside.expand_as(mask_BT).float(), mask_BT)
        return Correction(ratio.masked_fill(outside, 0.0), metrics)


def _measure(difference_BT: Tensor, mask_BT: Tensor) -> Metrics:
    """The size of the mismatch. Means hide it, so percentiles and the extreme."""
    sizes = difference_BT[mask_BT].abs()
    nan = sizes.new_full((), torch.nan)
    ratio_BT = difference_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    outside_BT = (ratio_BT < BAND[0]) | (ratio_BT > BAND[1])
    empty = sizes.numel() == 0
    return {
        "mismatch_p50": quantile(sizes, 0.5),
        "mismatch_p95": quantile(sizes, 0.95),
        "mismatch_max": nan if empty else sizes.max(),
        "mismatch_outside": masked_mean(outside_BT.float(), mask_BT),
    }
