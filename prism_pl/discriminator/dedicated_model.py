"""Qwen3-VL with an MLP for each expert in every text layer, and each sequence run by the MLPs of its own expert."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer, Qwen3VLTextMLP

from prism_pl.chat import EXPERTS
from prism_pl.discriminator.upcycling import from_weights


class Routes(NamedTuple):
    """Which of N places goes to which expert: `order_N` puts them expert by expert, `sizes` of them to each, and
    `back_N` undoes it."""

    order_N: Tensor
    back_N: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, expert_N: Tensor, num_experts: int) -> "Routes":
        order_N = expert_N.argsort(stable=True)
        return cls(order_N, order_N.argsort(), torch.bincount(expert_N, minlength=num_experts).tolist())


class DedicatedLayer(Qwen3VLTextDecoderLayer):
    """A text layer whose `mlp` holds one MLP an expert."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp: Any = nn.ModuleDict({expert: Qwen3VLTextMLP(config) for expert in EXPERTS})

    def forward(self, hidden_states: Tensor, *, routes: Routes, **options: Any) -> Tensor:
        """As the dense layer.

        Args:
            hidden_states: (rows, columns, hidden), as many places as `routes` has.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        hidden_states = hidden_states + attended
        flat_NH = self.post_attention_layernorm(hidden_states).flatten(0, 1)
        # An expert without a place runs over none of them: its weights get a gradient of 0, and ranks stay in step.
        parts = flat_NH.index_select(0, routes.order_N).split(routes.sizes)
        made = [mlp(part) for mlp, part in zip(self.mlp.values(), parts, strict=True)]
        return hidden_states + torch.cat(made).index_select(0, routes.back_N).view_as(hidden_states)


class DedicatedQwen3VLModel(Qwen3VLModel):
    """A Qwen3-VL backbone of `DedicatedLayer`s; its text model's forward pass takes `routes`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text: Any = self.language_model
        text.layers = nn.ModuleList(DedicatedLayer(text.config, i) for i in range(len(text.layers)))
        self.post_init()


def dedicate(config: Any, dense: Callable[[], Any], attn_implementation: str) -> DedicatedQwen3VLModel:
    """Each expert a copy of the dense model's MLPs; all else as it was.

    Args:
        config: of the dense model.
        dense: gives the dense model; at ZeRO-3 it is called on the first rank alone.
    """
    return from_weights(
        DedicatedQwen3VLModel, config, lambda: _dedicated(dense()), attn_implementation=attn_implementation
    )


def _dedicated(dense: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, tensor in dense.state_dict().items():
        layer, found, part = name.partition(".mlp.")
        if found and layer.startswith("language_model."):
            weights |= {f"{layer}.mlp.{expert}.{part}": tensor.clone() for expert in EXPERTS}
        else:
            weights[name] = tensor
    return weights
