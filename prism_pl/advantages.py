"""From the scores or rewards of P prompts x G rollouts to advantages: pure functions, statistics over each group.

P prompts, G rollouts a prompt. The caller gathers a group that spans ranks before it comes here. Everything is
reckoned in float64 on the CPU (some accelerators have no float64, and these are few numbers) and given back in the
input's dtype and place, so that a group of equal scores has a std of 0 and not of rounding noise.

Standard deviations are sample ones (ddof 1), `eps` = 1e-6 is added before dividing. A group counts as having no
variance, and gets exactly 0, when `std <= 1e-6 max(1, max |score|)`: within a few float32 roundings of equal. Without
that floor noise of 1e-6 would be blown up to half a standard deviation. Noise above float32's own (scores made in
bf16 differ by up to 1%) looks like variance and is not caught.

NaN: a malformed row's scores are never read. A NaN in a valid row makes its own group NaN (with `scale="batch"`: all of
them), so that the non-finite check stops the run instead of training on made-up numbers.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from prism_pl.aggregation import Metrics
from prism_pl.chat import EXPERTS, WHOLE

Scale = Literal["group", "batch", "none"]
Mixing = Literal["paper", "released"]

EPS = 1e-6
ZERO_STD = 1e-6


def paper_advantages(scores: Mapping[str, Tensor], valid_PG: Tensor, alpha: float = 0.5) -> tuple[Tensor, Metrics]:
    """The paper's order: mix the experts' scores, then normalise over the group (PRISM, arXiv 2604.28123, eq. 1 and 3).

    `r = alpha D_perception + (1 - alpha) D_reasoning`, `A = (r - mean) / (std + eps)`. Where the paper
    is silent, ours: a malformed response gets the lowest valid r of its group minus 1 before normalising and no further
    penalty; a group without a valid response, without variance, or of one gets A = 0.

    Args:
        scores: `perception` and `reasoning`, each (P, G), or `response` alone (then alpha is without effect); rows that
            are not valid may hold anything.
        valid_PG: True where the response follows the three-block format.
        alpha: weight of the perception expert, in [0, 1].

    Returns:
        advantages_PG and the metrics `num_zero_std_groups` (no variance, or a group of one, with a valid response),
        `num_all_malformed_groups` and `num_malformed`.

    Raises:
        ValueError: alpha outside [0, 1], or experts other than perception and reasoning.
    """
    weights = _expert_weights(scores, alpha)
    device, valid_PG = valid_PG.device, valid_PG.bool().cpu()
    reward_PG = torch.stack([weight * _exact(scores[name]) for name, weight in weights.items()]).sum(0)
    reward_PG, all_malformed_P = _fill_malformed(reward_PG, valid_PG)
    advantages_PG, zero_std_P = _normalise(reward_PG)
    return _like(advantages_PG, _any(scores)), _metrics(zero_std_P, all_malformed_P, valid_PG, device)


def released_advantages(
    scores: Mapping[str, Tensor], valid_PG: Tensor, alpha: float = 0.5, malformed_penalty: float = 1.5
) -> tuple[Tensor, Metrics]:
    """The release's order: normalise each expert's scores over the group, then mix.

    `A = alpha norm(D_perception) + (1 - alpha) norm(D_reasoning)`, minus `malformed_penalty` for a malformed
    response. For each expert a malformed response gets the lowest valid score of its group minus 1 before
    normalising. A group without variance normalises to 0; of two or more that are all malformed, A =
    -malformed_penalty. In a group of one the normalised score is the raw one, `score / (1 + eps)`, or `-1 / (1 +
    eps)` if malformed.

    Args:
        scores: `perception` and `reasoning`, each (P, G); rows that are not valid may hold anything.
        valid_PG: True where the response follows the three-block format.
        alpha: weight of the perception expert, in [0, 1]; 0.5 in the release.
        malformed_penalty: taken off the advantage of a malformed response; 1.5 in the release.

    Returns:
        advantages_PG and the metrics `num_zero_std_groups` (a valid response, but no expert has variance),
        `num_all_malformed_groups` and `num_malformed`. Groups of one are not counted as zero-std: they do train.

    Raises:
        ValueError: alpha outside [0, 1], a negative penalty, or experts other than perception and reasoning.
    """
    weights = _expert_weights(scores, alpha)
    _check_penalty(malformed_penalty)
    device, valid_PG = valid_PG.device, valid_PG.bool().cpu()
    normalised, zero_std_P = _normalise_each(scores, valid_PG, "released")
    advantages_PG = -malformed_penalty * (~valid_PG).double()
    for name, weight in weights.items():
        advantages_PG = advantages_PG + weight * normalised[name]
    metrics = _metrics(zero_std_P, ~valid_PG.any(1), valid_PG, device)
    return _like(advantages_PG, _any(scores)), metrics


def segment_advantages(
    scores: Mapping[str, Tensor],
    valid_PG: Tensor,
    mixing: Mixing,
    alpha: float = 0.5,
    malformed_penalty: float = 1.5,
) -> tuple[dict[str, Tensor], Metrics]:
    """Advantages by expert, for credit by segment: `A_k = 2 w_k norm(D_k)` with w = (alpha, 1 - alpha), so that at 0.5
    each expert's tokens carry its own normalised score, and the mean over both is what `released` gives every token.

    Args:
        scores, valid_PG, alpha: as in `released_advantages`.
        mixing: what the other cases are taken from. `paper`: no penalty, and A = 0 in a group of one. `released`: A_k
            minus `malformed_penalty` where malformed, and raw scores in a group of one.

    Returns:
        advantages_PG of `perception` and `reasoning`, and the metrics of `released_advantages`.
    """
    weights = _expert_weights(scores, alpha)
    _check_penalty(malformed_penalty)
    device, valid_PG = valid_PG.device, valid_PG.bool().cpu()
    normalised, zero_std_P = _normalise_each(scores, valid_PG, mixing)
    penalty_PG = (malformed_penalty if mixing == "released" else 0.0) * (~valid_PG).double()
    by_expert = {
        name: _like(len(weights) * weight * normalised[name] - penalty_PG, scores[name])
        for name, weight in weights.items()
    }
    return by_expert, _metrics(zero_std_P, ~valid_PG.any(1), valid_PG, device)


def mixed_rewards(scores: Mapping[str, Tensor], alpha: float) -> Tensor:
    """`alpha D_perception + (1 - alpha) D_reasoning` (eq. 1), or the score of the only expert."""
    weights = _expert_weights(scores, alpha)
    return torch.stack([weight * scores[name] for name, weight in weights.items()]).sum(0)


def variance_shares(
    scores: Mapping[str, Tensor], valid_PG: Tensor, mixing: Mixing, alpha: float = 0.5
) -> tuple[dict[str, Tensor], Tensor]:
    """How much of what the policy is rewarded by comes from each expert, whatever alpha says: the covariance of its
    term with the sum of the terms over the variance of the sum, within groups and over valid responses. Adds up to 1;
    below 0 where an expert pulls against the sum; NaN without any variance. Second that variance, summed over the
    responses: weighted by it, shares of parts are those of the whole.

    Args:
        mixing: the terms are weighted scores (`paper`) or weighted normalised scores (`released`).
    """
    weights = _expert_weights(scores, alpha)
    device, valid_PG = valid_PG.device, valid_PG.bool().cpu()
    values = {name: _exact(value) for name, value in scores.items()}
    if mixing == "released":
        values, _ = _normalise_each(scores, valid_PG, mixing)
    terms = {name: _centred(weight * values[name], valid_PG) for name, weight in weights.items()}
    total_PG = torch.stack(list(terms.values())).sum(0)
    variance = total_PG.square().sum()
    shares = {name: ((term * total_PG).sum() / variance).float().to(device) for name, term in terms.items()}
    return shares, variance.to(device)


def group_advantages(rewards_PG: Tensor, scale: Scale = "group") -> tuple[Tensor, Metrics]:
    """Verifiable rewards to advantages: centred on the group's mean, divided by what `scale` says.

    Args:
        rewards_PG: the batch of all ranks where `scale` is `batch`.
        scale: `group` the group's std (GRPO); `batch` the std of all rewards of the batch; `none` nothing (Dr. GRPO,
            arXiv 2503.20783: dividing by a group's std favours questions that are nearly always or never solved).

    Returns:
        advantages_PG and the metric `num_zero_std_groups`. A group without variance, or of one, gets A = 0.

    Raises:
        ValueError: unknown scale.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale: {scale!r} is not one of {', '.join(get_args(Scale))}.")
    rewards = _exact(rewards_PG)
    normalised_PG, zero_std_P = _normalise(rewards)
    if scale == "group":
        advantages_PG = normalised_PG
    else:
        centred_PG = rewards - rewards.mean(1, keepdim=True)
        # All groups are without variance where the batch has none or one reward, so its std is not used there.
        divisor = rewards.std() + EPS if scale == "batch" and rewards.numel() > 1 else 1.0
        advantages_PG = torch.where(zero_std_P[:, None], torch.zeros_like(rewards), centred_PG / divisor)
    return _like(advantages_PG, rewards_PG), {"num_zero_std_groups": zero_std_P.sum().to(rewards_PG.device)}


def groups_with_variance(values_PG: Tensor) -> Tensor:
    """(P,) True for the groups whose values differ: those that teach something. DAPO's dynamic sampling (arXiv
    2503.14476, eq. 11) keeps these, judged by accuracy. A group of one has none."""
    return (~_normalise(_exact(values_PG))[1]).to(values_PG.device)


def _exact(values: Tensor) -> Tensor:
    # First to the CPU: MPS would refuse the float64.
    return values.cpu().double()


def _like(values: Tensor, given: Tensor) -> Tensor:
    # First the dtype, for the same reason.
    return values.to(given.dtype).to(given.device)


def _expert_weights(scores: Mapping[str, Tensor], alpha: float) -> dict[str, float]:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(
            f"alpha: {alpha!r} must lie in [0, 1]: the perception expert's weight; reasoning gets the rest."
        )
    if tuple(scores) == WHOLE:
        return {WHOLE[0]: 1.0}
    if set(scores) != set(EXPERTS):
        raise ValueError(f"scores: experts {sorted(scores)} given, {sorted(EXPERTS)} needed to mix them by alpha.")
    return {"perception": alpha, "reasoning": 1.0 - alpha}


def _check_penalty(malformed_penalty: float) -> None:
    if not malformed_penalty >= 0.0:
        raise ValueError(f"malformed_penalty: {malformed_penalty!r} must be at least 0; it is subtracted.")


def _any(scores: Mapping[str, Tensor]) -> Tensor:
    return next(iter(scores.values()))


def _centred(values_PG: Tensor, valid_PG: Tensor) -> Tensor:
    """Minus the mean over the group's valid rows; 0 where not valid."""
    values_PG = torch.where(valid_PG, values_PG, torch.zeros_like(values_PG))
    mean_P1 = values_PG.sum(1, keepdim=True) / valid_PG.sum(1, keepdim=True).clamp(min=1)
    return torch.where(valid_PG, values_PG - mean_P1, torch.zeros_like(values_PG))


def _normalise_each(scores: Mapping[str, Tensor], valid_PG: Tensor, mixing: Mixing) -> tuple[dict[str, Tensor], Tensor]:
    """Each expert's filled scores normalised over the group, and (P,) where no expert has variance. `released` keeps a
    group of one as it is, and does not count it."""
    group_of_one = mixing == "released" and valid_PG.shape[1] == 1
    zero_std_P = torch.full_like(valid_PG[:, 0], not group_of_one)
    normalised = {}
    for name, value in scores.items():
        filled_PG, _ = _fill_malformed(_exact(value), valid_PG)
        if group_of_one:
            normalised[name] = filled_PG / (1.0 + EPS)
        else:
            normalised[name], expert_zero_std_P = _normalise(filled_PG)
            zero_std_P = zero_std_P & expert_zero_std_P
    return normalised, zero_std_P


def _fill_malformed(scores_PG: Tensor, valid_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Malformed rows become the lowest valid score of their group minus 1 (-1 where none is valid), and (P,) which
    groups have no valid row."""
    assert scores_PG.shape == valid_PG.shape, f"scores {tuple(scores_PG.shape)}, valid {tuple(valid_PG.shape)}"
    all_malformed_P = ~valid_PG.any(1)
    lowest_P = torch.where(valid_PG, scores_PG, torch.full_like(scores_PG, torch.inf)).amin(1)
    lowest_P = torch.where(all_malformed_P, torch.zeros_like(lowest_P), lowest_P)
    return torch.where(valid_PG, scores_PG, lowest_P[:, None] - 1.0), all_malformed_P


def _normalise(values_PG: Tensor) -> tuple[Tensor, Tensor]:
    """`(x - mean) / (std + eps)` over each group, exactly 0 where a group has no variance, and (P,) which those are."""
    if values_PG.shape[1] == 1:
        # One value has no std. x - x keeps a NaN visible.
        return values_PG - values_PG, torch.ones_like(values_PG[:, 0], dtype=torch.bool)
    std_P1 = values_PG.std(1, keepdim=True)
    zero_P1 = std_P1 <= ZERO_STD * values_PG.abs().amax(1, keepdim=True).clamp(min=1.0)
    normalised_PG = (values_PG - values_PG.mean(1, keepdim=True)) / (std_P1 + EPS)
    return torch.where(zero_P1, torch.zeros_like(normalised_PG), normalised_PG), zero_P1[:, 0]


def _metrics(zero_std_P: Tensor, all_malformed_P: Tensor, valid_PG: Tensor, device: torch.device) -> Metrics:
    metrics = {
        "num_zero_std_groups": (zero_std_P & ~all_malformed_P).sum(),
        "num_all_malformed_groups": all_malformed_P.sum(),
        "num_malformed": (~valid_PG).sum(),
    }
    return {name: value.to(device) for name, value in metrics.items()}
