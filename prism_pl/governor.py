"""A governor for the game: it keeps the discriminator's accuracy in a band by holding it back or pushing it.

A discriminator that wins every pair saturates and teaches the policy nothing; one that wins half of them tells it
nothing either. Off by default, as published: PRISM takes one discriminator step a policy step, whatever happens.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from prism_pl.strategy import global_sum


class Plan(NamedTuple):
    """What the discriminator does in a step.

    Attributes:
        steps: optimiser steps, 0 for none.
        rate: factor on its learning rate.
    """

    steps: int
    rate: float = 1.0


class Governor:
    """Decides how much the discriminator learns, from its experts' accuracies on each step's fresh pairs.

    It goes by the expert whose accuracy lies farthest from the middle of the band: their mean would hide one that wins
    every pair behind one that guesses. What is done reaches all of them, since they learn in one step.

    Within `hysteresis` of `high`, or above, it is held back until its accuracy is twice as far below `high`; near or
    under `low` it is pushed in the same way. So the edges leave room for what a step overshoots, and a decision is not
    undone by the next batch's noise. In between it learns as configured. It acts on what it has seen, so single steps
    lie outside: about one in ten in the game of tests/test_governor.py, which stays above 0.93 without it.

    Args:
        low, high: the band of each expert's pair accuracy.
        by: what is done. `steps` takes no step while held back and `extra_steps` more while pushed. `rate` multiplies
            the learning rate by `factor` in each step while held back and divides it while pushed, from 1 / `span` to
            `span` times the configured one; in between it goes back to that as fast.
        hysteresis: how far inside the band an intervention begins; it ends twice as far inside.
        window: steps that the accuracy is averaged over; few pairs make a noisy one.
        extra_steps, factor, span: see `by`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        low: float = 0.6,
        high: float = 0.85,
        by: Literal["steps", "rate"] = "steps",
        hysteresis: float = 0.06,
        window: int = 2,
        extra_steps: int = 1,
        factor: float = 0.25,
        span: float = 10.0,
    ) -> None:
        if not 0.5 <= low < high <= 1:
            raise ValueError(f"governor: low={low} and high={high} must be accuracies, 0.5 <= low < high <= 1")
        if not 0 <= 4 * hysteresis <= high - low:
            raise ValueError(f"governor: hysteresis={hysteresis} must be at least 0 and at most a quarter of the band")
        if by not in ("steps", "rate"):
            raise ValueError(f"governor: by={by!r} must be 'steps' or 'rate'")
        if window < 1 or extra_steps < 1 or not 0 < factor < 1 or span < 1:
            raise ValueError(
                f"governor: window={window} and extra_steps={extra_steps} must be at least 1, factor={factor} between "
                f"0 and 1, span={span} at least 1"
            )
        self.low, self.high, self.by, self.hysteresis = low, high, by, hysteresis
        self.extra_steps, self.factor, self.span = extra_steps, factor, span
        self.window = window
        self.accuracies: dict[str, deque[float]] = {}
        self.push = 0  # -1 while the discriminator is held back, 1 while it is pushed
        self.rate = 1.0

    def plan(self, accuracies: Mapping[str, float], steps: int) -> Plan:
        """Take in each expert's accuracy on a step's fresh pairs, over all ranks, and decide.

        Args:
            accuracies: NaN, from a step without pairs, says nothing, and all of them NaN decide nothing.
            steps: what the discriminator would take without a governor. Where none is due none is added.
        """
        known = {expert: accuracy for expert, accuracy in accuracies.items() if accuracy == accuracy}
        for expert, accuracy in known.items():
            self.accuracies.setdefault(expert, deque(maxlen=self.window)).append(accuracy)
        if known:
            self._switch(self.accuracy)
            self._move_rate()
        if self.by == "rate":
            return Plan(steps, self.rate)
        if self.push < 0 or steps == 0:
            return Plan(0)
        return Plan(steps + self.extra_steps if self.push else steps)

    def _move_rate(self) -> None:
        if self.push:
            moved = self.rate * self.factor**-self.push
            self.rate = min(max(moved, 1 / self.span), self.span)
        else:
            self.rate = min(1.0, self.rate / self.factor) if self.rate < 1 else max(1.0, self.rate * self.factor)

    @property
    def accuracy(self) -> float:
        """The one that it goes by, a mean over the window; NaN before the first."""
        means = [sum(values) / len(values) for values in self.accuracies.values()]
        middle = (self.low + self.high) / 2
        return max(means, key=lambda mean: abs(mean - middle), default=float("nan"))

    def _switch(self, accuracy: float) -> None:
        below_high, above_low = self.high - accuracy, accuracy - self.low
        if below_high < self.hysteresis:
            self.push = -1
        elif above_low < self.hysteresis:
            self.push = 1
        elif (self.push < 0 and below_high >= 2 * self.hysteresis) or (
            self.push > 0 and above_low >= 2 * self.hysteresis
        ):
            self.push = 0

    def metrics(self, plan: Plan) -> dict[str, float]:
        """For the logs: what was seen and what was done."""
        seen = {"governor/accuracy": self.accuracy, "governor/push": float(self.push)}
        return seen | {"governor/steps": float(plan.steps), "governor/rate": plan.rate}

    def state_dict(self) -> dict[str, Any]:
        accuracies = {expert: list(values) for expert, values in self.accuracies.items()}
        return {"accuracies": accuracies, "push": self.push, "rate": self.rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.accuracies = {expert: deque(values, self.window) for expert, values in state["accuracies"].items()}
        self.push, self.rate = state["push"], state["rate"]


def pair_accuracies(
    demonstrations: Mapping[str, Tensor], rollouts: Mapping[str, Tensor], valid_B: Tensor
) -> dict[str, float]:
    """Of each expert the share of pairs whose demonstration scores higher, a tie counting one half, over all ranks.

    Args:
        demonstrations, rollouts: each expert's scores, (B,).
        valid_B: rollouts that have scores. NaN without any, and where a score of one is NaN.
    """
    margins_EN = torch.stack([(demonstrations[e] - rollouts[e])[valid_B] for e in rollouts]).detach().double()
    # torch's sign of NaN is 0, which would pass for a tie.
    wins_EN = torch.where(margins_EN.isnan(), margins_EN, (margins_EN.sign() + 1) / 2)
    *totals, count = global_sum(torch.cat([wins_EN.sum(1), valid_B.sum()[None].double()])).tolist()
    return {expert: total / count if count else float("nan") for expert, total in zip(rollouts, totals, strict=True)}


@contextmanager
def scaled_rate(optimizer: Optimizer, rate: float) -> Iterator[None]:
    """The optimiser's learning rates times `rate` meanwhile; its schedule does not see it."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= rate
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr
