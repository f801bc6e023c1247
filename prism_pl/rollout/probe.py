"""A probe after each sync: does the engine sample from the policy that the trainer holds?"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from prism_pl.batch import Example
from prism_pl.logprobs import token_logps
from prism_pl.processor import Processor
from prism_pl.rollout.batch import rollout_batch
from prism_pl.rollout.engine import Rollout, Sampling
from prism_pl.rollout.inference import inference

Generate = Callable[[Sequence[Example], int, Sampling], list[Rollout]]


class Probe:
    """Greedy log-probabilities of the engine against the trainer's, on a prompt that the engine has read before.

    Old weights, and old keys, values or image features in a cache, show as a difference: the prompt is one that the
    engine may have cached.

    Args:
        dtype: the engine's.
        num_tokens: of the probe's response.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, num_tokens: int = 4) -> None:
        self.dtype = dtype
        self.sampling = Sampling(temperature=0.0, max_tokens=num_tokens, seed=0)  # seeded: it counts as no draw
        self.example: Example | None = None
        self.difference = float("nan")

    def remember(self, examples: Sequence[Example]) -> None:
        """Keep a prompt of a call to ask for it after the next sync, one with an image where there is one."""
        if examples:
            self.example = next((example for example in examples if example.images), examples[0])

    @torch.no_grad()
    def check(self, generate: Generate, policy: Any, processor: Processor) -> None:
        """ValueError where engine and trainer differ by more than the tolerance. Nothing before the first rollouts."""
        if self.example is None:
            return
        rollouts = generate([self.example], 1, self.sampling)
        batch, sampler_logps_BT = rollout_batch(processor, [processor.prompt(self.example)], rollouts, 1)
        batch = move_data_to_device(batch, policy.get_input_embeddings().weight.device)
        tolerance = self._tolerance(batch.input_ids_BS.device)
        with inference(policy):
            logps_BT = token_logps(policy, batch, banned_ids=processor.banned_ids).logps_BT
        self.difference = float((sampler_logps_BT.to(logps_BT) - logps_BT).abs().max())
        if not self.difference <= tolerance:
            raise ValueError(
                f"rollout contract: after a sync the engine's log-probabilities are {self.difference:.3g} from the "
                f"trainer's on example {self.example.id!r} (rounding explains {tolerance:.3g}): the engine "
                "samples from other weights, or from keys, values or image features that it cached under the old ones"
            )

    def metrics(self) -> dict[str, float]:
        """The last difference, in nats a token."""
        return {"rollout/probe_difference": self.difference}

    def _tolerance(self, device: torch.device) -> float:
        """The largest difference, in nats a token, that rounding explains, by the coarser of the two sides."""
        if self.dtype != torch.float32 or torch.is_autocast_enabled(device.type):
            return 0.5  # measured at 4B dimensions: at most 0.1
        return 1e-3 if device.type == "cpu" else 2e-2  # a GPU's float32 may be TF32
