"""The release's discriminator: a sparse mixture whose router shares its experts among both segments."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from prism_pl.chat import EXPERTS
from prism_pl.discriminator.backbone import BackboneDiscriminator
from prism_pl.discriminator.balance import balance_loss, routing_sums
from prism_pl.discriminator.folder import HeadSharing, refuse_other
from prism_pl.discriminator.routing import routing_diagnostics
from prism_pl.discriminator.upcycling import upcycle
from prism_pl.policy import load_safetensors

# The release's, where a discriminator starts anew.
UPCYCLING = {"num_experts": 4, "top_k": 2, "noise_std": 0.01}


class SparseMoEDiscriminator(BackboneDiscriminator):
    """A dense Qwen3-VL upcycled to transformers' Qwen3-VL-MoE; caption and reasoning are two passes of its weights.

    Args:
        path, init_heads, dropout, freeze, attn_implementation, gradient_checkpointing, packed: see
            `BackboneDiscriminator`.
        heads: `shared` is one head for both segments (the release, and the default anew), `per_expert` one for each.
        num_experts, top_k, noise_std: of the upcycling; 4, 2 and 0.01 anew. A warm-started network has its own: None
            takes them over, another value is a ValueError.
        balance_weight: of the router's load-balancing loss, in the warm start and online.
        experts_implementation: of transformers. `eager` loops over the experts; `grouped_mm` is one kernel for all, but
            runs in the weights' dtype: for weights held in bf16, not for autocast.
        max_segment_tokens, likelihood_weight, max_pixels: see `DenseDiscriminator`.
    """

    def __init__(
        self,
        path: str,
        init_heads: bool = False,
        heads: HeadSharing | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
        noise_std: float | None = None,
        balance_weight: float = 0.01,
        experts_implementation: str = "eager",
        dropout: float = 0.1,
        max_segment_tokens: int | None = None,
        likelihood_weight: float | None = None,
        freeze: Sequence[str] = (),
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        max_pixels: int | None = None,
        packed: bool = True,
    ) -> None:
        given = {"num_experts": num_experts, "top_k": top_k, "noise_std": noise_std}
        upcycling = {name: value for name, value in given.items() if value is not None}
        if init_heads:
            upcycling = UPCYCLING | upcycling
            check_upcycling(**upcycling)
        if balance_weight < 0:
            raise ValueError(f"balance_weight is {balance_weight}: give 0 or more")
        settings = {
            "experts": EXPERTS,
            "heads": "shared" if init_heads and heads is None else heads,
            "max_segment_tokens": max_segment_tokens,
            "likelihood_weight": likelihood_weight,
            "max_pixels": max_pixels,
        }
        load = partial(load_sparse, upcycling=upcycling, experts_implementation=experts_implementation)
        super().__init__(
            load, path, init_heads, settings, dropout, freeze, attn_implementation, gradient_checkpointing, packed
        )
        self.balance_weight = balance_weight

    def text_options(self, readers_KN: Tensor) -> dict[str, Any]:
        return {"output_router_logits": True}

    def sums(self, output: Any, readers_KN: Tensor) -> dict[str, Tensor]:
        return routing_sums(output.router_logits, self.model.config.text_config.num_experts_per_tok, readers_KN)

    def aux_loss(self, sums: Mapping[str, Tensor]) -> Tensor:
        return self.balance_weight * balance_loss(sums)

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return routing_diagnostics(sums["counts"])


class TextOnlySparseMoEDiscriminator(SparseMoEDiscriminator):
    """`SparseMoEDiscriminator` that sees no image, the release's text-only ablation. The vision tower rests."""

    text_only = True


def load_sparse(
    path: str,
    anew: bool,
    attn_implementation: str,
    *,
    upcycling: Mapping[str, Any],
    experts_implementation: str,
) -> Any:
    """A `Qwen3VLMoeModel`, from its own folder or upcycled from a policy's.

    Args:
        upcycling: the numbers of `UPCYCLING`; of a network from its own folder, those that it has to have.
    """
    from transformers import Qwen3VLConfig, Qwen3VLModel, Qwen3VLMoeModel

    if not anew:
        check_upcycled(path, upcycling)
        model = load_safetensors(Qwen3VLMoeModel, path, attn_implementation)
        model.set_experts_implementation(experts_implementation)
        return model
    return upcycle(
        Qwen3VLConfig.from_pretrained(path),
        partial(load_safetensors, Qwen3VLModel, path, attn_implementation),
        **upcycling,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
    )


def check_upcycling(num_experts: int, top_k: int, noise_std: float) -> None:
    """ValueError where the numbers of an upcycling are out of range."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}: give 1 to num_experts={num_experts}")
    if noise_std < 0:
        raise ValueError(f"noise_std is {noise_std}: give 0 or more")


def check_upcycled(path: str, given: Mapping[str, Any]) -> None:
    """ValueError where a number is given that the network at `path` was not upcycled with: it would act nowhere."""
    from transformers import Qwen3VLMoeConfig

    text: Any = Qwen3VLMoeConfig.from_pretrained(path).text_config
    if "noise_std" in given:
        raise ValueError(
            f"noise_std is {given['noise_std']}, and {path!r} is warm-started, its noise long drawn: leave noise_std "
            "out, or run warmup.yaml anew with it"
        )
    refuse_other(path, given, {"num_experts": text.num_experts, "top_k": text.num_experts_per_tok})
