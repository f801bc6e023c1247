"""The policy losses as classes to name in YAML: options held over the pure functions of `prism_pl.losses`.

    policy_loss:
      class_path: prism_pl.policy_loss.DAPO
      init_args: {dual_clip: 10.0}

The plain names are the papers' forms, `Released*` those of PRISM's release. A loss of one's own is a subclass with
another `loss_fn`, or with `__call__` written out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prism_pl.aggregation import Aggregation, Metrics, check_aggregation, count
from prism_pl.losses import cispo, dapo, dr_grpo, grpo, gspo
from prism_pl.policy_gradient import check_clip


class PolicyLoss:
    """What a module asks of a policy loss: whether to mask truncated rollouts, the denominator's count, the loss.

    Subclass it and write `__call__` for a loss of one's own; options go into `__init__`. Not a dataclass itself,
    because the command line accepts subclasses only of plain classes.
    """

    aggregation: Aggregation = "token_mean"
    constant_length: int | None = None
    mask_truncated: bool = False

    def count(self, mask_BT: Tensor) -> Tensor:
        """This mask's share of the denominator: add over micro-batches, sum over ranks, give to each call."""
        return count(mask_BT, self.aggregation, self.constant_length)

    def __call__(
        self,
        logps_BT: Tensor,
        old_logps_BT: Tensor,
        advantages: Tensor,
        mask_BT: Tensor,
        denominator: Tensor | float | None = None,
        weights_BT: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss and its metrics; arguments as in `prism_pl.policy_gradient`; `denominator` None: this call's
        count."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__: write the loss there.")


@dataclass(frozen=True)
class ClippedLoss(PolicyLoss):
    """A policy loss with a clipped ratio, and the options that all of them have.

    Args:
        aggregation: token_mean, sequence_mean or constant (see `prism_pl.aggregation`).
        clip_low: the ratio is clipped at 1 - clip_low.
        clip_high: the ratio is clipped at 1 + clip_high.
        dual_clip: bound on the ratio where the advantage is negative, above 1; None: off.
        constant_length: tokens that `constant` divides by: the rollouts' largest number of new tokens.
        mask_truncated: leave truncated rollouts out of the loss. Read by the module, which takes them out of the mask
            before `count`, so that they count in no denominator either.

    Raises:
        ValueError: an option outside its range, naming the option and the value.
    """

    aggregation: Aggregation = "sequence_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    constant_length: int | None = None
    mask_truncated: bool = False

    loss_fn: ClassVar[Callable[..., tuple[Tensor, Metrics]]] = staticmethod(grpo)

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.constant_length)
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError(
                "constant_length: None, but aggregation 'constant' divides by it. "
                "Set it to the largest number of new tokens a rollout may have."
            )

    def __call__(
        self,
        logps_BT: Tensor,
        old_logps_BT: Tensor,
        advantages: Tensor,
        mask_BT: Tensor,
        denominator: Tensor | float | None = None,
        weights_BT: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        return type(self).loss_fn(
            logps_BT,
            old_logps_BT,
            advantages,
            mask_BT,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            aggregation=self.aggregation,
            denominator=denominator,
            constant_length=self.constant_length,
            weights_BT=weights_BT,
        )


@dataclass(frozen=True)
class GRPO(ClippedLoss):
    """GRPO as in the paper: mean over each response's tokens, then over responses; clip 0.2; no dual clip."""


@dataclass(frozen=True)
class DAPO(ClippedLoss):
    """DAPO as in the paper: token mean, clip 0.2 / 0.28."""

    aggregation: Aggregation = "token_mean"
    clip_high: float = 0.28

    loss_fn: ClassVar[Callable[..., tuple[Tensor, Metrics]]] = staticmethod(dapo)


@dataclass(frozen=True)
class DrGRPO(ClippedLoss):
    """Dr. GRPO as in the paper: sums divided by `constant_length`, which must be given. For unscaled
    advantages."""

    aggregation: Aggregation = "constant"

    loss_fn: ClassVar[Callable[..., tuple[Tensor, Metrics]]] = staticmethod(dr_grpo)


@dataclass(frozen=True)
class GSPO(ClippedLoss):
    """GSPO as in the paper: sequence ratio, clip 3e-4 / 4e-4, mean over responses."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    loss_fn: ClassVar[Callable[..., tuple[Tensor, Metrics]]] = staticmethod(gspo)


@dataclass(frozen=True)
class ReleasedGRPO(ClippedLoss):
    """GRPO as PRISM's release runs it: token mean, clip 0.2, dual clip 3."""

    aggregation: Aggregation = "token_mean"
    dual_clip: float | None = 3.0


@dataclass(frozen=True)
class ReleasedDAPO(DAPO):
    """DAPO as PRISM's release runs it: the paper's with a dual clip of 10."""

    dual_clip: float | None = 10.0


@dataclass(frozen=True)
class ReleasedGSPO(GSPO):
    """GSPO as PRISM's release runs it: in the loss the same as the paper's."""


@dataclass(frozen=True)
class CISPO(ClippedLoss):
    """CISPO: token mean of a bounded, detached ratio times logp. `clip_low` 1 means no lower bound, as in the paper;
    the upper bound, a weight of at most 5, is ours. There is no dual clip: the weight is bounded already."""

    aggregation: Aggregation = "token_mean"
    clip_low: float = 1.0
    clip_high: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None:
            raise ValueError(f"dual_clip: {self.dual_clip!r} cannot act in CISPO; set clip_high, or dual_clip to null.")

    def __call__(
        self,
        logps_BT: Tensor,
        old_logps_BT: Tensor,
        advantages: Tensor,
        mask_BT: Tensor,
        denominator: Tensor | float | None = None,
        weights_BT: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        return cispo(
            logps_BT,
            old_logps_BT,
            advantages,
            mask_BT,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            aggregation=self.aggregation,
            denominator=denominator,
            constant_length=self.constant_length,
            weights_BT=weights_BT,
        )
