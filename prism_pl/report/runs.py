"""A run: a folder that holds the folders of stages and evaluations, found by what lies in them.

An evaluation's folder holds `evaluation.json`; a stage's holds TensorBoard event files with its own tags; a difficulty
filter's holds `pass_rates.jsonl`. Where a pipeline wrote `ledger.json`, names, order and times of the stages are the
ledger's. A single stage or evaluation is a run too.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from prism_pl.errors import UsageError, did_you_mean
from prism_pl.evaluation import IMAGES
from prism_pl.pass_rates import PASS_RATES
from prism_pl.report.evaluations import FILE_NAME, Evaluation, read_evaluation
from prism_pl.report.events import EVENT_FILES, Curves, read_curves

LEDGER = "ledger.json"
# Folders of a stage that hold no stage, and where a pipeline keeps what it ran anew.
NOT_STAGES = ("checkpoints", "earlier", IMAGES)
DEPTH = 4
# Tags that every stage may have, and so tell no stage.
SHARED_TAGS = ("time", "rollout", "proxies", "health", "evaluate", "epoch", "hp_metric", "step")


@dataclass(frozen=True)
class Stage:
    """A stage's run folder.

    Attributes:
        name: of the stage in the ledger, else the path of its folder in the run's.
        kind: what its tags begin with: sft, warmup, align, rlvr or a stage of the user's.
        curves: its scalars.
        config: its `config.yaml`, empty where there is none.
        ledger: its entry in the ledger, empty where there is none.
    """

    name: str
    folder: Path
    kind: str
    curves: Curves
    config: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The module's init_args."""
        return self.config.get("model", {}).get("init_args", {})

    @cached_property
    def num_batches(self) -> int:
        """Batches so far; TensorBoard counts them from 0."""
        own = [curve.steps[-1] for tag, curve in self.curves.items() if tag.startswith(f"{self.kind}/")]
        return max(own, default=-1) + 1

    @property
    def seconds(self) -> tuple[float, str]:
        """Wall-clock time, and where it is from: the ledger's, else from the first logged number to the last."""
        if isinstance(self.ledger.get("seconds"), int | float):
            return float(self.ledger["seconds"]), "ledger"
        times = [time for curve in self.curves.values() for time in (curve.times[0], curve.times[-1])]
        return max(times) - min(times), "events"


@dataclass
class Run:
    """All that was found below a folder. `evaluations` and `stages` stand in order."""

    name: str
    folder: Path
    stages: list[Stage] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    filters: dict[str, Path] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs; folders of one name are told apart by the folders above them.

    Raises:
        UsageError: a path that does not exist, or is no run.
        ValueError: a file in it that is broken.
    """
    folders = [_folder_of(path) for path in paths]
    if len(set(folders)) < len(folders):
        raise UsageError(f"report: one run is named twice among {', '.join(map(str, paths))}; give each once.")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _folder_of(path: Path) -> Path:
    if not path.exists():
        raise UsageError(
            f"report {path}: there is no such folder. Give that of a run, such as runs/demo.{_beside(path)}"
        )
    if path.is_file() and path.name != FILE_NAME:
        raise UsageError(f"report {path}: this is a file. Give the folder of a run, such as {path.parent}.")
    return (path.parent if path.is_file() else path).resolve()


def _beside(path: Path) -> str:
    """The nearest of the folders beside what is no run, or all of them."""
    folders = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    others = [one.name for one in folders if one.is_dir() and one != path and not one.name.startswith(".")]
    return did_you_mean(path.name, others) or (f" Beside it: {', '.join(others[:8])}." if others else "")


def _names(folders: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def _read_run(folder: Path, name: str) -> Run:
    run = Run(name, folder, ledger=_read_ledger(folder / LEDGER))
    entries = run.ledger.get("stages", {})
    named = {_place(folder, entry, key): (key, entry) for key, entry in entries.items()}
    found: list[tuple[str, Evaluation]] = []
    for place in dict.fromkeys([*named, *_folders(folder, DEPTH)]):
        if not place.is_dir():
            continue
        relative = place.relative_to(folder).as_posix() if place.is_relative_to(folder) else place.name
        label, entry = named.get(place, (folder.name if relative == "." else relative, {}))
        if (place / FILE_NAME).exists():
            found.append((label, read_evaluation(place)))
        if (place / PASS_RATES).exists():
            run.filters[label] = place
        if any(place.glob(EVENT_FILES)):
            curves = read_curves(place)
            kind = _kind(curves)
            if kind:
                run.stages.append(Stage(label, place, kind, curves, _read_config(place), entry))
    if not (run.stages or found or run.filters or entries):
        raise UsageError(
            f"report {folder}: this is no run. It holds no evaluation.json, no pass_rates.jsonl, no ledger.json and no "
            f"TensorBoard events of a stage. Give the folder that holds the stages' folders.{_beside(folder)}"
        )
    if not entries:
        run.stages.sort(key=lambda stage: min(curve.times[0] for curve in stage.curves.values()))
        found = _in_order(found, run.stages)
    times = Counter(evaluation.name for _, evaluation in found)
    run.evaluations = {e.name if times[e.name] == 1 else label: e for label, e in found}
    return run


def _place(folder: Path, entry: dict[str, Any], name: str) -> Path:
    return Path(os.path.normpath(folder / str(entry.get("folder", name))))


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folder and those below it that may be a stage's."""
    yield folder
    for inner in sorted(folder.iterdir()) if depth else ():
        if inner.is_dir() and inner.name not in NOT_STAGES and not inner.name.startswith(("export", ".")):
            yield from _folders(inner, depth - 1)


def _kind(curves: Curves) -> str:
    """The stage whose tags these are, or "" for the events of an evaluation."""
    heads = Counter(tag.split("/")[0] for tag in curves if "/" in tag)
    own = [(count, head) for head, count in heads.items() if head not in SHARED_TAGS and "lr-" not in head]
    return max(own)[1] if own else ""


def _read_ledger(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        entries = content.get("stages", {})
        if not all(isinstance(entry, dict) for entry in entries.values()):
            raise TypeError("its stages are no objects")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no ledger ({error}): move it away to report on what lies beside it") from None
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text()) if file.exists() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML ({error}): move it away to report without it") from None
    return content if isinstance(content, dict) else {}


# How checkpoints stand to each other


def same_place(one: str, other: str) -> bool:
    """Whether two paths mean one folder, also after a run was moved: the last two parts agree."""
    return bool(one) and Path(one).parts[-2:] == Path(other).parts[-2:]


def parent_of(evaluation: Evaluation, run: Run) -> str | None:
    """The name of the checkpoint that an evaluated one was trained from, as far as the run has both."""
    stage = _stage_of(evaluation, run.stages)
    start = str(stage.settings.get("policy", {}).get("path", "")) if stage else ""
    names = [n for n, e in run.evaluations.items() if same_place(start, str(e.settings["policy"]))]
    return names[0] if names else None


def unevaluated(run: Run) -> list[str]:
    """The policies that stages exported and no evaluation is of, as `sft/export`."""
    seen = [str(evaluation.settings["policy"]) for evaluation in run.evaluations.values()]
    exports = {f"{stage.name}/export": stage.folder / "export" for stage in run.stages if stage.kind != "warmup"}
    return [
        name for name, path in exports.items() if path.is_dir() and not any(same_place(str(path), one) for one in seen)
    ]


def _stage_of(evaluation: Evaluation, stages: Sequence[Stage]) -> Stage | None:
    """The stage that exported the policy."""
    exported = Path(str(evaluation.settings["policy"]))
    found = [stage for stage in stages if exported.parent.name == stage.folder.name and stage.kind != "warmup"]
    return found[0] if found else None


def _in_order(found: list[tuple[str, Evaluation]], stages: Sequence[Stage]) -> list[tuple[str, Evaluation]]:
    """As their stages ran; first what no stage of the run exported."""
    order = {id(stage): n for n, stage in enumerate(stages, start=1)}
    return sorted(found, key=lambda item: order.get(id(_stage_of(item[1], stages)), 0))


def labels_of(runs: Sequence[Run]) -> dict[tuple[str, str], str]:
    """(run, checkpoint) -> what tables call it: its name, or `run/name` where several runs have the name."""
    names = Counter(name for run in runs for name in run.evaluations)
    plain = len(runs) == 1 or max(names.values(), default=1) == 1
    return {(run.name, n): n if plain else f"{run.name}/{n}" for run in runs for n in run.evaluations}


def evaluations_of(runs: Sequence[Run]) -> dict[str, Evaluation]:
    """Label -> evaluation, run by run."""
    labels = labels_of(runs)
    return {labels[run.name, name]: evaluation for run in runs for name, evaluation in run.evaluations.items()}


def default_pairs(run: Run) -> list[tuple[str, str]]:
    """Each checkpoint with the one it was trained from, and those with each other that stages of one kind exported."""
    pairs = []
    for name, evaluation in run.evaluations.items():
        parent = parent_of(evaluation, run)
        if parent is not None:
            pairs.append((name, parent))
    kinds: dict[str, list[str]] = {}
    for name, evaluation in run.evaluations.items():
        stage = _stage_of(evaluation, run.stages)
        if stage is not None:
            kinds.setdefault(stage.kind, []).append(name)
    for names in kinds.values():
        pairs += [(b, a) for i, a in enumerate(names) for b in names[i + 1 :] if (b, a) not in pairs]
    return pairs
