"""A router's load, entropy and mutual information with the segments, worked out by hand."""

import math

import pytest
import torch

from prism_pl.discriminator.balance import routing_sums
from prism_pl.discriminator.routing import entropy, mutual_information, routing_diagnostics


def test_entropy_by_hand():
    assert entropy(torch.tensor([0.25] * 4)).item() == pytest.approx(math.log(4))
    assert entropy(torch.tensor([1.0, 0.0])).item() == 0
    assert entropy(torch.tensor([0.75, 0.25])).item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_mutual_information_by_hand():
    # Each expert reads one segment: the expert tells it, log 2. All alike: nothing.
    assert mutual_information(torch.tensor([[5, 0], [0, 5]])).item() == pytest.approx(math.log(2))
    assert mutual_information(torch.tensor([[3, 6], [2, 4]])).item() == pytest.approx(0, abs=1e-12)
    # p = [[3, 1], [1, 3]] / 8, margins 1/2: sum p log(p / (1/4)) = 3/4 log(3/2) + 1/4 log(1/2).
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert mutual_information(torch.tensor([[3, 1], [1, 3]])).item() == pytest.approx(expected)
    assert math.isnan(mutual_information(torch.zeros(2, 2)).item())


def test_diagnostics_are_means_over_layers_not_of_pooled_experts():
    # Two layers whose experts specialise the other way round: pooled, they would seem not to.
    told = routing_diagnostics(torch.tensor([[[6, 0], [0, 2]], [[0, 6], [2, 0]]]), per_layer=True)
    assert told["router/load/0/0"] == pytest.approx(0.75)
    assert told["router/load/mean/0"] == pytest.approx(0.5)
    apart = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)  # the expert tells the segment: all of the segments' entropy
    for name in ("entropy/mean", "entropy/min", "entropy/1", "mutual_information/mean", "mutual_information/max"):
        assert told[f"router/{name}"].item() == pytest.approx(apart), name
    assert all(value.shape == () for value in told.values())
    assert set(routing_diagnostics(torch.ones(3, 2, 4))) == {
        *(f"router/load/mean/{e}" for e in range(4)),
        "router/load/max",
        *("router/entropy/mean", "router/entropy/min"),
        *("router/mutual_information/mean", "router/mutual_information/max"),
    }


def test_diagnostics_of_a_sure_router():
    # Two places of kind 0 go to expert 0, two of kind 1 to expert 1; the other layer sends all to expert 1.
    logits = [torch.nn.functional.one_hot(torch.tensor(c), 2).float() * 50 for c in ([0, 0, 1, 1], [1, 1, 1, 1])]
    told = routing_diagnostics(routing_sums(logits, 1, torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))["counts"])
    assert told["router/entropy/mean"].item() == pytest.approx(math.log(2) / 2)
    assert told["router/entropy/min"].item() == 0
    assert told["router/mutual_information/mean"].item() == pytest.approx(math.log(2) / 2)
    assert told["router/mutual_information/max"].item() == pytest.approx(math.log(2))
    assert told["router/load/mean/1"].item() == pytest.approx(0.75)
    assert told["router/load/max"].item() == pytest.approx(0.75)  # 1/2 and 1
