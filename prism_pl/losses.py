"""Losses as pure functions over tensors: `(loss, metrics)`, each loss a sum divided once by a global count.

B sequences (or pairs), T response tokens. `denominator` is the count over the whole optimiser step (see
`prism_pl.aggregation`); None means this call's own count. Metrics are detached scalars over this call alone;
`combine_metrics` merges those of micro-batches. The policy-gradient losses live in `prism_pl.policy_gradient`.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_pl.aggregation import (
    Aggregation,
    Metrics,
    aggregate,
    at_least_float32,
    combine_metrics,
    count,
    divide,
    masked_mean,
)
from prism_pl.policy_gradient import cispo, dapo, dr_grpo, grpo, gspo

__all__ = [
    "Aggregation",
    "KLKind",
    "Metrics",
    "aggregate",
    "bradley_terry",
    "check_kl_placement",
    "cispo",
    "combine_metrics",
    "count",
    "dapo",
    "dr_grpo",
    "grpo",
    "gspo",
    "kl_estimate",
    "masked_nll",
    "score_l2",
    "soft_clip",
]

KLKind = Literal["k1", "k2", "k3"]


def masked_nll(logps_BT: Tensor, mask_BT: Tensor, denominator: Tensor | float | None = None) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the masked-in tokens, in nats: `-sum(logps) / number of tokens`.

    Metrics: `nll` (this call's mean per token), `num_tokens`.
    """
    loss = aggregate(-logps_BT, mask_BT, "token_mean", denominator)
    return loss, {"nll": masked_mean(-logps_BT, mask_BT), "num_tokens": count(mask_BT, "token_mean")}


def bradley_terry(
    chosen_B: Tensor,
    rejected_B: Tensor,
    weight_B: Tensor | None = None,
    label_smoothing: float = 0.0,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Metrics]:
    """The discriminator's loss, `-log sigmoid(D(x, y+) - D(x, y-))` (PRISM, arXiv 2604.28123, eq. 2).

    Args:
        chosen_B: scores of the demonstrations.
        rejected_B: scores of the rollouts, each paired with its own prompt's demonstration.
        weight_B: weight of each pair, or a mask. A pair of weight 0 (a malformed rollout) is left out whatever its
            scores hold, NaN included.
        label_smoothing: e in `-(1 - e) log sigmoid(m) - e log sigmoid(-m)`, the share of labels taken to be swapped.
            With e > 0 the best margin is finite, `log((1 - e) / e)`, which keeps the discriminator from saturating.
        denominator: sum of weights over the whole step; None: of this call.

    Returns:
        The loss (a backward-able 0 without any pair) and the metrics `accuracy` (share of pairs with a positive margin;
        a tie counts half, so scores that are all alike give 0.5), `margin` (mean), both NaN without any pair, and
        `num_pairs` (sum of weights).

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: {label_smoothing!r} must lie in [0, 0.5); at 0.5 both sides are alike.")
    assert chosen_B.shape == rejected_B.shape, f"{tuple(chosen_B.shape)} chosen, {tuple(rejected_B.shape)} rejected"
    margin_B = at_least_float32(chosen_B) - at_least_float32(rejected_B)
    weight_B = torch.ones_like(margin_B) if weight_B is None else weight_B.detach().to(margin_B.dtype)
    margin_B = torch.where(weight_B > 0, margin_B, torch.zeros_like(margin_B))
    loss_B = -(1.0 - label_smoothing) * F.logsigmoid(margin_B) - label_smoothing * F.logsigmoid(-margin_B)
    num_pairs = weight_B.sum()
    loss = divide((weight_B * loss_B).sum(), num_pairs if denominator is None else denominator)

    margin_B = margin_B.detach()
    # sign() turns NaN into 0; a broken score must be seen in the logs.
    wins_B = torch.where(margin_B.isnan(), margin_B, 0.5 * (margin_B.sign() + 1.0))
    return loss, {
        "accuracy": (weight_B * wins_B).sum() / num_pairs,
        "margin": (weight_B * margin_B).sum() / num_pairs,
        "num_pairs": num_pairs,
    }


def score_l2(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    coefficient: float = 0.001,
    denominators: Sequence[Tensor | float] | None = None,
) -> tuple[Tensor, Metrics]:
    """Keep scores near 0: `coefficient x mean squared score`, each term's own mean, averaged over the terms.

    Bradley-Terry sees only differences, so absolute scores drift; this holds them. The release has four terms (each
    expert's scores of demonstrations and of rollouts), each a mean over all rollouts, divided by 4. What each
    term counts is decided by `prism_pl.discriminator_loss`.

    Args:
        scores: one (B,) tensor a term.
        weights: (B,) weights (or masks) of each term's rows; None: 1. A row of weight 0 may hold NaN.
        coefficient: 0.001 in the release; 0 switches it off.
        denominators: each term's sum of weights over the whole step; None: of this call.

    Returns:
        The loss and the metric `score_square` (without the coefficient, of this call alone, NaN where a term is empty).
    """
    assert scores, "score_l2 needs at least one tensor of scores"
    if coefficient < 0:
        raise ValueError(f"score_l2: {coefficient!r} must not be negative; 0 switches it off.")
    terms = [at_least_float32(scores_B) for scores_B in scores]
    masks = [torch.ones_like(t) for t in terms] if weights is None else [w.detach().to(terms[0].dtype) for w in weights]
    totals = [
        (w_B * torch.where(w_B > 0, scores_B, torch.zeros_like(scores_B)).square()).sum()
        for scores_B, w_B in zip(terms, masks, strict=True)
    ]
    counts = [w_B.sum() for w_B in masks]
    means = [divide(t, n) for t, n in zip(totals, counts if denominators is None else denominators, strict=True)]
    square = torch.stack([total.detach() / num for total, num in zip(totals, counts, strict=True)]).mean()
    return coefficient * torch.stack(means).mean(), {"score_square": square}


def soft_clip(scores: Tensor, limit: float) -> Tensor:
    """Bound scores to (-limit, limit): `x / sqrt(1 + (x / limit)^2)`, close to x near 0, rising everywhere.

    The release clamps at +-10, whose gradient is exactly 0 outside: a saturated pair stops learning without a sign.
    Here the slope is `(1 + (x / limit)^2)^(-3/2)`, 0.35 at the limit and still 1e-3 at ten times the limit, where
    tanh's would round to 0 in float32.

    Raises:
        ValueError: `limit` not positive.
    """
    if not limit > 0:
        raise ValueError(f"score_clip: {limit!r} must be a positive number; use null for no limit.")
    # sin(atan(u)) = u / sqrt(1 + u^2), and its backward is a product: the quotient's is a difference of near-equals.
    return limit * torch.sin(torch.atan(at_least_float32(scores) / limit))


def kl_estimate(logps_BT: Tensor, ref_logps_BT: Tensor, kind: KLKind) -> Tensor:
    """Per-token estimates of KL(policy || reference) from tokens drawn from the policy (Schulman 2020, "Approximating
    KL divergence"). With d = log pi - log ref:

    * `k1 = d`. Value: unbiased, high variance, may be negative. Gradient as a loss term: `grad log pi`, which
      averages to 0 over the policy's samples: it regularises nothing. Its place is the reward, where the policy
      gradient multiplies it by the score function and gives the gradient of the KL.
    * `k2 = d^2 / 2`. Value: biased (by third-order terms in d), never negative. Gradient as a loss term: `d grad log
      pi`, on the policy's own samples exactly the gradient of KL(policy || reference). The one to put in a loss.
    * `k3 = exp(-d) + d - 1`. Value: unbiased, never negative, low variance while d is small. Gradient as a loss term:
      `(1 - ref / pi) grad log pi`, on average the gradient of the other direction, KL(reference || policy): biased
      for the KL that it estimates, and unbounded where ref >> pi. It is GRPO's own term.

    On samples that are not the current policy's (several updates a batch), every statement holds only after importance
    weighting. No gradient flows into `ref_logps_BT`.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in get_args(KLKind):
        raise ValueError(f"kl: {kind!r} is not one of {', '.join(get_args(KLKind))}.")
    diff_BT = at_least_float32(logps_BT) - at_least_float32(ref_logps_BT).detach()
    if kind == "k1":
        return diff_BT
    if kind == "k2":
        return 0.5 * diff_BT.square()
    # expm1 keeps the digits where d is small and the two halves nearly cancel.
    return torch.expm1(-diff_BT) + diff_BT


def check_kl_placement(kind: KLKind, place: Literal["reward", "loss"]) -> None:
    """Refuse a KL estimator where it does not do its work: k1 belongs in the reward, k2 and k3 in the loss.

    Raises:
        ValueError: k1 in the loss (no gradient in expectation); k2 or k3 in the reward (k2's value is biased, k3's
            tail is unbounded; both lose the sign that k1 has); an unknown kind or place.
    """
    if kind not in get_args(KLKind):
        raise ValueError(f"kl: {kind!r} is not one of {', '.join(get_args(KLKind))}.")
    if place not in ("reward", "loss"):
        raise ValueError(f"kl place: {place!r} is neither 'reward' nor 'loss'.")
    if kind == "k1" and place == "loss":
        raise ValueError(
            "kl: 'k1' in the loss has no gradient in expectation and regularises nothing. "
            "Put k1 in the reward, or use 'k2' in the loss (or 'k3', whose gradient is biased)."
        )
    if kind != "k1" and place == "reward":
        raise ValueError(f"kl: {kind!r} is not offered in the reward. Use 'k1' there, or put {kind!r} in the loss.")
