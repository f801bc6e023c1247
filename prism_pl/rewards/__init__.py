"""Rewards: plain functions on extracted text and lengths, and the classes that a YAML names.

`accuracy(answer, truth)` and `format(response)` give 0.0 or 1.0; `overlong(...)` a penalty; `timeouts()` says how many
comparisons of this process got no verdict. `AccuracyFormatReward` combines them.
"""

from prism_pl.rewards.accuracy_format import AccuracyFormatReward, Reward, RewardOutput
from prism_pl.rewards.equality import accuracy
from prism_pl.rewards.shape import format, overlong
from prism_pl.rewards.symbolic import timeouts

__all__ = ["AccuracyFormatReward", "Reward", "RewardOutput", "accuracy", "format", "overlong", "timeouts"]
