"""Groups of rollouts on their way into policy updates: dynamic sampling's buffer, and shuffled mini-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prism_pl.advantages import groups_with_variance
from prism_pl.processor import Prompt
from prism_pl.rollout.engine import Rollout
from prism_pl.strategy import global_min


@dataclass(frozen=True)
class Group:
    """The G rollouts of one prompt and their rewards."""

    prompt: Prompt
    rollouts: list[Rollout]
    rewards_G: Tensor


def make_groups(prompts: Sequence[Prompt], rollouts: Sequence[Rollout], rewards_B: Tensor) -> list[Group]:
    """B = P * G rollouts, prompt by prompt as an engine returns them, as P groups."""
    rewards_PG = rewards_B.view(len(prompts), -1)
    size = rewards_PG.shape[1]
    return [Group(prompt, list(rollouts[p * size : (p + 1) * size]), rewards_PG[p]) for p, prompt in enumerate(prompts)]


def groups_worth_training(groups: Sequence[Group], parts: Mapping[str, Tensor]) -> list[Group]:
    """The groups whose answers are neither all right nor all wrong.

    Args:
        parts: of the reward, (B,) each. ValueError where `accuracy` is not among them.
    """
    if "accuracy" not in parts:
        raise ValueError(
            f"dynamic_sampling judges groups by the reward's part 'accuracy', and this reward has {sorted(parts)}: "
            "give it that part, or set dynamic_sampling: false"
        )
    keep_P = groups_with_variance(parts["accuracy"].view(len(groups), -1))
    return [group for group, keep in zip(groups, keep_P.tolist(), strict=True) if keep]


class Draw(NamedTuple):
    """What a buffer gives out: the groups, the further batches it took, and how many groups are missing."""

    groups: list[Group]
    refills: int
    shortfall: int


class GroupBuffer:
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) as a buffer between rollout batches and updates.

    Groups worth training on come in batch by batch. While there are too few, the next batch is the refill; at most
    `max_refills` of them, then training goes on with what there is. The surplus of a full buffer is dropped, as in
    PRISM's release: after the update it would be of old weights. No update happens while the buffer fills, so all its
    rollouts are of the same weights. All ranks give out equally many groups.

    Args:
        max_refills: further batches to fill up with; then what there is is given out.
        max_barren: batches one after another without a single group worth training, at which the run stops: without
            a step the policy stays as it is, and so do its answers.
    """

    def __init__(self, max_refills: int, max_barren: int = 20) -> None:
        if max_refills < 0:
            raise ValueError(f"max_refills is {max_refills}: give 0 (never refill) or more")
        if max_barren < 1:
            raise ValueError(f"max_barren is {max_barren}: give at least 1 batch")
        self.max_refills = max_refills
        self.max_barren = max_barren
        self._groups: list[Group] = []
        self._refills = 0
        self._barren = 0

    def add(self, groups: Sequence[Group]) -> None:
        """Take in groups of the present weights."""
        self._groups.extend(groups)

    def take(self, wanted: int, device: torch.device) -> Draw | None:
        """`wanted` groups, or fewer once the refills are used up (possibly none); None: give the next batch first.

        Args:
            device: of the collective that all ranks decide by.

        Raises ValueError after `max_barren` batches without a group.
        """
        held = int(global_min(torch.tensor(len(self._groups), device=device)))
        self._barren = 0 if held else self._barren + 1
        if self._barren >= self.max_barren:
            raise ValueError(
                f"dynamic sampling found no group to train on in {self._barren} batches (max_barren): in each group "
                "all answers are right, or all wrong. Take prompts that the policy sometimes solves, more num_rollouts "
                "or a higher sampling.temperature, or set dynamic_sampling: false"
            )
        if held < wanted and self._refills < self.max_refills:
            self._refills += 1
            return None
        given = self._groups[: min(held, wanted)]
        draw = Draw(given, self._refills, wanted - len(given))
        self._groups, self._refills = [], 0
        return draw

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that a checkpoint loads with `weights_only`."""
        groups = [
            {"prompt": dict(vars(g.prompt)), "rollouts": [dict(vars(r)) for r in g.rollouts], "rewards_G": g.rewards_G}
            for g in self._groups
        ]
        return {"groups": groups, "refills": self._refills, "barren": self._barren}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on filling where `state` was saved."""
        self._groups = [
            Group(Prompt(**g["prompt"]), [Rollout(**r) for r in g["rollouts"]], g["rewards_G"]) for g in state["groups"]
        ]
        self._refills, self._barren = state["refills"], state["barren"]


def shuffled_minibatches(
    num_groups: int, num_minibatches: int, num_epochs: int, seed: int, step: int
) -> list[list[int]]:
    """Indices of groups for each update in turn: every epoch shuffles anew and cuts into mini-batches of (nearly) equal
    size. A function of its arguments alone, so that a resumed run shuffles alike. Fewer groups than mini-batches make
    one mini-batch each."""
    generator = np.random.default_rng([seed, step])
    plan: list[list[int]] = []
    for _ in range(num_epochs):
        # A single mini-batch keeps its order: shuffling would change nothing but rounding.
        order = generator.permutation(num_groups) if num_minibatches > 1 else np.arange(num_groups)
        plan += [part.tolist() for part in np.array_split(order, min(num_minibatches, num_groups))]
    return plan
