"""The load-balancing loss of a sparse mixture over a whole update.

L text layers, K kinds of segment, E experts, N places.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prism_pl.strategy import global_sum, share


def routing_sums(router_logits: Sequence[Tensor], top_k: int, readers_KN: Tensor) -> dict[str, Tensor]:
    """What `balance_loss` and `routing.routing_diagnostics` need of one pass. Additive over passes.

    Args:
        router_logits: of each layer, (N, E).
        readers_KN: how many sequences of each kind read each place: a prompt that stands once for several sequences
            counts as if each had its own, and padding not at all.

    Returns:
        `probabilities`: (E,) sums of the router's probabilities over tokens and layers, with their gradient.
        `counts`: (L, K, E) tokens that went to each expert.
        `tokens`: a scalar, tokens times layers.
    """
    probabilities, counts = [], []
    # In float32 also under bf16 autocast, which would round the counts.
    with torch.autocast(readers_KN.device.type, enabled=False):
        for logits_NE in router_logits:
            probabilities_NE = logits_NE.float().softmax(-1)
            probabilities.append(readers_KN.sum(0) @ probabilities_NE)
            chosen_NE = torch.zeros_like(probabilities_NE).scatter(1, probabilities_NE.topk(top_k, dim=-1).indices, 1.0)
            counts.append((readers_KN @ chosen_NE).detach())
    return {
        "probabilities": torch.stack(probabilities).sum(0),
        "counts": torch.stack(counts),
        "tokens": readers_KN.sum() * len(router_logits),
    }


def balance_loss(sums: Mapping[str, Tensor]) -> Tensor:
    """`E sum_e f_e P_e`, the load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4 to 6) as transformers
    takes it over all layers: f the share of (token, layer) pairs that go to expert e, which adds up to `top_k`, and P
    the mean probability that the router gives it.

    f and P are those of the whole update, over all micro-batches and ranks, where the mean of micro-batches' losses
    would ask for balance inside each. P is linear in the sums, so micro-batches that are computed again in the
    backward pass give the gradient of the whole. On each rank the part whose mean over ranks is the loss.
    """
    load_E = global_sum(sums["counts"].sum((0, 1))) / global_sum(sums["tokens"]).clamp_min(1.0)
    mean_E = sums["probabilities"] / share(sums["tokens"])
    return len(load_E) * (load_E * mean_E).sum()
