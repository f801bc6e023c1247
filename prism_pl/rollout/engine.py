"""What a rollout engine is: anything with these methods can be named in YAML."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from prism_pl.batch import Example
from prism_pl.processor import Processor
from prism_pl.strategy.ranks import world_size


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        temperature: 0 is greedy.
        max_tokens: the longest response, end-of-turn token included.
        top_p, top_k: below full (1.0; 0) only in evaluation: training needs the log-probabilities of the distribution
            that was sampled from to be the policy's own.
        seed: None draws from the engine's own generator, whose state is saved with the run.
    """

    temperature: float = 1.0
    max_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature is {self.temperature}: it is 0 (greedy) or more")
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens is {self.max_tokens}: a response has at least 1 token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}: it lies above 0 and up to 1 (1 keeps everything)")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k is {self.top_k}: it is 0 (keeps everything) or more")


def check_training_sampling(sampling: Sampling) -> None:
    """Refuse, with a ValueError, what the trainer's log-probabilities cannot follow.

    The trainer's distribution is softmax(logits / temperature) without the banned ids. Cut at top_p or top_k, the
    samples come from another one, and the policy gradient is biased by the tokens that could not be drawn.
    """
    if sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature is 0 (greedy): training needs a distribution to sample from, e.g. temperature: 1.0"
        )
    if sampling.top_p < 1:
        raise ValueError(
            f"sampling.top_p is {sampling.top_p}: in training the samples would not come from the distribution whose "
            "log-probabilities the loss uses; set top_p: 1.0 (a lower one is for evaluation)"
        )
    if sampling.top_k > 0:
        raise ValueError(
            f"sampling.top_k is {sampling.top_k}: in training the samples would not come from the distribution whose "
            "log-probabilities the loss uses; set top_k: 0 (a cut is for evaluation)"
        )


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    Attributes:
        prompt_ids: the prompt as the engine saw it, image placeholders expanded.
        response_ids: sampled ids, the end-of-turn token included where it was sampled.
        sampler_logps: log-probability of each id under the distribution sampled from (temperature applied, banned
            ids removed).
        text: the response decoded without special tokens.
        finish_reason: "stop" at an end-of-turn token, "length" when cut at `max_tokens`.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    sampler_logps: list[float]
    text: str
    finish_reason: Literal["stop", "length"]


# Told the number of an example and its rollouts.
GroupDone = Callable[[int, list[Rollout]], None]


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses from the policy. `start` is called once, before everything else.

    A class named in YAML must annotate these methods as here (jsonargparse compares the signatures); where Any stands,
    any annotation will do.
    """

    def start(self, policy: Any, processor: Processor, *, rank: int) -> None: ...

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        """`num_samples` rollouts an example, prompt by prompt: rollout g of example p stands at p * num_samples + g.

        In a run of several processes each calls it equally often, because engines may work together: a process that
        has nothing to ask for gives no examples.

        Args:
            on_group: is told each group as soon as all of it is there, while the engine goes on with the others. An
                engine that has all at once need not call it.
        """
        ...

    def dtype(self) -> torch.dtype:
        """In which sampling computes: below float32 its probabilities are not quite the trainer's."""
        ...

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the policy's weights and forget every cache made with the old ones."""
        ...

    def sleep(self) -> None:
        """Lend the engine's memory to the training part of a step, until the next `sync`, `wake` or `generate`."""
        ...

    def wake(self) -> None:
        """Take the memory back, with the policy's weights as they are now. Nothing where the engine is awake."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers of the last `generate`, `sync` and `sleep` that are worth a curve, as `rollout/<name>`."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def generate_batch(
    engine: RolloutEngine, examples: Sequence[Example], num_samples: int, sampling: Sampling, batch_idx: int
) -> list[list[Rollout]]:
    """The rollouts of each example of a loader's batch, outside training. The batches' seeds count up from the one of
    `sampling`: one seed for all would draw the same noise in each, and prompts would not be independent."""
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed + batch_idx)
    # Alone, a process has nobody to keep in step with.
    rollouts = engine.generate(examples, num_samples, sampling) if examples or world_size() > 1 else []
    return [rollouts[p * num_samples : (p + 1) * num_samples] for p in range(len(examples))]
