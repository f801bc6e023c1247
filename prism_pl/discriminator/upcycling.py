"""Sparse upcycling (arXiv 2212.05055): a dense Qwen3-VL becomes a mixture whose experts are its MLPs, with noise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prism_pl.strategy.sharding import build_sharded, builds_sharded

ROUTER_STD = 0.02


def upcycle(
    dense: Any, num_experts: int, top_k: int, noise_std: float, *, attn_implementation: str, experts_implementation: str
) -> Any:
    """A `Qwen3VLMoeModel` of a `Qwen3VLModel`: in every text layer the MLP becomes `num_experts` copies, of which a
    router (N(0, 0.02)) picks `top_k` a token, their probabilities renormalised. Everything else is copied.

    Args:
        noise_std: of the normal noise on the copies' weights; with 0 the forward pass is the dense model's.
    """
    from transformers import Qwen3VLMoeModel

    config = moe_config(dense.config, num_experts, top_k)
    weights: dict[str, Tensor] = {}
    for name, tensor in dense.state_dict().items():
        if not (name.startswith("language_model.") and ".mlp." in name):
            weights[name] = tensor
    for i, layer in enumerate(dense.language_model.layers):
        # The fused layout of transformers: gate above up, expert by expert.
        gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]).detach()
        prefix = f"language_model.layers.{i}.mlp."
        weights[prefix + "experts.gate_up_proj"] = _copies(gate_up, num_experts, noise_std)
        weights[prefix + "experts.down_proj"] = _copies(layer.mlp.down_proj.weight.detach(), num_experts, noise_std)
        weights[prefix + "gate.weight"] = torch.randn(num_experts, gate_up.shape[1]) * ROUTER_STD
    return from_weights(
        Qwen3VLMoeModel,
        config,
        weights,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
    )


def moe_config(dense: Any, num_experts: int, top_k: int) -> Any:
    """The `Qwen3VLMoeConfig` of an upcycled `Qwen3VLConfig`: every text layer sparse, each expert of the dense size."""
    from transformers import Qwen3VLMoeConfig

    text, vision = dense.text_config.to_dict(), dense.vision_config.to_dict()
    for part in (text, vision):
        del part["model_type"]
    text |= {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": text["intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **{name: getattr(dense, name) for name in tokens})


def from_weights(kind: Any, config: Any, weights: Mapping[str, Tensor], **options: Any) -> Any:
    """A model of transformers that holds exactly these weights, in float32."""
    if builds_sharded():
        return build_sharded(kind, config, lambda: weights, **options)
    model, info = kind.from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=torch.float32, output_loading_info=True, **options
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return model


def _copies(weight: Tensor, num: int, noise_std: float) -> Tensor:
    copies = weight.expand(num, *weight.shape).clone()
    return copies.add_(torch.randn_like(copies), alpha=noise_std) if noise_std else copies
