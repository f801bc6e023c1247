"""Policy-gradient losses: GRPO, DAPO, Dr. GRPO, GSPO, CISPO as pure functions.

B sequences, T response tokens. Common arguments:

* `logps_BT`: log-probabilities of the sampled tokens under the policy being trained.
* `old_logps_BT`: the trainer's own at the rollout's weights (`logps_BT.detach()` where a batch is used once; the
  ratio is then exactly 1 and no clip acts). Never the rollout engine's: those enter through `weights_BT` only.
* `advantages`: (B,) for a sequence or (B, T) for each token; no gradient flows into them.
* `mask_BT`: True where a response token is trained. Masked-out positions may hold anything, NaN included.
* `clip_low`, `clip_high`: the ratio is clipped to [1 - clip_low, 1 + clip_high].
* `dual_clip`: c > 1; for A < 0 the objective is at least c A (arXiv 1912.09729), so one token whose ratio exploded
  cannot take over the step. None: off.
* `aggregation`, `denominator`, `constant_length`: see `prism_pl.aggregation`.
* `weights_BT`: (B, T), or (B, 1) for a sequence; detached factors on each token's loss (a correction for the mismatch
  of sampler and trainer).

Each returns the loss and metrics over this call's tokens, NaN where there are none: `clip_fraction` =
`clip_fraction_low` + `clip_fraction_high` (share of tokens on which the clip acts: A < 0 below, A > 0 above),
`dual_clip_fraction`, `ratio_mean|min|max|p05|p95` (no interpolation), `approx_kl` (k3 estimate of KL(old || new), nats
a token), `num_tokens`.

A log-ratio is bounded to +-20 before the exponential (verl does the same): e^89 is infinite in float32, and its product
with the zero gradient of a clipped token would be NaN. A token beyond it has no gradient; in
GSPO and CISPO, whose ratios are weights without a gradient, it keeps its own under the bounded ratio.
"""

import torch
from torch import Tensor

from prism_pl.aggregation import Aggregation, Metrics, aggregate, at_least_float32, masked_mean, quantile

MAX_LOG_RATIO = 20.0


def grpo(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: Aggregation = "sequence_mean",
    denominator: Tensor | float | None = None,
    constant_length: int | None = None,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GRPO (arXiv 2402.03300, eq. 3 without the KL term): `-min(w A, clip(w) A)` with the token ratio
    `w = exp(logp - old_logp)`; mean over each sequence's tokens, then over sequences. PRISM's release takes the token
    mean and a dual clip of 3."""
    check_clip(clip_low, clip_high, dual_clip)
    log_ratio_BT = _bounded(_log_ratio(logps_BT, old_logps_BT, mask_BT))
    loss_BT, metrics = _clipped(log_ratio_BT.exp(), advantages, mask_BT, clip_low, clip_high, dual_clip)
    metrics["approx_kl"] = _approx_kl(log_ratio_BT, mask_BT)
    return aggregate(
        _weighted(loss_BT, weights_BT, mask_BT), mask_BT, aggregation, denominator, constant_length
    ), metrics


def dapo(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token_mean",
    denominator: Tensor | float | None = None,
    constant_length: int | None = None,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """DAPO (arXiv 2503.14476, eq. 8): GRPO's token loss with the higher upper clip, averaged over all tokens of the
    batch, so that a long response weighs by its length. Dynamic sampling and overlong shaping are not the loss's
    business. PRISM's release adds a dual clip of 10."""
    return grpo(
        logps_BT,
        old_logps_BT,
        advantages,
        mask_BT,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        denominator=denominator,
        constant_length=constant_length,
        weights_BT=weights_BT,
    )


def dr_grpo(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: Aggregation = "constant",
    denominator: Tensor | float | None = None,
    constant_length: int | None = None,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Dr. GRPO (arXiv 2503.20783): GRPO's token loss summed and divided by a constant length instead of each response's
    own, which removes the preference for long wrong answers. Goes with `group_advantages(..., scale="none")`. Without a
    `denominator`, `constant_length` is needed."""
    return grpo(
        logps_BT,
        old_logps_BT,
        advantages,
        mask_BT,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        denominator=denominator,
        constant_length=constant_length,
        weights_BT=weights_BT,
    )


def gspo(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
    aggregation: Aggregation = "sequence_mean",
    denominator: Tensor | float | None = None,
    constant_length: int | None = None,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GSPO (arXiv 2507.18071): the ratio is the sequence's, `s = exp(mean over valid tokens of logp - old_logp)`.

    In the token form (GSPO-token there), `s_t = sg[s] exp(logp_t - sg[logp_t])`, sg = stop gradient: the value is s at
    every token, the gradient of a sequence's mean is `s A / |y| sum_t grad logp_t`, that of the sequence form, and
    advantages may differ by token. The clip acts on whole sequences; hence the small ranges."""
    check_clip(clip_low, clip_high, dual_clip)
    log_ratio_BT = _log_ratio(logps_BT, old_logps_BT, mask_BT)
    num_tokens_B1 = mask_BT.bool().sum(-1, keepdim=True).clamp(min=1)
    sequence_B1 = _bounded(log_ratio_BT.detach().sum(-1, keepdim=True) / num_tokens_B1)
    ratio_BT = (sequence_B1 + log_ratio_BT - log_ratio_BT.detach()).exp()
    loss_BT, metrics = _clipped(ratio_BT, advantages, mask_BT, clip_low, clip_high, dual_clip)
    metrics["approx_kl"] = _approx_kl(log_ratio_BT, mask_BT)
    return aggregate(
        _weighted(loss_BT, weights_BT, mask_BT), mask_BT, aggregation, denominator, constant_length
    ), metrics


def cispo(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float = 4.0,
    aggregation: Aggregation = "token_mean",
    denominator: Tensor | float | None = None,
    constant_length: int | None = None,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5): `-sg[clip(w, 1 - clip_low, 1 + clip_high)] A logp`.

    The clip bounds a token's weight instead of silencing the token, so every token keeps a gradient. The paper sets
    no lower bound (None here) and prints no upper one; 4.0, a weight of at most 5, is ours. The value of this loss
    means little (it scales with logp); its gradient is what trains. In the metrics `clip_fraction_*` is the share of
    weights that were bounded, whatever the advantage's sign, and `dual_clip_fraction` is 0."""
    check_clip(0.0 if clip_low is None else clip_low, clip_high, None)
    mask_BT = mask_BT.bool()
    log_ratio_BT = _log_ratio(logps_BT, old_logps_BT, mask_BT)
    ratio_BT = _bounded(log_ratio_BT.detach()).exp()
    lowest, highest = 0.0 if clip_low is None else 1.0 - clip_low, 1.0 + clip_high
    advantages_BT = _per_token(advantages, mask_BT)
    loss_BT = -ratio_BT.clamp(lowest, highest) * advantages_BT * logps_BT
    metrics = _metrics(ratio_BT, mask_BT, ratio_BT < lowest, ratio_BT > highest, torch.zeros_like(mask_BT))
    metrics["approx_kl"] = _approx_kl(log_ratio_BT, mask_BT)
    return aggregate(
        _weighted(loss_BT, weights_BT, mask_BT), mask_BT, aggregation, denominator, constant_length
    ), metrics


def check_clip(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """Raise ValueError unless 0 <= clip_low <= 1, clip_high >= 0, and dual_clip is None or above 1."""
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low: {clip_low!r} must lie in [0, 1]: the ratio is clipped at 1 - clip_low from below.")
    if not clip_high >= 0.0:
        raise ValueError(
            f"clip_high: {clip_high!r} must be at least 0: the ratio is clipped at 1 + clip_high from above."
        )
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip: {dual_clip!r} must be above 1 (the release uses 3 and 10); null switches it off.")


def _clipped(
    ratio_BT: Tensor, advantages: Tensor, mask_BT: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Metrics]:
    """PPO's clipped objective as a loss, per token, with the optional dual clip."""
    mask_BT = mask_BT.bool()
    advantages_BT = _per_token(advantages, mask_BT).to(ratio_BT.dtype)
    clipped_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_BT = torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)
    negative_BT = advantages_BT < 0
    dual_BT = torch.zeros_like(mask_BT)
    if dual_clip is not None:
        loss_BT = torch.where(negative_BT, torch.minimum(loss_BT, -advantages_BT * dual_clip), loss_BT)
        dual_BT = negative_BT & (ratio_BT > dual_clip)
    low_BT = negative_BT & (ratio_BT < 1.0 - clip_low)
    high_BT = (advantages_BT > 0) & (ratio_BT > 1.0 + clip_high)
    return loss_BT, _metrics(ratio_BT.detach(), mask_BT, low_BT, high_BT, dual_BT)


def _metrics(ratio_BT: Tensor, mask_BT: Tensor, low_BT: Tensor, high_BT: Tensor, dual_BT: Tensor) -> Metrics:
    ratios = ratio_BT[mask_BT]
    empty = ratios.numel() == 0
    nan = ratios.new_full((), torch.nan)
    low, high = masked_mean(low_BT.float(), mask_BT), masked_mean(high_BT.float(), mask_BT)
    return {
        "clip_fraction": low + high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "dual_clip_fraction": masked_mean(dual_BT.float(), mask_BT),
        "ratio_mean": ratios.mean(),
        "ratio_min": nan if empty else ratios.min(),
        "ratio_max": nan if empty else ratios.max(),
        "ratio_p05": quantile(ratios, 0.05),
        "ratio_p95": quantile(ratios, 0.95),
        "num_tokens": mask_BT.sum(),
    }


def _log_ratio(logps_BT: Tensor, old_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log pi - log pi_old in at least float32, 0 at masked-out positions (exp of padding may overflow, and inf x 0 =
    NaN)."""
    assert logps_BT.shape == old_logps_BT.shape == mask_BT.shape, (
        f"logps {tuple(logps_BT.shape)}, old {tuple(old_logps_BT.shape)}, mask {tuple(mask_BT.shape)}"
    )
    difference_BT = at_least_float32(logps_BT) - at_least_float32(old_logps_BT).detach()
    return torch.where(mask_BT.bool(), difference_BT, torch.zeros_like(difference_BT))


def _bounded(log_ratio: Tensor) -> Tensor:
    """A log-ratio whose exponential is finite."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _per_token(advantages: Tensor, mask_BT: Tensor) -> Tensor:
    """(B,) or (B, T) advantages as (B, T), detached, 0 at masked-out positions."""
    assert advantages.shape in (mask_BT.shape, mask_BT.shape[:1]), (
        f"advantages {tuple(advantages.shape)} fit neither sequences nor tokens of {tuple(mask_BT.shape)}"
    )
    advantages = advantages.detach()
    advantages_BT = advantages if advantages.dim() == 2 else advantages[:, None].expand(mask_BT.shape)
    return torch.where(mask_BT.bool(), advantages_BT, torch.zeros_like(advantages_BT))


def _weighted(loss_BT: Tensor, weights_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
    if weights_BT is None:
        return loss_BT
    # A (B,) tensor would broadcast along the tokens where B = T.
    assert weights_BT.shape in (loss_BT.shape, (loss_BT.shape[0], 1)), f"weights {tuple(weights_BT.shape)}"
    return loss_BT * torch.where(mask_BT.bool(), weights_BT.detach(), torch.zeros_like(loss_BT))


def _approx_kl(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """k3 with samples of the old policy: `(w - 1) - log w`."""
    log_ratio_BT = _bounded(log_ratio_BT.detach())
    return masked_mean(torch.expm1(log_ratio_BT) - log_ratio_BT, mask_BT)
