"""What a stage needs of every row: known to the stage, and checked by `data check` before a run meets a row without."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

from prism_pl.batch import Example
from prism_pl.chat import EXPERTS, parse
from prism_pl.discriminator.folder import known_settings
from prism_pl.discriminator.interface import DiscriminatorFactory
from prism_pl.rollout.engine import RolloutEngine, Sampling


@dataclass(frozen=True)
class Lengths:
    """A row in tokens: its prompt with images expanded, its response, and the longest segment of the response."""

    prompt: int = 0
    response: int = 0
    segment: int = 0


@dataclass(frozen=True)
class RowNeeds:
    """What must be there.

    Attributes:
        response: a response, of any form.
        demonstration: a response in the three-block format.
        answers: an accepted answer.
        max_length: tokens of prompt and response together, at the most.
        max_prompt: tokens of the prompt at the most, which leave the engine room for a response.
        max_images: images at the most that the engine takes.
        unless_rejected: the engine's limits are not of rows with a `rejected` response: nothing is sampled for them.
        max_segment: tokens of a demonstration's segment at the most, which the discriminator takes.
        experts: the segments that it reads.
    """

    response: bool = False
    demonstration: bool = False
    answers: bool = False
    max_length: int | None = None
    max_prompt: int | None = None
    max_images: int | None = None
    unless_rejected: bool = False
    max_segment: int | None = None
    experts: tuple[str, ...] = EXPERTS

    def unmet(self, example: Example, lengths: Lengths) -> str:
        """What a row lacks, in the words that rows are counted by; "" where nothing is."""
        if (self.response or self.demonstration) and not example.response:
            return "no response"
        if self.demonstration and not (parsed := parse(example.response or "")).valid:
            return f"malformed demonstration: {parsed.reason}"
        if self.answers and not any(answer.strip() for answer in example.answers):
            return "no answer"
        if self.max_length is not None and lengths.prompt + lengths.response > self.max_length:
            return f"over {self.max_length} tokens"
        if self.max_segment is not None and lengths.segment > self.max_segment:
            return f"a segment of over {self.max_segment} tokens, the discriminator's max_segment_tokens"
        return "" if self.unless_rejected and example.rejected is not None else self._of_the_engine(example, lengths)

    def _of_the_engine(self, example: Example, lengths: Lengths) -> str:
        if self.max_images is not None and len(example.images) > self.max_images:
            return f"over {self.max_images} images, the engine's max_images"
        if self.max_prompt is not None and lengths.prompt > self.max_prompt:
            return f"a prompt of over {self.max_prompt} tokens, the engine's max_model_len less sampling.max_tokens"
        return ""


@runtime_checkable
class HasRowNeeds(Protocol):
    """A stage that says what it needs."""

    row_needs: RowNeeds


@runtime_checkable
class HasLimits(Protocol):
    """An engine that knows before it is started what it takes; None: what the started one allows."""

    @property
    def max_model_len(self) -> int | None: ...

    @property
    def max_images(self) -> int | None: ...


def with_engine(needs: RowNeeds, engine: RolloutEngine | None, sampling: Sampling) -> RowNeeds:
    """The needs of a stage that samples from every row."""
    if not isinstance(engine, HasLimits):
        return needs
    longest = None if engine.max_model_len is None else engine.max_model_len - sampling.max_tokens
    return replace(needs, max_prompt=longest, max_images=engine.max_images)


def with_discriminator(needs: RowNeeds, factory: DiscriminatorFactory) -> RowNeeds:
    """The needs of a stage whose demonstrations a discriminator reads, so far as it is known before it is built."""
    settings = known_settings(factory.keywords) if isinstance(factory, partial) else None
    if settings is None:
        return needs
    return replace(needs, max_segment=settings.max_segment_tokens, experts=settings.experts)
