"""Per-token log-probabilities and entropies, in chunks over tokens.

A response of 8k tokens over a vocabulary of 151,936 entries is 5 GB of fp32 logits a copy. Here logits exist for
`chunk_tokens` tokens at a time, in the forward pass and (recomputed) in the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prism_pl.batch import SequenceBatch
from prism_pl.policy import hidden_states
from prism_pl.strategy.sharding import inside


class TokenStats(NamedTuple):
    """Log-probability and entropy (nats) of each response token's distribution; 0 where there is no token."""

    logps_BT: Tensor
    entropy_BT: Tensor


def token_logps(
    policy: Any,
    batch: SequenceBatch,
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    chunk_tokens: int = 2048,
) -> TokenStats:
    """Log-probabilities of the response tokens under the distribution that a sampler draws from: logits divided by
    the temperature, banned ids removed. The entropy carries no gradient.

    Args:
        policy: a causal language model with a Qwen3-VL backbone `.model` and a head `.lm_head`.
        chunk_tokens: response tokens whose logits exist at once.
    """

    def forward() -> TokenStats:
        return response_logps(
            hidden_states(policy.model, batch),
            batch,
            policy.lm_head,
            temperature=temperature,
            banned_ids=banned_ids,
            chunk_tokens=chunk_tokens,
        )

    return inside(policy, forward)


def response_logps(
    hidden_BSH: Tensor,
    batch: SequenceBatch,
    lm_head: nn.Linear,
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    chunk_tokens: int = 2048,
) -> TokenStats:
    """`token_logps` from last hidden states that are there already, see `head_logps`."""
    before_BT = (batch.response_index_BT - 1).clamp_min(0)
    rows, _ = batch.mask_BT.nonzero(as_tuple=True)
    hidden_NH = hidden_BSH[rows, before_BT[batch.mask_BT]]
    targets_N = batch.response_ids_BT[batch.mask_BT]
    logps_N, entropy_N = head_logps(
        hidden_NH,
        lm_head,
        targets_N,
        lm_head.bias,
        temperature=temperature,
        banned_ids=banned_ids,
        chunk_tokens=chunk_tokens,
    )
    blank_BT = torch.zeros(batch.mask_BT.shape, dtype=logps_N.dtype, device=logps_N.device)
    return TokenStats(
        blank_BT.masked_scatter(batch.mask_BT, logps_N), blank_BT.masked_scatter(batch.mask_BT, entropy_N)
    )


def head_logps(
    hidden_NH: Tensor, head: nn.Module, targets_N: Tensor, bias_V: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`chunked_logps` by the (V, hidden) weight of a layer, in the hidden states' dtype. It is one call of the layer,
    however many chunks this rank has (`prism_pl.strategy.inside`).

    Args:
        head: a linear layer, whose bias is handed over too, or embeddings.
        options: those of `chunked_logps`.
    """

    def logits(hidden_NH: Tensor) -> Tensor:
        bias = None if bias_V is None else bias_V.to(hidden_NH.dtype)
        return nn.functional.linear(hidden_NH, head.weight.to(hidden_NH.dtype), bias)

    return inside(head, lambda hidden_NH: chunked_logps(hidden_NH, logits, targets_N, **options), hidden_NH)


def chunked_logps(
    hidden_NH: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    chunk_tokens: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of N targets, at most `chunk_tokens` rows of logits at a time."""
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: give at least 1")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")
    banned = torch.tensor(list(banned_ids), dtype=torch.long, device=hidden_NH.device)
    if len(targets_N) <= chunk_tokens:
        return _logps(hidden_NH, lm_head, targets_N, temperature, banned)
    parts = [
        checkpoint(_logps, hidden, lm_head, targets, temperature, banned, use_reentrant=False)
        for hidden, targets in zip(hidden_NH.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _logps(
    hidden_NH: Tensor, lm_head: Callable[[Tensor], Tensor], targets_N: Tensor, temperature: float, banned: Tensor
) -> tuple[Tensor, Tensor]:
    logits_NV = lm_head(hidden_NH).float() / temperature
    logits_NV = logits_NV.index_fill(1, banned, float("-inf"))
    all_logps_NV = logits_NV.log_softmax(dim=-1)
    logps_N = all_logps_NV.gather(1, targets_N[:, None]).squeeze(1)
    with torch.no_grad():
        probabilities_NV = all_logps_NV.exp()
        entropy_N = -(probabilities_NV * all_logps_NV.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
    return logps_N, entropy_N
