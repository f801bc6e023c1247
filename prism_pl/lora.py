"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft, inside the policy: training sees adapters, everyone else whole
weights under their Hugging Face names."""

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXT_LINEARS = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
ADAPTER = "default"


@dataclass
class LoraSpec:
    """Which layers get adapters, and how large. Everything else in the policy stays as it is.

    There is no dropout: the trainer's log-probabilities would not be those of the policy that was sampled from.

    Attributes:
        rank: of the update to each weight.
        alpha: the update is scaled by alpha / rank.
        targets: a regular expression that the whole name of a layer matches; by default every linear layer of the text
            model.
    """

    rank: int = 16
    alpha: int = 32
    targets: str = TEXT_LINEARS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"policy.lora.rank is {self.rank}: give at least 1, or lora: null for full training")
        if self.alpha < 1:
            raise ValueError(f"policy.lora.alpha is {self.alpha}: updates are scaled by alpha / rank, give at least 1")


def add_lora(policy: Any, spec: LoraSpec) -> None:
    """Put adapters into a policy, in place; they alone are trained. They start as no change.

    Raises ValueError where peft is not installed, or where no layer matches.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"policy.lora needs peft ({error}): pip install peft, or set lora: null") from None
    for layer in (policy.get_input_embeddings(), policy.get_output_embeddings()):
        name = next(name for name, module in policy.named_modules() if module is layer)
        if re.fullmatch(spec.targets, name):
            raise ValueError(
                f"policy.lora.targets {spec.targets!r} matches {name}: embeddings and head may share their weights, "
                "which an adapter would part; match linear layers inside the model"
            )
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=spec.targets, bias="none")
    try:
        inject_adapter_in_model(config, policy, ADAPTER)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise ValueError(f"policy.lora.targets {spec.targets!r} matches no layer of the policy") from None


def freeze_adapters(policy: Any, patterns: Sequence[str]) -> None:
    """Turn off the adapters of weights whose names match a pattern."""
    for name, parameter in policy.named_parameters():
        owner, found, _ = name.partition(".lora_")
        if found and any(fnmatch(f"{owner}.weight", pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def has_lora(policy: Any) -> bool:
    """Whether a policy holds adapters."""
    return any(".lora_" in name for name, _ in policy.named_parameters())


def save_adapters(policy: Any, base: str, folder: Path) -> None:
    """Write a policy's adapters in peft's form, for `PeftModel.from_pretrained`, to be put on the policy they began on.

    Args:
        base: path or hub id of that policy.
    """
    from safetensors.torch import save_file

    config = policy.peft_config[ADAPTER]
    weights = {
        "base_model.model." + name.replace(f".{ADAPTER}", ""): parameter.detach().cpu().contiguous()
        for name, parameter in policy.named_parameters()
        if ".lora_" in name
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = base
    config.save_pretrained(folder)


@torch.no_grad()
def whole_parameters(policy: Any, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """A policy's parameters under their Hugging Face names, adapters merged into the weights they belong to. A merged
    weight is made when it is asked for.

    Args:
        names: which; None: all.
    """
    for name, parameter in policy.named_parameters():
        if ".lora_" in name or (names is not None and name.replace(".base_layer.", ".") not in names):
            continue
        owner, base, leaf = name.rpartition(".base_layer.")
        if not base:
            yield name, parameter
        elif leaf == "weight":
            # In float32 also under bf16 autocast, so that an engine is sent what an export holds.
            with torch.autocast(parameter.device.type, enabled=False):
                merged = parameter + policy.get_submodule(owner).get_delta_weight(ADAPTER)
            yield f"{owner}.weight", merged
        else:
            yield f"{owner}.{leaf}", parameter
