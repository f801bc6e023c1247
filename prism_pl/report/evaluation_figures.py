"""Figures of evaluations: accuracy by family, structure over the supervision's, truth of captions and steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism_pl.evaluation import PromptRecord, Side
from prism_pl.evaluation_tables import ALL_FAMILIES, DISTANCES, Table, prompt_counts
from prism_pl.report.evaluations import Evaluation
from prism_pl.report.figures import GRID, PAPER, QUIET, SUPERVISION, Figures, legend
from prism_pl.report.runs import Run

COUNTED = {
    "descriptive_items": "descriptive items",
    "reasoning_steps": "reasoning steps",
    "response_length": "length, tokens",
}
TRUTH = {
    "caption_precision": "caption precision",
    "caption_recall": "caption recall",
    "caption_exact": "captions exact",
    "step_correctness": "steps right",
    "step_completeness": "steps complete",
}
MOST_BINS = 40


def accuracy_figure(figures: Figures, runs: Sequence[Run], split: str) -> list[str]:
    """Accuracy of every checkpoint on every family with its interval, a panel a run."""
    panels = {run.name: {n: e.tables[split] for n, e in run.evaluations.items() if split in e.tables} for run in runs}
    panels = {name: tables for name, tables in panels.items() if tables}
    families = list(dict.fromkeys(f for tables in panels.values() for table in tables.values() for f in table))
    most = max(len(tables) for tables in panels.values())
    figure, axes = figures.grid(1, len(panels), 0.7 + len(families) * (0.16 + 0.085 * most))
    handles: dict[str, Any] = {}
    for axis, (run, tables) in zip(axes[0], panels.items(), strict=True):
        for row, family in enumerate(families):
            for n, (name, by_family) in enumerate(tables.items()):
                y = row + (n - (len(tables) - 1) / 2) * 0.75 / len(tables)
                entry = by_family.get(family, {}).get("accuracy")
                if entry is not None:
                    handles.setdefault(name, _interval(axis, entry, y, figures.colour(name)))
        shown = families if axis is axes[0, 0] else [""] * len(families)
        axis.set_yticks(range(len(families)), ["all families" if f == ALL_FAMILIES else f for f in shown])
        axis.set_ylim(len(families) - 0.45, -0.55)
        axis.grid(axis="y", visible=False)
        for row in range(1, len(families)):
            axis.axhline(row - 0.5, color=GRID, linewidth=0.8)
        axis.set_xlim(-2, 102)
        axis.set_xlabel("accuracy, % (95% interval over prompts)")
        axis.set_title(run if len(runs) > 1 else "")
    legend(figure, handles)
    return figures.save(figure, f"accuracy-{split}", f"Accuracy by question family, {split} prompts")


def _interval(axis: Any, entry: Mapping[str, Any], y: float, colour: str, marker: str = "o", factor: int = 100) -> Any:
    """A number with its interval, lying at height y; a share is shown in percent."""
    mean, low, high = (entry[key] * factor for key in ("mean", "low", "high"))
    if low == low:
        axis.plot([low, high], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt", alpha=0.75)
    return axis.plot([mean], [y], marker, color=colour, markersize=4.5)[0]


def structure_figure(figures: Figures, runs: Sequence[Run], split: str) -> list[str]:
    """Distributions of items, steps and lengths: a row a checkpoint, over the supervision's; a line a run."""
    names = list(dict.fromkeys(n for run in runs for n, e in run.evaluations.items() if split in e.tables))
    figure, axes = figures.grid(len(names), len(COUNTED), 1.3)
    handles: dict[str, Any] = {}
    for column, metric in enumerate(COUNTED):
        limit = _limit(runs, split, metric)
        for axis, name in zip(axes[:, column], names, strict=True):
            evaluated = [(run, run.evaluations[name]) for run in runs if name in run.evaluations]
            supervision = _pooled(evaluated[0][1].rows(split), metric, "supervision")
            if supervision:
                handles["supervision"] = _stairs(axis, supervision, limit, color=SUPERVISION, fill=True)
            for run, evaluation in evaluated:
                policy = _pooled(evaluation.rows(split), metric, "policy")
                if policy:
                    style = {"color": figures.run_colour(run), "linestyle": figures.dash(run), "linewidth": 1.7}
                    label = run.name if len(runs) > 1 else "policy"
                    handles[label] = _stairs(axis, policy, limit, **style)
            _dress(axis, limit, [_distance(evaluation, split, metric) for _, evaluation in evaluated])
            axis.tick_params(labelbottom=name == names[-1])
        axes[0, column].set_title(COUNTED[metric])
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center", weight="bold")
    legend(figure, handles)
    caption = f"Structure of the responses over the supervision's, {split} prompts: shares of valid responses"
    return figures.save(figure, f"structure-{split}", caption)


def _pooled(rows: Sequence[PromptRecord], metric: str, side: Side) -> list[int]:
    """All counts of one side. Prompts without supervision count for the policy alone."""
    if any(record["supervision"] is not None for record in rows):
        return [count for counts in prompt_counts(rows, metric, side).values() for count in counts]
    found = [response[DISTANCES[metric]] for record in rows for response in record["policy"] if side == "policy"]
    return [count for count in found if count is not None]


def _limit(runs: Sequence[Run], split: str, metric: str) -> int:
    """Above the 99.5th percentile of all counts, so that one endless response does not flatten the rest."""
    import numpy as np

    rows = [e.rows(split) for run in runs for e in run.evaluations.values()]
    sides: tuple[Side, ...] = ("policy", "supervision")
    counts = [count for of_one in rows for side in sides for count in _pooled(of_one, metric, side)]
    return int(np.percentile(counts, 99.5)) + 1 if counts else 1


def _stairs(axis: Any, counts: Sequence[int], limit: int, **style: Any) -> Any:
    """Shares of responses in few bins; what lies above the limit stands in the last one."""
    import numpy as np

    width = -(-(limit + 1) // MOST_BINS)
    edges = np.arange(0, limit + 1 + width, width) - 0.5
    return axis.stairs(np.histogram(np.minimum(counts, limit), edges)[0] / len(counts), edges, **style)


def _distance(evaluation: Evaluation, split: str, metric: str) -> str:
    entry = evaluation.tables.get(split, {}).get(ALL_FAMILIES, {}).get(f"{metric}/distance")
    if entry is None:
        return ""
    return "no valid response" if entry["mean"] != entry["mean"] else f"{entry['mean']:.2f}"


def _dress(axis: Any, limit: int, texts: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_yticks([])
    axis.grid(visible=False)
    axis.spines["left"].set_visible(False)
    axis.set_xlim(-0.5, limit + 0.5)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.25)  # room for the text
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = list(dict.fromkeys(text for text in texts if text))
    # In the order of the runs; equal ones stand once.
    text = "W1 " + " | ".join(shown) if any(text[0].isdigit() for text in shown) else "".join(shown)
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5, "alpha": 0.8}
    axis.text(0.99, 0.98, text, transform=axis.transAxes, ha="right", va="top", fontsize=8.5, bbox=box)


@dataclass(frozen=True)
class Panel:
    """A number's part of a figure: its title, what the axis is in, a factor, and a value to mark."""

    title: str
    unit: str
    factor: int = 1
    reference: float | None = None


def truth_figure(figures: Figures, runs: Sequence[Run], split: str) -> list[str]:
    """Truth of captions and steps of every checkpoint. Nothing where scenes are not known."""
    panels = {f"{metric}/policy": Panel(title, "%", 100) for metric, title in TRUTH.items()}
    caption = f"Truth of captions and steps, {split} prompts, 95% intervals; n/a: no valid response"
    return interval_panels(figures, runs, split, panels, f"truth-{split}", caption, columns=len(panels))


def interval_panels(
    figures: Figures,
    runs: Sequence[Run],
    split: str,
    panels: Mapping[str, Panel],
    name: str,
    caption: str,
    columns: int = 3,
) -> list[str]:
    """Numbers of every checkpoint with their intervals, a panel each, `columns` in a row, a colour a run where there
    are several. Nothing where no checkpoint has any of them."""
    evaluated = [(run, n, e) for run in runs for n, e in run.evaluations.items() if split in e.tables]
    tables: dict[tuple[str, str], Table] = {(run.name, n): e.tables[split][ALL_FAMILIES] for run, n, e in evaluated}
    panels = {m: panel for m, panel in panels.items() if any(m in table for table in tables.values())}
    names = list(dict.fromkeys(name for _, name in tables))
    if not panels:
        return []
    columns = min(columns, len(panels))
    height = 0.9 + len(names) * (0.18 + 0.1 * len(runs))
    figure, axes = figures.grid(-(-len(panels) // columns), columns, height)
    handles: dict[str, Any] = {}
    for axis, (metric, panel) in zip(axes.flat, panels.items(), strict=False):
        for r, run in enumerate(runs):
            for n, checkpoint in enumerate(names):
                y = n + (r - (len(runs) - 1) / 2) * 0.6 / len(runs)
                entry = tables.get((run.name, checkpoint), {}).get(metric)
                if entry is not None and entry["mean"] == entry["mean"]:
                    colour = figures.colour(checkpoint) if len(runs) == 1 else figures.run_colour(run)
                    handles[run.name] = _interval(axis, entry, y, colour, figures.marker(run), panel.factor)
        axis.set_yticks(range(len(names)), names if axis in axes[:, 0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_title(panel.title)
        axis.set_xlabel(panel.unit)
        if panel.reference is not None:
            axis.axvline(panel.reference, color=QUIET, linewidth=1)
        _mark_missing(axis, [n for n, checkpoint in enumerate(names) if not _known(tables, checkpoint, metric)])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    legend(figure, handles if len(runs) > 1 else {})
    return figures.save(figure, name, caption)


def _known(tables: Mapping[tuple[str, str], Table], name: str, metric: str) -> bool:
    entries = [table[metric] for (_, other), table in tables.items() if other == name and metric in table]
    return any(entry["mean"] == entry["mean"] for entry in entries)


def _mark_missing(axis: Any, rows: Sequence[int]) -> None:
    low, high = axis.get_xlim()
    for row in rows:
        axis.text((low + high) / 2, row, "n/a", ha="center", va="center", fontsize=8.5, color=QUIET)
