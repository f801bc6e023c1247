"""Every metric over two processes, or merged from two halves, gives what one process gives on all the data."""

import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes
from torchmetrics import Metric

from prism_pl.chat import render
from prism_pl.governor import pair_accuracies
from prism_pl.health.panel import ExpertPanel, Judged, joined, judged
from prism_pl.metrics import (
    BootstrapMean,
    CaptionFaithfulness,
    DescriptiveItems,
    DistributionDistance,
    LengthDistance,
    PassAtK,
    ReasoningSteps,
    RewardGapMetric,
    StepCorrectness,
)
from prism_pl.strategy.ranks import gathered_values, metrics_over_ranks, sums_over_ranks
from tests.style_game import Game

NAN = float("nan")
NUM_PROMPTS = 5


def make_metrics() -> dict[str, Metric]:
    return {
        "steps": ReasoningSteps(),
        "items": DescriptiveItems(),
        "distance": DistributionDistance(segment="reasoning"),
        "lengths": LengthDistance(),
        "pass": PassAtK([1, 2]),
        "gap": RewardGapMetric(),
        "captions": CaptionFaithfulness(),
        "correctness": StepCorrectness(),
        "mean": BootstrapMean(num_resamples=500),
    }


def update(metrics: dict[str, Metric], prompts: range) -> None:
    """Feed the prompts, one update each. Prompt 1 is malformed."""
    for p in prompts:
        response = render("- x\n" * (p + 1), "1. x\n" * (2 * p + 1), "3") if p != 1 else "malformed"
        teacher = render("- x\n" * 3, "1. x\n" * 4, "3")
        generator = torch.Generator().manual_seed(p)
        scores_PG, valid_PG = torch.randn(1, 4, generator=generator), torch.tensor([[True, True, True, p != 1]])
        metrics["steps"].update([response])
        metrics["items"].update([response])
        metrics["distance"].update(policy=[response], supervision=[teacher])
        metrics["lengths"].update(policy=[7 * p], supervision=[20])
        metrics["pass"].update(scores_PG > 0)
        metrics["gap"].update(torch.tensor([0.1 * p]), scores_PG, valid_PG)
        metrics["captions"].update([["red 3"] * p if p != 1 else None], [Counter({"red 3": 2})])
        metrics["correctness"].update([p], [p + 1], [2 * p + 1])
        metrics["mean"].update([0.3 * p])


def compute(metrics: dict[str, Metric]) -> dict[str, dict[str, float]]:
    return {name: {key: x.item() for key, x in metric.compute().items()} for name, metric in metrics.items()}


def one_process() -> dict[str, dict[str, float]]:
    metrics = make_metrics()
    update(metrics, range(NUM_PROMPTS))
    return compute(metrics)


def assert_same(result: dict[str, dict[str, float]]) -> None:
    expected = one_process()
    assert result.keys() == expected.keys()
    for name, values in expected.items():
        assert result[name] == pytest.approx(values, rel=1e-6, nan_ok=True), name


def test_the_data_of_this_file_tell_the_halves_apart():
    first, second, whole = make_metrics(), make_metrics(), one_process()
    update(first, range(2))
    update(second, range(2, NUM_PROMPTS))
    for half in (compute(first), compute(second)):
        for name in whole:
            assert half[name] != pytest.approx(whole[name], rel=1e-3, nan_ok=True), name


def test_merged_states_equal_one_process():
    first, second = make_metrics(), make_metrics()
    update(first, range(2))
    update(second, range(2, NUM_PROMPTS))
    for name, metric in first.items():
        metric.merge_state(second[name])
    assert_same(compute(first))


def test_forward_gives_the_batch_and_keeps_the_whole():
    metric = PassAtK([1])
    assert metric(torch.tensor([[1, 1]]))["pass_at_1"] == 1
    assert metric(torch.tensor([[0, 0]]))["pass_at_1"] == 0
    assert metric.compute()["pass_at_1"] == 0.5


def panel_numbers(rows: slice) -> dict[str, float]:
    """The last numbers of a style panel that sees these prompts of each step, and with other ranks theirs."""
    game, panel = Game(longer=1), ExpertPanel(window=4)
    for _ in range(6):
        whole = judged(game.step())["perception"]
        sides = ({name: value[rows] for name, value in side.items()} for side in (whole.rollouts, whole.demonstrations))
        own = Judged(whole.scores_PG[rows], whole.demonstration_P[rows], whole.valid_PG[rows], *sides)
        numbers = panel.update(joined(gathered_values(own)), 10.0)
    return numbers


def governed_accuracies(rows: slice) -> dict[str, float]:
    """What a governor decides by, of these pairs and other ranks': a win, a loss, a tie, three wins; and the other way
    round."""
    demonstrations, rollouts = torch.tensor([1.0, 0, 1, 2, 2, 2])[rows], torch.tensor([0.0, 1, 1, 1, 1, 1])[rows]
    sides = {"one": demonstrations, "other": rollouts}, {"one": rollouts, "other": demonstrations}
    return pair_accuracies(*sides, torch.ones(6, dtype=torch.bool)[rows])


def metrics_of_two_ranks(rank: int) -> dict[str, dict[str, Any]]:
    """The first rank has 3 tokens and 2 pairs, the second 1 token and none."""
    own = [
        {"entropy": 1.0, "x_max": 4.0, "x_min": 2.0, "num_x": 3.0, "broken": 1.0, "broken_max": 1.0, "accuracy": 0.5},
        {"entropy": 3.0, "x_max": 6.0, "x_min": 1.0, "num_x": 2.0, "broken": NAN, "broken_max": NAN, "accuracy": NAN},
    ][rank]
    told = {name: torch.tensor(value) for name, value in own.items()} | {"idle_max": torch.tensor(NAN)}
    counts = dict.fromkeys(told, torch.tensor((3, 1)[rank]))
    counts |= {"accuracy": torch.tensor((2, 0)[rank]), "idle_max": torch.tensor(0)}
    sums = {"counts": torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (rank + 1), "tokens": torch.tensor(5 + rank)}
    reduced = metrics_over_ranks(told, counts)
    assert all(value.dtype == torch.float32 for value in reduced.values())
    return {
        "metrics": {name: value.item() for name, value in reduced.items()},
        "sums": {name: value.tolist() for name, value in sums_over_ranks(sums).items()},
    }


def _run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    uneven, idle = make_metrics(), make_metrics()
    update(uneven, range(2) if rank == 0 else range(2, NUM_PROMPTS))
    update(idle, range(NUM_PROMPTS) if rank == 1 else range(0))
    panel = panel_numbers(slice(0, 3) if rank == 0 else slice(3, None))
    results = {"uneven": compute(uneven), "idle": compute(idle), "panel": panel}
    results["accuracy"] = governed_accuracies(slice(0, 2) if rank == 0 else slice(2, None))
    results["told"] = metrics_of_two_ranks(rank)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one_with_uneven_shares_and_with_an_idle_rank(tmp_path):
    # A fork server imports torchmetrics once for both ranks, and, unlike a fork of pytest, has no threads.
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(_run_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    expected = panel_numbers(slice(None))
    assert 0.5 < expected["accuracy/length"] < 1
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt")
        assert_same(results["uneven"])
        assert_same(results["idle"])
        assert results["accuracy"] == governed_accuracies(slice(None)) == {"one": 4.5 / 6, "other": 1.5 / 6}
        assert results["panel"] == pytest.approx(expected, rel=1e-9)
        # (3 x 1 + 1 x 3) / 4 tokens. Whose count is 0 is left out; a NaN that counts comes through.
        wanted = {"entropy": 1.5, "x_max": 6, "x_min": 1, "num_x": 5, "broken": NAN, "broken_max": NAN}
        wanted |= {"accuracy": 0.5, "idle_max": NAN}
        assert results["told"]["metrics"] == pytest.approx(wanted, nan_ok=True)
        assert results["told"]["sums"] == {"counts": [[3, 6], [9, 12]], "tokens": 11}
