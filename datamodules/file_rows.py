"""Rows of files as a data set of Examples: nothing is read before it is asked for."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.fields import Columns, Fields
from datamodules.sources import Source, Table
from prism_pl.bad_rows import BadRow
from prism_pl.batch import Example
from prism_pl.errors import did_you_mean
from prism_pl.fingerprint import hash_value

# Fields and the folder where relative image paths start -> an Example without id and meta of its place.
ReadRow = Callable[[Fields, Path], Example]


@dataclass(frozen=True)
class Reading:
    """How rows become Examples.

    Attributes:
        read_row: the format.
        columns: field -> the columns it may stand in.
        given: the fields whose column the user named.
        system_prompt: of every row; None is `prism_pl.chat.SYSTEM_PROMPT`.
        keep_system: rows that bring a system prompt keep it.
    """

    read_row: ReadRow
    columns: Columns
    given: frozenset[str] = field(default_factory=frozenset)
    system_prompt: str | None = None
    keep_system: bool = False


def with_columns(columns: Columns, given: Mapping[str, str] | None) -> Columns:
    """The format's columns with the user's in their place. ValueError for a field that the format does not have."""
    for name in given or {}:
        if name not in columns:
            raise ValueError(
                f"data.columns: there is no field {name!r}.{did_you_mean(name, columns)} Fields: {', '.join(columns)}"
            )
    return {**columns, **{name: (column,) for name, column in (given or {}).items()}}


class FileRows(Dataset[Example | BadRow]):
    """The rows of several sources, one after the other. A row that cannot be read is a `BadRow`.

    Args:
        sources: files, folders or hub repositories.
        reading: how rows become Examples.
        split: `meta["split"]` of rows that do not say one.
    """

    def __init__(self, sources: Sequence[Source], reading: Reading, split: str) -> None:
        self.tables = [Table(source, name) for source, name in zip(sources, _names(sources), strict=True)]
        self.reading, self.split = reading, split
        self.ends = list(accumulate(len(table) for table in self.tables))
        for table in self.tables:
            if not len(table):
                raise ValueError(f"data: {table.source.path} holds no rows")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example | BadRow:
        table, row = self._find(index)
        name = f"{table.name}-{row}"
        try:
            fields = Fields(table.row(row), self.reading.columns, self.reading.given)
            example = self.reading.read_row(fields, table.images)
            example.images = [table.located(image) for image in example.images]
            example.id = fields.text("id") or name
        except ValueError as error:
            return BadRow(name, table.place(row), str(error))
        if not self.reading.keep_system or example.system is None:
            example.system = self.reading.system_prompt
        example.meta = {"family": table.name, "split": self.split, **example.meta, "source": table.name, "row": row}
        return example

    def ids(self) -> Iterator[str]:
        """The rows' ids, in order. Where the user named a column of ids, it alone is read."""
        for table in self.tables:
            names = (f"{table.name}-{row}" for row in range(len(table)))
            if "id" in self.reading.given:
                (column,) = self.reading.columns["id"]
                yield from map(self._id, table.rows_with(column), names)
            else:
                yield from names

    def _id(self, columns: Mapping[str, Any], name: str) -> str:
        try:
            return Fields(columns, self.reading.columns, self.reading.given).text("id") or name
        except ValueError:  # a row that cannot be read
            return name

    def check_ids(self, num_rows: int) -> None:
        """ValueError where two of the first so many rows have one id in the column that the user named: results are
        kept by id, and one row would pass for the other."""
        if "id" not in self.reading.given:
            return
        seen: set[str] = set()
        for id in islice(self.ids(), num_rows):
            if id in seen:
                break
            seen.add(id)
        else:
            return
        alike = (index for index, each in enumerate(self.ids()) if each == id)
        places = " and ".join(self._place(index) for index in islice(alike, 2))
        raise ValueError(
            f"data.columns: the column {self.reading.columns['id'][0]!r} gives {places} one id, {id!r}: name a column "
            "whose ids all differ, or leave columns.id out, and rows are called FILE-ROW"
        )

    def _place(self, index: int) -> str:
        table, row = self._find(index)
        return table.place(row)

    def fingerprint(self) -> str:
        """Hash of what the rows hold and of the columns it is read from."""
        columns = {name: list(self.reading.columns[name]) for name in sorted(self.reading.given)}
        return hash_value([[table.fingerprint() for table in self.tables], columns])[:16]

    def check_columns(self) -> None:
        """ValueError where the first row of each source lacks a column: all others would too."""
        for number, table in enumerate(self.tables):
            first = self[self.ends[number - 1] if number else 0]
            if isinstance(first, BadRow) and first.reason.startswith("no "):
                raise ValueError(f"data: {first}")
            assert len(table)

    def _find(self, index: int) -> tuple[Table, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.ends, index)
        return self.tables[number], index - (self.ends[number - 1] if number else 0)


def _names(sources: Sequence[Source]) -> list[str]:
    """What each source is called in ids: its path's last part, numbered where two share it."""
    stems = []
    for source in sources:
        file = source.only if isinstance(source.only, str) else source.path
        stem = Path(file).stem if "*" not in file else Path(file).parent.name or "rows"
        stems.append(stem)
    return [stem if stems.count(stem) == 1 else f"{stem}-{stems[:n].count(stem) + 1}" for n, stem in enumerate(stems)]
