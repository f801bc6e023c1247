"""One network for both segments: PRISM's dense ablation, and GAD's discriminator of whole responses."""

from collections.abc import Sequence
from typing import Any, Literal

from prism_pl.chat import EXPERTS, WHOLE
from prism_pl.discriminator.backbone import BackboneDiscriminator
from prism_pl.policy import load_safetensors


class DenseDiscriminator(BackboneDiscriminator):
    """One dense network with one head.

    Args:
        path, init_heads, dropout, freeze, attn_implementation, gradient_checkpointing, packed: see
            `BackboneDiscriminator`.
        segments: `split` scores caption and reasoning in two passes of the same weights, `whole` the response in one
            (GAD, arXiv 2511.10643); it is the only "expert" then, and `alpha` is without effect.
        max_segment_tokens: see `Discriminator`; 4096 anew.
        likelihood_weight: each score gets this times the segment's mean token log-likelihood under the backbone. A head
            at the last token learns style in a few steps, and is far slower to notice one false word among forty; the
            likelihood notices it at once, and Bradley-Terry trains it as SPIN does (arXiv 2401.01335). Needs tied
            embeddings. 0 anew: the papers' discriminator.
        max_pixels: images above this many pixels are scaled down.

    `segments`, `max_segment_tokens`, `likelihood_weight` and `max_pixels` are the warm start's: None takes them over,
    another value than theirs is a ValueError.
    """

    def __init__(
        self,
        path: str,
        init_heads: bool = False,
        segments: Literal["split", "whole"] | None = None,
        dropout: float = 0.1,
        max_segment_tokens: int | None = None,
        likelihood_weight: float | None = None,
        freeze: Sequence[str] = (),
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        max_pixels: int | None = None,
        packed: bool = True,
    ) -> None:
        anew = EXPERTS if init_heads else None
        settings = {
            "experts": anew if segments is None else {"split": EXPERTS, "whole": WHOLE}[segments],
            "heads": "shared",
            "max_segment_tokens": max_segment_tokens,
            "likelihood_weight": likelihood_weight,
            "max_pixels": max_pixels,
        }
        super().__init__(
            load_dense, path, init_heads, settings, dropout, freeze, attn_implementation, gradient_checkpointing, packed
        )


def load_dense(path: str, anew: bool, attn_implementation: str) -> Any:
    """A `Qwen3VLModel`, from a policy and from a discriminator alike."""
    from transformers import Qwen3VLModel

    return load_safetensors(Qwen3VLModel, path, attn_implementation)
