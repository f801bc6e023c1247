"""Bootstrap intervals of the Wasserstein-1 distance between two sides' counts, over prompts.

As in `prism_pl.metrics.bootstrap` the prompt is what is resampled, with all its responses of all sides. The distance is
not a mean over prompts, so each resample has its own pooled histograms: a matrix product of how often each prompt was
drawn with the prompts' histograms gives all of them at once.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from prism_pl.metrics.bootstrap import Interval
from prism_pl.metrics.resamples import times_drawn_together

Counts = Mapping[str, Sequence[int]]  # prompt id -> a count for each valid response; may be empty


def distance_interval(
    policy: Counts, supervision: Counts, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of W1(policy, supervision). Resampled distances lie above the true one on average, because sampling
    noise only adds distance: compare two policies with `paired_distance_difference`, not by their intervals.

    NaN where a side is empty in all, or so rarely filled that some resample leaves it empty.

    Raises:
        ValueError: the ids of the two sides differ, or there are none.

    Example:
        >>> distance_interval({"a": [1], "b": [1, 2]}, {"a": [3], "b": [3]}).mean.__round__(3)
        1.667
    """
    histograms_SPK, gaps_K = _histograms([policy, supervision])
    return _interval(histograms_SPK, gaps_K, num_resamples, level, seed)


def paired_distance_difference(
    a: Counts, b: Counts, supervision: Counts, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of W1(a, supervision) - W1(b, supervision) over the same resampled prompts: below 0, a is nearer.

    Raises as `distance_interval`.
    """
    histograms_SPK, gaps_K = _histograms([a, b, supervision])
    return _interval(histograms_SPK, gaps_K, num_resamples, level, seed)


def histogram_distance(policy_K: np.ndarray, supervision_K: np.ndarray) -> float:
    """W1 between two histograms over 0 ... K-1, or NaN where one is empty: the estimate of `distance_interval`."""
    pooled_SRK = np.stack([policy_K, supervision_K])[:, None].astype(np.float64)
    return float(_statistic(pooled_SRK, np.ones(len(policy_K) - 1))[0])


def _histograms(sides: Sequence[Counts]) -> tuple[np.ndarray, np.ndarray]:
    """For each side and prompt how often each of the K values that occur stands there, and the gaps between values."""
    ids = sorted(sides[0])
    for side in sides[1:]:
        if side.keys() != sides[0].keys():
            odd = sorted(side.keys() ^ sides[0].keys())
            raise ValueError(
                f"the sides of a distance need the same prompts, and {len(odd)} ids stand on one side only, such as "
                f"{odd[0]!r}: evaluate on the same split, or intersect them first"
            )
    if not ids:
        raise ValueError("a bootstrap needs the counts of at least one prompt and got none")
    values = np.unique([count for side in sides for counts in side.values() for count in counts])
    histograms_SPK = np.zeros((len(sides), len(ids), len(values)))
    for s, side in enumerate(sides):
        for p, key in enumerate(ids):
            np.add.at(histograms_SPK[s, p], np.searchsorted(values, side[key]), 1)
    # The order of the prompts must not change the interval: resampling draws positions.
    order_P = np.lexsort(histograms_SPK.transpose(0, 2, 1).reshape(-1, len(ids))) if len(values) else slice(None)
    return histograms_SPK[:, order_P], np.diff(values)


def _interval(histograms_SPK: np.ndarray, gaps: np.ndarray, num_resamples: int, level: float, seed: int) -> Interval:
    num_prompts = histograms_SPK.shape[1]
    estimate = float(_statistic(histograms_SPK.sum(1)[:, None], gaps)[0])
    if num_prompts == 1:
        return Interval(estimate, float("nan"), float("nan"), 1)
    pooled_SRK = times_drawn_together(num_prompts, num_resamples, seed) @ histograms_SPK
    tail = (1 - level) / 2
    low, high = np.quantile(_statistic(pooled_SRK, gaps), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), num_prompts)


def _statistic(pooled_SRK: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Two sides: their distance. Three: distance of the first to the last, less that of the second to the last."""
    totals = pooled_SRK.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        # In one dimension W1 is the area between the two distribution functions.
        cdf_SRK = np.where(totals > 0, pooled_SRK.cumsum(-1) / totals, np.nan)
    if not pooled_SRK.shape[-1]:
        return np.full(pooled_SRK.shape[1], np.nan)
    area_SR = (np.abs(cdf_SRK[:-1] - cdf_SRK[-1:])[..., :-1] * gaps).sum(-1)
    # A single value leaves no gap to integrate over, but an empty side still has no distance.
    area_SR = np.where(np.isnan(cdf_SRK[:-1, :, -1] + cdf_SRK[-1:, :, -1]), np.nan, area_SR)
    return area_SR[0] if len(area_SR) == 1 else area_SR[0] - area_SR[1]
