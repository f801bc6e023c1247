"""One policy update over a batch of rollouts, shared by alignment and RLVR.

Sums in the loss, divides once by the count over all micro-batches and ranks, and checks every piece before its backward
pass. The caller clips, checks the gradient norm and steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prism_pl.aggregation import Metrics, aggregate, combine_metrics
from prism_pl.batch import SequenceBatch, in_order, micro_batches
from prism_pl.logprobs import token_logps
from prism_pl.losses import check_kl_placement, kl_estimate
from prism_pl.mismatch import MismatchCorrection
from prism_pl.optim import check_finite
from prism_pl.policy_loss import ClippedLoss, PolicyLoss
from prism_pl.strategy import global_sum


@dataclass(frozen=True)
class KLPenalty:
    """A pull towards the policy that the stage started from. Off in PRISM; GAD has 0.001.

    Attributes:
        coefficient: 0 switches it off, and no reference is held.
        place: in the `reward` (k1, summed over a response) or in the `loss` (k2, or k3, whose gradient is biased).
        kind: the estimator, see `prism_pl.losses.kl_estimate`.
    """

    coefficient: float = 0.0
    place: Literal["reward", "loss"] = "loss"
    kind: Literal["k1", "k2", "k3"] = "k2"

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ValueError(f"kl.coefficient is {self.coefficient}: give 0 (off) or more")
        check_kl_placement(self.kind, self.place)

    @property
    def in_loss(self) -> bool:
        return self.coefficient > 0 and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        return self.coefficient > 0 and self.place == "reward"


@dataclass(frozen=True)
class Numerics:
    """How log-probabilities are computed: what of the sampled distribution, and how much at once.

    Attributes:
        temperature, banned_ids: of the distribution that was sampled from.
        micro_batch_tokens: padded tokens run at once; None runs the whole batch.
        chunk_tokens: response tokens whose logits exist at once.
    """

    temperature: float = 1.0
    banned_ids: Sequence[int] = ()
    micro_batch_tokens: int | None = None
    chunk_tokens: int = 2048

    def logps(self, policy: Any, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """`logps_BT` and `entropy_BT` of one piece."""
        stats = token_logps(
            policy, batch, temperature=self.temperature, banned_ids=self.banned_ids, chunk_tokens=self.chunk_tokens
        )
        return stats.logps_BT, stats.entropy_BT

    @torch.no_grad()
    def all_logps(self, policy: Any, batch: SequenceBatch) -> Tensor:
        """`logps_BT` of a whole batch, piece by piece, without gradient."""
        parts = [(rows, self.logps(policy, piece)[0]) for rows, piece in micro_batches(batch, self.micro_batch_tokens)]
        return in_order([rows for rows, _ in parts], [logps_BT for _, logps_BT in parts])


def policy_backward(
    policy: Any,
    batch: SequenceBatch,
    advantages_B: Tensor,
    mask_BT: Tensor,
    policy_loss: PolicyLoss,
    *,
    denominator: Tensor,
    numerics: Numerics,
    backward: Callable[[Tensor], None],
    sampler_logps_BT: Tensor | None = None,
    mismatch: MismatchCorrection | None = None,
    old_logps_BT: Tensor | None = None,
    ref_logps_BT: Tensor | None = None,
    kl: KLPenalty | None = None,
    what: str,
) -> tuple[Tensor, Metrics]:
    """Run the policy loss backward over a batch, in micro-batches.

    Args:
        mask_BT: response tokens that are trained.
        denominator: what the loss sum is divided by: `policy_loss.count` of the whole update, over all ranks, divided
            by their number (`prism_pl.strategy.share`).
        backward: the module's `manual_backward`.
        sampler_logps_BT, mismatch: the engine's log-probabilities, and what is done about their difference from the
            trainer's. None: neither measured nor corrected.
        old_logps_BT: of the trainer at the rollouts' weights. None: this batch is used once, so they are the current
            ones and the ratio is exactly 1.
        ref_logps_BT: of the frozen reference, where `kl` is in the loss.
        what: the loss's name in messages.

    Returns:
        This rank's loss, detached, and the loss's metrics with `num_tokens` (trained) and `entropy` (their mean, nats).
    """
    losses: list[Tensor] = []
    metrics: list[Metrics] = []
    for rows, piece in micro_batches(batch, numerics.micro_batch_tokens):
        logps_BT, entropy_BT = numerics.logps(policy, piece)
        old_BT = logps_BT.detach() if old_logps_BT is None else old_logps_BT[rows]
        mask = mask_BT[rows]
        weights_BT, measured = None, {}
        if mismatch is not None and sampler_logps_BT is not None:
            weights_BT, measured = mismatch(old_BT, sampler_logps_BT[rows], mask)
        loss, told = policy_loss(
            logps_BT, old_BT, advantages_B[rows], mask, denominator=denominator, weights_BT=weights_BT
        )
        # Micro-batches are merged by the number of tokens, which a loss of one's own need not give.
        told = {**told, **measured, "num_tokens": mask.sum()}
        told["entropy"] = entropy_BT[mask].mean()
        if kl is not None and kl.in_loss:
            assert ref_logps_BT is not None
            kl_BT = kl_estimate(logps_BT, ref_logps_BT[rows], kl.kind)
            loss = loss + kl.coefficient * aggregate(kl_BT, mask, policy_loss.aggregation, denominator)
            told["kl"] = kl_BT.detach()[mask].mean()
        check_finite(loss, what, piece.ids)
        backward(loss)
        losses.append(loss.detach())
        metrics.append(told)
    return torch.stack(losses).sum(), combine_metrics(metrics)


def kl_reward(
    kl: KLPenalty, policy: Any, reference: Any, batch: SequenceBatch, numerics: Numerics
) -> tuple[Tensor, Tensor]:
    """What to take off each response's reward, (B,): the coefficient times k1 summed over its tokens, a one-sample
    estimate of the KL divergence of the response distributions. Second the mean KL a token over all ranks, for the
    logs."""
    logps_BT, ref_logps_BT = numerics.all_logps(policy, batch), numerics.all_logps(reference, batch)
    kl_BT = kl_estimate(logps_BT, ref_logps_BT, kl.kind) * batch.mask_BT
    total, num_tokens = global_sum(kl_BT.sum()), global_sum(batch.mask_BT.sum())
    return kl.coefficient * kl_BT.sum(-1), total / num_tokens


def warn_inert_clip(policy_loss: PolicyLoss, num_updates: int) -> None:
    """Say once, at the start, that a configured clip range cannot act because each batch is used for one update."""
    if num_updates == 1 and isinstance(policy_loss, ClippedLoss):
        rank_zero_warn(
            f"{type(policy_loss).__name__}: each rollout batch is used for one update, so the importance ratio is "
            f"exactly 1 and clip_low={policy_loss.clip_low}, clip_high={policy_loss.clip_high}, dual_clip="
            f"{policy_loss.dual_clip} cannot act; only the aggregation ({policy_loss.aggregation}) does."
        )


def rows_of(rows: list[int], *values: Tensor | None) -> list[Tensor | None]:
    """Some rows of per-token tensors, None where there is none."""
    return [None if value_BT is None else value_BT[rows] for value_BT in values]
