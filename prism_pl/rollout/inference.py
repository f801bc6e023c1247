"""The trainer's policy as a sampler must see it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def inference(policy: Any) -> Iterator[None]:
    """The policy in evaluation mode (which also stops gradient checkpointing from refusing a cache), without its own
    generation defaults, such as a repetition penalty; afterwards everything as it was."""
    from transformers import GenerationConfig

    training = [module for module in policy.modules() if module.training]
    defaults = policy.generation_config
    policy.eval()
    policy.generation_config = GenerationConfig()
    try:
        yield
    finally:
        policy.generation_config = defaults
        for module in training:
            module.training = True


def compute_dtype(policy: Any) -> torch.dtype:
    """In which the live policy computes here: its weights' precision, or that of the autocast around the call."""
    weight = policy.get_input_embeddings().weight
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
