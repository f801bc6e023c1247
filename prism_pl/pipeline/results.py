"""What a finished stage left: hashes of its outputs, and what it measured."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from prism_pl.fingerprint import hash_path
from prism_pl.ledger import Attempt, Entry
from prism_pl.pass_rates import read_pass_rates
from prism_pl.pipeline.graph import OUTPUTS
from prism_pl.report.events import read_curves


def outputs_of(kind: str, folder: Path) -> dict[str, str]:
    """Name -> sha256 of those outputs of a command that are there."""
    return {what: hash_path(folder / path) for what, path in OUTPUTS[kind].items() if (folder / path).exists()}


def results_of(entry: Entry, folder: Path, keep: Sequence[float] | None) -> dict[str, Any]:
    """The measurements of a finished stage; `prism_pl.ledger` has their shape.

    Args:
        keep: of a difficulty filter, the least and the largest pass rate that is trained on; None where nothing is.
    """
    if entry["kind"] == "fit":
        metrics = {tag: curve.values[-1] for tag, curve in read_curves(folder).items() if tag != "hp_metric"}
        found = {"step": step_of(folder / "checkpoints" / "last.ckpt"), "metrics": metrics}
        kept = folder / OUTPUTS["fit"]["kept_ids"]
        return found | ({"kept": len(json.loads(kept.read_text())["ids"])} if kept.exists() else {})
    if entry["kind"] == "test":
        return _evaluated(folder / OUTPUTS["test"]["evaluation"])
    if entry["kind"] == "predict":
        return _filtered(folder / OUTPUTS["predict"]["pass_rates"], keep)
    return {}


def keep_of(configs: Sequence[Mapping[str, Any]]) -> Sequence[float] | None:
    """The bounds of the pass rates that are trained on, of the first of these stages' configurations that has some."""
    data = [config.get("data") or {} for config in configs]
    return next((found for one in data if (found := one.get("init_args", one).get("keep"))), None)


def begun_at(folder: Path, attempt: Attempt) -> int | None:
    """The step that an attempt went on from: as the fit itself noted in starts.jsonl, else as expected before it."""
    file = folder / "starts.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines:
        return attempt["resumed_from_step"]
    start = json.loads(lines[-1])
    if start["time"] < attempt["started"]:  # it ended before it began to train
        return attempt["resumed_from_step"]
    return start["step"] if start["checkpoint"] is not None else None


def step_of(checkpoint: Path | None) -> int | None:
    """The step of a checkpoint, a file or a folder; None where there is none, or it cannot be read."""
    if checkpoint is None:
        return None
    import torch

    if checkpoint.is_dir():  # of several engines
        checkpoint = checkpoint / "rank-0.ckpt"
    try:
        # Mapped into memory: only the step is read, not the weights.
        return torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    except Exception:  # what is wrong with it is said by the command that goes on from it
        return None


def _evaluated(file: Path) -> dict[str, Any]:
    """The tables over all families, with mean and interval of each metric."""
    content = json.loads(file.read_text())
    tables = {
        split: {
            metric: {key: entry[key] for key in ("mean", "low", "high")} for metric, entry in families["all"].items()
        }
        for split, families in content["tables"].items()
    }
    return {"name": content["name"], "tables": tables}


def _filtered(file: Path, keep: Sequence[float] | None) -> dict[str, Any]:
    rates = list(read_pass_rates(file).values())
    return {
        "prompts": len(rates),
        "mean_pass_rate": fmean(rates),
        "keep": keep,
        "kept": None if keep is None else sum(keep[0] <= rate <= keep[1] for rate in rates),
        "none_right": sum(rate == 0 for rate in rates),
        "all_right": sum(rate == 1 for rate in rates),
    }
