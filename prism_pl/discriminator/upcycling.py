"""Sparse upcycling (arXiv 2212.05055): a dense Qwen3-VL becomes a mixture whose experts are its MLPs, with noise."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prism_pl.strategy.sharding import build_sharded, builds_sharded

ROUTER_STD = 0.02


def upcycle(
    config: Any,
    dense: Callable[[], Any],
    num_experts: int,
    top_k: int,
    noise_std: float,
    *,
    attn_implementation: str,
    experts_implementation: str,
) -> Any:
    """A `Qwen3VLMoeModel` of a `Qwen3VLModel`: in every text layer the MLP becomes `num_experts` copies, of which a
    router (N(0, 0.02)) picks `top_k` a token, their probabilities renormalised. Everything else is copied.

    Args:
        config: of the dense model.
        dense: gives the dense model; at ZeRO-3 it is called on the first rank alone.
        noise_std: of the normal noise on the copies' weights; with 0 the forward pass is the dense model's.
    """
    from transformers import Qwen3VLMoeModel

    # Drawn by every rank, whoever makes the weights: their generators go on alike.
    seed = int(torch.randint(2**62, (), device="cpu"))
    return from_weights(
        Qwen3VLMoeModel,
        moe_config(config, num_experts, top_k),
        lambda: upcycled_weights(dense(), num_experts, noise_std, seed),
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
    )


def upcycled_weights(dense: Any, num_experts: int, noise_std: float, seed: int) -> dict[str, Tensor]:
    """The weights of `upcycle`, by name. The seed is of noise and routers."""
    weights: dict[str, Tensor] = {}
    for name, tensor in dense.state_dict().items():
        if not (name.startswith("language_model.") and ".mlp." in name):
            weights[name] = tensor
    generator = torch.Generator(dense.device).manual_seed(seed)
    for i, layer in enumerate(dense.language_model.layers):
        # The fused layout of transformers: gate above up, expert by expert.
        gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]).detach()
        down = layer.mlp.down_proj.weight.detach()
        prefix = f"language_model.layers.{i}.mlp."
        weights[prefix + "experts.gate_up_proj"] = _copies(gate_up, num_experts, noise_std, generator)
        weights[prefix + "experts.down_proj"] = _copies(down, num_experts, noise_std, generator)
        weights[prefix + "gate.weight"] = _normal((num_experts, gate_up.shape[1]), ROUTER_STD, generator)
    return weights


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


def from_weights(kind: Any, config: Any, weights: Callable[[], Mapping[str, Tensor]], **options: Any) -> Any:
    """A model of transformers that holds exactly these weights, in float32; at ZeRO-3 the first rank alone makes
    them, in its CPU memory."""
    if builds_sharded():
        return build_sharded(kind, config, weights, **options)
    model, info = kind.from_pretrained(
        None, config=config, state_dict=dict(weights()), dtype=torch.float32, output_loading_info=True, **options
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return model


def _copies(weight: Tensor, num: int, noise_std: float, generator: torch.Generator) -> Tensor:
    copies = weight.expand(num, *weight.shape).clone()
    return copies.add_(_normal(copies.shape, noise_std, generator)) if noise_std else copies


def _normal(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).mul_(std)
