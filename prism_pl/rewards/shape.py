"""What a reward says about a response's shape: the three-block format, and its length."""

from prism_pl.chat import parse


def format(response: str) -> float:
    """1.0 when the whole response keeps the three-block format (`prism_pl.chat.parse`), else 0.0."""
    return float(parse(response).valid)


def overlong(length: int, max_length: int, buffer: int, penalty: float = 1.0) -> float:
    """DAPO's soft punishment of overlong responses (Yu et al. 2025, equation 13), to be added to a reward:

        -penalty * clip((length - (max_length - buffer)) / buffer, 0, 1)

    0 up to `max_length - buffer` tokens, from there linearly down to `-penalty` at `max_length`. `length`, `max_length`
    and `buffer` are in response tokens. Raises ValueError for `buffer` outside of 1 to `max_length`, a negative length
    or a negative penalty.

    Example:
        >>> overlong(length=7168, max_length=8192, buffer=4096)  # (7168 - 4096) / 4096
        -0.75
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(
            f"overlong: buffer is {buffer}, but has to lie between 1 and max_length, which is {max_length}"
        )
    if length < 0:
        raise ValueError(f"overlong: length is {length}, but a response has 0 or more tokens")
    if not 0 <= penalty < float("inf"):
        raise ValueError(f"overlong: penalty is {penalty}, but it is subtracted: give 0 or a positive number")
    share = (length - (max_length - buffer)) / buffer
    return -penalty * min(max(share, 0.0), 1.0) + 0.0  # + 0.0 turns -0.0 into 0.0
