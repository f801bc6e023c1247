"""torchmetrics for PRISM: structural proxies, drift, reward gap, faithfulness, pass@k; bootstrap intervals.

Every metric's `compute` returns a flat dict of scalar tensors, ready for `log_dict` under a prefix.

torchmetrics imports transformers and takes seconds, so the metric classes are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prism_pl.metrics.bootstrap import (
    Interval,
    bootstrap_interval,
    paired_difference,
    paired_ratio_difference,
    ratio_interval,
)
from prism_pl.metrics.bootstrap_crossed import crossed_interval
from prism_pl.metrics.counting import count_items, describe_rule

if TYPE_CHECKING:
    from prism_pl.metrics.bootstrap_mean import BootstrapMean
    from prism_pl.metrics.drift import DistributionDistance, LengthDistance, energy_distance, energy_interval
    from prism_pl.metrics.faithfulness import CaptionFaithfulness, ItemCounts, StepCorrectness, compare_items
    from prism_pl.metrics.passk import PassAtK, pass_at_k
    from prism_pl.metrics.probe import probe_intervals
    from prism_pl.metrics.reward_gap import RewardGapMetric
    from prism_pl.metrics.structure import DescriptiveItems, ReasoningSteps
    from prism_pl.metrics.structure_drift import StructureDrift

_HOME = {
    "BootstrapMean": "bootstrap_mean",
    "CaptionFaithfulness": "faithfulness",
    "DescriptiveItems": "structure",
    "DistributionDistance": "drift",
    "ItemCounts": "faithfulness",
    "LengthDistance": "drift",
    "PassAtK": "passk",
    "ReasoningSteps": "structure",
    "RewardGapMetric": "reward_gap",
    "StepCorrectness": "faithfulness",
    "StructureDrift": "structure_drift",
    "compare_items": "faithfulness",
    "energy_distance": "drift",
    "energy_interval": "drift",
    "pass_at_k": "passk",
    "probe_intervals": "probe",
}

__all__ = [
    "BootstrapMean",
    "CaptionFaithfulness",
    "DescriptiveItems",
    "DistributionDistance",
    "Interval",
    "ItemCounts",
    "LengthDistance",
    "PassAtK",
    "ReasoningSteps",
    "RewardGapMetric",
    "StepCorrectness",
    "StructureDrift",
    "bootstrap_interval",
    "compare_items",
    "count_items",
    "crossed_interval",
    "describe_rule",
    "energy_distance",
    "energy_interval",
    "paired_difference",
    "paired_ratio_difference",
    "pass_at_k",
    "probe_intervals",
    "ratio_interval",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
