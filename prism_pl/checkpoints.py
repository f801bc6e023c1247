"""What a run's checkpoint holds: the trained networks, and plain values."""

from pathlib import Path
from typing import Any

from torch import nn

from prism_pl.fingerprint import hash_path

PLAIN = (str, int, float, bool, type(None))


def source_of(path: str) -> dict[str, str] | None:
    """What a frozen network is built from, before it is: its path and a hash of all files there. None of a hub id."""
    return {"path": path, "sha256": hash_path(Path(path))} if Path(path).is_dir() else None


def leave_out(checkpoint: dict[str, Any], name: str, source: dict[str, str] | None) -> None:
    """Take a frozen network's weights out of a checkpoint: they lie at the network's own path, `source`."""
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: w for key, w in weights.items() if not key.startswith(f"{name}.")}
    checkpoint[f"{name}_source"] = source


def put_back(checkpoint: dict[str, Any], name: str, network: nn.Module, source: dict[str, str] | None) -> None:
    """Undo `leave_out` with the weights of the network as built, so that loading stays strict about all others.

    Raises:
        ValueError: other files lie at the path than those that the run began with. (A path that was changed is a
            setting that was changed, which the run's folder refuses or the user insists on.)
    """
    before = checkpoint.get(f"{name}_source")
    if before and source and before["path"] == source["path"] and before["sha256"] != source["sha256"]:
        raise ValueError(
            f"model.init_args.policy.path: {source['path']} holds other files than when this run began, and its frozen "
            f"{name} network is read from there again: bring them back, or start anew with --fresh"
        )
    checkpoint["state_dict"].update({f"{name}.{key}": w for key, w in network.state_dict().items()})


def keep_plain_hyperparameters(checkpoint: dict[str, Any]) -> None:
    """Drop hyperparameters that are objects. Under the CLI all are plain YAML values. A module built from Python is
    given factories and an engine, which holds the policy: pickled, they would swell the checkpoint, and loading with
    `weights_only` would refuse it. `load_from_checkpoint` then needs them as arguments."""
    given = checkpoint.get("hyper_parameters", {})
    checkpoint["hyper_parameters"] = {name: value for name, value in given.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return type(value) in PLAIN
