"""All published benchmarks of an evaluation in one table, and their average."""

from collections.abc import Sequence

from prism_pl.evaluation_tables import ALL_FAMILIES, LENIENT, is_unit_score, unit_ratios
from prism_pl.metrics.bootstrap import Interval, average_interval
from prism_pl.report.comparisons import Pair, shown_difference
from prism_pl.report.evaluations import Evaluation
from prism_pl.report.tables import Evaluations, cell, markdown_table, with_bounds

# What stands for a benchmark that has several scores; accuracy for the others. The paper does not say which it took.
HEADLINE = {"wemath": "strict", "hallusionbench": "aAcc"}
# MMMU-Pro is the mean of its settings, so that each benchmark counts once.
PUBLISHED = (
    ("mathvista",),
    ("mathverse",),
    ("mathvision",),
    ("wemath",),
    ("mmmu",),
    ("mmmu_pro_standard", "mmmu_pro_vision"),
    ("hallusionbench",),
)


def headline(split: str, lenient: bool = False) -> str:
    """The metric that stands for a benchmark; by the answer wherever it stands, or in a well-formed response only."""
    metric = HEADLINE.get(split, "accuracy")
    return LENIENT + metric if lenient else metric


def benchmarks(evaluations: Evaluations, pairs: Sequence[Pair], num_resamples: int, seed: int) -> list[str]:
    """A row a benchmark and one for their average, a column a checkpoint, then the average's paired differences. Empty
    where no checkpoint was put to a published benchmark."""
    known = [group for group in PUBLISHED if all(_asked(e, group) for e in evaluations.values())]
    if not known or not evaluations:
        return []
    rows = []
    for split in (split for group in known for split in group):
        metric = headline(split)
        tables = [evaluation.tables[split][ALL_FAMILIES] for evaluation in evaluations.values()]
        label = split if metric == "accuracy" else f"{split} ({metric})"
        rows.append([label, *(cell(table, metric, 100, with_interval=True) for table in tables)])
    for lenient in (False, True):
        averages = [_average([e], known, lenient, num_resamples, seed) for e in evaluations.values()]
        label = "average, answer wherever it stands" if lenient else "average"
        rows.append([label, *(with_bounds(*(100 * x for x in average[:3]), digits=1) for average in averages)])
    lines = markdown_table(["benchmark", *evaluations], rows)
    differences = [
        [f"{a} - {b}", shown_difference(_average([evaluations[a], evaluations[b]], known, False, num_resamples, seed))]
        for a, b in pairs
        if a in evaluations and b in evaluations
    ]
    if differences:
        lines += ["", *markdown_table(["average", "difference"], differences)]
    note = "Percent with 95% intervals; MMMU-Pro counts once in the average. Differences from 0 to 1, paired."
    return [*lines, "", note]


def _asked(evaluation: Evaluation, group: Sequence[str]) -> bool:
    return all(split in evaluation.tables for split in group)


def _average(
    evaluations: Sequence[Evaluation], known: Sequence[Sequence[str]], lenient: bool, num_resamples: int, seed: int
) -> Interval:
    """The average of one checkpoint, or the difference of two, over benchmarks."""
    weights = {split: 1 / len(group) for group in known for split in group}
    groups = [_rows(evaluations, split, headline(split, lenient)) for split in weights]
    return average_interval(groups, list(weights.values()), num_resamples, seed=seed)


def _rows(evaluations: Sequence[Evaluation], split: str, metric: str) -> list[tuple[float, ...]]:
    """Rows of numerator and denominator a unit, those of two checkpoints beside each other."""
    assert is_unit_score(metric) or metric in ("accuracy", "lenient_accuracy")
    columns = [unit_ratios(evaluation.rows(split), metric) for evaluation in evaluations]
    return [tuple(number for column in columns for number in column[unit]) for unit in columns[0]]
