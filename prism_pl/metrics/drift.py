"""Drift: how far the policy's responses are from the supervision's, as a distance between two distributions.

Counts and lengths are small integers, so the metrics keep one integer histogram a side: summed over ranks it is exact,
and its size does not grow with the number of responses.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from prism_pl.metrics.bootstrap import Interval
from prism_pl.metrics.counting import (
    DEFAULT_RULE,
    Rule,
    Segment,
    check_rule,
    check_segment,
    count_segment,
    describe_rule,
)
from prism_pl.metrics.drift_bootstrap import histogram_distance
from prism_pl.metrics.pair_bootstrap import pair_interval


class _HistogramDistance(Metric):
    """Wasserstein-1 and energy distance between the integers seen for the policy and for the supervision."""

    full_state_update = False
    policy_counts: Tensor
    supervision_counts: Tensor

    def __init__(self, limit_name: str, limit: int) -> None:
        super().__init__()
        if limit < 1:
            raise ValueError(f"{limit_name}={limit} must be at least 1: it is the largest value the histogram holds")
        self.limit_name, self.limit = limit_name, limit
        for name in ("policy_counts", "supervision_counts"):
            self.add_state(name, torch.zeros(limit + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def _histogram(self, values: Sequence[int]) -> Tensor:
        """Counts of 0 ... limit. A value outside is refused: clipping it would silently shorten the distance."""
        if values and not 0 <= min(values) <= max(values) <= self.limit:
            name, worst = type(self).__name__, max(values) if max(values) > self.limit else min(values)
            raise ValueError(
                f"{name} got {worst}, outside 0 ... {self.limit}: give it a {self.limit_name} that holds it"
            )
        return torch.bincount(torch.tensor(values, dtype=torch.int64), minlength=self.limit + 1).to(self.device)

    def compute(self) -> dict[str, Tensor]:
        """`distance` (Wasserstein-1, in items or tokens), `energy` (energy distance), the mean of each side as `policy`
        and `supervision`, and their sizes `n_policy` and `n_supervision`. NaN where a side is empty."""
        from scipy.stats import energy_distance

        policy = self.policy_counts.cpu().numpy()
        supervision = self.supervision_counts.cpu().numpy()
        n_policy, n_supervision = int(policy.sum()), int(supervision.sum())
        energy = float("nan")
        if n_policy and n_supervision:
            # Only values that occur: scipy sorts all it is given.
            p, s = policy.nonzero()[0], supervision.nonzero()[0]
            energy = float(energy_distance(p, s, policy[p], supervision[s]))
        values = {
            "distance": histogram_distance(policy, supervision),
            "energy": energy,
            "policy": _histogram_mean(policy),
            "supervision": _histogram_mean(supervision),
            "n_policy": n_policy,
            "n_supervision": n_supervision,
        }
        return {key: torch.tensor(value, device=self.device) for key, value in values.items()}


class DistributionDistance(_HistogramDistance):
    """Wasserstein-1 between the policy's and the supervision's counts of structural items, over valid responses.

    Args:
        rule: counting rule, see `prism_pl.metrics.counting`.
        segment: `caption` (descriptive items) or `reasoning` (reasoning steps).
        max_count: largest count the histogram holds; more items in a response is a ValueError.

    Example:
        >>> response = "<caption>{}</caption><think>read</think><answer>3</answer>".format
        >>> metric = DistributionDistance(segment="caption")
        >>> metric.update(policy=[response("- a 3")], supervision=[response("- a 3\\n- red\\n- left")])
        >>> metric.compute()["distance"].item()
        2.0
    """

    num_malformed: Tensor

    def __init__(self, rule: Rule = DEFAULT_RULE, segment: Segment = "caption", max_count: int = 8192) -> None:
        super().__init__("max_count", max_count)
        check_rule(rule)
        check_segment(segment)
        self.rule: Rule = rule
        self.segment: Segment = segment
        self.add_state("num_malformed", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, *, policy: Sequence[str] = (), supervision: Sequence[str] = ()) -> None:
        """Add full responses to either side; malformed ones of both sides are counted together and left out."""
        policy_valid, supervision_valid = self._counts(policy), self._counts(supervision)
        policy_counts, supervision_counts = self._histogram(policy_valid), self._histogram(supervision_valid)
        self.policy_counts += policy_counts
        self.supervision_counts += supervision_counts
        self.num_malformed += len(policy) + len(supervision) - len(policy_valid) - len(supervision_valid)

    def _counts(self, responses: Sequence[str]) -> list[int]:
        counts = [count_segment(response, self.segment, self.rule) for response in responses]
        return [count for count in counts if count is not None]

    def compute(self) -> dict[str, Tensor]:
        """As in the base class, and `malformed`, the responses left out."""
        return {**super().compute(), "malformed": self.num_malformed}

    def describe(self) -> str:
        """What is compared, and by which counting rule."""
        what = "descriptive items" if self.segment == "caption" else "reasoning steps"
        rule = describe_rule(self.rule)
        return f"Wasserstein-1 between policy and supervision in {what} per valid response, counted as {rule}"


class LengthDistance(_HistogramDistance):
    """Wasserstein-1 between the token lengths of the policy's responses and the supervision's.

    `max_length` (tokens) is the longest response the histogram holds; a longer one is a ValueError.
    """

    def __init__(self, max_length: int = 32_768) -> None:
        super().__init__("max_length", max_length)

    def update(self, *, policy: Sequence[int] = (), supervision: Sequence[int] = ()) -> None:
        """Add lengths in tokens to either side."""
        policy_counts, supervision_counts = self._histogram(policy), self._histogram(supervision)
        self.policy_counts += policy_counts
        self.supervision_counts += supervision_counts


def energy_distance(first_NK: np.ndarray, second_MK: np.ndarray) -> float:
    """Energy distance between two samples of K-dimensional vectors, such as (items, steps, tokens) of each response.

    sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|) with Euclidean norms (Szekely and Rizzo, 2013); 0 only for equal
    distributions. For K = 1 it equals scipy's one-dimensional function of this name. Memory grows with N x M.
    Scale the columns first if one of them should not rule the distance.

    Raises:
        ValueError: a sample that is empty or not two-dimensional, or different K.
    """
    from scipy.spatial.distance import cdist

    shapes = first_NK.shape, second_MK.shape
    if any(len(shape) != 2 or not shape[0] for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"energy_distance needs samples of shape (N, K) and (M, K), N and M > 0, and got {shapes}")
    between = cdist(first_NK, second_MK).mean()
    within = cdist(first_NK, first_NK).mean() + cdist(second_MK, second_MK).mean()
    return float(_distance(2 * between - within))


def energy_interval(
    first_NK: np.ndarray,
    prompt_N: np.ndarray,
    second_MK: np.ndarray,
    prompt_M: np.ndarray,
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval over prompts of the energy distance between two samples that answer the same prompts.

    As `energy_distance`, but with means over pairs of different prompts alone, and each prompt counts once, however
    many responses it has. Two samples of one distribution so have a squared distance of 0 on average, where the plain
    one grows as samples shrink; what comes out below 0 is 0.

    Args:
        prompt_N, prompt_M: the number of each vector's prompt, 0 ... P - 1; each prompt has some on both sides.
    """
    from scipy.spatial.distance import cdist

    means = [_mean_for_prompts(prompts, int(prompt_N.max()) + 1) for prompts in (prompt_N, prompt_M)]
    samples = [first_NK, second_MK]

    def distances_PP(one: int, other: int) -> np.ndarray:
        return means[one] @ cdist(samples[one], samples[other]) @ means[other].T

    gaps_PP = 2 * distances_PP(0, 1) - distances_PP(0, 0) - distances_PP(1, 1)
    return pair_interval(gaps_PP, np.ones_like(gaps_PP), num_resamples, level, seed, transform=_distance)


def _mean_for_prompts(prompt_N: np.ndarray, num_prompts: int) -> np.ndarray:
    """(P, N): what a vector over responses is multiplied with to get its mean over each prompt's responses."""
    of_prompt_PN = (np.arange(num_prompts)[:, None] == prompt_N).astype(np.float64)
    return of_prompt_PN / of_prompt_PN.sum(1, keepdims=True)


def _distance(squares: np.ndarray) -> np.ndarray:
    # Rounding can leave a tiny negative number where the samples are equal; NaN has to come through.
    return np.sqrt(np.maximum(squares, 0.0))


def _histogram_mean(counts: np.ndarray) -> float:
    size = counts.sum()
    return float((np.arange(counts.size) * counts).sum() / size) if size else float("nan")
