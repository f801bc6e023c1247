"""The reward gap of one expert: D_k(x, y+) - D_k(x, y-), the curve PRISM judges convergence by."""

import torch
from torch import Tensor
from torchmetrics import Metric


class RewardGapMetric(Metric):
    """Mean reward gap, discriminator accuracy and within-group score spread of one expert; make one for each expert.

    Every valid rollout is paired with its prompt's one demonstration. A NaN score makes the numbers it enters NaN: a
    broken discriminator must not look like one at 50%. Without any pair all are NaN.

    A group has to arrive whole: gather the scores of a group that spans ranks before the update.

    Example:
        >>> metric = RewardGapMetric()
        >>> metric.update(torch.tensor([1.0]), torch.tensor([[0.0, 1.0, 2.0]]))
        >>> {key: value.item() for key, value in metric.compute().items()}
        {'gap': 0.0, 'accuracy': 0.5, 'score_std': 1.0, 'n': 3, 'malformed': 0}
    """

    full_state_update = False
    total_gap: Tensor
    total_wins: Tensor
    total_std: Tensor
    num_pairs: Tensor
    num_groups: Tensor
    num_malformed: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total_gap", "total_wins", "total_std"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")
        for name in ("num_pairs", "num_groups", "num_malformed"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, supervision_P: Tensor, policy_PG: Tensor, valid_PG: Tensor | None = None) -> None:
        """Add the scores of P demonstrations and of G rollouts for each.

        Args:
            supervision_P: score of each prompt's demonstration.
            policy_PG: scores of the rollouts; what stands at malformed ones is not read.
            valid_PG: True where the rollout has the three-block format; None where all have.

        Raises:
            ValueError: shapes that do not fit.
        """
        valid_PG = torch.ones_like(policy_PG, dtype=torch.bool) if valid_PG is None else valid_PG.bool()
        if policy_PG.ndim != 2 or supervision_P.shape != policy_PG.shape[:1] or valid_PG.shape != policy_PG.shape:
            raise ValueError(
                "RewardGapMetric needs supervision_P, policy_PG and valid_PG of shapes (P,), (P, G) and (P, G), and "
                f"got {tuple(supervision_P.shape)}, {tuple(policy_PG.shape)} and {tuple(valid_PG.shape)}"
            )
        scores_PG = policy_PG.detach().float()
        gaps = (supervision_P.detach().float()[:, None] - scores_PG)[valid_PG]
        # sign makes a tie, which tells nothing, one half; but torch's sign of NaN is 0, which would pass for a tie.
        wins = torch.where(gaps.isnan(), gaps, (gaps.sign() + 1) / 2)
        self.total_gap += gaps.sum()
        self.total_wins += wins.sum()
        self.num_pairs += gaps.numel()
        self.num_malformed += valid_PG.numel() - gaps.numel()
        std_P, has_std_P = _group_std(scores_PG, valid_PG)
        self.total_std += std_P[has_std_P].sum()
        self.num_groups += has_std_P.sum()

    def compute(self) -> dict[str, Tensor]:
        """`gap`, the mean; `accuracy`, the share of pairs with a gap above 0, a tie counting one half; `score_std`, the
        mean over groups of two or more valid rollouts of the sample std of their scores; `n` pairs; `malformed`."""
        return {
            "gap": self.total_gap / self.num_pairs,
            "accuracy": self.total_wins / self.num_pairs,
            "score_std": self.total_std / self.num_groups,
            "n": self.num_pairs,
            "malformed": self.num_malformed,
        }


def _group_std(scores_PG: Tensor, valid_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Sample std over the valid scores of each group, and whether the group has the two it takes."""
    num_valid_P = valid_PG.sum(1)
    # `where`, not a product: a NaN at a malformed place times 0 would still be NaN.
    mean_P = torch.where(valid_PG, scores_PG, 0.0).sum(1) / num_valid_P
    squares_PG = torch.where(valid_PG, (scores_PG - mean_P[:, None]) ** 2, 0.0)
    return (squares_PG.sum(1) / (num_valid_P - 1)).sqrt(), num_valid_P > 1
