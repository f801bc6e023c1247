"""What a rollout engine and the trainer promise each other, checked in the loop.

A broken promise rarely crashes: the samples are then of another policy, or of another prompt, and the loss goes on
falling. Every check here is a ValueError that begins with "rollout contract" and names the cause.
"""

import zlib
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from prism_pl.rollout.bucket import Bucket
from prism_pl.rollout.engine import Rollout

# Of a bucket of weights its first and last name, and the checksums of its head and of its values.
Entry = tuple[tuple[str, str], int, int]

# Whoever draws the same response by chance, at this log-probability or below, does so once in e^30 times.
UNLIKELY = -30.0

# Float32 on both sides differs by 1e-5 nats a token on a CPU, and by 2e-2 at most where a GPU multiplies in TF32.
MAX_MISMATCH = 0.05


def check_prompt_ids(returned: Sequence[int], expected: Sequence[int], image_token_id: int, row: str) -> None:
    """ValueError where the engine read another prompt than the trainer: then its log-probabilities, and the rollouts
    themselves, are of another distribution.

    Args:
        returned, expected: the engine's and the trainer's prompt, image placeholders expanded.
        row: the example's id.
    """
    if list(returned) == list(expected):
        return
    theirs, ours = (list(ids).count(image_token_id) for ids in (returned, expected))
    if theirs != ours:
        raise ValueError(
            f"rollout contract: example {row!r} has {theirs} image tokens in the engine and {ours} in the trainer: "
            "give both the same max_pixels, and the engine one placeholder an image, not expanded ones"
        )
    raise ValueError(
        f"rollout contract: the engine read another prompt than the trainer for example {row!r} "
        f"({len(returned)} and {len(expected)} tokens): give both the same tokenizer, chat template, system prompt and "
        "max_pixels"
    )


class StreamDigest:
    """A checksum of a stream of weights: of names, shapes and bits, bucket by bucket.

    The sums stay on the tensors' device until they are compared, so that a stream is waited for once.
    """

    def __init__(self) -> None:
        self.names: list[tuple[str, str]] = []
        self._heads: list[int] = []
        self._sums: list[Tensor] = []

    def add(self, bucket: Bucket) -> None:
        """Add up one bucket."""
        self.names.append((bucket.names[0], bucket.names[-1]))
        self._heads.append(bucket.head())
        self._sums.append(bucket.bits())

    def entries(self) -> list[Entry]:
        """One a bucket."""
        sums = torch.stack(self._sums).tolist() if self._sums else []
        return list(zip(self.names, self._heads, sums, strict=True))


def check_received(sent: StreamDigest, received: StreamDigest) -> None:
    """ValueError where the engine did not receive the very weights that were sent, in their order."""
    check_entries(sent.entries(), received.entries())


def check_entries(ours: Sequence[Entry], theirs: Sequence[Entry]) -> None:
    """`check_received` of what two digests have added up, one of them in another process."""
    for (names, head, bits), (_, other_head, other_bits) in zip(ours, theirs, strict=False):
        if (head, bits) != (other_head, other_bits):
            what = "other values" if head == other_head else "other names or shapes"
            raise ValueError(
                f"rollout contract: the part of the weight sync from {names[0]!r} to {names[1]!r} reached the engine "
                f"with {what} (checksums differ)"
            )
    if len(ours) != len(theirs):
        raise ValueError(
            f"rollout contract: the weight sync was sent to the engine in {len(ours)} parts and {len(theirs)} arrived"
        )


def check_name(name: str, shape: tuple[int, ...], expected: Mapping[str, tuple[int, ...]], sent: set[str]) -> None:
    """ValueError where a sync sends a parameter that the policy did not have, or had in another shape, or twice.

    Args:
        expected: shapes by name, of the policy that the engine was started with.
        sent: the names so far.
    """
    if name not in expected:
        raise ValueError(
            f"rollout contract: a sync sends {name!r}, which the policy did not have when the engine was started: send "
            "its parameters under the same names"
        )
    if shape != expected[name]:
        raise ValueError(f"rollout contract: {name!r} has the shape {shape} in a sync, and {expected[name]} before")
    if name in sent:
        raise ValueError(f"rollout contract: a sync sends {name!r} twice: send each parameter once")


def check_complete(sent: set[str], expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where a sync left out a parameter of the policy."""
    missing = sorted(expected.keys() - sent)
    if missing:
        raise ValueError(
            f"rollout contract: a sync must send every parameter of the policy; {len(missing)} are missing: "
            f"{', '.join(missing[:3])}"
        )


def check_loaded(loaded: set[str], parameters: set[str]) -> None:
    """ValueError where a sync left a parameter of the engine's model as it was.

    Args:
        loaded: what the engine says it has loaded, by its own names.
        parameters: what its model has.
    """
    stale = sorted(parameters - loaded)
    if stale:
        raise ValueError(
            f"rollout contract: {len(stale)} parameters of the engine kept their old weights in a sync, e.g. "
            f"{stale[0]!r}"
        )


def check_rank_seeds(seeds: Sequence[tuple[int, int]], groups: Sequence[int]) -> None:
    """ValueError where two engines would draw the same numbers.

    Args:
        seeds: of each rank, what its draws start from: torch's seed and its own number.
        groups: of each rank, which engine it belongs to.
    """
    owner: dict[tuple[int, int], int] = {}
    for seed, group in zip(seeds, groups, strict=True):
        if owner.setdefault(seed, group) != group:
            raise ValueError(
                f"rollout contract: the engines {owner[seed]} and {group} have the same seed, so their rollouts would "
                "repeat each other: give `start` each process's own rank"
            )


def check_group_draws(prints: Sequence[int]) -> None:
    """ValueError where ranks that share an engine by tensor parallelism drew different tokens: each then decoded its
    own responses with the others' partial sums, and the log-probabilities are of no model.

    Args:
        prints: of each of these ranks, a checksum of all that it drew.
    """
    if len(set(prints)) > 1:
        raise ValueError(
            "rollout contract: the ranks of one tensor-parallel engine drew different responses to the same prompts, "
            "so each decoded its own with the other ranks' share of the weights: their generators are not in step. "
            "Give all ranks the same sampling and the same vLLM, and let nothing else draw while it generates"
        )


def check_mismatch(p95: float) -> None:
    """ValueError where sampler and trainer, both in float32, differ on the rollouts by more than rounding explains.

    Args:
        p95: of the rollouts' tokens, the 95th percentile of the difference of log-probabilities, in nats.
    """
    if p95 > MAX_MISMATCH:
        raise ValueError(
            f"rollout contract: the engine's log-probabilities of the rollouts are {p95:.3g} nats from the trainer's "
            f"(95th percentile; in float32 rounding explains less than {MAX_MISMATCH}): it samples from other weights, "
            "at another temperature or without the banned ids, or it drew other tokens than it says. For an engine "
            "that is meant to differ, set model.init_args.mismatch.kind to tis or mis (corrects it) or off (measures)"
        )


def draw_prints(rollouts: Sequence[Rollout], num: int = 16) -> list[tuple[int, float]]:
    """What other ranks need to recognise these draws: a checksum and the log-probability of the first `num`."""
    ids = [",".join(map(str, rollout.response_ids)).encode() for rollout in rollouts[:num]]
    return [(zlib.crc32(each), sum(r.sampler_logps)) for each, r in zip(ids, rollouts, strict=False)]


def check_rank_draws(prints: Sequence[Sequence[tuple[int, float]]], groups: Sequence[int]) -> float:
    """The share of draws that another engine drew too. A sharp policy may repeat itself; a long response of a flat one
    that stands on two engines, at the same place, is a ValueError: their generators run in step.

    Args:
        prints: `draw_prints` of each rank.
        groups: of each rank, which engine it belongs to.
    """
    first = {group: list(prints[rank]) for rank, group in reversed(list(enumerate(groups)))}
    repeated = total = 0
    for group, other in combinations(sorted(first), 2):
        for (one, logp), (two, _) in zip(first[group], first[other], strict=False):
            total += 1
            repeated += one == two
            if one == two and logp < UNLIKELY:
                raise ValueError(
                    f"rollout contract: the engines {group} and {other} drew the same response, of log-probability "
                    f"{logp:.1f}: their generators run in step, so the batch holds every rollout twice"
                )
    return repeated / total if total else 0.0
