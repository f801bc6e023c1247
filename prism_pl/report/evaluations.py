"""A finished evaluation as it was written to `evaluation.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_pl.evaluation import PromptRecord
from prism_pl.evaluation_tables import ALL_FAMILIES, Entry, Table, Tables

FILE_NAME = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """A read `evaluation.json`: its settings are everything but name, tables and records.

    Attributes:
        name: what tables call this checkpoint.
        folder: of the file, which the records' images are relative to.
    """

    name: str
    settings: dict[str, Any]
    tables: Tables
    records: list[PromptRecord]
    folder: Path = Path()

    def table(self, split: str, family: str = ALL_FAMILIES) -> Table:
        """One table; ValueError for a split or family that was not evaluated."""
        if family not in self.tables.get(split, {}):
            known = {name: list(families) for name, families in self.tables.items()}
            raise ValueError(f"the evaluation {self.name!r} has no {family!r} of {split!r}; it has {known}")
        return self.tables[split][family]

    def rows(self, split: str) -> list[PromptRecord]:
        """The records of a split."""
        return [record for record in self.records if record["split"] == split]


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation from its file or its run's folder. Null is read as NaN, which it was written from.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no evaluation; names it.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: evaluate the checkpoint first (python -m prism_pl test)")
    try:
        content = json.loads(file.read_text())
        written, records, name = content.pop("tables"), content.pop("records"), content.pop("name")
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is no evaluation ({error}): evaluate the checkpoint anew (python -m prism_pl test)"
        ) from None
    tables = {
        split: {
            family: {metric: _with_nan(entry) for metric, entry in table.items()} for family, table in families.items()
        }
        for split, families in written.items()
    }
    return Evaluation(name, settings=content, tables=tables, records=records, folder=file.parent)


def _with_nan(entry: dict[str, Any]) -> Entry:
    filled: dict[str, Any] = {key: float("nan") if value is None else value for key, value in entry.items()}
    return Entry(**filled)
