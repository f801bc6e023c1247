"""A row that could not be read, as a value: what a data set gives in an example's place, so that whoever reads it says
whether it stops the run or is counted. Collators that take both declare it by `ReadsBadRows`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prism_pl.batch import Example


@dataclass(frozen=True)
class BadRow:
    """A row without an example.

    Attributes:
        id: as the example's would be.
        place: file and row, for the message.
        reason: what is wrong, in a few words that do not depend on the row where they can.
    """

    id: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class ReadsBadRows:
    """Base of collators that take bad rows beside examples; others are never given one."""

    def __call__(self, rows: Sequence[Any]) -> Any:
        raise NotImplementedError


class Strict:
    """A collator behind which no bad row passes.

    Args:
        collator: what makes the batch.
    """

    def __init__(self, collator: Callable[[list[Example]], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Example | BadRow]) -> Any:
        """The batch. ValueError names the first bad row: file, row and reason."""
        for row in rows:
            if isinstance(row, BadRow):
                raise ValueError(
                    f"{row}. Mend the row, or have `python -m prism_pl data check` list the rows to leave out and give "
                    "its folder as data.check_folder"
                )
        return self.collator(list(rows))  # pyright: ignore[reportArgumentType]


def strict(collator: Callable[[list[Example]], Any]) -> Callable[[Any], Any]:
    """The collator itself if it reads bad rows, else with none let through."""
    return collator if isinstance(collator, ReadsBadRows) else Strict(collator)
