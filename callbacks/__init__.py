"""Callbacks that a YAML names as `callbacks.<Name>`."""

from callbacks.completions import Completions
from callbacks.export import Export, ExportAdapters
from callbacks.progress import Progress
from callbacks.reward_gap import RewardGap
from callbacks.structural_proxies import StructuralProxies

__all__ = ["Completions", "Export", "ExportAdapters", "Progress", "RewardGap", "StructuralProxies"]
