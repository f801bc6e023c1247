"""Which tokens of a rollout an advantage goes to: all of them, or each expert's to the segment that it reads."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from prism_pl.advantages import Mixing, paper_advantages, released_advantages, segment_advantages
from prism_pl.aggregation import Metrics
from prism_pl.batch import SequenceBatch
from prism_pl.chat import EXPERTS
from prism_pl.processor import Processor
from prism_pl.strategy import own_part

Credit = Literal["response", "segment"]


def check_credit(credit: Credit, experts: Sequence[str]) -> None:
    """ValueError for credit by segment under a discriminator that does not tell the segments apart."""
    if credit == "segment" and set(experts) != set(EXPERTS):
        raise ValueError(
            f"credit is 'segment', and the discriminator's experts are {', '.join(experts)}: it needs "
            f"{' and '.join(EXPERTS)}. Set credit to 'response', or segments to 'split'"
        )


def credited_advantages(
    scores: Mapping[str, Tensor],
    valid_PG: Tensor,
    batch: SequenceBatch,
    processor: Processor,
    *,
    credit: Credit,
    mixing: Mixing,
    alpha: float,
    malformed_penalty: float,
    ranks: int = 1,
) -> tuple[Tensor, Metrics]:
    """Advantages of B rollouts, (B,) for whole responses, (B, T) by segment, and their metrics.

    Args:
        scores, valid_PG, mixing, alpha, malformed_penalty: see `prism_pl.advantages`; of whole groups.
        batch: this rank's rollouts as sampled, encoded by `processor`.
        ranks: that share each group, each with its own rollouts of it; the metrics are then a rank's part of the count.
    """

    def own(values_PG: Tensor) -> Tensor:
        return own_part(values_PG, ranks).flatten()

    if credit == "segment":
        by_expert, told = segment_advantages(scores, valid_PG, mixing, alpha, malformed_penalty)
        flat = {expert: own(advantages_PG) for expert, advantages_PG in by_expert.items()}
        advantages = token_advantages(processor, batch, flat, own(valid_PG))
    else:
        if mixing == "paper":
            advantages_PG, told = paper_advantages(scores, valid_PG, alpha)
        else:
            advantages_PG, told = released_advantages(scores, valid_PG, alpha, malformed_penalty)
        advantages = own(advantages_PG)
    return advantages, {name: value / ranks for name, value in told.items()}


def token_advantages(
    processor: Processor, batch: SequenceBatch, by_expert: Mapping[str, Tensor], valid_B: Tensor
) -> Tensor:
    """(B, T) advantages: the perception expert's on caption tokens, the reasoning expert's on those after them. A
    malformed response has no segments: all its tokens carry the mean of both.

    Args:
        by_expert: (B,) each.
        valid_B: False where a response has no segments.
    """
    caption_B1, reasoning_B1 = (by_expert[expert][:, None] for expert in EXPERTS)
    rows = zip(batch.response_ids_BT.tolist(), batch.mask_BT.sum(-1).tolist(), strict=True)
    ends_B1 = torch.tensor([num_caption_tokens(processor, ids[:length]) for ids, length in rows])[:, None]
    in_caption_BT = torch.arange(batch.mask_BT.shape[1]) < ends_B1
    split_BT = torch.where(in_caption_BT.to(caption_B1.device), caption_B1, reasoning_B1)
    return torch.where(valid_B[:, None], split_BT, (caption_B1 + reasoning_B1) / 2)


def num_caption_tokens(processor: Processor, ids: Sequence[int]) -> int:
    """How many ids of a response its caption block takes: up to the one that completes the closing tag; all of them
    where there is none. Sampled ids need not be the tokenizer's own, so the text of prefixes decides. A longer prefix
    holds the tag too, so a search by halves finds the end."""
    lengths = range(len(ids) + 1)
    return min(bisect_left(lengths, True, key=lambda n: "</caption>" in processor.decode(ids[:n])), len(ids))
