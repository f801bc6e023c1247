"""Paired differences between checkpoints, and what they are required to be."""

import math
from collections.abc import Callable, Sequence

from prism_pl.errors import UsageError
from prism_pl.evaluation_tables import DISTANCES, NLL_RATIOS, prompt_counts, unit_ratios
from prism_pl.metrics.bootstrap import Interval, paired_ratio_difference, same_ids
from prism_pl.metrics.drift_bootstrap import paired_distance_difference
from prism_pl.metrics.unit_scores import UNIT_SCORES
from prism_pl.report.evaluations import Evaluation
from prism_pl.report.runs import Run, evaluations_of, labels_of
from prism_pl.report.tables import COLUMNS, NOT_AVAILABLE, Evaluations, cell, markdown_table, number

# What pairs of checkpoints are compared by; of distances and of negative log-likelihoods less is better.
COMPARED = (
    "accuracy",
    "format",
    "descriptive_items/distance",
    "reasoning_steps/distance",
    "caption_precision",
    "caption_recall",
    "caption_exact",
    "step_correctness",
    *UNIT_SCORES,
    *NLL_RATIOS,
)
# What a difference's 95% interval has to be.
WANTED: dict[str, Callable[[Interval], bool]] = {
    "up": lambda interval: interval.low > 0,
    "down": lambda interval: interval.high < 0,
    "kept": lambda interval: interval.high >= 0,  # not shown to be lower
}
Pair = tuple[str, str]  # labels; the first less the second


def differences(
    a: Evaluation,
    b: Evaluation,
    split: str = "test",
    num_resamples: int = 10_000,
    seed: int = 0,
    metrics: Sequence[str] = COMPARED,
) -> dict[str, Interval]:
    """Metric -> interval of a - b, both resampled by the same prompts. Shares stay shares; distances in items or steps.

    Raises:
        ValueError: the two were not evaluated on the same prompts.
    """
    rows_a, rows_b = a.rows(split), b.rows(split)
    same_ids({r["id"]: r for r in rows_a}, {r["id"]: r for r in rows_b})  # units alone would not tell
    found: dict[str, Interval] = {}
    for metric in metrics:
        base, _, kind = metric.partition("/")
        if kind == "distance":
            assert base in DISTANCES
            of_a, of_b = prompt_counts(rows_a, base, "policy"), prompt_counts(rows_b, base, "policy")
            if of_a:
                supervision = prompt_counts(rows_a, base, "supervision")
                found[metric] = paired_distance_difference(of_a, of_b, supervision, num_resamples, seed=seed)
        elif base in a.table(split) or f"{base}/policy" in a.table(split):
            ratios_a, ratios_b = unit_ratios(rows_a, base), unit_ratios(rows_b, base)
            found[metric] = paired_ratio_difference(ratios_a, ratios_b, num_resamples, seed=seed)
    return found


def differences_table(
    evaluations: Evaluations, pairs: Sequence[Pair], split: str, num_resamples: int, seed: int
) -> list[str]:
    """`differences` of each pair, a column a pair; a star marks those whose interval excludes 0."""
    found = [differences(evaluations[a], evaluations[b], split, num_resamples, seed) for a, b in pairs]
    rows = [
        [metric, *(shown_difference(of_pair.get(metric)) for of_pair in found)]
        for metric in COMPARED
        if any(metric in of_pair for of_pair in found)
    ]
    counts = sorted({interval.n for of_pair in found for interval in of_pair.values()})
    in_units = any("unit" in record for evaluation in evaluations.values() for record in evaluation.rows(split))
    what = "units" if in_units else "prompts"
    note = (
        f"Paired bootstrap over {' or '.join(map(str, counts))} {what} of {split}: {num_resamples} resamples, seed "
        f"{seed}; shares from 0 to 1, distances in items and steps, likelihoods in nats a token. A star: the 95% "
        "interval excludes 0."
    )
    return [*markdown_table(["difference", *(f"{a} - {b}" for a, b in pairs)], rows), "", note]


def shown_difference(interval: Interval | None, digits: int = 3, starred: bool = True) -> str:
    """`+0.078 [+0.046, +0.109] *`; empty where there is none, n/a where nothing was counted.

    Args:
        starred: whether an interval that excludes 0 gets a star.
    """
    if interval is None:
        return ""
    if math.isnan(interval.mean):
        return NOT_AVAILABLE
    mean, low, high = (number(value, digits, sign=True) for value in interval[:3])
    return f"{mean} [{low}, {high}]{' *' if starred and interval.excludes_zero() else ''}"


def named_pairs(text: str, runs: Sequence[Run], option: str = "--pairs") -> list[Pair]:
    """The pairs of labels that `name:name` means: one in every run that has both names, or else one across runs.

    Raises:
        UsageError: a name that no checkpoint has, or, across runs, that several have.
    """
    first, colon, second = text.partition(":")
    if not colon:
        raise UsageError(f"{option} {text!r}: give name:name, the first less the second")
    labels = labels_of(runs)
    inside = [run for run in runs if first in run.evaluations and second in run.evaluations]
    if inside:
        return [(labels[run.name, first], labels[run.name, second]) for run in inside]
    by_name = {label: [label] for label in labels.values()}
    for (_, name), label in labels.items():
        if label != name:
            by_name.setdefault(name, []).append(label)
    for name in (first, second):
        found = by_name.get(name, [])
        if len(found) != 1:
            several = f"stands in several runs ({', '.join(found)})" if found else "is none of them"
            raise UsageError(
                f"{option} {text!r} names {name!r}, which {several}; the evaluations are {', '.join(labels.values())}"
            )
    return [(by_name[first][0], by_name[second][0])]


def unmet(required: Sequence[str], runs: Sequence[Run], num_resamples: int, seed: int) -> list[str]:
    """A sentence for each requirement `name:name:metric:up|down|kept` that the test split's differences do not meet.

    Raises:
        UsageError: a requirement that is none, or names a checkpoint or metric that is not there.
    """
    evaluations = evaluations_of(runs)
    sentences = []
    for requirement in required:
        pair, *rest = requirement.rsplit(":", 2)
        metric, wanted = rest if len(rest) == 2 else ("", "")
        if metric not in COMPARED or wanted not in WANTED:
            shape = f"name:name:metric:{'|'.join(WANTED)}"
            raise UsageError(f"--require {requirement!r}: give {shape} with a metric of {', '.join(COMPARED)}")
        for first, second in named_pairs(pair, runs, "--require"):
            both = evaluations[first], evaluations[second]
            found = differences(*both, "test", num_resamples, seed, [metric])
            if metric not in found:
                raise UsageError(f"--require {requirement!r}: {first} was not evaluated by {metric}")
            interval = found[metric]
            if not WANTED[wanted](interval):
                bounds = f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
                where = "" if (first, second) == tuple(pair.split(":")) else f" ({first} - {second})"
                sentences.append(f"{requirement}{where}: the difference is {bounds}")
    return sentences


def side_by_side(runs: Sequence[Run], split: str, num_resamples: int, seed: int) -> list[str]:
    """A row for each checkpoint that several runs have and each metric; a column a run, and each run less the first."""
    first, *others = runs
    shared = [name for name in first.evaluations if any(name in run.evaluations for run in others)]
    rows = []
    for name in shared:
        for column, (metric, factor) in COLUMNS.items():
            cells = [_side_cell(run, name, split, metric, factor) for run in runs]
            if any(cells):
                compared = [_side_difference(first, run, name, split, metric, num_resamples, seed) for run in others]
                rows.append([name, column, *cells, *compared])
    header = ["checkpoint", "number", *(run.name for run in runs), *(f"{run.name} - {first.name}" for run in others)]
    return markdown_table(header, rows, num_left=2) if rows else []


def _side_cell(run: Run, name: str, split: str, metric: str, factor: int) -> str:
    evaluation = run.evaluations.get(name)
    known = evaluation is not None and split in evaluation.tables
    return cell(evaluation.table(split), metric, factor, with_interval=True) if evaluation and known else ""


def _side_difference(first: Run, other: Run, name: str, split: str, metric: str, num_resamples: int, seed: int) -> str:
    """The paired difference where it is one that is compared and both saw the same prompts, else nothing."""
    a, b = other.evaluations.get(name), first.evaluations.get(name)
    compared = metric if metric in COMPARED else metric.removesuffix("/policy")
    if a is None or b is None or compared not in COMPARED:
        return ""
    if {r["id"] for r in a.rows(split)} != {r["id"] for r in b.rows(split)} or not a.rows(split):
        return "other prompts"
    found = differences(a, b, split, num_resamples, seed, [compared]).get(compared)
    return shown_difference(found)
