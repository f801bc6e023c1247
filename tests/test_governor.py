"""The governor: a rigged game that saturates without it and stays in its band with it, and its part in alignment."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from callbacks import RewardGap
from prism_pl.governor import Governor, Plan, pair_accuracies, scaled_rate
from tests.conftest import make_examples
from tests.stubs import RIGHT, WRONG, Rows, equal, fit, weights
from tests.test_align import EXPERTS, make


class RiggedGame:
    """A policy that never catches up: what tells demonstrations apart turns a little every step, and it stands still.

    Both sides are Gaussian in the plane. The discriminator is linear, trained by Bradley-Terry on the step's pairs: it
    follows the turn if it learns, and falls behind if it does not.
    """

    def __init__(self, governor: Governor | None) -> None:
        self.governor = governor
        self.draw = torch.Generator().manual_seed(0)
        self.discriminator = nn.Linear(2, 1, bias=False)
        with torch.no_grad():  # it starts 1.2 rad behind: right in 4 of 5 pairs
            self.discriminator.weight.copy_(2 * torch.tensor([[math.cos(-1.2), math.sin(-1.2)]]))
        self.optimizer = torch.optim.SGD(self.discriminator.parameters(), lr=0.3, weight_decay=0.1)
        self.turn = 0.0

    def step(self, num_pairs: int = 256) -> float:
        """Play a step. Returns the accuracy on its fresh pairs, before the discriminator learns from them."""
        self.turn += 2 * math.pi / 300
        noise = 0.3 * torch.randn(2, num_pairs, 2, generator=self.draw)
        demonstrations = torch.tensor([math.cos(self.turn), math.sin(self.turn)]) + noise[0]
        rollouts = noise[1]
        with torch.no_grad():
            scores = [{"one": self.discriminator(side).squeeze(-1)} for side in (demonstrations, rollouts)]
        accuracies = pair_accuracies(*scores, torch.ones(num_pairs, dtype=torch.bool))
        plan = Plan(1) if self.governor is None else self.governor.plan(accuracies, steps=1)
        for _ in range(plan.steps):
            margins = self.discriminator(demonstrations) - self.discriminator(rollouts)
            self.optimizer.zero_grad()
            (-nn.functional.logsigmoid(margins)).mean().backward()
            with scaled_rate(self.optimizer, plan.rate):
                self.optimizer.step()
        return accuracies["one"]


def test_a_rigged_game_saturates_without_a_governor():
    game = RiggedGame(None)
    assert min([game.step() for _ in range(300)][50:]) > 0.93


@pytest.mark.parametrize("by", ["steps", "rate"])
def test_a_governor_holds_the_accuracy_in_its_band(by):
    governor = Governor(low=0.6, high=0.85, by=by)
    game = RiggedGame(governor)
    seen = [game.step() for _ in range(300)][50:]  # each step's own pairs, not the governor's mean
    inside = [0.6 <= accuracy <= 0.85 for accuracy in seen]
    assert sum(inside) > 0.88 * len(inside)
    assert min(seen) >= 0.6
    assert max(seen) < 0.92  # what a step overshoots


def test_interventions_end_inside_the_band_and_not_where_they_began():
    governor = Governor(low=0.6, high=0.8, hysteresis=0.05, window=1, extra_steps=2)
    accuracies = (0.70, 0.76, 0.74, 0.71, 0.69, 0.74, 0.64, 0.66, 0.71, 0.90)
    assert [governor.plan({"one": accuracy}, 1).steps for accuracy in accuracies] == [1, 0, 0, 0, 1, 1, 3, 3, 1, 0]
    assert governor.plan({"one": 0.55}, 1).steps == 3  # from one end of the band to the other
    assert governor.plan({"one": 0.55}, 0).steps == 0  # none is added where none is due
    assert governor.plan({"one": math.nan}, 1).steps == 3  # a step without pairs decides nothing
    assert governor.accuracy == 0.55


def test_the_rate_moves_within_its_span_and_goes_back_inside_the_band():
    governor = Governor(low=0.6, high=0.8, hysteresis=0.04, by="rate", window=1, factor=0.5, span=4.0)
    accuracies = (0.9, 0.9, 0.9, 0.7, 0.5, 0.5, 0.5, 0.5, 0.7, 0.7, 0.7)
    assert [governor.plan({"one": a}, 1).rate for a in accuracies] == [0.5, 0.25, 0.25, 0.5, 1, 2, 4, 4, 2, 1, 1]
    assert governor.plan({"one": 0.7}, 3) == Plan(3, 1.0)


def test_the_accuracy_is_averaged_over_a_window_and_survives_a_checkpoint():
    governor = Governor(low=0.6, high=0.8, hysteresis=0.04, by="rate", window=2, factor=0.5)
    plans = [governor.plan({"one": accuracy}, 1) for accuracy in (0.9, 0.9, 0.6)]
    assert governor.accuracy == pytest.approx(0.75)
    again = Governor(low=0.6, high=0.8, hysteresis=0.04, by="rate", window=2, factor=0.5)
    again.load_state_dict(governor.state_dict())
    assert [again.plan({"one": a}, 1) for a in (0.95, 0.4)] == [governor.plan({"one": a}, 1) for a in (0.95, 0.4)]
    assert [plan.rate for plan in plans] == [0.5, 0.25, 0.125]
    assert governor.metrics(plans[1]) == {
        "governor/accuracy": pytest.approx(0.675),
        "governor/push": 0.0,
        "governor/steps": 1.0,
        "governor/rate": plans[1].rate,
    }


def test_it_goes_by_the_expert_that_is_farthest_out():
    """Means of 0.8 and 0.7 would lie inside the band."""
    governor = Governor(low=0.6, high=0.9, hysteresis=0.05, window=1)
    assert governor.plan({"perception": 1.0, "reasoning": 0.7}, 1).steps == 0
    assert governor.accuracy == 1.0
    assert governor.plan({"perception": 0.85, "reasoning": 0.5}, 1).steps == 2
    assert governor.metrics(Plan(2))["governor/accuracy"] == 0.5
    assert governor.plan({"perception": 0.75, "reasoning": math.nan}, 1).steps == 2  # the last one known stands
    assert governor.plan({"perception": 0.75, "reasoning": 0.75}, 1).steps == 1


def test_pair_accuracies_by_hand():
    nan = float("nan")
    demonstrations = {"a": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([0.0, 2.0, 2.0])}
    rollouts = {"a": torch.tensor([0.0, 1.0, nan]), "b": torch.tensor([1.0, 1.0, 1.0])}
    first_two, none = torch.tensor([True, True, False]), torch.tensor([False] * 3)
    # A win and a tie; a loss and a win.
    assert pair_accuracies(demonstrations, rollouts, first_two) == {"a": 0.75, "b": 0.5}
    assert all(math.isnan(accuracy) for accuracy in pair_accuracies(demonstrations, rollouts, none).values())
    found = pair_accuracies(demonstrations, rollouts, torch.tensor([True] * 3))
    assert math.isnan(found["a"])
    assert found["b"] == pytest.approx(2 / 3)


def test_a_scaled_rate_is_put_back():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones(1)
    with scaled_rate(optimizer, 0.1):
        optimizer.step()
    assert weight.item() == pytest.approx(-0.05)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "options",
    [{"low": 0.4}, {"high": 1.1}, {"low": 0.9}, {"hysteresis": 0.2}, {"by": "force"}, {"window": 0}, {"factor": 1.0}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=f"governor: .*{next(iter(options))}="):
        Governor(**options)


# In alignment


class Scripted(Governor):
    """Has its plans beforehand."""

    def __init__(self, *plans: Plan) -> None:
        super().__init__()
        self.plans, self.told = list(plans), []

    def plan(self, accuracies: Mapping[str, float], steps: int) -> Plan:
        super().plan(accuracies, steps)
        self.told.append((dict(accuracies), steps))
        return self.plans[len(self.told) - 1]


def test_alignment_does_what_the_governor_plans_and_logs_it(random_policy, tmp_path):
    rows = Rows(make_examples(4))
    for plan, learns in ((Plan(0), False), (Plan(1, 0.0), False), (Plan(2, 0.5), True)):
        governor = Scripted(plan)
        module = make(random_policy, [RIGHT, WRONG], governor=governor, discriminator_steps=3)
        module.configure_model()
        before = weights(module.discriminator)
        _, record = fit(module, rows, tmp_path, [RewardGap()])
        logged = record.steps[0]
        assert equal(weights(module.discriminator), before) is not learns
        assert ("align/discriminator_loss" in logged) == (plan.steps > 0)
        assert (logged["align/governor/steps"], logged["align/governor/rate"]) == plan
        # It decides by the step's own pairs, before the discriminator learns from them.
        accuracies = {expert: logged[f"align/discriminator_accuracy/{expert}"] for expert in EXPERTS}
        assert governor.told == [(pytest.approx(accuracies), 3)]
        assert logged["align/governor/accuracy"] == pytest.approx(governor.accuracy)


def test_two_planned_steps_are_two_plain_ones(random_policy, tmp_path):
    stepped = []
    for options in ({"governor": Scripted(Plan(2))}, {"discriminator_steps": 2}):
        module = make(random_policy, **options)
        fit(module, Rows(make_examples(4)), tmp_path)
        stepped.append(weights(module.discriminator))
    assert equal(*stepped)


def test_a_resumed_run_goes_on_under_the_same_governor(random_policy, tmp_path):
    options: dict[str, Any] = {"kind": torch.optim.AdamW, "lr": 1e-3, "discriminator_lr": 1e-2}

    def run(ckpt=None):
        governor = Governor(low=0.6, high=0.8, hysteresis=0.04, by="rate", window=3)
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = make(random_policy, [RIGHT, WRONG], governor=governor, **options)
        rows = Rows(make_examples(8), resumable=True)
        _, record = fit(module, rows, tmp_path, [saving], ckpt, max_steps=4, enable_checkpointing=True)
        return module, [(s["align/governor/accuracy"], s["align/governor/rate"]) for s in record.steps]

    whole, told = run()
    resumed, told_again = run(tmp_path / "step=2.ckpt")
    assert told_again == told[2:]
    assert told[-1][1] != 1.0
    assert equal(weights(resumed.discriminator), weights(whole.discriminator))
