"""What an engine holds after a sync, read back from its own layers and compared with the trainer's weights, exactly.

In bf16 rounding hides a whole run of small steps from the probe's log-probabilities: whether weights arrived at all is
seen in the weights alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prism_pl.lora import whole_parameters
from prism_pl.rollout import vllm_compat
from prism_pl.rollout.bucket import Bucket, Named, cut
from prism_pl.strategy.sharding import gathered

COLUMNS = 16  # of each weight, others at each sync
MOST_UNITS = 32  # a sync, beside embeddings and head: all of a network of 4B parameters, some 600, in 20 syncs
GOLDEN = (math.sqrt(5) - 1) / 2  # steps of this size come near every column soon, taken in any regular turn


@dataclass(frozen=True)
class Unit:
    """A parameter of the engine.

    Attributes:
        name: vLLM's.
        parts: the policy's names of what is fused in it, in order; of a tied head the embeddings' name.
        num_columns: of each, where the dimensions after the first are one.
    """

    name: str
    parts: tuple[str, ...]
    num_columns: int

    def columns(self, turn: int) -> range:
        """Those to be compared in this turn."""
        start = COLUMNS * int(turn * GOLDEN % 1 * math.ceil(self.num_columns / COLUMNS))
        return range(start, min(start + COLUMNS, self.num_columns))


class ReadBack:
    """Compares some columns of some parameters after each sync: of the embeddings and the head each time, of the others
    in turn, of all of them where they are few.

    Every row of a weight is in each of its columns, and an optimiser step moves every value that it trains, so what
    never arrived shows in the first turn after a change that the engine's dtype can hold.

    Args:
        expected: shapes by name, of the policy's parameters.
        tied: whether the head is the embeddings.
        max_bytes: of the sharded weights that are made whole at once.
    """

    def __init__(self, expected: Mapping[str, tuple[int, ...]], tied: bool, max_bytes: int = 1 << 30) -> None:
        self.shapes, self.tied, self.max_bytes = expected, tied, max_bytes
        self.turn = 0
        self.unreadable = False
        self.always: list[Unit] = []
        self.others: list[Unit] = []

    @torch.no_grad()
    def check(self, llm: Any, policy: Any, on_cpu: bool) -> None:
        """ValueError where a parameter of the engine is not the trainer's, cast to the engine's dtype."""
        if self.unreadable:
            return
        (model,) = llm.collective_rpc(vllm_compat.model_of)
        try:
            units, held = self._held(model, on_cpu)
        except (AttributeError, KeyError) as error:  # layers are named otherwise: no reason to end a run
            self.unreadable = True
            rank_zero_warn(
                f"This vLLM's weights cannot be read back after a sync ({error}): the probe alone checks them."
            )
            return
        dtype = next(model.parameters()).dtype
        ours = self._trainers(policy, units, dtype)
        self.turn += 1
        # What tensor parallelism shards is not compared: a shard has fewer columns, which `held_columns` left out, or
        # fewer rows. What every rank holds is: norms, most of the biases, the vision tower's positions and patches.
        pairs = [(name, ours[name], rows) for name, rows in held.items() if rows.shape == ours[name].shape]
        _compare(pairs, dtype)

    def _held(self, model: Any, on_cpu: bool) -> tuple[list[Unit], dict[str, Tensor]]:
        """What is compared in this turn, and the engine's columns of it by name."""
        if not self.always:
            self._find_units(model)
        units = [*self.always, *self._in_turn()]
        bands = {unit.name: (unit.columns(self.turn), unit.num_columns) for unit in units}
        with vllm_compat.own_arithmetic("cpu" if on_cpu else "cuda"):
            return units, vllm_compat.held_columns(model, bands, on_cpu)

    def _find_units(self, model: Any) -> None:
        parts: dict[str, dict[int, str]] = {}
        heads = {"lm_head.weight": "model.language_model.embed_tokens.weight"} if self.tied else {}
        for asked, name in [*((name, name) for name in self.shapes), *heads.items()]:
            place = vllm_compat.place_of(model, asked)
            if place is not None:
                parts.setdefault(place[0], {})[place[1]] = name
        for name, numbered in parts.items():
            names = tuple(numbered[i] for i in sorted(numbered))
            unit = Unit(name, names, math.prod(self.shapes[names[0]][1:]))
            often = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            (self.always if often else self.others).append(unit)
        if not self.always:
            raise KeyError("no embeddings among the engine's parameters")

    def _in_turn(self) -> list[Unit]:
        if len(self.others) <= MOST_UNITS:
            return self.others
        step = math.ceil(len(self.others) / MOST_UNITS)
        return self.others[self.turn % step :: step]

    def _trainers(self, policy: Any, units: Sequence[Unit], dtype: torch.dtype) -> dict[str, Tensor]:
        """The same columns of the trainer's weights, by the engine's names."""
        columns = {part: unit.columns(self.turn) for unit in units for part in unit.parts}
        bands: dict[str, Tensor] = {}
        wanted = whole_parameters(policy, columns)
        for part in cut(wanted, self.max_bytes // dtype.itemsize):
            with gathered([tensor for _, tensor in part]):
                bands |= _bands(part, columns, dtype)
        return {unit.name: torch.cat([bands[part] for part in unit.parts]) for unit in units}


def _bands(named: Sequence[Named], columns: Mapping[str, range], dtype: torch.dtype) -> dict[str, Tensor]:
    cut_out = [(name, tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]) for name, tensor in named]
    cut_out = [(name, table[:, columns[name].start : columns[name].stop]) for name, table in cut_out]
    return dict(Bucket.pack(cut_out, dtype).named())


def _compare(pairs: Sequence[tuple[str, Tensor, Tensor]], dtype: torch.dtype) -> None:
    """ValueError for the first that differ. On a GPU this is the one moment that is waited for."""
    ours = Bucket.pack([(name, rows) for name, rows, _ in pairs], dtype)
    theirs = Bucket.pack([(name, rows) for name, _, rows in pairs], dtype)
    if torch.equal(ours.flat, theirs.flat):
        return
    for (name, mine), (_, held) in zip(ours.named(), theirs.named(), strict=True):
        # NaN is another check's, which names the rows: here it would hide who has it.
        differs = (mine != held) & ~mine.isnan() & ~held.isnan()
        if differs.any():
            raise ValueError(
                f"rollout contract: after a sync the engine's {name!r} is not the trainer's: {int(differs.sum())} of "
                f"{differs.numel()} values read back are others. The weights did not arrive, or vLLM samples from "
                "weights that it packed or kept before"
            )
