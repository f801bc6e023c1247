"""The ranks of a run beside each other: engines must not draw the same rollouts."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prism_pl.rollout.contract import check_group_draws, check_rank_draws, check_rank_seeds, draw_prints
from prism_pl.rollout.draws import Draws
from prism_pl.rollout.engine import Rollout, Sampling
from prism_pl.strategy.ranks import gathered_values, global_max, global_min, on_first_rank, world_size

__all__ = ["RankCheck", "TensorGroup", "check_same_number", "on_first_rank"]


class RankCheck:
    """Compares seeds at the start, and draws at each sync: those are the moments that every rank comes to.

    Args:
        draws: this rank's.
        size: ranks to an engine.
    """

    def __init__(self, draws: Draws, size: int = 1) -> None:
        self.prints: list[tuple[int, float]] = []
        self.repeated = 0.0
        self.groups = [rank // size for rank in range(world_size())]
        check_rank_seeds(gathered_values((draws.seed, draws.rank)), self.groups)

    def remember(self, rollouts: Sequence[Rollout], sampling: Sampling) -> None:
        """Keep what the engine drew. A seeded call is asked for by its seed, and a greedy one draws nothing."""
        if sampling.seed is None and sampling.temperature > 0:
            self.prints = draw_prints(rollouts)

    def check_draws(self) -> None:
        """ValueError where two engines drew the same."""
        if len(self.groups) > 1:
            self.repeated = check_rank_draws(gathered_values(self.prints), self.groups)

    def metrics(self) -> dict[str, float]:
        """The share of the last draws that stood on another engine too."""
        return {"rollout/repeated_draws": self.repeated} if len(self.groups) > 1 else {}


def check_same_number(num_rows: int, device: torch.device) -> None:
    """ValueError where ranks are asked for different numbers of rollouts. A policy sharded over them decodes for all at
    once, and would wait forever."""
    number = torch.tensor(num_rows, device=device)
    if int(global_max(number)) != int(global_min(number)):
        raise ValueError(
            f"one rank is asked for {num_rows} rollouts, another for a different number: at ZeRO-3 this engine needs "
            "as many on each. Set the policy's stage to 2, or take another engine"
        )


class TensorGroup:
    """Ranks that share an engine by tensor parallelism: neighbours, which generate for all of them together.

    Args:
        size: ranks to an engine.

    Attributes:
        number: which of the run's engines this rank belongs to.
    """

    def __init__(self, size: int) -> None:
        world = world_size()
        if world % size:
            raise ValueError(
                f"engine tensor_parallel is {size}, and the run has {world} processes: it must divide their number"
            )
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.number, self.place = divmod(rank, size)
        self.size = size
        self.group: Any = None
        if size > 1:
            # Every rank makes every group, in the same order, as torch asks for.
            groups = [torch.distributed.new_group(range(k, k + size), backend="gloo") for k in range(0, world, size)]
            self.group = groups[self.number]

    def union(self, rows: Sequence[Any]) -> tuple[list[Any], range]:
        """The rows of all ranks of the group, in order, and where this rank's stand among them."""
        parts: list[list[Any]] = self._gathered(list(rows))
        start = sum(len(part) for part in parts[: self.place])
        return [row for part in parts for row in part], range(start, start + len(rows))

    def share(self, draws: Draws) -> None:
        """Let all ranks of the group draw as its first: each draws for the whole engine, and all must draw the same,
        whatever seed a rank was given and wherever its checkpoint was saved."""
        draws.rank, state = self._gathered((draws.rank, draws.state_dict()))[0]
        draws.load_state_dict(state)

    def check_draws(self, drawn: Mapping[int, Sequence[Sequence[int]]]) -> None:
        """ValueError, on every rank of the group, where they drew different responses.

        Args:
            drawn: the ids of each response to each prompt of the union, by the prompt's number.
        """
        if self.size > 1:
            check_group_draws(self._gathered(zlib.crc32(repr(sorted(drawn.items())).encode())))

    def _gathered(self, value: Any) -> list[Any]:
        """A plain value of every rank of the group, in order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values
