"""Intervals over prompts and seeds at once, for numbers that several runs of one recipe gave."""

import math

import numpy as np

from prism_pl.metrics.bootstrap import Interval


def crossed_interval(
    values_SP: np.ndarray, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the mean over S runs and P prompts: the hull of two, of which each misses what the other knows.

    * Both resampled, each with replacement and apart from the other (the pigeonhole bootstrap; Owen, Annals of Applied
      Statistics 1, 2007). Runs of one recipe share their prompts, so neither is nested in the other. But resamples of a
      few runs never reach beyond the lowest and highest one, which hold the mean of three in 3 of 4 cases only.
    * Student's t with S - 1 degrees of freedom over the runs' means, which is as wide as few runs ask for, and takes
      the prompts as they are. For a difference it is the paired t interval.

    With a single run only its prompts are resampled, so that the interval says nothing of other runs; with a single
    prompt only the runs count.

    Args:
        values_SP: one value a run and prompt; for a difference to another recipe, the differences. Runs and prompts in
            an order of their own (such as their ids'), since resampling draws positions.

    Raises:
        ValueError: no run or no prompt.

    Example:
        >>> crossed_interval(np.array([[1.0, 0.0], [1.0, 0.0]])).mean
        0.5
    """
    if values_SP.ndim != 2 or not values_SP.size:
        raise ValueError(f"crossed_interval needs values of shape (runs, prompts) and got {values_SP.shape}")
    num_runs, num_prompts = values_SP.shape
    mean = float(values_SP.mean())
    if values_SP.size == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    generator = np.random.default_rng(seed)
    runs_RS, prompts_RP = (
        generator.multinomial(size, [1 / size] * size, num_resamples) / size for size in (num_runs, num_prompts)
    )
    tail = (1 - level) / 2
    low, high = np.quantile(((runs_RS @ values_SP) * prompts_RP).sum(1), [tail, 1 - tail])
    reach = _student_reach(values_SP.mean(1), tail) if num_runs > 1 else 0.0
    return Interval(mean, min(float(low), mean - reach), max(float(high), mean + reach), num_prompts)


def _student_reach(means_S: np.ndarray, tail: float) -> float:
    """How far Student's t interval of the mean goes to each side."""
    from scipy.special import stdtrit

    num_runs = len(means_S)
    return float(stdtrit(num_runs - 1, 1 - tail) * means_S.std(ddof=1) / math.sqrt(num_runs))
