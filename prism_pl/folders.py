"""The next free folder of a name, for runs and pipelines that begin beside an earlier one. Light: no heavy imports."""

from pathlib import Path


def is_free(folder: Path, lock: str) -> bool:
    """Whether a folder is new, or empty but for the file `lock` of a run that did not begin."""
    return not folder.exists() or (folder.is_dir() and all(path.name == lock for path in folder.iterdir()))


def free_folder(folder: Path, lock: str) -> Path:
    """`folder` where it is free, else the first free of `folder-2`, `folder-3`, ..."""
    chosen, number = folder, 2
    while not is_free(chosen, lock):
        chosen, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return chosen
