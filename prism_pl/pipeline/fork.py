"""`--from STAGE`: a new run folder in which the stage and what depends on it run; the others are taken from the old."""

import os
from pathlib import Path

from prism_pl.errors import UsageError
from prism_pl.folders import free_folder, is_free
from prism_pl.ledger import LOCK, Entry, Ledger
from prism_pl.pipeline.graph import Graph


def fork(graph: Graph, stage: str, folder: Path, to: Path | None, command: str) -> Ledger:
    """The ledger of a fork, not written yet: entries of the old one with their folders and hashes, as parents.

    Args:
        graph: the stages as they are to be now.
        stage: the first that runs.
        folder: of the pipeline to fork.
        to: the new run folder; None is the next free one beside the old.
        command: for the new ledger.

    Raises:
        UsageError: nothing to fork, a parent that is not finished, or a new folder that is none.
    """
    old = Ledger.read(folder)
    if old is None:
        raise UsageError(f"--from {stage}: {folder} holds no pipeline to fork (--run_folder names it).")
    done = {name for name, entry in old.stages.items() if entry["status"] == "finished"}
    unfinished = [name for name in graph if name in graph.above(stage) - done]
    if unfinished:
        raise UsageError(
            f"--from {stage}: it depends on {', '.join(unfinished)}, which {folder} has not finished. Run that first, "
            f"or fork from {unfinished[0]}."
        )
    new = to or free_folder(folder, LOCK)
    if not is_free(new, LOCK):
        raise UsageError(f"--to {new} exists: a fork begins in a new folder. To go on with it: --run_folder {new}.")
    ledger = Ledger.new(new, command)
    ledger.content["forked_from"] = {"folder": os.path.relpath(folder, new), "stage": stage}
    anew = graph.below({stage}) | {stage}
    for name in graph:
        if name not in anew and name in old.stages and old.stages[name]["status"] == "finished":
            ledger.stages[name] = _taken(old.stages[name], old, new)
    return ledger


def _taken(entry: Entry, old: Ledger, new: Path) -> Entry:
    """An entry of the old ledger as the new one has it: its paths lead to the old folder."""
    taken = entry.copy()
    taken["folder"], taken["log"] = (os.path.relpath(old.path(entry, key), new) for key in ("folder", "log"))
    taken["taken_from"] = os.path.relpath(old.folder, new)
    return taken


def follow(ledger: Ledger) -> None:
    """Let what was taken from another pipeline lead to where that one has it now: `--update` there moves the folder of
    a stage that it runs anew to `earlier/`. In memory; nothing is written."""
    originals: dict[str, Ledger | None] = {}
    for name, entry in ledger.stages.items():
        source = entry["taken_from"]
        if source is None:
            continue
        if source not in originals:
            original = Ledger.read(Path(os.path.normpath(ledger.folder / source)))
            originals[source] = original
            if original is not None:  # may be a fork itself
                follow(original)
        if (original := originals[source]) is not None:
            earlier = [one for one in original.content["earlier"] if one["name"] == name]
            for one in [original.stages.get(name), *earlier]:
                if one is not None and all(one[key] == entry[key] for key in ("attempts", "outputs")):
                    taken = _taken(one, original, ledger.folder)
                    entry["folder"], entry["log"] = taken["folder"], taken["log"]
                    break
