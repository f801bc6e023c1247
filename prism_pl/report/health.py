"""Whether the game of an alignment stage was healthy: the panel's numbers, what it flagged, and who acted."""

import json
from collections.abc import Sequence
from typing import Any

from prism_pl.checkpoint_choice import CHOICE, DRIFT
from prism_pl.report.events import Curve
from prism_pl.report.figures import Figures, legend
from prism_pl.report.runs import Run, Stage
from prism_pl.report.tables import NOT_AVAILABLE, markdown_table, number
from prism_pl.report.training import with_stages

READERS = {"discriminator": "-", "length": "--", "surface": ":"}
SHADOWS = ("length", "surface")
# Column -> (tag behind the expert's, factor, digits).
COLUMNS = {
    "pairs right, %": ("accuracy/{}/discriminator", 100, 1),
    "length alone": ("accuracy/{}/length", 100, 1),
    "surface alone": ("accuracy/{}/surface", 100, 1),
    "scores explained by length, %": ("explained/{}/length", 100, 0),
    "by surface": ("explained/{}/surface", 100, 0),
    "score std": ("score_std/{}", 1, 3),
    "saturated pairs, %": ("saturated_margins/{}", 100, 1),
    "saturated scores, %": ("saturated_scores/{}", 100, 1),
}


def health(figures: Figures, runs: Sequence[Run]) -> list[str]:
    """Figure, table and flags; nothing where no stage has the panel."""
    stages = [item for item in with_stages(runs) if _experts(item[1])]
    if not stages:
        return []
    rows = [
        [label, expert, *(_last(stage, tag.format(expert), factor, digits) for tag, factor, digits in COLUMNS.values())]
        for _, stage, label in stages
        for expert in _experts(stage)
    ]
    note = (
        "Of the last window of steps. Pairs right: demonstration above rollout, by the discriminator and by "
        "classifiers that see only a segment's length, or how it is written. Explained: share of the variance of "
        "the scores inside groups. Saturated: pairs, and clipped scores, that have under 1% of their gradient left."
    )
    lines = [*_figure(figures, runs, stages), *markdown_table(["stage", "expert", *COLUMNS], rows, num_left=2)]
    lines += ["", note, ""]
    for _, stage, label in stages:
        lines += [f"* **{label}**: {said}" for said in (*_flags(stage), *_others(stage))]
    return lines


def _experts(stage: Stage) -> list[str]:
    tags = [tag.split("/") for tag in sorted(stage.curves) if tag.startswith("health/accuracy/")]
    return list(dict.fromkeys(parts[2] for parts in tags))


def _curve(stage: Stage, tag: str) -> Curve:
    return stage.curves.get(tag, Curve([], [], [])).finite()


def _last(stage: Stage, tag: str, factor: int, digits: int) -> str:
    """A tag's last logged number, n/a where that is NaN and empty where there is none."""
    curve = stage.curves.get(f"health/{tag}")
    return number(curve.values[-1] * factor, digits) if curve is not None else ""


def _figure(figures: Figures, runs: Sequence[Run], stages: Sequence[tuple[Run, Stage, str]]) -> list[str]:
    experts = list(dict.fromkeys(expert for _, stage, _ in stages for expert in _experts(stage)))
    figure, axes = figures.grid(1, len(experts), 2.6)
    handles: dict[str, Any] = {}
    for run, stage, label in stages:
        colour = figures.colour(stage.name) if len(runs) == 1 else figures.run_colour(run)
        for axis, expert in zip(axes[0], experts, strict=True):
            for reader, dash in READERS.items():
                curve = _curve(stage, f"health/accuracy/{expert}/{reader}")
                if curve.steps:
                    named = reader if len(stages) == 1 else f"{label}, {reader}"
                    handles[named] = axis.plot(curve.steps, curve.values, color=colour, linestyle=dash)[0]
    for axis, expert in zip(axes[0], experts, strict=True):
        axis.axhline(0.5, color="#59636e", linewidth=1)
        axis.set_title(expert)
        axis.set_xlabel("batch")
    axes[0, 0].set_ylabel("pairs ranked right, share")
    legend(figure, handles)
    caption = "Pair accuracy over a window of steps: the discriminator, and what sees only length or surface"
    return figures.save(figure, "health", caption)


def _flags(stage: Stage) -> list[str]:
    """What was flagged as rewarding style, or that nothing was."""
    said, judged = [], 0
    for expert in _experts(stage):
        for shadow in SHADOWS:
            curve = _curve(stage, f"health/style/{expert}/{shadow}")
            judged += len(curve.values)
            flagged = [step for step, value in zip(curve.steps, curve.values, strict=True) if value]
            if flagged:
                share = f"{len(flagged)} of {len(curve.values)} windows, first at batch {flagged[0]}"
                said.append(f"FLAG: the expert {expert} may be rewarding style ({shadow}): {share}.")
    if not judged:
        return ["not judged for style: it ended before the first window of steps was full."]
    return said or ["no expert was flagged as rewarding style."]


def _others(stage: Stage) -> list[str]:
    """What a router, a governor, the convergence monitor and the choice of the checkpoint told."""
    said = []
    entropy = _curve(stage, f"{stage.kind}/router/entropy/mean").values
    told = _curve(stage, f"{stage.kind}/router/mutual_information/mean").values
    if entropy and told:
        said.append(f"router: load entropy {entropy[-1]:.2f} nats, {told[-1]:.3f} nats about the segment.")
    push = _curve(stage, f"{stage.kind}/governor/push").values
    if push:
        accuracy = _curve(stage, f"{stage.kind}/governor/accuracy").values
        said.append(
            f"governor: held the discriminator back in {push.count(-1)} of {len(push)} batches and pushed it in "
            f"{push.count(1)}; last accuracy {number(accuracy[-1], 3) if accuracy else NOT_AVAILABLE}."
        )
    said += _settled(stage)
    file = stage.folder / CHOICE
    if file.exists():
        choice = json.loads(file.read_text())
        drifts = {v["step"]: v[DRIFT] for v in choice["validations"]}
        if choice["step"] is not None:
            said.append(
                f"`export/` is the policy of step {choice['step']}, of the least drift on validation rows "
                f"({drifts[choice['step']]:.3f}; the last had {number(_or_nan(list(drifts.values())[-1]), 3)}); "
                "results are on test rows."
            )
    return said


def _settled(stage: Stage) -> list[str]:
    """The convergence monitor's verdict: a batch or two of calm between swings is none."""
    flat, marked = _curve(stage, "health/settled").values, _curve(stage, "health/settled_at")
    if marked.values:
        return [f"the gaps had settled at step {marked.values[0]:.0f} (batch {marked.steps[0]})."]
    if not flat:
        return []
    calm = f": flat and quiet in {flat.count(1)} of {len(flat)} batches, never in enough of them in a row"
    return [f"the gaps did not settle{calm if any(flat) else ''}."]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
