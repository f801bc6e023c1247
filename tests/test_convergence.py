"""The monitor: slope and variance by hand, a settled game that is stopped and unsettled ones that are not."""

import math
import random

import pytest
import torch

from callbacks import ConvergenceMonitor
from prism_pl.convergence import Trend, settled, trend
from tests.stubs import SaveAfter
from tests.test_callbacks import Stage, fit, read, scalars


def test_slope_and_variance_by_hand():
    # Steps 0, 1, 2 around 1; values 1, 3, 2 around 2: slope (-1 x -1 + 0 x 1 + 1 x 0) / 2, variance (1 + 1 + 0) / 2.
    assert trend([1.0, 3.0, 2.0]) == Trend(pytest.approx(0.5), pytest.approx(1.0), pytest.approx(2.0))
    assert trend([5.0, 5.0]) == Trend(0.0, 0.0, 5.0)
    assert all(math.isnan(value) for value in trend([1.0, math.nan, 2.0]))


def test_settled_is_flat_and_quiet_for_every_expert():
    flat, rising, loud = Trend(0.001, 0.01, 2.0), Trend(-0.03, 0.01, 0.0), Trend(0.0, 0.5, 0.0)
    assert settled([flat, flat], 10, max_change=0.2, max_variance=0.1)
    assert not settled([flat, rising], 10, max_change=0.2, max_variance=0.1)
    assert not settled([flat, loud], 10, max_change=0.2, max_variance=0.1)
    assert not settled([flat, Trend(math.nan, math.nan, math.nan)], 10, max_change=0.2, max_variance=0.1)


class Gaps(Stage):
    """A stage with given gaps of both experts at each step; None is a step without a valid rollout."""

    def __init__(self, perception, reasoning):
        super().__init__()
        self.gaps = {"perception": perception, "reasoning": reasoning}

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        gaps = {expert: curve(self.trainer.fit_loop.total_batch_idx) for expert, curve in self.gaps.items()}
        known = all(gap is not None for gap in gaps.values())
        return {
            "valid": torch.full((1, 2), known),
            "scores": {expert: torch.zeros(1, 2) for expert in gaps},
            "demonstration_scores": {expert: torch.tensor([gap or 0.0]) for expert, gap in gaps.items()},
        }


def noise(scale: float):
    draw = random.Random(0)
    drawn = [draw.gauss(0, scale) for _ in range(200)]
    return lambda step: drawn[step]


def fallen(step: int) -> float:
    return 2.0 * math.exp(-step / 5)


def play(folder, monitor, perception, reasoning, num_steps=60, **options):
    stage = Gaps(perception, reasoning)
    trainer = fit(folder, [monitor], stage, num_steps=num_steps, **options)
    return trainer.fit_loop.total_batch_idx + 1, stage


def test_a_settled_game_is_marked_and_stopped(tmp_path):
    quiet = noise(0.05)
    steps, stage = play(tmp_path, ConvergenceMonitor(window=10, patience=3, stop=True), fallen, quiet)
    events = read(tmp_path)
    flags = [value for _, value in scalars(events, "health/settled")]
    assert steps < 40
    assert flags[-3:] == [1, 1, 1]
    assert flags[-4] == 0
    assert stage.weight == steps  # the last step was done
    slopes = dict(scalars(events, "health/gap_slope/perception"))
    assert min(slopes) == 9  # from the first full window on
    assert slopes[9] == pytest.approx(trend([fallen(step) for step in range(10)]).slope, rel=1e-5)
    variances = dict(scalars(events, "health/gap_variance/reasoning"))
    assert variances[9] == pytest.approx(trend([quiet(step) for step in range(10)]).variance, rel=1e-4)


def test_unsettled_games_are_not_stopped(tmp_path):
    curves = {
        "falls": (lambda step: 3.0 - 0.03 * step, noise(0.05)),
        "swings": (noise(0.05), lambda step: 0.8 * math.sin(step)),
        "nan": (noise(0.05), lambda step: math.nan if step % 10 == 0 else 0.0),
    }
    for name, (perception, reasoning) in curves.items():
        monitor = ConvergenceMonitor(window=10, patience=3, stop=True)
        assert play(tmp_path / name, monitor, perception, reasoning)[0] == 60, name
        assert monitor.settled_at is None
        assert "health/settled_at" not in read(tmp_path / name).Tags()["scalars"]


def test_without_stop_the_step_is_marked_and_said_once(tmp_path, caplog):
    monitor = ConvergenceMonitor(window=10, patience=3)
    with caplog.at_level("INFO"):
        assert play(tmp_path, monitor, noise(0.02), lambda step: 1.5)[0] == 60
    assert monitor.settled_at == 24  # twelve batches, of two optimiser steps each in this stage
    said = [record.message for record in caplog.records if "has settled" in record.message]
    assert len(said) == 1
    assert "reasoning +1.500" in said[0]
    assert scalars(read(tmp_path), "health/settled_at") == [(11, 24)]


def test_a_step_without_a_valid_rollout_is_passed_over(tmp_path):
    monitor = ConvergenceMonitor(window=10, patience=1)
    play(tmp_path, monitor, lambda step: None if step % 2 else 0.5, lambda step: 0.5, num_steps=30)
    assert scalars(read(tmp_path), "health/settled")[0][0] == 18  # ten gaps: steps 0, 2, ..., 18


def test_a_resumed_run_goes_on_counting_and_stays_ended(tmp_path):
    def run(folder, *more, **options):
        monitor = ConvergenceMonitor(window=10, patience=3, stop=True)
        stage = Gaps(fallen, noise(0.05))
        fit(tmp_path / folder, [monitor, *more], stage, num_steps=60, **options)
        return monitor, int(stage.weight)

    whole, steps = run("whole", SaveAfter(14, tmp_path / "middle.ckpt"), SaveAfter(15, tmp_path / "later.ckpt"))
    resumed, steps_again = run("resumed", ckpt_path=tmp_path / "middle.ckpt")
    assert (resumed.settled_at, steps_again) == (whole.settled_at, steps)
    assert resumed.gaps == whole.gaps
    # From a checkpoint of the ended run no step is taken.
    run("ended", SaveAfter(steps - 1, tmp_path / "end.ckpt"))
    _, after = run("again", ckpt_path=tmp_path / "end.ckpt")
    assert after == steps


def test_bad_options_are_refused():
    for options in ({"window": 2}, {"patience": 0}, {"max_change": 0.0}, {"max_variance": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ConvergenceMonitor(**options)
