"""What a mixture tells about its router: the keys of its diagnostics, and how they follow from counts.

A discriminator that is a mixture of experts counts, in each routed layer, how many of each segment's valid tokens went
to each expert of the layer (a token that goes to two counts for both), adds the counts up over the passes of an update,
and gives `routing_diagnostics` of them as its metrics. The stages log those as they stand, `align/router/...`, of the
counts of all ranks:

    router/load/mean/<expert>            share of the routings that went to the expert, mean over the layers
    router/load/<layer>/<expert>         the same of one layer, with `per_layer`
    router/load/max                      of the busiest expert of a layer, mean over the layers: 1 / E is even
    router/entropy/mean, .../<layer>     of the load, nats: log E where all are used alike, 0 where one takes all
    router/entropy/min                   of the layer that is used least evenly
    router/mutual_information/mean, .../<layer>
                                         of expert and segment, nats: 0 where the router does not tell segments apart,
                                         at most log 2 (two segments), where each expert reads one of them
    router/mutual_information/max        of the layer that tells them apart best

All are taken layer by layer, for an expert's number means nothing across layers.
L layers, K kinds of segment, E experts of a layer. Layers and experts are numbered from 0.
"""

import torch
from torch import Tensor


def entropy(p_XE: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats; 0 log 0 is 0."""
    return -torch.xlogy(p_XE, p_XE).sum(-1)


def mutual_information(counts_XKE: Tensor) -> Tensor:
    """I(K; E) = H(K) + H(E) - H(K, E) of a table of counts, in nats; NaN for an empty table."""
    joint_XKE = counts_XKE.double() / counts_XKE.sum((-2, -1), keepdim=True)
    apart = entropy(joint_XKE.sum(-1)) + entropy(joint_XKE.sum(-2))
    # Rounding can leave a tiny negative number where the two are independent; NaN has to come through.
    return (apart - entropy(joint_XKE.flatten(-2))).clamp_min(0.0)


def routing_diagnostics(counts_LKE: Tensor, per_layer: bool = False) -> dict[str, Tensor]:
    """The diagnostics of this file's head.

    Args:
        counts_LKE: routings of valid tokens in this update; NaN where there is none.
        per_layer: also those of every layer; few want 28 curves of each.
    """
    counts_LKE = counts_LKE.double()
    load_LE = counts_LKE.sum(1) / counts_LKE.sum((1, 2))[:, None]
    entropy_L, information_L = entropy(load_LE), mutual_information(counts_LKE)
    told = {f"router/load/mean/{e}": value for e, value in enumerate(load_LE.mean(0))}
    told["router/load/max"] = load_LE.amax(-1).mean()
    told |= {"router/entropy/mean": entropy_L.mean(), "router/entropy/min": entropy_L.min()}
    told["router/mutual_information/mean"] = information_L.mean()
    told["router/mutual_information/max"] = information_L.max()
    for layer in range(len(counts_LKE)) if per_layer else ():
        told |= {f"router/load/{layer}/{e}": value for e, value in enumerate(load_LE[layer])}
        told[f"router/entropy/{layer}"] = entropy_L[layer]
        told[f"router/mutual_information/{layer}"] = information_L[layer]
    return {name: value.float() for name, value in told.items()}
