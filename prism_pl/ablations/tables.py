"""What the arms came to, from the evaluations that a run folder holds: arms by question family in the shape of the
paper's Table 2, paired differences to the first arm, and how far each arm's responses lie from the supervision's.

An arm's number is the mean over its seeds; a prompt's is the mean over its samples. Intervals are over prompts and
seeds (`prism_pl.metrics.bootstrap_crossed`); differences are paired by prompt and by seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from prism_pl.ablations.arms import Cell
from prism_pl.evaluation_tables import prompt_ratio
from prism_pl.ledger import Ledger
from prism_pl.metrics.bootstrap import Interval
from prism_pl.metrics.bootstrap_crossed import crossed_interval
from prism_pl.report.comparisons import shown_difference
from prism_pl.report.drift import COLUMNS as DRIFT
from prism_pl.report.evaluations import Evaluation, read_evaluation
from prism_pl.report.tables import COLUMNS, NOT_AVAILABLE, check_rules, markdown_table, number, with_bounds

# Most of these follow from pooled counts and have no value a prompt: what is shown of them is their spread over seeds.
SPREAD_COLUMNS = {column: spec for column, spec in (COLUMNS | DRIFT).items() if column != "accuracy"}
RESAMPLING_SEED = 0
NOTE = (
    "Accuracy in percent over {} prompts of {}, mean over the seeds; differences in points, paired by prompt and seed. "
    "95% intervals: the wider, on each side, of resampled prompts and seeds ({} resamples, seed {}) and of Student's t "
    "over the seeds. A star: the interval excludes 0; of a single seed the interval is over prompts alone, and has "
    "none. Each cell is tested for itself: of 20 that differ in nothing one gets a star by chance."
)


@dataclass
class Arm:
    """What is known of an arm at one point of its pipeline.

    Attributes:
        evaluations: by seed.
        missing: seeds whose evaluation is not finished.
        same: further arms for which these are the very same stages.
    """

    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    same: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Accuracy:
    """Of one split: for each arm and seed the share of right samples of every prompt.

    Attributes:
        family_of: prompt -> family.
        by_arm: arm -> seed -> (P,) in the order of `family_of`, in percent.
    """

    family_of: dict[str, str]
    by_arm: dict[str, dict[int, np.ndarray]]

    @property
    def families(self) -> list[str]:
        """In the order of their names."""
        return sorted(set(self.family_of.values()))

    def values(self, arm: str, seeds: Sequence[int], family: str | None = None) -> np.ndarray:
        """(seeds, prompts), of one family or of all."""
        of_family = [family is None or family == one for one in self.family_of.values()]
        return np.stack([self.by_arm[arm][seed][of_family] for seed in seeds])

    def difference(self, arm: str, first: str, family: str | None = None) -> np.ndarray | None:
        """arm - first, (seeds, prompts), over the seeds that both have; None where they share none."""
        seeds = [seed for seed in self.by_arm[arm] if seed in self.by_arm.get(first, {})]
        return self.values(arm, seeds, family) - self.values(first, seeds, family) if seeds else None


def read_arms(ledger: Ledger, name_of: Mapping[Cell, str], stage: str) -> dict[str, Arm]:
    """Arm -> its evaluations of one stage, for the arms that have the stage."""
    entries = ledger.content["dropped"] | ledger.stages
    names: dict[str, dict[int, str]] = {}
    for cell, name in name_of.items():
        if cell.stage == stage:
            names.setdefault(cell.arm, {})[cell.seed] = name
    arms: dict[str, Arm] = {}
    for arm, by_seed in names.items():
        earlier = next((other for other in arms if names[other] == by_seed), None)
        if earlier is not None:
            arms[earlier].same.append(arm)
            continue
        arms[arm] = Arm()
        for seed, name in by_seed.items():
            if name in entries and entries[name]["status"] == "finished":
                arms[arm].evaluations[seed] = read_evaluation(ledger.path(entries[name]))
            else:
                arms[arm].missing.append(seed)
    return arms


def accuracy_of(arms: Mapping[str, Arm], split: str) -> Accuracy:
    """The accuracies of a split.

    Raises:
        ValueError: evaluations that were not made on the same prompts.
    """
    family_of: dict[str, str] = {}
    by_arm: dict[str, dict[int, np.ndarray]] = {}
    for arm, one in arms.items():
        for seed, evaluation in one.evaluations.items():
            rows = {row["id"]: row for row in evaluation.rows(split)}
            family_of = family_of or {key: rows[key]["family"] for key in sorted(rows)}
            if rows.keys() != family_of.keys():
                odd = sorted(rows.keys() ^ family_of.keys())
                raise ValueError(
                    f"{arm} with seed {seed} was evaluated on other prompts than the first arm: {len(odd)} ids of "
                    f"{split} stand on one side only, such as {odd[0]!r}; evaluate all on the same rows"
                )
            ratios = [prompt_ratio(rows[key], "accuracy") for key in family_of]
            by_arm.setdefault(arm, {})[seed] = np.array([100 * right / samples for right, samples in ratios])
    return Accuracy(family_of, by_arm)


def accuracy_table(accuracy: Accuracy, first: str, num_resamples: int) -> list[str]:
    """A row an arm: accuracy by family, over all prompts with its interval, and its difference to the first arm."""
    rows = []
    for arm, by_seed in accuracy.by_arm.items():
        cells = [number(float(accuracy.values(arm, [*by_seed], f).mean()), 1) for f in accuracy.families]
        average = crossed_interval(accuracy.values(arm, [*by_seed]), num_resamples, seed=RESAMPLING_SEED)
        gaps = None if arm == first else accuracy.difference(arm, first)
        compared = _shown(gaps, num_resamples)
        each = [] if gaps is None else [number(gap, 1, sign=True) for gap in gaps.mean(1).tolist()]
        seeds = ", ".join(map(str, by_seed))
        bounds = max(average.low, 0.0), min(average.high, 100.0)  # Student's t knows no ends of the scale
        rows.append([arm, seeds, *cells, with_bounds(average.mean, *bounds, 1), compared, " ".join(each)])
    return markdown_table(["arm", "seeds", *accuracy.families, "average", f"less {first}", "by seed"], rows)


def family_differences(accuracy: Accuracy, first: str, num_resamples: int) -> list[str]:
    """A row an arm: its difference to the first arm on each family; nothing without the first arm or another one."""
    others = [arm for arm in accuracy.by_arm if arm != first]
    if first not in accuracy.by_arm or not others:
        return []
    rows = [
        [arm, *(_shown(accuracy.difference(arm, first, family), num_resamples) for family in accuracy.families)]
        for arm in others
    ]
    return markdown_table([f"less {first}", *accuracy.families], rows)


def spread_table(arms: Mapping[str, Arm], split: str) -> list[str]:
    """A row an arm: format, distances to the supervision and truth, each the mean over the seeds and their range."""
    tables = {arm: [e.table(split) for e in one.evaluations.values()] for arm, one in arms.items()}
    known = {c: s for c, s in SPREAD_COLUMNS.items() if any(s[0] in t for of_arm in tables.values() for t in of_arm)}
    rows = []
    for arm, of_arm in tables.items():
        cells = []
        for metric, factor in known.values():
            values = [factor * table[metric]["mean"] for table in of_arm if metric in table]
            cells.append(_with_range(values, 1 if factor == 100 or metric.startswith("response_length/") else 2))
        rows.append([arm, *cells])
    return markdown_table(["arm", *known], rows)


def make_page(
    ledger: Ledger, name_of: Mapping[Cell, str], first: str, tables: Mapping[str, str], num_resamples: int = 10_000
) -> str:
    """All tables as Markdown; what is missing is said.

    Args:
        ledger: of the run folder.
        name_of: which stage each arm, seed and stage is, see `Merged`.
        first: the arm that the others are compared with.
        tables: evaluation stage -> heading.
    """
    lines = [
        f"# Ablations: {ledger.folder.name}",
        "",
        f"Made from {ledger.folder} by `{ledger.content['command']}`.",
        "",
    ]
    for stage, heading in tables.items():
        arms = read_arms(ledger, name_of, stage)
        lines += [f"## {heading}", "", *_sections(arms, first, num_resamples)]
        for arm, one in arms.items():
            lines += [f"As {arm}, by the same stages: {', '.join(one.same)}.", ""] if one.same else []
        waiting = [f"{arm} ({', '.join(map(str, one.missing))})" for arm, one in arms.items() if one.missing]
        lines += [f"Not evaluated yet, by seed: {'; '.join(waiting)}.", ""] if waiting else []
    return "\n".join(lines)


def _sections(arms: Mapping[str, Arm], first: str, num_resamples: int) -> list[str]:
    """The tables of one evaluation stage, split by split."""
    evaluated = {arm: one for arm, one in arms.items() if one.evaluations}
    evaluations = {f"{arm} {seed}": e for arm, one in evaluated.items() for seed, e in one.evaluations.items()}
    lines = []
    for split in dict.fromkeys(split for evaluation in evaluations.values() for split in evaluation.tables):
        accuracy = accuracy_of(evaluated, split)
        lines += [f"### {split}", "", *accuracy_table(accuracy, first, num_resamples), ""]
        lines += [NOTE.format(len(accuracy.family_of), split, num_resamples, RESAMPLING_SEED), ""]
        differences = family_differences(accuracy, first, num_resamples)
        lines += [*differences, ""] if differences else []
        lines += [*spread_table(evaluated, split), ""]
        lines += [f"Mean over the seeds (least to most); items and steps counted as {check_rules(evaluations)}.", ""]
    return lines


def _shown(gaps_SP: np.ndarray | None, num_resamples: int) -> str:
    if gaps_SP is None:
        return ""
    interval: Interval = crossed_interval(gaps_SP, num_resamples, seed=RESAMPLING_SEED)
    return shown_difference(interval, digits=1, starred=len(gaps_SP) > 1)


def _with_range(values: Sequence[float], digits: int) -> str:
    known = [value for value in values if value == value]
    if not known:
        return NOT_AVAILABLE if values else ""
    shown = number(float(np.mean(known)), digits)
    return f"{shown} ({number(min(known), digits)} to {number(max(known), digits)})" if len(known) > 1 else shown
