"""What training logged: the reward gap, curves, and what acted."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from prism_pl.report.events import Curve
from prism_pl.report.figures import Figures, legend
from prism_pl.report.runs import Run, Stage
from prism_pl.report.tables import NOT_AVAILABLE, markdown_table, number

# Tag behind the stage's name -> title of its panel.
PANELS = {
    "val_accuracy": "held-out accuracy",
    "reward": "reward",
    "response_length": "response length, tokens",
    "entropy": "entropy, nats a token",
    "malformed": "malformed responses, share",
    "truncated": "cut at max_tokens, share",
    "clip_fraction": "ratios outside the clip range, share",
    "zero_std_groups": "groups that teach nothing",
}
# Tag -> what acted, for the table; summed over the run where it says so.
ACTED = {
    "clip_fraction": "tokens whose ratio was clipped, share",
    "dual_clip_fraction": "tokens under the dual clip, share",
    "approx_kl": "approximate KL to the rollouts' policy, nats",
    "kl": "KL penalty, nats",
    "mismatch_p95": "sampler's mismatch, 95th percentile, nats",
    "mismatch_outside": "mismatch ratios outside 0.9 to 1.1, share",
    "mismatch_truncated": "mismatch weights truncated, share",
    "mismatch_masked": "mismatch weights masked, share",
    "zero_std_groups": "groups without spread, a batch",
    "num_zero_std_groups": "groups without spread, a batch",
    "num_all_malformed_groups": "groups of malformed responses only, a batch",
    "refills": "refills of dynamic sampling, a step",
    "shortfall": "groups short after all refills, a step",
    "skipped": "steps skipped for want of groups, share",
    "truncated": "responses cut at max_tokens, share",
    "malformed": "malformed responses, share",
    "overlong": "overlong punishment, mean",
    "reward_timeouts": "comparisons stopped by the clock, a batch",
}


def with_stages(runs: Sequence[Run]) -> Iterator[tuple[Run, Stage, str]]:
    """Every stage with its run, and the label that legends and tables give it."""
    for run in runs:
        for stage in run.stages:
            yield run, stage, stage.name if len(runs) == 1 else f"{run.name}/{stage.name}"


def reward_gap(figures: Figures, runs: Sequence[Run]) -> list[str]:
    """Figure and table of the reward gap for each expert, training and held-out; nothing where no stage logged it."""
    tag = "/reward_gap/"
    stages = [item for item in with_stages(runs) if any(tag in name for name in item[1].curves)]
    experts = list(dict.fromkeys(t.split(tag)[1] for _, stage, _ in stages for t in sorted(stage.curves) if tag in t))
    if not experts:
        return []
    figure, axes = figures.grid(1, len(experts), 2.9)
    handles: dict[str, Any] = {}
    rows = []
    for run, stage, label in stages:
        for axis, expert in zip(axes[0], experts, strict=True):
            trained = stage.curves.get(f"{stage.kind}/reward_gap/{expert}", Curve([], [], [])).finite()
            held_out = stage.curves.get(f"{stage.kind}/val_reward_gap/{expert}", Curve([], [], [])).finite()
            colour, dash = figures.colour(stage.name), figures.dash(run)
            if trained.steps:
                handles[f"{label}, training"] = axis.plot(*trained[:2], color=colour, linestyle=dash, alpha=0.45)[0]
            if held_out.steps:
                line = axis.plot(*held_out[:2], color=colour, linestyle=dash, marker=figures.marker(run), linewidth=2.2)
                handles[f"{label}, held-out"] = line[0]
            rows.append([label, expert, *_ends(trained, 3), *_first_and_last(held_out, 3)])
    for axis, expert in zip(axes[0], experts, strict=True):
        axis.axhline(0, color="#59636e", linewidth=1)
        axis.set_title(expert)
        axis.set_xlabel("batch")
    axes[0, 0].set_ylabel("D(supervision) - D(policy)")
    legend(figure, handles)
    caption = "Reward gap of each expert over the batches; 0: the discriminator cannot tell the policy's responses"
    header = ["stage", "expert", "training, first quarter", "last quarter", "held-out, first", "last"]
    note = (
        "Training: means over the first and the last quarter of the batches. Held-out: the first and last validation."
    )
    return [*figures.save(figure, "reward-gap", caption), *markdown_table(header, rows, num_left=2), "", note, ""]


def _ends(curve: Curve, digits: int) -> tuple[str, str]:
    """Means of the first and the last quarter of a curve."""
    quarter = max(1, len(curve.values) // 4)
    if not curve.values:
        return NOT_AVAILABLE, NOT_AVAILABLE
    return number(fmean(curve.values[:quarter]), digits), number(fmean(curve.values[-quarter:]), digits)


def _first_and_last(curve: Curve, digits: int) -> tuple[str, str]:
    if not curve.values:
        return NOT_AVAILABLE, NOT_AVAILABLE
    return number(curve.values[0], digits), number(curve.values[-1], digits)


def curves(figures: Figures, runs: Sequence[Run]) -> list[str]:
    """Small panels of what the rollout stages logged, a line a stage."""
    stages = [item for item in with_stages(runs) if f"{item[1].kind}/response_length" in item[1].curves]
    panels = [p for p in PANELS if any(_moves(stage.curves.get(f"{stage.kind}/{p}")) for _, stage, _ in stages)]
    if not panels:
        return []
    columns = 3
    figure, axes = figures.grid(-(-len(panels) // columns), columns, 1.9)
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for run, stage, label in stages:
            curve = stage.curves.get(f"{stage.kind}/{panel}", Curve([], [], [])).finite()
            if curve.steps:
                marker = figures.marker(run) if panel.startswith("val_") or len(curve.steps) == 1 else ""
                style = {"color": figures.colour(stage.name), "linestyle": figures.dash(run), "markersize": 4}
                handles[label] = axis.plot(*curve[:2], marker=marker, **style)[0]
        axis.set_title(PANELS[panel])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for column in range(columns):
        below = [axis for axis in axes[:, column] if axis.get_visible()]
        for axis in below[-1:]:
            axis.set_xlabel("batch")
    legend(figure, handles)
    return figures.save(figure, "training", "Curves of the stages that train on rollouts")


def _moves(curve: Curve | None) -> bool:
    """Whether there is more to see than a line at 0, which the table of what acted tells as well."""
    return curve is not None and any(curve.finite().values)


def what_acted(runs: Sequence[Run]) -> list[str]:
    """A row for each mechanism that some stage logged: its mean over the batches and its largest value."""
    stages = [item for item in with_stages(runs) if f"{item[1].kind}/response_length" in item[1].curves]
    rows: dict[str, list[str]] = {}
    for tag, words in ACTED.items():
        cells = [_acted(stage.curves.get(f"{stage.kind}/{tag}")) for _, stage, _ in stages]
        if any(cells):
            # Two stages may call one thing differently.
            before = rows.get(words, [""] * len(cells))
            rows[words] = [one or other for one, other in zip(before, cells, strict=True)]
    clipped = [_clipped_gradients(stage) for _, stage, _ in stages]
    if any(clipped):
        rows["batches whose gradient was clipped, share"] = clipped
    header = ["what", *(label for _, _, label in stages)]
    return markdown_table(header, [[words, *cells] for words, cells in rows.items()]) if rows else []


def _acted(curve: Curve | None) -> str:
    if curve is None:
        return ""
    values = curve.finite().values
    if not values:
        return NOT_AVAILABLE
    if not any(values):
        return "0: never"
    peak = max(values, key=abs)
    return f"{_short(fmean(values))} (at most {_short(peak)})"


def _short(value: float) -> str:
    """Three significant digits, without an exponent where a reader can do without."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def _clipped_gradients(stage: Stage) -> str:
    """Share of the batches whose gradient norm lay above `max_grad_norm`, which the configuration names."""
    limit = stage.settings.get("max_grad_norm")
    tags = [tag for tag in (f"{stage.kind}/grad_norm", f"{stage.kind}/grad_norm/policy") if tag in stage.curves]
    if not tags or not isinstance(limit, int | float) or math.isinf(limit):
        return ""
    norms = stage.curves[tags[0]].finite().values
    return f"{fmean(norm > limit for norm in norms):.3g} (above {limit:g})" if norms else NOT_AVAILABLE
