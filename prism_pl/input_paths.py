"""Which settings name files and folders that are read, and what a value of theirs leads to. Light: no heavy imports."""

import glob
import os
import re
from pathlib import Path

# Outputs (default_root_dir, dirpath, save_dir) are none.
PATH_KEY = re.compile(r"(^|_)(path|paths|file|files|folder|folders)$|^pass_rates$")
NO_PATH_KEYS = frozenset({"class_path"})
ROWS_KEYS = ("train", "validation", "test")  # of a data module's arguments: a path or a hub id by itself, or a list
ROW_FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")


def is_input_key(key: str) -> bool:
    """Whether the value at a dotted key names what is read: `model.init_args.policy.path`, `data.train`,
    `data.init_args.validation.1.path`. Numbers are places in a list."""
    *above, last = names_of(key)
    rows = last in ROWS_KEYS and above in (["data"], ["data", "init_args"])
    return rows or (bool(PATH_KEY.search(last)) and last not in NO_PATH_KEYS)


def names_of(key: str) -> list[str]:
    """The names of a dotted key, without the places in lists."""
    return [name for name in key.split(".") if not name.isdigit()] or [key]


def found_at(value: str) -> list[Path]:
    """The file or folder of this name, else what it matches as a pattern such as `data/*.parquet`, else nothing."""
    return [Path(value)] if os.path.exists(value) else [Path(path) for path in sorted(glob.glob(value, recursive=True))]


def absolute(value: str, folder: Path) -> str | None:
    """The absolute path or pattern of a value in `folder`; None where it leads to nothing there."""
    if os.path.exists(folder / value):
        return str((folder / value).resolve())
    pattern = (glob.escape(str(folder.resolve())) / Path(value)).resolve()
    return str(pattern) if found_at(str(pattern)) else None
