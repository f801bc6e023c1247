"""Rows of a published file, from this machine or the hub: `datasets` underneath, JSON as the authors wrote it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_pl.errors import did_you_mean

Rows = Sequence[Mapping[str, Any]]
TABLES = {".parquet": "parquet", ".arrow": "arrow"}


def read_rows(path: str, split: str, subset: str | None, columns: Sequence[str], limit: int | None) -> Rows:
    """Rows with all of `columns`; images as paths or as {"bytes", "path"}, not decoded.

    Raises:
        FileNotFoundError: neither a file or folder here nor a data set that the hub or its cache has.
        ValueError: a file that cannot be read, a split that is not there, or a column that is missing.
    """
    file = Path(path)
    rows = _of_json(file) if file.suffix in (".json", ".jsonl") else _of_datasets(file, path, split, subset)
    if not len(rows):
        raise ValueError(f"{path} has no rows")
    known = list(rows[0])
    for column in columns:
        if column not in known:
            raise ValueError(
                f"{path} has no column {column!r}.{did_you_mean(column, known)} It has {', '.join(known)}: is it the "
                "file of this benchmark?"
            )
    if limit is None or limit >= len(rows):
        return rows
    return rows[:limit] if isinstance(rows, list) else rows.select(range(limit))  # pyright: ignore


def _of_json(file: Path) -> list[dict[str, Any]]:
    """Lines of objects, a list of them, or one object that maps ids to them (MathVista's testmini.json)."""
    try:
        text = file.read_text()
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no whole JSON ({error}): download it anew") from None
    return list(content.values()) if isinstance(content, dict) else content


def _of_datasets(file: Path, path: str, split: str, subset: str | None) -> Any:
    from datasets import DatasetDict, Image, load_dataset, load_from_disk

    found: Any = None
    try:
        if file.suffix in TABLES:
            found = load_dataset(TABLES[file.suffix], data_files=path, split="train")
        elif (file / "dataset_dict.json").is_file() or (file / "dataset_info.json").is_file():
            found = load_from_disk(path)
            found = found[split] if isinstance(found, DatasetDict) else found
        else:
            found = load_dataset(path, subset, split=split)
    except KeyError:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(str, found))}") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        kind = ValueError if file.exists() else FileNotFoundError
        raise kind(
            f"{path!r} (subset {subset}, split {split}) could not be read ({reason}): give a parquet, json or jsonl "
            "file, a folder that the hub's data set was downloaded to, or its hub name"
        ) from error
    for column, feature in found.features.items():
        if isinstance(feature, Image):
            found = found.cast_column(column, Image(decode=False))
    return found
