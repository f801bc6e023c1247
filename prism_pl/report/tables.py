"""Tables of evaluations: a row a checkpoint, families beside each other, runs side by side."""

import math
from collections.abc import Mapping, Sequence

from prism_pl.evaluation_tables import ALL_FAMILIES, Table
from prism_pl.metrics.unit_scores import UNIT_SCORES
from prism_pl.report.evaluations import Evaluation

# Checkpoint's label -> its evaluation, in the order of the tables.
Evaluations = Mapping[str, Evaluation]

# Column -> (metric, factor). Shares are shown in percent.
COLUMNS: dict[str, tuple[str, int]] = {
    "accuracy": ("accuracy", 100),
    "lenient": ("lenient_accuracy", 100),
    "format": ("format", 100),
    **{score: (score, 100) for score in UNIT_SCORES},
    "judge +": ("judge_to_right", 100),
    "judge -": ("judge_to_wrong", 100),
    "items W1": ("descriptive_items/distance", 1),
    "steps W1": ("reasoning_steps/distance", 1),
    "caption precision": ("caption_precision/policy", 100),
    "caption recall": ("caption_recall/policy", 100),
    "caption exact": ("caption_exact/policy", 100),
    "steps right": ("step_correctness/policy", 100),
    "length": ("response_length/policy", 1),
}
WITH_INTERVAL = ("accuracy", *UNIT_SCORES, "items W1", "steps W1")
NOT_AVAILABLE = "n/a"


def markdown_row(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> list[str]:
    """The lines of a Markdown table; all but the first `num_left` columns stand at the right."""
    rule = ["---"] * num_left + ["---:"] * (len(header) - num_left)
    return [markdown_row(cells) for cells in (header, rule, *rows)]


def number(value: float, digits: int, sign: bool = False) -> str:
    """A number with its digits, or "n/a" for NaN: where nothing was counted there is no number."""
    if math.isnan(value):
        return NOT_AVAILABLE
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def with_bounds(mean: float, low: float, high: float, digits: int) -> str:
    """`0.5 [0.4, 0.6]`; without bounds (a single prompt) `0.5 [n/a]`; n/a where there is no number."""
    if math.isnan(mean):
        return NOT_AVAILABLE
    bounds = ", ".join(number(bound, digits) for bound in (low, high))
    return f"{number(mean, digits)} [{NOT_AVAILABLE if NOT_AVAILABLE in bounds else bounds}]"


def cell(table: Table, metric: str, factor: int, with_interval: bool = False) -> str:
    """A metric of a table, empty where the table has none."""
    entry = table.get(metric)
    if entry is None:
        return ""
    digits = 1 if factor == 100 or metric.startswith("response_length/") else 2
    mean, low, high = (entry[key] * factor for key in ("mean", "low", "high"))
    return with_bounds(mean, low, high, digits) if with_interval else number(mean, digits)


def check_rules(evaluations: Evaluations) -> str:
    """The rule that all of them count items by, in words; ValueError where they differ."""
    rules = {evaluation.settings["rule_in_words"] for evaluation in evaluations.values()}
    if len(rules) > 1:
        raise ValueError(f"the evaluations count items by different rules ({'; '.join(sorted(rules))}): use one rule")
    return rules.pop()


def results_table(evaluations: Evaluations, split: str = "test") -> list[str]:
    """One row a checkpoint, and one for the supervision where its scenes are known.

    Raises:
        ValueError: different counting rules, or a checkpoint without this split.
    """
    tables = {label: evaluation.table(split) for label, evaluation in evaluations.items()}
    rule = check_rules(evaluations)
    columns = {c: spec for c, spec in COLUMNS.items() if any(spec[0] in table for table in tables.values())}
    rows = [
        [label, *(cell(table, *spec, with_interval=c in WITH_INTERVAL) for c, spec in columns.items())]
        for label, table in tables.items()
    ]
    first = next(iter(tables.values()))
    if "response_length/supervision" in first:
        of_supervision = [
            cell(first, metric.replace("/policy", "/supervision"), factor) if "/policy" in metric else ""
            for metric, factor in columns.values()
        ]
        rows.append(["supervision", *of_supervision])
    num_prompts = " or ".join(str(n) for n in sorted({table["accuracy"]["prompts"] for table in tables.values()}))
    note = f"{num_prompts} prompts of {split}; shares in percent; items and steps counted as {rule}; 95% intervals."
    return [*markdown_table(["checkpoint", *columns], rows), "", note]


def families_table(evaluations: Evaluations, split: str, metric: str = "accuracy") -> list[str]:
    """A row a question family, a column a checkpoint: the metric in percent with its interval."""
    families = dict.fromkeys(f for e in evaluations.values() for f in e.tables[split])
    rows = []
    for family in families:
        found = [e.tables[split].get(family, {}) for e in evaluations.values()]
        prompts = next(table["accuracy"]["prompts"] for table in found if table)
        label = "all families" if family == ALL_FAMILIES else family
        rows.append([f"{label} ({prompts})", *(cell(table, metric, 100, with_interval=True) for table in found)])
    return markdown_table(["family (prompts)", *evaluations], rows)


def metrics_table(evaluations: Evaluations, split: str, metrics: Mapping[str, tuple[str, int]]) -> list[str]:
    """A row a checkpoint with every metric's interval, then the supervision: `metrics` as `COLUMNS`."""
    tables = {label: evaluation.table(split) for label, evaluation in evaluations.items()}
    columns = {c: spec for c, spec in metrics.items() if any(spec[0] in table for table in tables.values())}
    rows = [
        [label, *(cell(table, *spec, with_interval=True) for spec in columns.values())]
        for label, table in tables.items()
    ]
    first = next(iter(tables.values()))
    supervised = [
        cell(first, metric.replace("/policy", "/supervision"), factor) if "/policy" in metric else ""
        for metric, factor in columns.values()
    ]
    if any(supervised):
        rows.append(["supervision", *supervised])
    return markdown_table(["checkpoint", *columns], rows) if columns else []
