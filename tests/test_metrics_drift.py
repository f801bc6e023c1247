import numpy as np
import pytest
import scipy.stats

from prism_pl.chat import render
from prism_pl.metrics import DistributionDistance, LengthDistance, energy_distance


def with_items(*counts: int) -> list[str]:
    return [render("\n".join(["- x"] * count), "read", "3") for count in counts]


def test_distribution_distance_hand_values():
    metric = DistributionDistance(rule="bullets", segment="caption")
    metric.update(policy=with_items(1, 1), supervision=with_items(2, 4))
    metric.update(policy=["malformed"])
    result = metric.compute()
    # sorted pairs 1-2 and 1-4: (1 + 3) / 2
    assert result["distance"] == 2
    assert (result["policy"], result["supervision"]) == (1, 3)
    assert [result[key].item() for key in ("n_policy", "n_supervision", "malformed")] == [2, 2, 1]


def test_equal_distributions_have_distance_zero_whatever_the_sizes():
    metric = DistributionDistance()
    metric.update(policy=with_items(1, 3), supervision=with_items(3, 1, 1, 3))
    result = metric.compute()
    assert (result["distance"], result["energy"]) == (0, 0)


def test_distance_sees_spread_at_an_equal_mean():
    metric = DistributionDistance()
    metric.update(policy=with_items(3, 3), supervision=with_items(1, 5))
    assert metric.compute()["distance"] == 2


def test_the_segment_is_chosen():
    metric = DistributionDistance(rule="lines", segment="reasoning")
    metric.update(policy=[render("- a\n- b\n- c", "one", "3")], supervision=[render("- a", "one\ntwo", "3")])
    assert metric.compute()["distance"] == 1
    assert "reasoning steps" in metric.describe()
    assert "lines that are not empty" in metric.describe()
    with pytest.raises(ValueError, match=r"segment='captions' is unknown.*Did you mean 'caption'"):
        DistributionDistance(segment="captions")  # pyright: ignore[reportArgumentType]


def test_an_empty_side_is_nan():
    metric = DistributionDistance()
    metric.update(policy=with_items(1))
    result = metric.compute()
    assert result["distance"].isnan()
    assert result["supervision"].isnan()
    assert result["policy"] == 1


def test_overflow_is_refused_and_leaves_the_metric_as_it_was():
    metric = DistributionDistance(max_count=3)
    metric.update(policy=with_items(3), supervision=with_items(0 + 1))
    with pytest.raises(ValueError, match=r"DistributionDistance got 4, outside 0 \.\.\. 3.*max_count"):
        metric.update(policy=with_items(2), supervision=with_items(4))
    result = metric.compute()
    assert (result["n_policy"], result["distance"]) == (1, 2)
    with pytest.raises(ValueError, match="max_count=0"):
        DistributionDistance(max_count=0)


def test_length_distance_is_scipys_on_the_raw_lengths():
    generator = np.random.default_rng(0)
    policy, supervision = generator.integers(0, 900, 50).tolist(), generator.integers(300, 2000, 70).tolist()
    metric = LengthDistance(max_length=2000)
    for first in range(0, 70, 20):
        metric.update(policy=policy[first : first + 20], supervision=supervision[first : first + 20])
    result = metric.compute()
    assert result["distance"].item() == pytest.approx(scipy.stats.wasserstein_distance(policy, supervision))
    assert result["energy"].item() == pytest.approx(scipy.stats.energy_distance(policy, supervision))
    assert result["policy"].item() == pytest.approx(np.mean(policy))
    with pytest.raises(ValueError, match="LengthDistance got -1"):
        metric.update(policy=[-1])


def test_energy_distance_hand_value_in_two_dimensions():
    # between: 5 (a 3-4-5 triangle); within: 0 and 0; sqrt(2 x 5)
    assert energy_distance(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])) == pytest.approx(10**0.5)


def test_energy_distance_in_one_dimension_is_scipys():
    generator = np.random.default_rng(1)
    a, b = generator.normal(0, 1, 40), generator.normal(1, 2, 30)
    assert energy_distance(a[:, None], b[:, None]) == pytest.approx(scipy.stats.energy_distance(a, b))
    assert energy_distance(a[:, None], a[:, None]) == pytest.approx(0, abs=1e-7)


def test_energy_distance_checks_shapes_and_lets_nan_through():
    with pytest.raises(ValueError, match=r"\(2, 1\), \(2, 2\)"):
        energy_distance(np.zeros((2, 1)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="N and M > 0"):
        energy_distance(np.zeros((0, 1)), np.zeros((2, 1)))
    assert np.isnan(energy_distance(np.array([[np.nan]]), np.zeros((2, 1))))
