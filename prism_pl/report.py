"""Tables from finished evaluations: one row a checkpoint, and paired differences between checkpoints."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_pl.evaluation import PromptRecord
from prism_pl.evaluation_tables import ALL_FAMILIES, DISTANCES, Entry, Table, Tables, prompt_counts, prompt_ratio
from prism_pl.metrics.bootstrap import Interval, paired_ratio_difference
from prism_pl.metrics.drift_bootstrap import paired_distance_difference

FILE_NAME = "evaluation.json"

# Column -> (metric, factor). Shares are shown in percent.
COLUMNS: dict[str, tuple[str, int]] = {
    "accuracy": ("accuracy", 100),
    "lenient": ("lenient_accuracy", 100),
    "format": ("format", 100),
    "items W1": ("descriptive_items/distance", 1),
    "steps W1": ("reasoning_steps/distance", 1),
    "caption precision": ("caption_precision/policy", 100),
    "caption recall": ("caption_recall/policy", 100),
    "caption exact": ("caption_exact/policy", 100),
    "steps right": ("step_correctness/policy", 100),
    "length": ("response_length/policy", 1),
}
WITH_INTERVAL = ("accuracy", "items W1", "steps W1")
# What pairs of checkpoints are compared by; for distances less is better.
COMPARED = (
    "accuracy",
    "format",
    "descriptive_items/distance",
    "reasoning_steps/distance",
    "caption_precision",
    "caption_recall",
    "caption_exact",
    "step_correctness",
)


@dataclass(frozen=True)
class Evaluation:
    """A read `evaluation.json`: its settings are everything but name, tables and records."""

    name: str
    settings: dict[str, Any]
    tables: Tables
    records: list[PromptRecord]

    def table(self, split: str, family: str = ALL_FAMILIES) -> Table:
        """One table; ValueError for a split or family that was not evaluated."""
        if family not in self.tables.get(split, {}):
            known = {name: list(families) for name, families in self.tables.items()}
            raise ValueError(f"the evaluation {self.name!r} has no {family!r} of {split!r}; it has {known}")
        return self.tables[split][family]

    def rows(self, split: str) -> list[PromptRecord]:
        """The records of a split."""
        return [record for record in self.records if record["split"] == split]


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation from its file or its run's folder. Null is read as NaN, which it was written from."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: evaluate the checkpoint first (python -m prism_pl test)")
    content = json.loads(file.read_text())
    tables = {
        split: {
            family: {metric: _with_nan(entry) for metric, entry in table.items()} for family, table in families.items()
        }
        for split, families in content.pop("tables").items()
    }
    return Evaluation(content.pop("name"), records=content.pop("records"), tables=tables, settings=content)


def _with_nan(entry: dict[str, Any]) -> Entry:
    filled: dict[str, Any] = {key: float("nan") if value is None else value for key, value in entry.items()}
    return Entry(**filled)


def results_table(evaluations: Sequence[Evaluation], split: str = "test") -> str:
    """A Markdown table with one row a checkpoint, and one for the supervision where its scenes are known."""
    tables = {evaluation.name: evaluation.table(split) for evaluation in evaluations}
    rules = {evaluation.settings["rule_in_words"] for evaluation in evaluations}
    if len(rules) > 1:
        raise ValueError(f"the evaluations count items by different rules ({'; '.join(sorted(rules))}): use one rule")
    columns = {c: spec for c, spec in COLUMNS.items() if any(spec[0] in table for table in tables.values())}
    lines = [_row(["checkpoint", *columns]), _row(["---", *["---:"] * len(columns)])]
    for name, table in tables.items():
        lines.append(_row([name, *(_cell(table, c, *spec, c in WITH_INTERVAL) for c, spec in columns.items())]))
    first = next(iter(tables.values()))
    supervised = [_cell(first, c, m.replace("/policy", "/supervision"), f) for c, (m, f) in columns.items()]
    of_supervision = [
        cell if "/policy" in spec[0] else "" for cell, spec in zip(supervised, columns.values(), strict=True)
    ]
    if "response_length/supervision" in first:
        lines.append(_row(["supervision", *of_supervision]))
    prompts = first["accuracy"]["prompts"]
    counting = f"items and steps counted as {rules.pop()}"
    lines += ["", f"{prompts} prompts of {split}; shares in percent; {counting}; 95% intervals."]
    return "\n".join(lines)


def _cell(table: Table, column: str, metric: str, factor: int, with_interval: bool = False) -> str:
    entry = table.get(metric)
    if entry is None:
        return ""
    digits = 1 if factor == 100 or column == "length" else 2
    mean, low, high = (f"{entry[key] * factor:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if with_interval else mean


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def differences(
    a: Evaluation, b: Evaluation, split: str = "test", num_resamples: int = 10_000, seed: int = 0
) -> dict[str, Interval]:
    """Metric -> interval of a - b, both resampled by the same prompts. Shares stay shares; distances in items or steps.

    Raises:
        ValueError: the two were not evaluated on the same prompts.
    """
    rows = {evaluation.name: evaluation.rows(split) for evaluation in (a, b)}
    found: dict[str, Interval] = {}
    for metric in COMPARED:
        base, _, kind = metric.partition("/")
        if kind == "distance":
            assert base in DISTANCES
            of_a, of_b = (prompt_counts(rows[e.name], base, "policy") for e in (a, b))
            if of_a:
                supervision = prompt_counts(rows[a.name], base, "supervision")
                found[metric] = paired_distance_difference(of_a, of_b, supervision, num_resamples, seed=seed)
        elif base in a.table(split) or f"{base}/policy" in a.table(split):
            of_a, of_b = ({r["id"]: prompt_ratio(r, base) for r in rows[e.name]} for e in (a, b))
            found[metric] = paired_ratio_difference(of_a, of_b, num_resamples, seed=seed)
    return found


def differences_table(
    pairs: Sequence[tuple[Evaluation, Evaluation]], split: str = "test", num_resamples: int = 10_000, seed: int = 0
) -> str:
    """A Markdown table of `differences` for each pair; a star marks those whose interval excludes 0."""
    lines = [_row(["pair", "metric", "difference", "95% interval", "excludes 0"]), _row(["---"] * 2 + ["---:"] * 3)]
    num_prompts = set()
    for a, b in pairs:
        for metric, interval in differences(a, b, split, num_resamples, seed).items():
            mean, low, high = (f"{value:+.3f}" for value in interval[:3])
            star = "*" if interval.excludes_zero() else ""
            lines.append(_row([f"{a.name} - {b.name}", metric, mean, f"[{low}, {high}]", star]))
            num_prompts.add(interval.n)
    counts = " or ".join(str(n) for n in sorted(num_prompts))
    bootstrap = f"Paired bootstrap over {counts} prompts of {split}: {num_resamples} resamples, seed {seed}"
    note = f"{bootstrap}; shares from 0 to 1, distances in items and steps."
    return "\n".join([*lines, "", note])


def print_evaluation(evaluation: Evaluation) -> None:
    """Show an evaluation on the screen: a table a split, a row a family. The file has the other intervals."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 140
    for split, families in evaluation.tables.items():
        columns = {c: spec for c, spec in COLUMNS.items() if spec[0] in families[ALL_FAMILIES]}
        title = f"{evaluation.name}: {split} (shares in percent; accuracy with its 95% interval over prompts)"
        shown = RichTable(title=Text(title))
        shown.add_column("family", no_wrap=True)
        for column in ("prompts", *columns):
            shown.add_column(column, justify="right", no_wrap=column == "accuracy")
        for family, table in families.items():
            prompts = str(table["accuracy"]["prompts"])
            cells = [_cell(table, c, *spec, with_interval=c == "accuracy") for c, spec in columns.items()]
            # As Text: Rich would read [nan, nan] as markup.
            shown.add_row(*map(Text, (family, prompts, *cells)), end_section=family == ALL_FAMILIES)
        console.print(shown)
