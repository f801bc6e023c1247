"""What a start of the pipeline does with each stage: the ledger against the YAML and against what lies on disk."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prism_pl.errors import UsageError
from prism_pl.fingerprint import differences, hash_path, hash_value
from prism_pl.ledger import Entry, Ledger
from prism_pl.pipeline.graph import OUTPUTS, Graph
from prism_pl.pipeline.inputs import gone
from prism_pl.requested import Complete, requested

Action = Literal["skip", "resume", "run", "rerun", "stop"]
# Of a fit's folder, see `prism_pl.checkpoint_files`, which is too heavy to import here.
LAST, PREVIOUS, NEXT = (f"checkpoints/{name}.ckpt" for name in ("last", "previous", "next"))
PASSED_OVER = "checkpoints/passed-over.partial"
PROGRESS = "progress.json"  # says that there has been one


@dataclass(frozen=True)
class Wanted:
    """A stage as the YAML wants it now.

    Args:
        args: what follows `python -m prism_pl`.
        config: complete, with paths in stages' folders written `{name}/...`.
        inputs: files and folders from outside that it reads: dotted key -> path and sha256.
        missing: those that are not there and cannot be hub ids either: dotted key -> path.
    """

    args: list[str]
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def data_hash(self) -> str:
        """Of the configuration's data section and the data files from outside."""
        files = {key: one["sha256"] for key, one in self.inputs.items() if key.startswith("data.")}
        return hash_value([self.config.get("data"), files])


@dataclass(frozen=True)
class Step:
    """What is done with a stage, and why.

    Args:
        action: `skip`: it is finished. `resume`: it goes on in its folder. `run`: the first time. `rerun`: anew, with
            the old folder moved aside. `stop`: it would have to be run anew, which needs --update.
        reason: for the user.
        changes: what differs from what it was made with or left; empty where only a parent runs.
        options: options that the code has gained or lost since, and nobody asked for.
    """

    action: Action
    reason: str
    changes: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)


def with_stage_names(value: Any, folders: Mapping[str, Path]) -> Any:
    """A configuration with paths in the stages' folders written `{name}/...`: moving a run changes nothing."""
    if isinstance(value, dict):
        return {key: with_stage_names(item, folders) for key, item in value.items()}
    if isinstance(value, list):
        return [with_stage_names(item, folders) for item in value]
    if isinstance(value, str) and os.sep in value:
        for name, folder in folders.items():
            for prefix in (str(folder), str(folder.absolute())):
                if value == prefix or value.startswith(prefix + os.sep):
                    return "{" + name + "}" + value[len(prefix) :]
    return value


def make_plan(
    graph: Graph, wanted: Mapping[str, Wanted], ledger: Ledger, update: bool, complete: Callable[[str], Complete]
) -> dict[str, Step]:
    """Decide for each stage, parents first.

    Args:
        graph: the stages.
        wanted: each stage as it is to be now.
        ledger: what ran.
        update: whether finished stages may be run anew.
        complete: command -> how today's code completes a configuration of it.
    """
    plan: dict[str, Step] = {}
    for name, node in graph.items():
        entry = ledger.stages.get(name)
        if entry is None or entry["status"] == "pending":
            plan[name] = _first_start(ledger.folder / name, update)
            continue
        missing = gone(entry, wanted[name].config)
        changes, options = _settings(entry, wanted[name], missing, complete(entry["kind"]))
        changes += changed(name, entry, wanted[name], ledger, graph)
        anew = [parent for parent in node.parents if plan[parent].action != "skip"]
        if entry["status"] == "finished":
            changes += altered(entry, ledger)
            said = "".join(f"; {path} ({key}), which it read, is gone" for key, path in missing.items())
            step = Step("skip", f"finished {entry['ended']} in {took(entry['seconds'])}; nothing changed since{said}")
        else:
            changes += _lost(entry, ledger)
            step = Step("resume", _how_it_goes_on(entry, ledger))
        if changes or anew:
            reason = "; ".join(changes) or f"{', '.join(anew)} runs first"
            free = update or node.stage.command == "report" or _nothing_to_lose(entry, ledger)
            step = Step("rerun" if free else "stop", reason, changes)
        plan[name] = replace(step, options=options)
    return plan


def _settings(
    entry: Entry, wanted: Wanted, missing: Mapping[str, str], complete: Complete
) -> tuple[list[str], list[str]]:
    """What was set otherwise when a stage ran, and the options that the code has gained or lost since."""
    asked, others = requested(entry["config"], wanted.config, complete)
    return [str(one) for one in asked if one.key not in missing], [str(one) for one in others]


def _first_start(folder: Path, update: bool) -> Step:
    """Of a stage that the ledger has not run; a fit by hand in its folder would be gone on with, whatever it was."""
    if checkpoint_in(folder) is None and not (folder / PROGRESS).exists():
        return Step("run", "not run yet")
    found = f"{folder} holds a run that the ledger knows nothing of"
    return Step("rerun" if update else "stop", found, [found])


def changed(name: str, entry: Entry, wanted: Wanted, ledger: Ledger, graph: Graph) -> list[str]:
    """What a stage was made from that is different now: inputs from outside, outputs of its parents."""
    found = []
    for key, now in wanted.inputs.items():
        before = entry["inputs"].get(key)
        if before is not None and before["path"] == now["path"] and before["sha256"] != now["sha256"]:
            found.append(f"{now['path']} ({key}) has other contents than when the stage read it")
    if entry["kind"] == "report" and entry["parents"].keys() != graph[name].parents.keys():
        found.append("other stages than it reported on")
    for parent, read in entry["parents"].items():
        left = ledger.stages[parent]["outputs"] if parent in ledger.stages and parent in graph else {}
        found += [f"{parent} has another {what} now" for what, sha in read.items() if left.get(what, sha) != sha]
    return found


def altered(entry: Entry, ledger: Ledger) -> list[str]:
    """Which outputs of a finished stage are no longer as it left them."""
    folder, found = ledger.path(entry), []
    for what, sha in entry["outputs"].items():
        path = folder / OUTPUTS[entry["kind"]][what]
        if not path.exists():
            found.append(f"{path} is gone")
        elif entry["kind"] != "report" and hash_path(path) != sha:
            found.append(f"{path} was altered after the stage wrote it")
    return found


def _how_it_goes_on(entry: Entry, ledger: Ledger) -> str:
    state = "killed" if entry["status"] == "running" else entry["status"]
    checkpoint = checkpoint_in(ledger.path(entry))
    return f"{state} before; goes on from {checkpoint}" if checkpoint else f"{state} before; starts anew"


def checkpoint_in(folder: Path) -> Path | None:
    """What a fit goes on from, or None; as `LastCheckpoints.to_go_on_from` has it."""
    last, previous, made, passed_over = (folder / name for name in (LAST, PREVIOUS, NEXT, PASSED_OVER))
    if not last.exists() and made.exists() and (previous.exists() or passed_over.exists()):
        return made  # killed between two renames
    return next((path for path in (last, previous) if path.exists()), None)


def _lost(entry: Entry, ledger: Ledger) -> list[str]:
    """A fit that had a checkpoint and has none is not silently begun anew."""
    folder = ledger.path(entry)
    lost = (folder / PROGRESS).exists() and checkpoint_in(folder) is None
    return [f"{folder / LAST}, to go on from, is gone"] if lost else []


def _nothing_to_lose(entry: Entry, ledger: Ledger) -> bool:
    """A stage that broke before its first checkpoint has nothing that --update would have to be asked for."""
    folder = ledger.path(entry)
    return entry["status"] != "finished" and checkpoint_in(folder) is None and not (folder / PROGRESS).exists()


def refuse_changes(plan: Mapping[str, Step], run_folder: Path, others: Sequence[str] = ()) -> None:
    """Stop where a finished stage would have to run anew and --update was not given.

    Raises:
        UsageError: with what changed, stage by stage, and the ways out.
    """
    stopped = {name: step for name, step in plan.items() if step.action == "stop"}
    if not stopped:
        return
    causes = {name: step for name, step in stopped.items() if step.changes} or stopped
    said = "; ".join(f"{name}: {', '.join(step.changes) or step.reason}" for name, step in causes.items())
    anew = [name for name, step in plan.items() if step.action in ("stop", "rerun")]
    raise UsageError(
        f"{run_folder} holds stages that were made otherwise. {said}. Put it back as it was; or --update runs "
        f"{', '.join(anew)} anew and keeps what they left in {run_folder / 'earlier'}; or --from {next(iter(causes))} "
        "runs them in a new folder."
    )


def refuse_missing(plan: Mapping[str, Step], wanted: Mapping[str, Wanted], ledger: Ledger) -> None:
    """Stop before the first stage where a later one would not find what it reads from outside. UsageError."""
    found = []
    for name, step in plan.items():
        if step.action == "skip":
            continue
        missing = wanted[name].missing
        if name in ledger.stages:  # what was there before is no hub id
            missing = gone(ledger.stages[name], wanted[name].config) | missing
        found += [f"{name}: {key}: there is no {path}" for key, path in missing.items()]
    if found:
        raise UsageError(f"{'; '.join(found)}. Nothing was started: put it there, or change the setting.")


def other_versions(ledger: Ledger, now: Mapping[str, str | None], plan: Mapping[str, Step]) -> list[str]:
    """Where stages ran on other versions than those here, as `torch: 2.12.0 -> 2.13.0 (sft, align)`, and which options
    these have that those had not, or the other way round."""
    found: dict[str, list[str]] = {}
    for name, entry in ledger.stages.items():
        if entry["status"] != "pending":
            for difference in [*differences(entry["versions"], dict(now)), *plan[name].options]:
                found.setdefault(difference, []).append(name)
    return [f"{difference} ({', '.join(names)})" for difference, names in found.items()]


def took(seconds: float | None) -> str:
    """A duration in words: `42 s`, `3 min 7 s`."""
    whole = round(seconds or 0)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
