"""What a run cost: wall-clock time by phase, steps, tokens."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from prism_pl.report.figures import COLOURS, SUPERVISION, Figures, legend
from prism_pl.report.runs import Run, Stage
from prism_pl.report.tables import NOT_AVAILABLE, markdown_table
from prism_pl.report.training import with_stages

PHASES = ("rollout", "reward", "score", "policy", "discriminator", "sync")
OTHER = "other"


def total(stage: Stage, tag: str) -> float | None:
    """A tag summed over all batches: its mean times their number, since not every batch need be logged."""
    curve = stage.curves.get(tag)
    values = curve.finite().values if curve is not None else []
    return fmean(values) * stage.num_batches if values else None


def phases(stage: Stage) -> dict[str, float]:
    """Seconds of each phase that was timed, and what is left of the stage's time as "other"."""
    tags = [tag.removeprefix("time/") for tag in stage.curves if tag.startswith("time/")]
    ordered = [*(p for p in PHASES if p in tags), *sorted(set(tags) - {*PHASES})]
    found = {phase: total(stage, f"time/{phase}") or 0.0 for phase in ordered}
    return found | {OTHER: max(0.0, stage.seconds[0] - sum(found.values()))}


def cost(figures: Figures, runs: Sequence[Run]) -> list[str]:
    """Figure and tables; nothing where a report has no stages."""
    stages = list(with_stages(runs))
    if not stages:
        return []
    by_phase = [phases(stage) for _, stage, _ in stages]
    shown = [p for p in dict.fromkeys(p for found in by_phase for p in found) if p != OTHER] + [OTHER]
    rows = []
    for (_, stage, label), found in zip(stages, by_phase, strict=True):
        tokens = total(stage, f"{stage.kind}/tokens")
        seconds, source = stage.seconds
        cells = [f"{found[p]:.1f}" if p in found else "" for p in shown]
        counted = NOT_AVAILABLE if tokens is None else f"{tokens:,.0f}"
        rows.append([label, str(stage.num_batches), counted, *cells, f"{seconds:.1f}", source])
    header = ["stage", "batches", "tokens", *(f"{p}, s" for p in shown), "all, s", "time from"]
    return [*_figure(figures, stages, by_phase, shown), *markdown_table(header, rows), "", *_notes(runs)]


def _figure(
    figures: Figures,
    stages: Sequence[tuple[Run, Stage, str]],
    by_phase: Sequence[dict[str, float]],
    shown: Sequence[str],
) -> list[str]:
    figure, axes = figures.grid(1, 1, 0.8 + 0.32 * len(stages))
    axis = axes[0, 0]
    handles: dict[str, Any] = {}
    colours = {p: SUPERVISION if p == OTHER else COLOURS[(i + 1) % len(COLOURS)] for i, p in enumerate(shown)}
    for row, found in enumerate(by_phase):
        left = 0.0
        for phase, seconds in found.items():
            bar = axis.barh(row, seconds, left=left, color=colours[phase], height=0.62)
            handles.setdefault(phase, bar)
            left += seconds
        axis.text(left, row, f"  {left:.0f} s", va="center", fontsize=8.5)
    axis.set_yticks(range(len(stages)), [label for _, _, label in stages])
    axis.set_ylim(len(stages) - 0.5, -0.5)
    axis.margins(x=0.1)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("seconds")
    legend(figure, {phase: handles[phase] for phase in shown if phase in handles})
    return figures.save(figure, "cost", "Wall-clock time of the stages by phase")


def _notes(runs: Sequence[Run]) -> list[str]:
    lines = [
        "Times of phases are means over the logged batches times the number of batches. `other` is the rest of a "
        "stage's time: loading, validation, checkpoints, all of it where no phase was timed. `events` means the time "
        "from the first logged number to the last, without the start of the process; `ledger` the whole of it. "
        "Tokens are those of all ranks.",
        "",
    ]
    for run in runs:
        entries = run.ledger.get("stages", {})
        timed = {n: e["seconds"] for n, e in entries.items() if isinstance(e.get("seconds"), int | float)}
        if timed:
            all_of_them = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in timed.items())
            lines += [f"{run.name}, by the ledger: {all_of_them}; {sum(timed.values()):.0f} s in all.", ""]
    return lines
