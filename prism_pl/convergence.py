"""When a curve has settled: it no longer climbs or falls, and no longer swings."""

import math
from collections.abc import Sequence
from statistics import linear_regression, variance
from typing import NamedTuple


class Trend(NamedTuple):
    """Of a window of a curve.

    Attributes:
        slope: of the least-squares line through it, a step.
        variance: of its values around their mean (sample variance).
        mean: of its values.
    """

    slope: float
    variance: float
    mean: float


def trend(values: Sequence[float]) -> Trend:
    """Slope, variance and mean of two or more values, a step apart; all NaN where one is."""
    if any(math.isnan(value) for value in values):
        return Trend(math.nan, math.nan, math.nan)
    slope = linear_regression(range(len(values)), values).slope
    return Trend(slope, variance(values), math.fsum(values) / len(values))


def settled(trends: Sequence[Trend], window: int, max_change: float, max_variance: float) -> bool:
    """Whether every curve is flat and quiet: its line moves by at most `max_change` over the window, and its variance
    is at most `max_variance`. False where one is NaN."""
    return all(abs(t.slope) * window <= max_change and t.variance <= max_variance for t in trends)
