"""Where rows come from: local files, folders and hub repositories, opened by `datasets` and read row by row.

JSON files become tables of text lines, one a row, so a line that is no JSON spoils no other and rows may differ in
their columns. Everything else keeps its columns. Tables are mapped into memory, not loaded.
"""

import glob
import hashlib
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

from datamodules.hub_images import located
from datamodules.json_rows import TEXT, array_lines, read_line, read_line_or_nothing
from prism_pl.fingerprint import hash_value
from prism_pl.input_paths import ROW_FILES

LINES = (".jsonl", ".ndjson")
ARRAYS = (".json",)
# Pages of a mapped table count as this process's memory once they are read. Mapping it anew gives them back.
READS_A_MAPPING = 1024
SCANNED_A_MAPPING = 65_536  # in order, without images
FINGERPRINTED_ROWS = 16_384
HASHED_BYTES = 4096  # of an image: as many tell images apart, and sets of them are large


@dataclass
class Source:
    """A set of rows, the same columns throughout.

    Attributes:
        path: a file (.jsonl, .json, .parquet, .arrow), a pattern such as `data/*.parquet`, a folder with such files or
            one written by `Dataset.save_to_disk`, or a hub id such as `prism-vlm/rl_dataset`.
        only: of a folder or hub repository, the file or files meant, such as `rl_training_data_5.9k.parquet`; None:
            all.
        subset, split, revision: of a hub repository; the split also of a saved `DatasetDict`.
        image_folder: where relative image paths start; None: beside the file. Of a hub repository they are fetched.
    """

    path: str
    only: str | list[str] | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    image_folder: str | None = None


class Table:
    """The rows of a source, unread.

    Args:
        source: which.
        name: what rows without an id of their own are called after.
    """

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.name = source, name
        self.files, self.dataset = open_source(source)
        self._on_hub = not self.files and not Path(source.path).is_dir() and source.image_folder is None
        self.images = Path() if self._on_hub else Path(source.image_folder or _folder(self.files, source))
        self._lines = self.dataset.column_names == [TEXT]
        self._reads = 0

    def __len__(self) -> int:
        return self.dataset.num_rows

    def row(self, index: int) -> dict[str, Any]:
        """The columns of a row. ValueError where a line is no JSON object."""
        self._reads += 1
        if self._reads % READS_A_MAPPING == 0:
            self.dataset = pickle.loads(pickle.dumps(self.dataset))
        row = self.dataset[index]
        return read_line(row[TEXT]) if self._lines else row

    def located(self, image: Any) -> Any:
        """An image of a row where it lies here. ValueError where it cannot be had."""
        if not self._on_hub or not isinstance(image, Path):
            return image
        file = self.source.only if isinstance(self.source.only, str) else ""
        return located(image, self.source.path, self.source.revision, str(Path(file).parent))

    def rows_with(self, column: str) -> Iterator[dict[str, Any]]:
        """All rows in order, where they are columns with this one (or what its path begins with) alone: images stay
        unread. A line that is no JSON object is a row without columns."""
        wanted = [name for name in self.dataset.column_names if name in (column, column.partition(".")[0])]
        few = self.dataset if self._lines else self.dataset.select_columns(wanted or self.dataset.column_names[:1])
        for start in range(0, len(self), SCANNED_A_MAPPING):
            mapped = pickle.loads(pickle.dumps(few)).select(range(start, min(start + SCANNED_A_MAPPING, len(self))))
            for batch in mapped.iter(READS_A_MAPPING):
                if self._lines:
                    yield from map(read_line_or_nothing, batch[TEXT])
                else:
                    yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))

    def place(self, index: int) -> str:
        """File and row (counted from 1) of a row. Counts lines, so only for messages."""
        for file in self.files if len(self.files) > 1 else []:
            num_rows = open_source(Source(file))[1].num_rows
            if index < num_rows:
                return f"{file}, row {index + 1}"
            index -= num_rows
        return f"{self.files[0] if self.files else self.source.path}, row {index + 1}"

    def fingerprint(self) -> str:
        """Hash of what the rows hold, wherever the files lie: all rows up to 16,384, else that many, evenly spread."""
        num_rows = len(self)
        step = max(1, num_rows / FINGERPRINTED_ROWS)
        chosen = [int(n * step) for n in range(min(num_rows, FINGERPRINTED_ROWS))]
        return hash_value([num_rows, [hash_value(_hashable(self.dataset[index])) for index in chosen]])


def open_source(source: Source) -> tuple[list[str], "Dataset"]:
    """The local files of a source (none of a hub repository) and its table.

    Raises:
        FileNotFoundError: there is no such file, folder or hub repository.
        ValueError: a file is damaged, or of a kind that is not read.
    """
    path = Path(source.path)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return [], _without_decoding(_saved(source))
    files = _local_files(source)
    if files:
        return files, _without_decoding(_load_files(files))
    if path.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") != 1 or _suffix(source.path):
        raise FileNotFoundError(f"data: there is no file {source.path!r}: name a file, a pattern, a folder or a hub id")
    return [], _without_decoding(_load_hub(source))


def _local_files(source: Source) -> list[str]:
    path, only = source.path, _only(source)
    found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    if os.path.isdir(path):
        inside = [Path(path) / name for name in only] or sorted(Path(path).rglob("*"))
        found = [str(file) for file in inside if file.suffix in ROW_FILES]
        if not found:
            raise ValueError(f"data: the folder {path} holds no file of a kind that is read: {', '.join(ROW_FILES)}")
    for file in found:
        if os.path.isfile(file) and not os.path.getsize(file):
            raise ValueError(f"data: {file} holds no rows: it is empty")
        if not os.path.isfile(file):
            raise FileNotFoundError(f"data: there is no file {file}")
        if not _suffix(file):
            raise ValueError(f"data: {file} is of no kind that is read: give {', '.join(ROW_FILES)}")
    if len({_kind(file) for file in found}) > 1:
        raise ValueError(f"data: {path} holds files of several kinds: give each kind as a source of its own")
    return found


def _only(source: Source) -> list[str]:
    return [source.only] if isinstance(source.only, str) else list(source.only or [])


def _suffix(path: str) -> str:
    return Path(path).suffix if Path(path).suffix in ROW_FILES else ""


def _kind(file: str) -> str:
    return "text" if _suffix(file) in LINES else _suffix(file)


def _load_files(files: Sequence[str]) -> "Dataset":
    import datasets
    from datasets.exceptions import DatasetGenerationError

    kind = _kind(files[0])
    try:
        if kind == "text":
            return _without_last_blanks(datasets.load_dataset("text", data_files=list(files), split="train"))
        if kind in ARRAYS:
            # Size and time are arguments so that a file that was changed is read anew.
            stamps = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
            return datasets.Dataset.from_generator(array_lines, gen_kwargs={"stamps": stamps})  # pyright: ignore[reportReturnType]
        if kind == ".arrow":
            return datasets.load_dataset("arrow", data_files=list(files), split="train")
        return datasets.load_dataset("parquet", data_files=list(files), split="train", batch_size=256)
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error)
        raise ValueError(f"data: {', '.join(files)} cannot be read ({reason})") from None
    except Exception as error:  # pyarrow raises kinds of its own for damaged files
        if not type(error).__module__.startswith("pyarrow"):
            raise
        raise ValueError(f"data: {', '.join(files)} cannot be read ({error})") from None


def _load_hub(source: Source) -> "Dataset":
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    files = _only(source)
    try:
        if files and all(_suffix(file) in LINES for file in files):
            revision = f"@{source.revision}" if source.revision else ""
            urls = [f"hf://datasets/{source.path}{revision}/{file}" for file in files]
            return _without_last_blanks(datasets.load_dataset("text", data_files=urls, split="train"))
        return datasets.load_dataset(
            source.path, source.subset, data_files=files or None, split=source.split, revision=source.revision
        )
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data: {source.path!r} is neither here nor on the hub, or the hub cannot be reached ({error})"
        ) from None


def _saved(source: Source) -> "Dataset":
    import datasets

    saved = datasets.load_from_disk(source.path)
    if isinstance(saved, datasets.Dataset):
        return saved
    if source.split not in saved:
        raise ValueError(f"data: {source.path} has no split {source.split!r}: give one of {', '.join(map(str, saved))}")
    return saved[source.split]


def _without_last_blanks(dataset: "Dataset") -> "Dataset":
    num_rows = dataset.num_rows
    while num_rows and not dataset[num_rows - 1][TEXT].strip():
        num_rows -= 1
    return dataset if num_rows == dataset.num_rows else dataset.select(range(num_rows))


def _without_decoding(dataset: "Dataset") -> "Dataset":
    """With images as encoded bytes or paths: they are opened where they are needed."""
    import datasets

    def encoded(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List | datasets.LargeList):
            return type(feature)(encoded(feature.feature))
        if isinstance(feature, dict):
            return type(feature)({name: encoded(value) for name, value in feature.items()})
        return feature

    return dataset.cast(encoded(dataset.features)) if "Image" in str(dataset.features) else dataset


def _folder(files: Sequence[str], source: Source) -> str:
    return str(Path(files[0]).parent) if files else source.path


def _hashable(value: Any) -> Any:
    if isinstance(value, bytes):
        return len(value), hashlib.sha256(value[:HASHED_BYTES]).hexdigest()
    if isinstance(value, dict):
        return {key: _hashable(item) for key, item in value.items()}
    return [_hashable(item) for item in value] if isinstance(value, list) else value
