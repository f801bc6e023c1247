"""What a stage reads from outside the pipeline: which files and folders, their hashes, and what is missing."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_pl.fingerprint import hash_path, hash_value
from prism_pl.input_paths import ROW_FILES, ROWS_KEYS, found_at, is_input_key, names_of
from prism_pl.ledger import Entry


def outside_inputs(config: Mapping[str, Any], cache: dict[str, str]) -> dict[str, dict[str, str]]:
    """The files and folders that a stage reads from outside the pipeline: dotted key -> path or pattern, and sha256.

    Args:
        cache: of hashes, for stages that read the same.
    """
    found: dict[str, dict[str, str]] = {}
    for key, value in _inputs(config).items():
        if not value.startswith("{") and (paths := found_at(value)):
            if value not in cache:
                cache[value] = _hash(paths, is_data=key.startswith("data."))
            found[key] = {"path": value, "sha256": cache[value]}
    return found


def _hash(paths: Sequence[Path], is_data: bool) -> str:
    """Of a folder of data, which may hold many images, the files' sizes serve in place of their contents."""
    hashes = [hash_path(path, contents=not is_data or path.is_file()) for path in paths]
    return hashes[0] if len(paths) == 1 else hash_value([[p.name, sha] for p, sha in zip(paths, hashes, strict=True)])


def missing_inputs(config: Mapping[str, Any]) -> dict[str, str]:
    """What a stage reads from outside the pipeline and would not find: dotted key -> path.

    A name that may be a hub id, such as `Qwen/Qwen3-VL-4B-Instruct`, is left to the command: it alone can look there.
    """
    return {key: value for key, value in _inputs(config).items() if _is_local(key, value) and not found_at(value)}


def _is_local(key: str, value: str) -> bool:
    is_data = key.startswith("data.")
    if names_of(key)[-1] in ("path", "ckpt_path", *ROWS_KEYS):
        is_file = is_data and value.endswith(ROW_FILES) and "://" not in value and not value.startswith("{")
        return is_file or value.startswith((os.sep, "./", "../"))
    # A pattern or an address is the datamodule's to understand, a model's other folders may be made by it.
    return is_data and not set(value) & set("{*?[:")


def gone(entry: Entry, config: Mapping[str, Any]) -> dict[str, str]:
    """What a stage read from outside, would read again, and is not there any more: dotted key -> path."""
    values = _inputs(config)
    return {
        key: read["path"]
        for key, read in entry["inputs"].items()
        if not found_at(read["path"]) and _same_name(read["path"], values.get(key, ""))
    }


def _same_name(path: str, value: str) -> bool:
    """Whether a value is that path; a YAML's relative path is made absolute only where it leads to something."""
    return value == path or (bool(value) and path.endswith(os.sep + os.path.normpath(value)))


def _inputs(config: Mapping[str, Any]) -> dict[str, str]:
    """Every path-like setting of what a stage reads: dotted key -> value."""
    return {k: v for section in ("model", "data", "ckpt_path") for k, v in _paths(config.get(section), section)}


def _paths(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for name, item in items for found in _paths(item, f"{key}.{name}")]
    return [(key, value)] if isinstance(value, str) and value and is_input_key(key) else []
