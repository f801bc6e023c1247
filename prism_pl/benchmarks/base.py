"""What a benchmark is: where its rows lie, what is asked, and which answers are right."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_pl.batch import Example
from prism_pl.benchmarks.source import Rows, read_rows

Row = Mapping[str, Any]


class Benchmark(ABC):
    """A set of questions with a rule. Any subclass can be named in YAML.

    Args:
        path: a hub name, a folder with its files, or one file (parquet, jsonl, json); None is `hub`.
        split, subset: of the hub's data set (`subset` is what it calls a configuration), or of a folder laid out alike;
            None are `hub_split` and `hub_subset`.
        image_folder: what image paths in the rows are relative to; None is the folder of the file.
        limit: take only the first so many rows.
        instructions: end the question with a sentence on the form of the answer. Off, question and options stand alone.
    """

    name: str  # its split in the tables
    hub: str
    hub_split: str
    hub_subset: str | None = None
    columns: tuple[str, ...]  # that a row has to have
    units: tuple[str, ...] = ()  # of `prism_pl.metrics.unit_scores`: scores over several questions at once

    def __init__(
        self,
        path: str | None = None,
        split: str | None = None,
        subset: str | None = None,
        image_folder: str | None = None,
        limit: int | None = None,
        instructions: bool = True,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"{type(self).__name__}: limit is {limit}: give at least 1, or null for all rows")
        self.path, self.split, self.subset = path or self.hub, split or self.hub_split, subset or self.hub_subset
        self.image_folder, self.limit, self.instructions = image_folder, limit, instructions

    def rows(self) -> Rows:
        """The rows, read when asked for. FileNotFoundError or ValueError names what is missing and the way out."""
        return read_rows(self.path, self.split, self.subset, self.columns, self.limit)

    def images(self, *images: Any) -> list[Any]:
        """Images as an `Example` holds them. A path is taken from `image_folder`; None is left out."""
        return [self._image(image) for image in images if image is not None and image != ""]

    def _image(self, image: Any) -> Any:
        if isinstance(image, str):
            beside = Path(self.path).parent if Path(self.path).is_file() else Path(self.path)
            return Path(self.image_folder or beside) / image
        if isinstance(image, Mapping):  # as `datasets` holds an image that it has not decoded
            return image["bytes"] or image["path"]
        return image

    def asked(self, *parts: str | None) -> str:
        """A question from its parts, one a paragraph; the last is the instruction."""
        *rest, instruction = parts
        return "\n".join(part for part in (*rest, instruction if self.instructions else None) if part)

    def meta(self, family: str, unit: str | None = None, **of_the_rule: Any) -> dict[str, Any]:
        """`Example.meta` of a row.

        Args:
            family: its part of the benchmark, a line of the tables.
            unit: questions of one unit are resampled together; None where the question stands alone.
            of_the_rule: what `is_right` needs of the row besides the answers.
        """
        known = {"split": self.name, "family": family, **of_the_rule}
        return known if unit is None else {**known, "unit": unit, "scores": list(self.units)}

    @abstractmethod
    def example(self, row: Row) -> Example:
        """A row as an example. Its `meta` is made by `meta`."""

    @abstractmethod
    def is_right(self, answer: str, example: Example) -> bool:
        """Whether an answer is right. `answer` is the inside of the answer block, never a whole response."""
