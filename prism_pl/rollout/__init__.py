"""Rollout engines: what samples responses from the policy."""

from prism_pl.rollout.batch import rollout_batch
from prism_pl.rollout.engine import Rollout, RolloutEngine, Sampling, check_training_sampling
from prism_pl.rollout.transformers_engine import TransformersEngine

__all__ = [
    "Rollout",
    "RolloutEngine",
    "Sampling",
    "TransformersEngine",
    "check_training_sampling",
    "rollout_batch",
]
