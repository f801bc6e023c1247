"""What vLLM would bend without a word is refused."""

import re

from prism_pl.rollout.engine import Sampling


def too_long(error: ValueError, max_model_len: int | None) -> ValueError | None:
    """What vLLM says of a `max_model_len` beyond the policy's positions, in our words; None of any other error."""
    if (found := re.search(r"derived max_model_len \(\w+=(\d+)", str(error))) is None:
        return None
    return ValueError(
        f"engine max_model_len is {max_model_len}, and the policy has {found[1]} positions (its config.json): give at "
        "most that, or leave it out"
    )


def check_temperature(sampling: Sampling) -> None:
    """ValueError for a temperature that vLLM takes for another one."""
    if 0 < sampling.temperature < 0.01:
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}: vLLM samples below 0.01 as at 0.01; give at least "
            "that, or 0 for greedy"
        )


def check_fits(num_prompt: int, sampling: Sampling, longest: int, row: str, remedy: str) -> None:
    """ValueError where a prompt and its response are too long.

    Args:
        num_prompt: tokens of the prompt.
        longest: what the engine takes, in tokens.
        row: the example's id.
        remedy: how the engine takes more.
    """
    if num_prompt + sampling.max_tokens > longest:
        raise ValueError(
            f"row {row!r}: a prompt of {num_prompt} tokens and sampling.max_tokens={sampling.max_tokens} do "
            f"not fit into the engine's {longest}: {remedy}, or lower max_tokens"
        )


def check_images(num_images: int, most: int, row: str) -> None:
    """ValueError where a prompt has more images than the engine was started for: vLLM would stop for good."""
    if num_images > most:
        raise ValueError(f"row {row!r} has {num_images} images, and the engine takes {most}: raise its max_images")
