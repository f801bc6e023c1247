"""Batches of rows of like length, drawn once from the seed: less padding, and so many tokens a batch at the most.

A batch then stands in a row's place: epochs shuffle the batches, ranks share them out, and a resumed run goes on behind
the last one, all by the sampler that does it for rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

POOL = 8192  # rows that are sorted together: enough to find equals, few enough to keep batches different


@dataclass(frozen=True)
class Plan:
    """Which rows make each batch: batch n is `rows[starts[n]:starts[n + 1]]`."""

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, number: int) -> list[int]:
        """Indices of the rows of a batch."""
        return self.rows[self.starts[number] : self.starts[number + 1]].tolist()


def plan_batches(lengths: Sequence[int] | np.ndarray, batch_size: int, batch_tokens: int | None, seed: int) -> Plan:
    """Batches of at most `batch_size` rows of like length.

    Args:
        lengths: tokens of each row.
        batch_tokens: the largest batch in padded tokens, rows times the longest of them; None: `batch_size` rows each,
            and the few that are left over stay out, which is said.
        seed: of the pools in which rows are sorted.

    Raises:
        ValueError: a row is longer than `batch_tokens`, or the rows fill no batch.
    """
    lengths = np.asarray(lengths)
    if batch_tokens is not None and len(lengths) and lengths.max() > batch_tokens:
        raise ValueError(
            f"batch_tokens is {batch_tokens}, and the longest row has {lengths.max()} tokens: raise it, or leave long "
            "rows out (data check --max_tokens)"
        )
    order = np.random.default_rng(seed).permutation(len(lengths))
    pool = max(1, POOL // batch_size) * batch_size
    pools = [order[start : start + pool] for start in range(0, len(order), pool)]
    # Longest first, equals in the order they were drawn.
    rows = np.concatenate([p[np.argsort(-lengths[p], kind="stable")] for p in pools]) if pools else order
    if batch_tokens is None:
        if len(rows) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, and there are only {len(rows)} training rows: give a smaller batch_size, "
                "batch_tokens, or more rows"
            )
        if left_out := len(rows) % batch_size:
            rank_zero_info(
                f"group_by_length: {left_out} of {len(rows)} training rows fill no batch of {batch_size} and are left "
                "out of every epoch; batch_tokens takes them in."
            )
        return Plan(rows, np.arange(0, len(rows) // batch_size + 1) * batch_size)
    return Plan(rows, np.array(_cuts(lengths[rows].tolist(), batch_size, batch_tokens, pool)))


def _cuts(lengths: list[int], batch_size: int, batch_tokens: int, pool: int) -> list[int]:
    """Where batches start. Within a pool the first row of a batch is its longest."""
    starts, longest = [0], lengths[0] if lengths else 0
    for row, length in enumerate(lengths):
        size = row - starts[-1] + 1
        if row and (size > batch_size or size * longest > batch_tokens or row % pool == 0):
            starts.append(row)
            longest = length
    return [*starts, len(lengths)] if lengths else [0]


class Batches(Dataset[list[Any]]):
    """A data set whose items are the batches of a plan, as lists of rows."""

    def __init__(self, rows: Dataset[Any], plan: Plan) -> None:
        self.rows, self.plan = rows, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> list[Any]:
        return [self.rows[index] for index in self.plan.batch(number)]
