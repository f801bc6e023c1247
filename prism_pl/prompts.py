"""The batch that alignment, warm start and RLVR start from: examples and their encoded prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prism_pl.batch import Example
from prism_pl.chat import Parsed, parse
from prism_pl.processor import Processor, Prompt


@dataclass
class PromptBatch:
    """P examples with their prompts.

    Attributes:
        examples: rows as the datamodule gave them.
        prompts: the same rows' prompts, encoded by the processor of the network that reads them most (the policy's in
            alignment and RLVR, the discriminator's in its warm start).
        discriminator_prompts: encoded by the discriminator's processor; the list `prompts` itself where both agree.
    """

    examples: list[Example]
    prompts: list[Prompt]
    discriminator_prompts: list[Prompt]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> list[str]:
        """The examples' ids, for messages."""
        return [example.id for example in self.examples]

    def to(self, *_: Any, **__: Any) -> "PromptBatch":
        """Itself: Lightning calls this to move a batch. Prompts stay on the CPU, where sequences are put together."""
        return self


class PromptCollator:
    """Examples -> `PromptBatch`, in the data loader's worker.

    Args:
        processor: encodes `prompts`.
        need_demonstration: every row must have a `response`.
        need_answers: every row must have `answers`.
        discriminator_processor: encodes `discriminator_prompts`; None takes `prompts`. Its cost is spared where it
            encodes as `processor` does.
    """

    def __init__(
        self,
        processor: Processor,
        need_demonstration: bool = False,
        need_answers: bool = False,
        discriminator_processor: Processor | None = None,
    ) -> None:
        self.processor = processor
        self.need_demonstration = need_demonstration
        self.need_answers = need_answers
        agree = discriminator_processor is None or same_encoding(processor, discriminator_processor)
        self.discriminator_processor = None if agree else discriminator_processor

    def __call__(self, examples: Sequence[Example]) -> PromptBatch:
        """ValueError names the row that lacks a demonstration or an answer."""
        for example in examples:
            if self.need_demonstration and not example.response:
                raise ValueError(
                    f"row {example.id!r} has no response: this stage compares rollouts with a demonstration and needs "
                    "one in every row"
                )
            if self.need_answers and not example.answers:
                raise ValueError(f"row {example.id!r} has no answers: this stage rewards right answers and needs them")
        prompts = [self.processor.prompt(example) for example in examples]
        judged = prompts
        if self.discriminator_processor is not None:
            judged = [self.discriminator_processor.prompt(example) for example in examples]
        return PromptBatch(list(examples), prompts, judged)


def same_encoding(one: Processor, other: Processor) -> bool:
    """Whether two processors turn every example into the same ids and patches."""
    return (
        one.tokenizer.chat_template == other.tokenizer.chat_template
        and one.tokenizer.backend_tokenizer.to_str() == other.tokenizer.backend_tokenizer.to_str()
        and one.image_processor.to_dict() == other.image_processor.to_dict()
        and one.text_only == other.text_only
    )


def demonstration(example: Example) -> Parsed:
    """A demonstration taken apart; a malformed one is a ValueError, since its pairs would vanish in silence."""
    assert example.response is not None
    parsed = parse(example.response)
    if not parsed.valid:
        raise ValueError(
            f"row {example.id!r}: the demonstration is malformed ({parsed.reason}), so it makes no pair: mend the row "
            "or leave it out"
        )
    return parsed


def check_demonstration_lengths(examples: Sequence[Example], valid_B: Tensor, max_segment_tokens: int) -> None:
    """ValueError for the first demonstration that the discriminator could not score though it is well-formed: one of
    its segments is over the cap, and its pairs would vanish in silence.

    Args:
        valid_B: of scores whose first rows are the examples' demonstrations.
    """
    for example, fits in zip(examples, valid_B.tolist(), strict=False):
        if not fits:
            raise ValueError(
                f"row {example.id!r}: a segment of the demonstration is longer than max_segment_tokens="
                f"{max_segment_tokens}, so it makes no pair: raise "
                "model.init_args.discriminator.init_args.max_segment_tokens of the warm start, or leave the row out"
            )
