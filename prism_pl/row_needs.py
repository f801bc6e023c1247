"""What a stage needs of every row: known to the stage, and checked by `data check` before a run meets a row without."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from prism_pl.batch import Example
from prism_pl.chat import parse


@dataclass(frozen=True)
class RowNeeds:
    """What must be there.

    Attributes:
        response: a response, of any form.
        demonstration: a response in the three-block format.
        answers: an accepted answer.
        max_length: tokens of prompt and response together, at the most.
    """

    response: bool = False
    demonstration: bool = False
    answers: bool = False
    max_length: int | None = None

    def unmet(self, example: Example, num_tokens: int) -> str:
        """What a row of so many tokens lacks, in the words that rows are counted by; "" where nothing is."""
        if (self.response or self.demonstration) and not example.response:
            return "no response"
        if self.demonstration and not (parsed := parse(example.response or "")).valid:
            return f"malformed demonstration: {parsed.reason}"
        if self.answers and not any(answer.strip() for answer in example.answers):
            return "no answer"
        if self.max_length is not None and num_tokens > self.max_length:
            return f"over {self.max_length} tokens"
        return ""


@runtime_checkable
class HasRowNeeds(Protocol):
    """A stage that says what it needs."""

    row_needs: RowNeeds
