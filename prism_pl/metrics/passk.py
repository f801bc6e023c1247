"""pass@k: the chance that at least one of k sampled responses is right."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def pass_at_k(correct_PG: Tensor, k: int) -> Tensor:
    """Unbiased estimate of pass@k for each prompt, from G rollouts of which c are right (Chen et al. 2021, eq. 1).

    1 - C(G - c, k) / C(G, k), as the product 1 - prod over i = G-c+1 ... G of (1 - k / i), which does not overflow.

    Args:
        correct_PG: 0 or 1 (any dtype) for each rollout of each prompt.
        k: at least 1, at most G.

    Returns:
        float32 estimates_P.

    Raises:
        ValueError: k outside 1 ... G, or `correct_PG` not two-dimensional or with values besides 0 and 1.
    """
    if correct_PG.ndim != 2:
        raise ValueError(f"correct_PG must be prompts x rollouts, and has the shape {tuple(correct_PG.shape)}")
    if not ((correct_PG == 0) | (correct_PG == 1)).all():
        raise ValueError("correct_PG holds values besides 0 and 1: threshold partial credit first")
    num_rollouts = correct_PG.shape[1]
    if not 1 <= k <= num_rollouts:
        raise ValueError(f"k={k} must lie in 1 ... {num_rollouts}, the rollouts per prompt: sample more or lower k")
    num_wrong_P1 = num_rollouts - correct_PG.long().sum(1, keepdim=True)
    i_G = torch.arange(1, num_rollouts + 1, device=correct_PG.device)
    # With fewer than k wrong, i = k is one of the factors and makes the product exactly 0.
    factors_PG = torch.where(i_G > num_wrong_P1, 1 - k / i_G, torch.ones_like(i_G, dtype=torch.float32))
    return 1 - factors_PG.prod(1)


class PassAtK(Metric):
    """Mean over prompts of the unbiased pass@k, for several k at once. Updates may differ in rollouts per prompt.

    Example:
        >>> metric = PassAtK([1, 2])
        >>> metric.update(torch.tensor([[1, 0, 0, 0]]))
        >>> {key: value.item() for key, value in metric.compute().items()}
        {'pass_at_1': 0.25, 'pass_at_2': 0.5, 'n': 1}
    """

    full_state_update = False
    total_K: Tensor
    num_prompts: Tensor

    def __init__(self, k: Sequence[int] = (1,)) -> None:
        super().__init__()
        if not k or min(k) < 1 or len(set(k)) < len(k):
            raise ValueError(f"k={list(k)} must name one or more different numbers from 1 up")
        self.k = list(k)
        self.add_state("total_K", torch.zeros(len(self.k)), dist_reduce_fx="sum")
        self.add_state("num_prompts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct_PG: Tensor) -> None:
        """Add P prompts with G rollouts each; see `pass_at_k` for the errors."""
        estimates_KP = torch.stack([pass_at_k(correct_PG, k) for k in self.k])
        self.total_K += estimates_KP.sum(1).to(self.total_K)
        self.num_prompts += correct_PG.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """`pass_at_<k>` for each k, NaN without prompts, and `n` prompts."""
        means_K = self.total_K / self.num_prompts
        scores = {f"pass_at_{k}": mean for k, mean in zip(self.k, means_K, strict=True)}
        return {**scores, "n": self.num_prompts}
