"""Discriminators: one score an expert for what each response says, text against text.

The segments are made by `prism_pl.segments`, the same way on both sides; a score is read at the end token that closes
each. The kinds are named in YAML; all grow from any dense Qwen3-VL.
"""

from prism_pl.discriminator.dedicated import DedicatedMoEDiscriminator, TextOnlyDiscriminator
from prism_pl.discriminator.dense import DenseDiscriminator
from prism_pl.discriminator.interface import Discriminator, DiscriminatorFactory, RowScores, Scores
from prism_pl.discriminator.scoring import diagnostics_over_ranks, evaluating, score, score_texts
from prism_pl.discriminator.sparse import SparseMoEDiscriminator, TextOnlySparseMoEDiscriminator

__all__ = [
    "DedicatedMoEDiscriminator",
    "DenseDiscriminator",
    "Discriminator",
    "DiscriminatorFactory",
    "RowScores",
    "Scores",
    "SparseMoEDiscriminator",
    "TextOnlyDiscriminator",
    "TextOnlySparseMoEDiscriminator",
    "diagnostics_over_ranks",
    "evaluating",
    "score",
    "score_texts",
]
