"""Two experts, each for its own segment, as PRISM's paper has them (arXiv 2604.28123, section 3)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from prism_pl.batch import SequenceBatch
from prism_pl.chat import EXPERTS
from prism_pl.discriminator.backbone import BackboneDiscriminator
from prism_pl.policy import load_safetensors


class DedicatedMoEDiscriminator(BackboneDiscriminator):
    """A perception expert and a reasoning expert: MLPs in every text layer and a head of their own, over one vision
    tower and one attention. An expert's MLPs run its sequences whole, prompt included, so that a caption's loss gives
    the reasoning expert no gradient. Grown from a dense Qwen3-VL, each expert starts as a copy of its MLPs.

    Args:
        path, init_heads, dropout, freeze, attn_implementation, gradient_checkpointing, packed: see
            `BackboneDiscriminator`.
        max_segment_tokens, likelihood_weight, max_pixels: see `DenseDiscriminator`.
    """

    def __init__(
        self,
        path: str,
        init_heads: bool = False,
        dropout: float = 0.1,
        max_segment_tokens: int | None = None,
        likelihood_weight: float | None = None,
        freeze: Sequence[str] = (),
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        max_pixels: int | None = None,
        packed: bool = True,
    ) -> None:
        settings = {
            "experts": EXPERTS,
            "heads": "per_expert",
            "max_segment_tokens": max_segment_tokens,
            "likelihood_weight": likelihood_weight,
            "max_pixels": max_pixels,
        }
        super().__init__(
            load_dedicated,
            path,
            init_heads,
            settings,
            dropout,
            freeze,
            attn_implementation,
            gradient_checkpointing,
            packed,
        )

    def shares(self, sequences: SequenceBatch, expert_B: Tensor) -> Tensor | None:
        return sequences.prompt_of_B * len(self.experts) + expert_B if self.packed else None

    def text_options(self, readers_KN: Tensor) -> dict[str, Any]:
        from prism_pl.discriminator.dedicated_model import Routes

        return {"routes": Routes.of(readers_KN.argmax(0), len(self.experts))}


class TextOnlyDiscriminator(DedicatedMoEDiscriminator):
    """`DedicatedMoEDiscriminator` that sees no image, PRISM's text-only ablation: what it finds in a response, it finds
    in the text. The vision tower rests."""

    text_only = True


def load_dedicated(path: str, anew: bool, attn_implementation: str) -> Any:
    """A `DedicatedQwen3VLModel`, from its own folder or grown from a policy's."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    from prism_pl.discriminator.dedicated_model import DedicatedQwen3VLModel, dedicate

    if not anew:
        return load_safetensors(DedicatedQwen3VLModel, path, attn_implementation)
    return dedicate(
        Qwen3VLConfig.from_pretrained(path),
        partial(load_safetensors, Qwen3VLModel, path, attn_implementation),
        attn_implementation,
    )
