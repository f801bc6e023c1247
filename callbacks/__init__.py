"""Callbacks that a YAML names as `callbacks.<Name>`."""

from callbacks.completions import Completions
from callbacks.convergence_monitor import ConvergenceMonitor
from callbacks.discriminator_health import DiscriminatorHealth
from callbacks.export import Export, ExportAdapters
from callbacks.progress import Progress
from callbacks.reward_gap import RewardGap
from callbacks.structural_proxies import StructuralProxies

__all__ = [
    "Completions",
    "ConvergenceMonitor",
    "DiscriminatorHealth",
    "Export",
    "ExportAdapters",
    "Progress",
    "RewardGap",
    "StructuralProxies",
]
