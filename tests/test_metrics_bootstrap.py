import subprocess
import sys

import numpy as np
import pytest
import torch

from prism_pl.metrics import (
    BootstrapMean,
    Interval,
    bootstrap_interval,
    paired_difference,
    paired_ratio_difference,
    ratio_interval,
)
from prism_pl.metrics.resamples import times_drawn, times_drawn_together


def test_interval_of_known_data_is_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 3.0, 900)
    interval = bootstrap_interval(values)
    # a mean of 900: standard error = sample std / 30, 1.96 of them to each side
    half = 1.96 * values.std() / 30
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert interval.n == 900


def test_two_prompts_by_enumeration():
    # resamples of (0, 1): means 0, 1/2, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert bootstrap_interval([0.0, 1.0], level=0.9) == (0.5, 0.0, 1.0, 2)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5, 2)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(1)
    draws = (bootstrap_interval(generator.random(40) < 0.6, 1000, 0.9, seed) for seed in range(400))
    covered = np.mean([low <= 0.6 <= high for _, low, high, _ in draws])
    # 400 trials at 0.9 have a standard error of 0.015; the percentile interval of 40 values runs a little narrow
    assert 0.84 < covered < 0.95


def test_the_seed_decides_and_the_order_does_not():
    values = np.random.default_rng(2).random(50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values[::-1], seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_many_prompts_are_resampled_in_chunks(monkeypatch):
    values = np.random.default_rng(3).random(30)
    whole = bootstrap_interval(values, 2000)
    monkeypatch.setattr("prism_pl.metrics.resamples.CHUNK", 30 * 300)
    assert bootstrap_interval(values, 2000) == pytest.approx(whole, abs=1e-12)  # the same draws
    monkeypatch.setattr("prism_pl.metrics.resamples.CHUNK", 1)
    assert bootstrap_interval(values, 200).mean == pytest.approx(values.mean())


def test_resamples_count_what_was_drawn():
    drawn_RP = np.random.default_rng(5).integers(7, size=(40, 7))
    (counts_RP,) = times_drawn(7, 40, seed=5)
    assert counts_RP.tolist() == [[row.tolist().count(p) for p in range(7)] for row in drawn_RP]
    assert (times_drawn_together(7, 40, seed=5).sum(1) == 7).all()
    with pytest.raises(ValueError, match="read-only"):
        counts_RP[0, 0] = 9  # kept for the next number


def test_one_prompt_has_no_interval_and_nan_stays_nan():
    single = bootstrap_interval([0.5])
    assert single.mean == 0.5
    assert np.isnan([single.low, single.high]).all()
    assert not single.excludes_zero()
    assert np.isnan(bootstrap_interval([0.5, float("nan"), 1.0])[:3]).all()


def test_excludes_zero():
    assert Interval(1, 0.5, 1.5, 9).excludes_zero()
    assert Interval(-1, -1.5, -0.5, 9).excludes_zero()
    assert not Interval(1, -0.5, 2.5, 9).excludes_zero()
    assert not Interval(1, 0.0, 2.0, 9).excludes_zero()


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="level=95 must lie between"):
        bootstrap_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="num_resamples=0"):
        bootstrap_interval([1.0, 2.0], num_resamples=0)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        bootstrap_interval(np.ones((1, 2)))


def test_pairing_takes_the_prompts_difficulty_out():
    easiness = np.random.default_rng(4).normal(0, 10, 300)
    better = {str(i): x + 0.1 for i, x in enumerate(easiness)}
    worse = {str(i): x for i, x in reversed(list(enumerate(easiness)))}
    interval = paired_difference(better, worse)
    assert interval.mean == pytest.approx(0.1)
    assert interval.excludes_zero()
    # taken by itself, each side's interval is 2 x 1.96 x 10 / sqrt(300) = 2.3 wide
    alone = bootstrap_interval(list(better.values()))
    assert alone.high - alone.low > 2


def test_a_paired_difference_of_the_same_is_zero():
    values = {"a": 0.3, "b": 0.9}
    assert paired_difference(values, values) == (0, 0, 0, 2)


def test_mismatched_ids_are_named():
    with pytest.raises(ValueError, match=r"only in a: \['x'\], only in b: \['y', 'z'\]"):
        paired_difference({"x": 1.0, "q": 1.0}, {"y": 1.0, "z": 1.0, "q": 2.0})
    with pytest.raises(ValueError, match="same prompts"):
        paired_ratio_difference({"x": (1, 1)}, {})


def test_a_ratio_resamples_prompts_and_weighs_by_the_denominator():
    # (1 + 9) / (2 + 10), not the mean of 1/2 and 9/10; resamples: 1/2, 10/12 (half of them), 9/10
    interval = ratio_interval([1, 9], [2, 10], level=0.9)
    assert interval == pytest.approx((10 / 12, 0.5, 0.9, 2))
    # shuffled together it is the same; values paired otherwise are not
    assert ratio_interval([9, 1], [10, 2], level=0.9) == interval
    assert ratio_interval([9, 1], [2, 10], level=0.9) != interval
    with pytest.raises(ValueError, match="2 numerators and 1 denominators"):
        ratio_interval([1, 2], [1])


def test_a_constant_ratio_has_no_width():
    assert ratio_interval([1, 2, 3], [2, 4, 6]) == (0.5, 0.5, 0.5, 3)


def test_the_order_of_the_prompts_does_not_change_a_ratios_interval():
    numerators, denominators = np.random.default_rng(6).integers(1, 9, (2, 40))
    assert ratio_interval(numerators[::-1], denominators[::-1]) == ratio_interval(numerators, denominators)


def test_a_ratio_to_nothing_is_nan():
    assert np.isnan(ratio_interval([0, 0], [0, 0])[:3]).all()
    assert np.isnan(ratio_interval([1, 0], [0, 0])[:3]).all()


def test_paired_ratio_difference_hand_values():
    a = {"p": (1.0, 2.0), "q": (3.0, 4.0)}
    b = {"q": (1.0, 4.0), "p": (1.0, 1.0)}
    # 4/6 - 2/5; resamples: p only 1/2 - 1 = -1/2; q only 3/4 - 1/4 = 1/2
    assert paired_ratio_difference(a, b, level=0.9) == pytest.approx((4 / 6 - 2 / 5, -0.5, 0.5, 2))


def test_bootstrap_mean_is_the_function_over_all_updates():
    values = np.random.default_rng(5).random(30).astype(np.float32)
    metric = BootstrapMean(num_resamples=500, level=0.8, seed=7)
    metric.update(values[:10].tolist())
    metric.update(torch.from_numpy(values[10:]))
    result = [metric.compute()[key].item() for key in ("mean", "low", "high", "n")]
    assert result == pytest.approx(bootstrap_interval(values, 500, 0.8, 7))


def test_bootstrap_mean_without_values_is_nan():
    metric = BootstrapMean()
    metric.update([])
    result = metric.compute()
    assert result["mean"].isnan()
    assert result["n"] == 0
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        metric.update([[1.0]])  # pyright: ignore[reportArgumentType]


def test_bootstrapping_needs_neither_torch_nor_torchmetrics():
    code = "import sys, prism_pl.metrics; print(*(m for m in ('torch', 'torchmetrics', 'scipy') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_every_public_name_exists():
    import prism_pl.metrics as metrics

    assert [name for name in metrics.__all__ if not callable(getattr(metrics, name))] == []
    with pytest.raises(AttributeError, match="PassAtKay"):
        metrics.PassAtKay  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
