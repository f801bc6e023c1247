"""Rollout engines: what samples responses from the policy."""

from prism_pl.rollout.auto import AutoEngine
from prism_pl.rollout.batch import rollout_batch
from prism_pl.rollout.engine import Rollout, RolloutEngine, Sampling, check_training_sampling
from prism_pl.rollout.transformers_engine import TransformersEngine
from prism_pl.rollout.vllm_engine import VLLMEngine
from prism_pl.rollout.vllm_server import VLLMServerEngine

__all__ = [
    "AutoEngine",
    "Rollout",
    "RolloutEngine",
    "Sampling",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "check_training_sampling",
    "rollout_batch",
]
