"""Rows left out because their prompt is long, as verl's `data.filter_overlong_prompts` does: counted, and said."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info

from datamodules.file_rows import FileRows
from prism_pl.bad_rows import BadRow
from prism_pl.processor import Processor


def short_enough(rows: FileRows, indices: Sequence[int], longest: int, processor: Processor, called: str) -> list[int]:
    """Positions in `indices` of the rows whose prompt, images expanded, has at most `longest` tokens. Texts and the
    headers of images are read, each row's once. A row that cannot be read stays: the loader stops at it.

    Args:
        called: what the rows are called in the line that says how many were left out.

    ValueError where none is left.
    """
    kept = [position for position, index in enumerate(indices) if _fits(rows[index], longest, processor)]
    if indices and not kept:
        raise ValueError(
            f"data.max_prompt_tokens is {longest}, and each of {len(indices)} {called} rows has a longer prompt: raise "
            "it, or scale images down with model.init_args.policy.max_pixels"
        )
    left_out = len(indices) - len(kept)
    rank_zero_info(f"Prompts over {longest} tokens: {left_out} of {len(indices)} {called} rows left out.")
    return kept


def _fits(row: "BadRow | object", longest: int, processor: Processor) -> bool:
    if isinstance(row, BadRow):
        return True
    try:
        return processor.prompt_length(row) <= longest  # pyright: ignore[reportArgumentType]
    except ValueError:
        return True
