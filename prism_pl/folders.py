"""Names of folders: the next free one, for runs and pipelines that begin beside an earlier one, and what the policy in
one is called. Light: no heavy imports."""

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


def checkpoint_name(policy: str) -> str:
    """What a policy is called that was given no name: an export by its run, else the last part of its path or hub id.

    Example:
        >>> checkpoint_name("runs/align/export"), checkpoint_name("runs/rlvr/export-best"), checkpoint_name("a/b")
        ('align', 'rlvr-best', 'b')
    """
    path = Path(policy).absolute()
    if path.name.split("-")[0] != "export":
        return path.name
    return path.parent.name + path.name.removeprefix("export")
