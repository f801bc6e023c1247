"""Images that the rows of a hub repository name by path: they lie beside the rows there, and are fetched once."""

from functools import cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from prism_pl.input_paths import ROW_FILES


@cache
def fetched(repository: str, revision: str | None) -> Path:
    """The folder here with the files of a data repository, those of rows left out.

    Raises:
        FileNotFoundError: they cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    rank_zero_info(f"Rows of {repository} name images by path: fetching the repository's files (once).")
    rows = [f"*{suffix}" for suffix in ROW_FILES]
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision, ignore_patterns=rows))
    except OSError as error:  # the hub's own errors are some, too
        raise FileNotFoundError(
            f"data: the images of {repository} cannot be fetched from the hub ({error}): try again, or download them "
            f"and give the folder where their paths start, {{path: {repository}, image_folder: FOLDER}}"
        ) from None


def located(image: Path, repository: str, revision: str | None, beside: str) -> Path:
    """Where an image lies here.

    Args:
        image: as the row names it.
        beside: the folder of the rows' file in the repository, where relative paths start; else they do at its top.

    Raises:
        ValueError: neither this machine nor the repository has it.
        FileNotFoundError: see `fetched`.
    """
    if image.is_absolute():
        if image.exists():
            return image
        raise ValueError(
            f"the image {str(image)!r} lies on the machine where {repository} was made: download the images, write the "
            "rows into a file with paths from the images' folder on, and give both, {path: FILE, image_folder: FOLDER}"
        )
    folder = fetched(repository, revision)
    for path in (folder / beside / image, folder / image):
        if path.exists():
            return path
    raise ValueError(
        f"{repository} has no file {str(image)!r} on the hub: download the images (archives unpacked), and give the "
        f"folder where their paths start, {{path: {repository}, image_folder: FOLDER}}"
    )
