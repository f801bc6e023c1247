"""Rewards as classes that a YAML can name: what they take, what they give, and the one of the paper.

Any class with the same `__call__` fits, wherever it is defined:

    class ShortAnswerReward:
        def __call__(self, responses: list[str], examples: list[Example]) -> RewardOutput:
            short_B = torch.tensor([float(len(parse(r).answer) <= 10) for r in responses])
            return RewardOutput(short_B, {"short": short_B})
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from prism_pl.batch import Example
from prism_pl.chat import lenient_answer, parse
from prism_pl.rewards.equality import accuracy


@dataclass(frozen=True)
class RewardOutput:
    """`rewards_B` (float32) is what the policy is trained on; each of `parts`, shaped alike, is logged by name."""

    rewards_B: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, outputs: Sequence["RewardOutput"]) -> "RewardOutput":
        """The rewards of several groups as those of one batch. ValueError where they have not the same parts."""
        for output in outputs:
            if output.parts.keys() != outputs[0].parts.keys():
                raise ValueError(
                    f"a reward gave the parts {sorted(outputs[0].parts)} for one prompt and {sorted(output.parts)} for "
                    "another: give every part each time, NaN where it says nothing"
                )
        parts = {name: torch.cat([output.parts[name] for output in outputs]) for name in outputs[0].parts}
        return cls(torch.cat([output.rewards_B for output in outputs]), parts)


class Reward(Protocol):
    """Scores whole responses, each against its own example (so an example stands once for each of its rollouts).

    In training it is called for one prompt's rollouts at a time, in a thread beside the rollout engine. One that draws
    random numbers needs a generator of its own: the global ones are the engine's meanwhile.
    """

    def __call__(self, responses: list[str], examples: list[Example]) -> RewardOutput: ...


class AccuracyFormatReward:
    """`accuracy_weight * accuracy + format_weight * format` (PRISM: 0.8 and 0.2); parts "accuracy" and "format".

    The answer is right when it equals any of `example.answers` by `prism_pl.rewards.accuracy`. A malformed response
    gets 0, also when its answer block is empty or a second answer stands in its reasoning. With `strict: false` the
    answer of a malformed response is looked for wherever it stands, and only its format part is 0.

    One row of the embedded digits, and what a right response earns:

        question   "Sum of left and red?"
        answers    ["7"]
        response   "<caption>\\n- 2 digits\\n- green 7 at left\\n- red 0 at centre\\n</caption>\\n<think>\\n1. left: 7
                    \\n2. red: 0\\n3. 7 + 0 = 7\\n4. the sum is 7\\n</think>\\n<answer>\\n7\\n</answer>"
        rewards_B  [1.0]; with the answer 8 [0.2]; without the caption's tags [0.0]
    """

    def __init__(self, accuracy_weight: float = 0.8, format_weight: float = 0.2, strict: bool = True) -> None:
        for name, weight in (("accuracy_weight", accuracy_weight), ("format_weight", format_weight)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"AccuracyFormatReward: {name} is {weight}: give 0 or a positive number")
        if accuracy_weight + format_weight == 0:
            raise ValueError("AccuracyFormatReward: both weights are 0, so every reward is: give one a positive number")
        self.accuracy_weight = accuracy_weight
        self.format_weight = format_weight
        self.strict = strict

    def __call__(self, responses: list[str], examples: list[Example]) -> RewardOutput:
        """Score B responses. Raises ValueError for an example without an answer, naming it."""
        if len(responses) != len(examples):
            raise ValueError(f"{len(responses)} responses for {len(examples)} examples: give each response its example")
        for example in examples:
            check_answers(example)
        scores = [self._score(response, example) for response, example in zip(responses, examples, strict=True)]
        accuracy_B = torch.tensor([right for right, _ in scores], dtype=torch.float32)
        format_B = torch.tensor([valid for _, valid in scores], dtype=torch.float32)
        rewards_B = self.accuracy_weight * accuracy_B + self.format_weight * format_B
        return RewardOutput(rewards_B, {"accuracy": accuracy_B, "format": format_B})

    def _score(self, response: str, example: Example) -> tuple[float, float]:
        """(accuracy, format) of one response."""
        parsed = parse(response)
        if not parsed.valid and self.strict:
            return 0.0, 0.0
        answer = parsed.answer if parsed.valid else lenient_answer(response)
        return float(is_right(answer, example)), float(parsed.valid)


def check_answers(example: Example) -> None:
    """ValueError for an example without an answer, naming it."""
    if not any(answer.strip() for answer in example.answers):
        raise ValueError(
            f"example {example.id!r} has no answer, so its responses cannot be rewarded: "
            "fill the answers column of this row, or leave the row out of the prompts"
        )


def is_right(answer: str, example: Example) -> bool:
    """Whether an answer, the inside of its block, equals any of the example's. ValueError where it has none."""
    check_answers(example)
    return any(accuracy(answer, truth) == 1.0 for truth in example.answers if truth.strip())
