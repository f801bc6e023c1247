"""A probe after each sync: does the engine sample from the policy that the trainer holds?"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from prism_pl.batch import Example
from prism_pl.logprobs import token_logps
from prism_pl.processor import Processor
from prism_pl.rollout.batch import rollout_batch
from prism_pl.rollout.engine import Rollout, Sampling
from prism_pl.rollout.inference import inference

# Nats a token that rounding to bf16 explains, on the probe's greedy tokens. At equal weights one probe reads from 0.001
# to 0.03 by its prompt, so a single reading bounds nothing: a run's own bound is its first reading times NOISE, never
# tighter than LEAST. Noise grows with the policy's logits and its entropy: up to 0.1 at the worst of 40 prompts of a
# policy far from its start, where single sampled tokens reach 0.3. The mean does not follow these, and moves as much as
# any token where caches are old.
ANY_TOKEN, MEAN, LEAST, NOISE = 0.5, 0.25, 0.15, 4.0

Generate = Callable[[Sequence[Example], int, Sampling], list[Rollout]]


class Probe:
    """Greedy log-probabilities of the engine against the trainer's, on a prompt that the engine has read before.

    Old weights, and old keys, values or image features in a cache, show as a difference: the prompt is one that the
    engine may have cached. Below float32 small ones do not: see `prism_pl.rollout.read_back` for the weights.

    Args:
        dtype: the engine's.
        num_tokens: of the probe's response.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, num_tokens: int = 4) -> None:
        self.dtype = dtype
        self.sampling = Sampling(temperature=0.0, max_tokens=num_tokens, seed=0)  # seeded: it counts as no draw
        self.example: Example | None = None
        self.difference = float("nan")
        self.mean_bound: float | None = None  # below float32, by the noise of the run's first check

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
        with inference(policy):
            logps_BT = token_logps(policy, batch, banned_ids=processor.banned_ids).logps_BT
        self.judge((sampler_logps_BT.to(logps_BT) - logps_BT).abs(), batch.input_ids_BS.device.type)

    def judge(self, differences: Tensor, device: str) -> None:
        """ValueError where the differences of the probe's tokens, in nats, are more than rounding.

        Args:
            device: the trainer's, "cpu" or "cuda".
        """
        self.difference, mean = float(differences.max()), float(differences.mean())
        if not self._coarse(device):
            tolerance = 1e-3 if device == "cpu" else 2e-2  # a GPU's float32 may be TF32
            self._demand(self.difference, tolerance, "")
            return
        self._demand(self.difference, ANY_TOKEN, "")
        self._demand(mean, MEAN if self.mean_bound is None else self.mean_bound, " on the average")
        if self.mean_bound is None:
            self.mean_bound = min(max(NOISE * mean, LEAST), MEAN)

    def metrics(self) -> dict[str, float]:
        """The last difference, in nats a token."""
        return {"rollout/probe_difference": self.difference}

    def _coarse(self, device: str) -> bool:
        """Whether either side computes below float32."""
        return self.dtype != torch.float32 or torch.is_autocast_enabled(device)

    def _demand(self, difference: float, tolerance: float, how: str) -> None:
        if not difference <= tolerance:
            assert self.example is not None
            raise ValueError(
                f"rollout contract: after a sync the engine's log-probabilities are {difference:.3g}{how} from the "
                f"trainer's on example {self.example.id!r} (rounding explains {tolerance:.3g}): the engine "
                "samples from other weights, or from keys, values or image features that it cached under the old ones"
            )
