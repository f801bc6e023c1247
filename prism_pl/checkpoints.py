"""What a run's checkpoint holds: the trained networks, and plain values."""

from typing import Any

from torch import nn

PLAIN = (str, int, float, bool, type(None))


def leave_out(checkpoint: dict[str, Any], name: str) -> None:
    """Take a frozen network's weights out of a checkpoint: they lie at the network's own path."""
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: w for key, w in weights.items() if not key.startswith(f"{name}.")}


def put_back(checkpoint: dict[str, Any], name: str, network: nn.Module) -> None:
    """Undo `leave_out` with the weights of the network as built, so that loading stays strict about all others."""
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
