"""What a warm-started discriminator's folder holds besides its backbone: settings and heads."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from prism_pl.chat import EXPERTS, WHOLE

SETTINGS = "discriminator.json"
HEADS = "heads.safetensors"

HeadSharing = Literal["shared", "per_expert"]


@dataclass(frozen=True)
class Settings:
    """What must be the same wherever a discriminator reads: scores made otherwise do not compare.

    Attributes:
        kind: the class's name.
        experts: the segments it reads.
        heads: one for all segments, or one for each.
        max_segment_tokens, likelihood_weight: see the discriminators.
        max_pixels: images above it are scaled down; None keeps the limit of the policy that it grew from.
    """

    kind: str
    experts: tuple[str, ...]
    heads: HeadSharing
    max_segment_tokens: int = 4096
    likelihood_weight: float = 0.0
    max_pixels: int | None = None


def fresh_settings(path: str, given: Mapping[str, Any]) -> Settings:
    """Settings of a discriminator that starts anew from the policy at `path`: `given`, defaults where it has None."""
    if _find(path, SETTINGS) is not None:
        raise ValueError(
            f"{path!r} is a warm-started discriminator and init_heads would throw its heads away: leave init_heads "
            "out, or name a policy"
        )
    return Settings(**{name: value for name, value in given.items() if value is not None})


def warm_settings(path: str, given: Mapping[str, Any]) -> Settings:
    """The settings at `path`. ValueError where there are none, or where `given` names another value than theirs."""
    file = _find(path, SETTINGS)
    if file is None:
        raise ValueError(
            f"{path!r} is no warm-started discriminator (no {SETTINGS}), and missing head weights are never random: "
            "run warmup.yaml and name its export/ folder"
        )
    held = json.loads(file.read_text())
    if held.get("kind") != given["kind"]:
        raise ValueError(
            f"{path!r} was warm-started as {held.get('kind')}, not as {given['kind']}: name that class, or run "
            f"warmup.yaml with {given['kind']}"
        )
    settings = Settings(**{**held, "experts": tuple(held["experts"])})
    refuse_other(path, given, asdict(settings))
    return settings


def refuse_other(path: str, given: Mapping[str, Any], held: Mapping[str, Any]) -> None:
    """ValueError where `given` names another value than the warm start at `path` has; None names none."""
    for name, value in given.items():
        if value is not None and value != held[name]:
            raise ValueError(
                f"{name} is {value}, and {path!r} was warm-started with {held[name]}: leave {name} out, or run "
                "warmup.yaml anew with it"
            )


def known_settings(options: Mapping[str, Any]) -> Settings | None:
    """What a discriminator of these options will read, before it is built: from its folder, or where it starts anew the
    defaults, with what is given in their place. None of a folder that is not there or holds no warm-started one."""
    if options.get("init_heads"):
        held: dict[str, Any] = {"kind": "", "experts": EXPERTS, "heads": "shared"}
    elif (file := Path(options.get("path", "")) / SETTINGS).is_file():
        held = json.loads(file.read_text())
    else:
        return None
    held["experts"] = WHOLE if options.get("segments") == "whole" else tuple(held["experts"])
    cap = options.get("max_segment_tokens")
    return Settings(**(held if cap is None else {**held, "max_segment_tokens": cap}))


def write_settings(settings: Settings, folder: Path) -> None:
    """Write the settings beside the weights."""
    (folder / SETTINGS).write_text(json.dumps(asdict(settings), indent=2) + "\n")


def write_heads(heads: Mapping[str, Tensor], folder: Path) -> None:
    """Write the heads' weights, in float32: they are a few numbers."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in heads.items()}, folder / HEADS)


def read_heads(path: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The heads' weights at `path`. ValueError where names or shapes are not those of `wanted`."""
    from safetensors.torch import load_file

    file = _find(path, HEADS)
    if file is None:
        raise ValueError(
            f"{path!r} lacks {HEADS}, and missing head weights are never random: run warmup.yaml and name its export/ "
            "folder"
        )
    found = load_file(file)
    shapes = [{name: tuple(tensor.shape) for name, tensor in heads.items()} for heads in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{file} holds the heads {shapes[0]} where {shapes[1]} are needed: run warmup.yaml anew")
    return found


def _find(path: str, name: str) -> Path | None:
    """A file of a folder or hub id; None where it does not exist."""
    from transformers.utils.hub import cached_file

    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None
