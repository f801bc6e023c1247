"""The report as one Markdown document."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_pl.errors import UsageError
from prism_pl.report.benchmarks import benchmarks
from prism_pl.report.comparisons import Pair, differences_table, named_pairs, side_by_side
from prism_pl.report.cost import cost
from prism_pl.report.difficulty import difficulty
from prism_pl.report.drift import drift
from prism_pl.report.evaluation_figures import accuracy_figure, structure_figure, truth_figure
from prism_pl.report.figures import Figures
from prism_pl.report.health import health
from prism_pl.report.runs import Run, default_pairs, evaluations_of, labels_of, unevaluated
from prism_pl.report.samples import samples
from prism_pl.report.tables import Evaluations, families_table, metrics_table, results_table
from prism_pl.report.training import curves, reward_gap, what_acted

STRUCTURE = {
    "items": ("descriptive_items/policy", 1),
    "items W1": ("descriptive_items/distance", 1),
    "steps": ("reasoning_steps/policy", 1),
    "steps W1": ("reasoning_steps/distance", 1),
    "tokens": ("response_length/policy", 1),
    "tokens W1": ("response_length/distance", 1),
    "cut at max_tokens, %": ("truncated", 100),
}
FAITHFULNESS = {
    "caption precision": ("caption_precision/policy", 100),
    "caption recall": ("caption_recall/policy", 100),
    "captions exact": ("caption_exact/policy", 100),
    "steps right": ("step_correctness/policy", 100),
    "steps complete": ("step_completeness/policy", 100),
}


@dataclass(frozen=True)
class Options:
    """What a report holds.

    Args:
        splits: to report on; empty: all that were evaluated.
        pairs: `name:name`, the first less the second; empty: each checkpoint with its parent and its kin.
        num_resamples, seed: of the paired differences.
        num_samples: prompts shown with their responses.
    """

    splits: Sequence[str] = ()
    pairs: Sequence[str] = ()
    num_resamples: int = 10_000
    seed: int = 0
    num_samples: int = 4


def make_report(runs: Sequence[Run], options: Options, page: Path, made_by: str) -> str:
    """Write the figures into `<stem>_files/` beside `page` and return the document's text.

    Raises:
        UsageError: an option that names a checkpoint or a split that is not there.
    """
    figures = Figures(page.with_name(f"{page.stem}_files"), page, runs)
    evaluations = evaluations_of(runs)
    splits = _splits(evaluations, options.splits)
    pairs = _pairs(runs, options.pairs)
    title = " and ".join(run.name for run in runs)
    lines = [f"# Report: {title}", "", *_opening(runs), ""]
    if averaged := benchmarks(evaluations, pairs, options.num_resamples, options.seed):
        lines += ["## Benchmarks", "", *averaged, ""]
    for split in splits:
        lines += _results(figures, runs, split, pairs, options, drawn=split == splits[0])
    if not splits:
        lines += ["## Results", "", "Left out: no evaluation.json was found (python -m prism_pl test writes one).", ""]
    sections: list[tuple[str, Callable[[], list[str]], str]] = [
        ("Reward gap", lambda: reward_gap(figures, runs), "no stage logged reward gaps (callbacks.RewardGap does)"),
        (
            "Is the game healthy?",
            lambda: health(figures, runs),
            "no stage logged the panel (callbacks.DiscriminatorHealth does)",
        ),
        ("Training", lambda: curves(figures, runs), "no stage that trains on rollouts left event files"),
        ("What acted", lambda: what_acted(runs), "no stage that trains on rollouts left event files"),
        (
            "Difficulty filter",
            lambda: difficulty(runs),
            "no pass rates were measured (predict does)",
        ),
        ("Cost", lambda: cost(figures, runs), "no stage left event files"),
    ]
    for heading, section, why in sections:
        lines += [f"## {heading}", "", *(section() or [f"Left out: {why}."]), ""]
    lines += ["## Samples", ""]
    for split in splits[:1]:
        shown = samples(figures, _with_split(evaluations, split), split, options.num_samples)
        lines += shown or ["Left out: no prompt was put to all checkpoints."]
    lines += ([] if splits else ["Left out: no evaluation.json was found."]) + ["", f"Made by `{made_by}`."]
    return "\n".join(lines) + "\n"


def _opening(runs: Sequence[Run]) -> list[str]:
    lines = ["Made only from what the runs wrote: evaluations, TensorBoard events, configurations, the ledger."]
    for run in runs:
        stages = ", ".join(f"{stage.name} ({stage.kind})" for stage in run.stages) or "none"
        evaluated = f"checkpoints {', '.join(run.evaluations)}" if run.evaluations else "no checkpoint was evaluated"
        lines += ["", f"* **{run.name}**: stages {stages}; {evaluated}."]
        if unseen := ", ".join(unevaluated(run)):
            command = "`python -m prism_pl test --config evaluate.yaml --model.policy.path` FOLDER"
            lines.append(f"  Not evaluated: {unseen} ({command}).")
        for name, entry in run.ledger.get("stages", {}).items():
            # The report's own entry is running, or was when it was made.
            if entry.get("status") not in ("finished", None) and entry.get("kind") != "report":
                lines.append(f"  Its ledger says that {name} is {entry['status']}.")
    return lines


def _results(
    figures: Figures, runs: Sequence[Run], split: str, pairs: Sequence[Pair], options: Options, drawn: bool
) -> list[str]:
    """All sections about one split, with figures where `drawn`."""
    evaluations = _with_split(evaluations_of(runs), split)
    lines = [f"## Results: {split}", "", *results_table(evaluations, split), ""]
    without = [label for label, e in evaluations_of(runs).items() if label not in evaluations]
    if without:
        lines += [f"Without {split} prompts: {', '.join(without)}.", ""]
    lines += ["### Question families", "", *(accuracy_figure(figures, runs, split) if drawn else [])]
    lines += [*families_table(evaluations, split), ""]
    lines += ["Accuracy in percent with its 95% interval over prompts.", "", "### Paired differences", ""]
    known = [pair for pair in pairs if all(label in evaluations for label in pair)]
    if known:
        lines += [*differences_table(evaluations, known, split, options.num_resamples, options.seed), ""]
    else:
        lines += ["Left out: no two checkpoints of which one was trained from the other, and no --pairs.", ""]
    if len(runs) > 1:
        shown = side_by_side(runs, split, options.num_resamples, options.seed)
        lines += ["### Runs side by side", "", *(shown or ["Left out: no checkpoint's name stands in two runs."]), ""]
    lines += ["### Structure and length against the supervision", ""]
    lines += structure_figure(figures, runs, split) if drawn else []
    lines += [*metrics_table(evaluations, split, STRUCTURE), ""]
    lines += [
        "W1: Wasserstein-1 distance to the supervision in items, steps, tokens; 95% intervals over prompts.",
        "",
    ]
    why = "Left out: the drift meter was off (`drift` of the evaluation's YAML)."
    lines += ["### Drift from the supervision", "", *(drift(figures, runs, evaluations, split, drawn) or [why]), ""]
    lines += ["### Faithfulness", "", *(truth_figure(figures, runs, split) if drawn else [])]
    why = "Left out: the scenes behind these prompts are not known."
    return [*lines, *(metrics_table(evaluations, split, FAITHFULNESS) or [why]), ""]


def _with_split(evaluations: Evaluations, split: str) -> Evaluations:
    return {label: e for label, e in evaluations.items() if split in e.tables}


def _splits(evaluations: Evaluations, wanted: Sequence[str]) -> list[str]:
    known = list(dict.fromkeys(split for e in evaluations.values() for split in e.tables))
    for split in wanted:
        if split not in known:
            raise UsageError(f"--splits {split}: the evaluations have {', '.join(known) or 'none'}")
    return list(wanted) or known


def _pairs(runs: Sequence[Run], wanted: Sequence[str]) -> list[Pair]:
    if wanted:
        return [pair for text in wanted for pair in named_pairs(text, runs)]
    labels = labels_of(runs)
    return [(labels[run.name, a], labels[run.name, b]) for run in runs for a, b in default_pairs(run)]
