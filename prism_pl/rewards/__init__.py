"""Rewards: plain functions on extracted text and lengths, and the classes that a YAML names.

`accuracy(answer, truth)` and `format(response)` give 0.0 or 1.0; `overlong(...)` a penalty; `is_right(answer, example)`
and `same_when_rounded(answer, truth, decimals)` a bool; `timeouts()` says how many comparisons of this process got no
verdict. `AccuracyFormatReward` combines them.
"""

from prism_pl.rewards.accuracy_format import AccuracyFormatReward, Reward, RewardOutput, is_right
from prism_pl.rewards.equality import accuracy, same_when_rounded
from prism_pl.rewards.shape import format, overlong
from prism_pl.rewards.symbolic import timeouts

__all__ = [
    "AccuracyFormatReward",
    "Reward",
    "RewardOutput",
    "accuracy",
    "format",
    "is_right",
    "overlong",
    "same_when_rounded",
    "timeouts",
]
