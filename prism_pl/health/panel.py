"""What one expert judged in a step, and whether it judges by style: numbers over a window of steps."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_pl.chat import parse, segments
from prism_pl.health.features import SHADOWS
from prism_pl.health.shadow import Shadow, deviations, explained_variance

# A margin above this leaves Bradley-Terry a gradient, sigmoid(-margin), under 1% of a wrongly ranked pair's.
SATURATED_MARGIN = math.log(99)
# A clipped score beyond this share of the limit keeps under 1% of its gradient: the slope behind the soft clip is
# (1 - share^2)^(3/2).
SATURATED_SHARE = math.sqrt(1 - 0.01 ** (2 / 3))


@dataclass(frozen=True)
class Judged:
    """P prompts with G rollouts and a demonstration each, as one expert saw them; float64 on the CPU.

    Attributes:
        scores_PG, demonstration_P: its scores from before it learned from them.
        valid_PG: rollouts that have a score.
        rollouts, demonstrations: for each shadow the features of the expert's segments, (P, G, K) and (P, K).
    """

    scores_PG: Tensor
    demonstration_P: Tensor
    valid_PG: Tensor
    rollouts: dict[str, Tensor]
    demonstrations: dict[str, Tensor]

    @property
    def margins_N(self) -> Tensor:
        """Demonstration less rollout, of each pair."""
        return (self.demonstration_P[:, None] - self.scores_PG)[self.valid_PG]


def judged(step: Mapping[str, Any]) -> dict[str, Judged]:
    """What each expert judged, from a `prism_pl.outputs.StepOutput`."""
    valid_PG, experts = step["valid"].cpu(), list(step["scores"])
    keep = [*valid_PG.flatten().tolist(), *(True for _ in step["demonstrations"])]
    texts = [
        segments(parse(text), experts) if kept else None
        for text, kept in zip([*step["rollouts"], *step["demonstrations"]], keep, strict=True)
    ]
    num_rollouts = valid_PG.numel()
    found = {}
    for expert, scores_PG in step["scores"].items():
        read = [None if parts is None else parts[expert] for parts in texts]
        rollouts, demonstrations = {}, {}
        for name, features in SHADOWS.items():
            blank = [0.0] * len(features(""))
            rows_NK = torch.tensor([blank if t is None else features(t) for t in read], dtype=torch.float64)
            rollouts[name] = rows_NK[:num_rollouts].view(*valid_PG.shape, -1)
            demonstrations[name] = rows_NK[num_rollouts:]
        demonstration_P = step["demonstration_scores"][expert].detach().cpu().double()
        found[expert] = Judged(scores_PG.detach().cpu().double(), demonstration_P, valid_PG, rollouts, demonstrations)
    return found


def joined(parts: Sequence[Judged], ranks_per_group: int = 1) -> Judged:
    """What several ranks judged as one step.

    Args:
        parts: of the ranks, in order.
        ranks_per_group: neighbours that hold the same prompts, each a part of their rollouts.
    """

    def whole(values: Sequence[Tensor]) -> Tensor:
        """Of (P, G, ...) of each rank: neighbours' rollouts of a prompt side by side, then all prompts."""
        firsts = range(0, len(values), ranks_per_group)
        return torch.cat([torch.cat(list(values[first : first + ranks_per_group]), dim=1) for first in firsts])

    prompts = parts[::ranks_per_group]
    return Judged(
        whole([part.scores_PG for part in parts]),
        torch.cat([part.demonstration_P for part in prompts]),
        whole([part.valid_PG for part in parts]),
        {name: whole([part.rollouts[name] for part in parts]) for name in SHADOWS},
        {name: torch.cat([part.demonstrations[name] for part in prompts]) for name in SHADOWS},
    )


class ExpertPanel:
    """The numbers of one expert over the last `window` steps, beside those of its shadows.

    Args:
        window: steps.
        accuracy_margin: a shadow that comes so near to the expert's accuracy does as well.
        max_explained: share of the scores' variance that a shadow may explain.
    """

    def __init__(self, window: int = 50, accuracy_margin: float = 0.03, max_explained: float = 0.5) -> None:
        self.accuracy_margin, self.max_explained = accuracy_margin, max_explained
        self.steps: deque[dict[str, float]] = deque(maxlen=window)
        self.shadows = {name: Shadow(len(features("")), window) for name, features in SHADOWS.items()}

    def update(self, step: Judged, score_clip: float | None = None) -> dict[str, float]:
        """Take in a step; a NaN score makes NaN of what it enters.

        Args:
            score_clip: of the soft clip that the scores went through.

        Returns:
            Over the window so far: `accuracy/discriminator` and `accuracy/<shadow>`, the share of pairs ranked right, a
            tie counting one half; `explained/<shadow>`, the share of the scores' variance inside groups; `score_std`,
            the mean over groups of two or more; `saturated_margins`, the share of pairs above `SATURATED_MARGIN`;
            `saturated_scores`, the share of rollouts and demonstrations above `SATURATED_SHARE` of the clip's limit,
            where there is one. Once the window is full also `style/<shadow>`, 1 where the expert may be rewarding
            style. NaN where nothing was counted.
        """
        sums = _sums(step, score_clip)
        for name, shadow in self.shadows.items():
            seen = shadow.observe(step.rollouts[name], step.demonstrations[name], step.scores_PG, step.valid_PG)
            sums |= {f"{what}/{name}": value for what, value in seen.items()}
        self.steps.append(sums)
        total = {key: sum(each[key] for each in self.steps) for key in sums}
        pairs = total["pairs"]
        numbers = {
            "accuracy/discriminator": _divide(total["wins"], pairs),
            "score_std": _divide(total["std"], total["groups"]),
            "saturated_margins": _divide(total["saturated_margins"], pairs),
        }
        if score_clip is not None:
            numbers["saturated_scores"] = _divide(total["saturated_scores"], total["scores"])
        for name in self.shadows:
            numbers[f"accuracy/{name}"] = _divide(total[f"wins/{name}"], pairs)
            numbers[f"explained/{name}"] = explained_variance(total[f"error/{name}"], total[f"total/{name}"])
            if len(self.steps) == self.steps.maxlen:
                numbers[f"style/{name}"] = self._flag(numbers, name)
        return numbers

    def _flag(self, numbers: Mapping[str, float], name: str) -> float:
        """Whether a shadow does as well as the expert, or explains its scores. Where the shadow is no better than
        chance by that same margin there is nothing to be had from style, and an expert as lost is only at its end."""
        accuracy, shadow = numbers["accuracy/discriminator"], numbers[f"accuracy/{name}"]
        if math.isnan(accuracy) or math.isnan(shadow):
            return math.nan
        as_good = shadow >= accuracy - self.accuracy_margin and shadow > 0.5 + self.accuracy_margin
        return float(as_good or numbers[f"explained/{name}"] > self.max_explained)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "shadows": {name: s.state_dict() for name, s in self.shadows.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps.clear()
        self.steps.extend(state["steps"])
        for name, shadow in self.shadows.items():
            shadow.load_state_dict(state["shadows"][name])


def _sums(step: Judged, score_clip: float | None) -> dict[str, float]:
    """What a step adds to the expert's own numbers."""
    margins_N, num_valid_P = step.margins_N, step.valid_PG.sum(1)
    squares_PG = torch.where(step.valid_PG, deviations(step.scores_PG[..., None], step.valid_PG).squeeze(-1), 0.0) ** 2
    spread_P = (squares_PG.sum(1) / (num_valid_P - 1)).sqrt()[num_valid_P > 1]
    # sign makes a tie one half; but torch's sign of NaN is 0, which would pass for a tie.
    wins_N = torch.where(margins_N.isnan(), margins_N, (margins_N.sign() + 1) / 2)
    edge = math.inf if score_clip is None else score_clip * SATURATED_SHARE
    scores_N = torch.cat([step.scores_PG[step.valid_PG], step.demonstration_P])
    return {
        "pairs": float(len(margins_N)),
        "wins": float(wins_N.sum()),
        "saturated_margins": float(_above(margins_N, SATURATED_MARGIN).sum()),
        "scores": float(len(scores_N)),
        "saturated_scores": float(_above(scores_N.abs(), edge).sum()),
        "groups": float(len(spread_P)),
        "std": float(spread_P.sum()),
    }


def _above(values_N: Tensor, limit: float) -> Tensor:
    """1 where a value lies above the limit, NaN where it is NaN."""
    return torch.where(values_N.isnan(), values_N, (values_N > limit).double())


def _divide(total: float, count: float) -> float:
    return total / count if count else math.nan
