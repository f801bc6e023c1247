"""Percentile bootstrap intervals over prompts (Efron and Tibshirani 1993, section 13.3).

The prompt is what is resampled, never the rollout: rollouts of one prompt depend on each other. So average the rollouts
of a prompt first, or, for a ratio such as caption precision (true items / stated items), sum numerators and
denominators over them.

Inputs are sorted before they are resampled, so neither the order of the prompts nor their split over ranks matters; the
same values and seed give the same interval. A NaN among the values makes mean and bounds NaN.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from prism_pl.metrics.resamples import times_drawn


class Interval(NamedTuple):
    """A mean (or ratio), the bounds of its interval, and the number of prompts behind it."""

    mean: float
    low: float
    high: float
    n: int

    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0. NaN bounds exclude nothing."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the mean of one value for each prompt. With a single prompt the bounds are NaN.

    Raises:
        ValueError: no values, more than one dimension, `level` outside (0, 1), `num_resamples` below 1.

    Example:
        >>> bootstrap_interval([0.5, 0.5, 0.5])
        Interval(mean=0.5, low=0.5, high=0.5, n=3)
    """
    values_P = np.sort(_column("values", values))
    return _interval(values_P[:, None], num_resamples, level, seed)


def ratio_interval(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of sum(numerators) / sum(denominators), one of each for a prompt, resampled together.

    NaN where the denominators of a resample add up to 0. Raises as `bootstrap_interval`, and on different lengths.
    """
    columns_P2 = np.stack(_same_length(_column("numerators", numerators), _column("denominators", denominators)), 1)
    order_P = np.lexsort(columns_P2.T)
    return _interval(columns_P2[order_P], num_resamples, level, seed)


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of mean(a - b) over the same prompts; both map prompt id -> value.

    Pairing takes the difficulty of the prompts out of the comparison: the interval is that of the differences.

    Raises:
        ValueError: as `bootstrap_interval`, and when the ids of the two differ.
    """
    ids = same_ids(a, b)
    return bootstrap_interval([a[key] - b[key] for key in ids], num_resamples, level, seed)


def paired_ratio_difference(
    a: Mapping[str, tuple[float, float]],
    b: Mapping[str, tuple[float, float]],
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of ratio(a) - ratio(b) over the same prompts; both map prompt id -> (numerator, denominator).

    Raises as `paired_difference`. NaN as in `ratio_interval`.
    """
    rows_P4 = np.array([(*a[key], *b[key]) for key in same_ids(a, b)], dtype=np.float64).reshape(-1, 4)
    order_P = np.lexsort(rows_P4.T)
    return _interval(rows_P4[order_P], num_resamples, level, seed)


def average_interval(
    groups: Sequence[Sequence[tuple[float, ...]]],
    weights: Sequence[float],
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the weighted mean over groups (benchmarks) of each group's ratio, or difference of ratios.

    Groups are resampled independently of each other, each over its own rows.

    Args:
        groups: rows of (numerator, denominator), or of (numerator, denominator) of a and then of b for differences.

        weights: one a group, divided by their sum.

    Raises as `ratio_interval`, and where weights and groups are not as many, or none.
    """
    if not groups or len(groups) != len(weights):
        raise ValueError(f"{len(groups)} groups and {len(weights)} weights: an average needs a weight a group")
    tables = [np.array(rows, dtype=np.float64) for rows in groups]
    tables = [table_PC[np.lexsort(table_PC.T)] for table_PC in tables]
    mean = float(np.average([_statistic(table_PC.sum(0), len(table_PC)) for table_PC in tables], weights=weights))
    num_rows = sum(map(len, tables))
    if any(len(table_PC) == 1 for table_PC in tables):
        return Interval(mean, float("nan"), float("nan"), num_rows)
    estimates = [_estimates(table_PC, num_resamples, seed + n) for n, table_PC in enumerate(tables)]
    return Interval(mean, *_bounds(np.average(estimates, axis=0, weights=weights), level), num_rows)


def same_ids(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """The ids that both have, in order; ValueError where one lacks an id of the other's."""
    if a.keys() != b.keys():
        only_a, only_b = sorted(a.keys() - b.keys())[:3], sorted(b.keys() - a.keys())[:3]
        raise ValueError(
            f"a paired difference needs the same prompts on both sides: {len(a)} and {len(b)} ids, "
            f"only in a: {only_a}, only in b: {only_b}. Evaluate both on the same split, or intersect them first"
        )
    return sorted(a)


def _interval(columns_PC: np.ndarray, num_resamples: int, level: float, seed: int) -> Interval:
    """Resample rows; what is estimated follows from the number of columns, see `_statistic`."""
    num_prompts = len(columns_PC)
    if not num_prompts:
        raise ValueError("a bootstrap needs the values of at least one prompt and got none")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, for example 0.95")
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples} must be at least 1; 10000 is usual")
    mean = float(_statistic(columns_PC.sum(0), num_prompts))
    if num_prompts == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    return Interval(mean, *_bounds(_estimates(columns_PC, num_resamples, seed), level), num_prompts)


def _estimates(columns_PC: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """The statistic of every resample."""
    num_prompts = len(columns_PC)
    blocks = times_drawn(num_prompts, num_resamples, seed)
    return np.concatenate([_statistic(drawn_RP @ columns_PC, num_prompts) for drawn_RP in blocks])


def _bounds(estimates_R: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(estimates_R, [tail, 1 - tail])
    return float(low), float(high)


def _statistic(sums_RC: np.ndarray, num_prompts: int) -> np.ndarray:
    """One column: its mean. Two: their ratio. Four: the difference of two ratios. `sums_RC` are sums over prompts."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if sums_RC.shape[-1] == 1:
            return sums_RC[..., 0] / num_prompts
        denominators = sums_RC[..., 1::2]
        ratios = np.where(denominators == 0, np.nan, sums_RC[..., 0::2] / denominators)
    return ratios[..., 0] if ratios.shape[-1] == 1 else ratios[..., 0] - ratios[..., 1]


def _column(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name} must hold one number for each prompt, and has the shape {column.shape}")
    return column


def _same_length(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} numerators and {len(second)} denominators: give one of each for a prompt")
    return first, second
