"""Of each token that vLLM samples its log-probability, and nothing beside it.

By itself vLLM keeps four arrays of a step, cuts them into one piece a sequence and notes rank, position, id and text of
each token with its log-probability. Training reads the last alone, and on a CPU the rest takes 5 to 11%
of a rollout (benchmarks/rollout.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepLogps:
    """What vLLM carries from its sampler to its scheduler, in the place of its `LogprobsTensors`.

    Attributes:
        logps_B: of the token that each sequence got in a step.
    """

    logps_B: Tensor

    def to_cpu_nonblocking(self) -> "StepLogps":
        """On its way to the CPU; vLLM waits for it."""
        return StepLogps(self.logps_B.to("cpu", non_blocking=True))

    def tolists(self) -> "StepLists":
        """For the scheduler."""
        return StepLists(self.logps_B.tolist())


@dataclass(frozen=True)
class StepLists:
    """In the place of vLLM's `LogprobsLists`."""

    logps: list[float]

    def slice_request(self, first: int, num: int) -> list[float]:
        """Those of one sequence."""
        return self.logps[first : first + num]


@contextmanager
def sampled_logps_alone() -> Iterator[None]:
    """Meanwhile vLLM finds and keeps only the log-probability of each sampled token. For `flat_logprobs` of the sampled
    token alone. A vLLM that has other names for this goes on by itself; its second model runner, which has a sampler of
    its own, still finds all, of which only the log-probability is kept."""
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.sample.sampler import Sampler

    if "_update_sample_logprobs" not in vars(LogprobsProcessor) or "gather_logprobs" not in vars(Sampler):
        yield
        return

    def gather(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> StepLogps:
        assert num_logprobs == 0, num_logprobs
        return StepLogps(logprobs.gather(-1, token_ids[:, None])[:, 0])

    def note(processor: Any, step: Any) -> None:
        processor.logprobs.logprobs += step if isinstance(step, list) else step.logprobs[:, 0].tolist()

    replaced = _replaced(LogprobsProcessor, "_update_sample_logprobs", note)
    with _replaced(Sampler, "gather_logprobs", staticmethod(gather)), replaced:
        yield


@contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    own = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)
