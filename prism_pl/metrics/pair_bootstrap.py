"""Bootstrap intervals, over prompts, of numbers that are means over pairs of responses: an AUC, an energy distance.

As in `prism_pl.metrics.bootstrap` the prompt is what is resampled, with all its responses of both sides. A prompt that
is drawn w times counts w times on either side of a pair, so every resample is a quadratic form of how often each prompt
was drawn, and a matrix product gives all of them at once. Memory and time grow with the square of the prompts.

Only responses to different prompts make a pair. Two of one prompt are not independent, and a prompt that is drawn twice
would bring pairs with itself into the resamples that the data do not have: their numbers would lie beside the estimate.
"""

from collections.abc import Callable

import numpy as np

from prism_pl.metrics.bootstrap import Interval
from prism_pl.metrics.resamples import times_drawn_together


def pair_interval(
    sums_PP: np.ndarray,
    counts_PP: np.ndarray,
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    transform: Callable[[np.ndarray], np.ndarray] = lambda mean: mean,
) -> Interval:
    """Interval of transform(sum of all pairs' values / number of pairs).

    Args:
        sums_PP: for prompt p of the first response and prompt q of the second, the sum of their pairs' values. What
            stands at p = q is left out.
        counts_PP: how many pairs that are.
        transform: of the mean, such as a square root.

    NaN where there is no pair, or so few that some resample has none.

    Example:
        >>> pair_interval(np.array([[9.0, 1.0], [0.0, 9.0]]), np.ones((2, 2)), 100).mean
        0.5
    """
    num_prompts = len(sums_PP)
    different_PP = 1 - np.eye(num_prompts)
    sums_PP, counts_PP = sums_PP * different_PP, counts_PP * different_PP

    def statistic(drawn_RP: np.ndarray) -> np.ndarray:
        sums, counts = (((drawn_RP @ matrix) * drawn_RP).sum(-1) for matrix in (sums_PP, counts_PP))
        with np.errstate(invalid="ignore"):
            return transform(np.where(counts > 0, sums / np.where(counts > 0, counts, 1), np.nan))

    mean = float(statistic(np.ones((1, num_prompts)))[0]) if num_prompts else float("nan")
    if num_prompts < 2:
        return Interval(mean, float("nan"), float("nan"), num_prompts)
    tail = (1 - level) / 2
    low, high = np.quantile(statistic(times_drawn_together(num_prompts, num_resamples, seed)), [tail, 1 - tail])
    return Interval(mean, float(low), float(high), num_prompts)
