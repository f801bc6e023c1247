"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft, inside the policy: training sees adapters, everyone else whole
weights under their Hugging Face names."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEXT_LINEARS = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
ADAPTER = "default"


@dataclass
class LoraSpec:
    """Which layers get adapters, and how large. Everything else in the policy stays as it is.

    Attributes:
        rank: of the update to each weight.
        alpha: the update is scaled by alpha / rank.
        dropout: before each adapter, in training.
        targets: a regular expression that the whole name of a layer matches; by default every linear layer of the text
            model.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = TEXT_LINEARS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"policy.lora.rank is {self.rank}: give at least 1, or lora: null for full training")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"policy.lora.dropout is {self.dropout}: give 0 up to below 1")


def add_lora(policy: Any, spec: LoraSpec) -> None:
    """Put adapters into a policy, in place; they alone are trained. They start as no change.

    Raises ValueError where peft is not installed, or where no layer matches.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"policy.lora needs peft ({error}): pip install peft, or set lora: null") from None
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=spec.targets, bias="none"
    )
    try:
        inject_adapter_in_model(config, policy, ADAPTER)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise ValueError(f"policy.lora.targets {spec.targets!r} matches no layer of the policy") from None


def has_lora(policy: Any) -> bool:
    """Whether a policy holds adapters."""
    return any(".lora_A." in name for name, _ in policy.named_parameters())


@torch.no_grad()
def whole_parameters(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """A policy's parameters under their Hugging Face names, adapters merged into the weights they belong to. A merged
    weight is made when it is asked for."""
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            continue
        owner, base, leaf = name.rpartition(".base_layer.")
        if not base:
            yield name, parameter
        elif leaf == "weight":
            yield f"{owner}.weight", parameter + policy.get_submodule(owner).get_delta_weight(ADAPTER)
        else:
            yield f"{owner}.{leaf}", parameter
