"""The discriminator's loss, the same in its warm start and in alignment."""

import torch
from torch import Tensor

from prism_pl.aggregation import Metrics
from prism_pl.discriminator import Scores
from prism_pl.losses import bradley_terry, score_l2
from prism_pl.strategy import global_sum, share


def discriminator_loss(
    chosen: Scores, rolled: Scores, label_smoothing: float, l2: float
) -> tuple[Tensor, dict[str, Metrics]]:
    """Bradley-Terry of each expert (eq. 2), summed over the experts; the release's mean squared score, averaged over
    its four terms; and the discriminator's own `aux_loss`. Counts are those of the whole step, over all ranks.

    The release takes every mean of the squared score over all B rollouts, for it scores malformed ones too. Here a
    malformed rollout has no score, so (ours) the two terms of rollouts are means over the valid ones. The two terms of
    demonstrations are means over all B as in the release, also those whose rollout is malformed. In a step without any
    valid rollout both are 0 (ours): without a pair, absolute scores of demonstrations alone would be all that trains.

    Args:
        chosen: of the demonstrations, one for each of the B rollouts, all valid.
        rolled: of the B rollouts.
        label_smoothing: see `bradley_terry`.
        l2: coefficient of the mean squared score.

    Returns:
        The loss, a backward-able 0 without any pair and aux_loss, and each expert's metrics of `bradley_terry`.
    """
    valid_B = rolled.valid_B
    assert bool(chosen.valid_B.all()), "demonstrations are checked when they are scored"
    demonstrated_B = chosen.valid_B & (global_sum(valid_B.sum()) > 0)
    num_valid, num_demonstrated = share(valid_B.sum()), share(demonstrated_B.sum())
    losses, terms, metrics = [rolled.aux_loss], [], {}
    for expert, rolled_B in rolled.by_expert.items():
        pair = chosen.by_expert[expert], rolled_B
        loss, metrics[expert] = bradley_terry(*pair, valid_B, label_smoothing, num_valid)
        losses.append(loss)
        terms += pair
    num_experts = len(metrics)
    masks, counts = [demonstrated_B, valid_B] * num_experts, [num_demonstrated, num_valid] * num_experts
    losses.append(score_l2(terms, masks, l2, counts)[0])
    return torch.stack(losses).sum(), metrics
