"""What an optimiser keeps, in CPU memory between its steps.

DeepSpeed's own `offload_states` does it for ZeRO 1 and 2, at 3 for no optimiser but its own Adam, and not at 0; and it
pins with torch's allocator, which rounds each tensor up to a power of two, 192 GiB in all for players of 4.4B and 5.3B
parameters. Here all of an engine's tensors lie in one buffer of their own size, under any stage and optimiser.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

ALIGNED = 64  # bytes; where a tensor may begin in the buffer


class Parking:
    """Moves the optimiser's state and the float32 master weights of one engine out of the device's memory and back.

    The buffer is as large as all that is parked, for AdamW on bf16 weights 12 bytes for each parameter of this rank's
    share: on one rank 50 GiB for a policy of 4.4B parameters. It is kept from one time to the next.

    Args:
        engine: DeepSpeed's, of a network that is trained.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._homes: list[tuple[Tensor, torch.device]] = []

    @torch.no_grad()
    def park(self) -> None:
        """Move everything away; a step needs `fetch` before. Optimisers make their state in their first step, so what
        there is to move may have grown."""
        assert not self._homes, "parked twice"
        tensors = list(kept(self.engine))
        if self.engine.zero_optimization_stage() in (1, 2):
            let_go_of_views(self.engine.optimizer)  # they would hold the device's memory
        for tensor, place in zip(tensors, self._places(tensors), strict=True):
            place.copy_(tensor)
            self._homes.append((tensor, tensor.device))
            tensor.data = place
        if torch.cuda.is_available():
            # The other player's blocks have other sizes, and vLLM takes memory from the device itself.
            torch.cuda.empty_cache()

    @torch.no_grad()
    def fetch(self) -> None:
        """Move everything back to where it was."""
        for tensor, device in self._homes:
            tensor.data = tensor.data.to(device, copy=True)
        if self._homes and self.engine.zero_optimization_stage() in (1, 2):
            self.engine.optimizer._link_all_hp_params()
            self.engine.optimizer._hp_optimizer_states_linked = False  # the next step links them
        self._homes.clear()

    def _places(self, tensors: list[Tensor]) -> list[Tensor]:
        """Parts of the buffer, one of each tensor's shape and dtype."""
        sizes = [math.ceil(tensor.nbytes / ALIGNED) * ALIGNED for tensor in tensors]
        if sum(sizes) > len(self._buffer):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = pinned(sum(sizes))
        parts = self._buffer[: sum(sizes)].split(sizes)
        return [
            part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(parts, tensors, strict=True)
        ]


def pinned(size: int) -> Tensor:
    """That many bytes of the CPU's memory, from which a GPU copies at full speed."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if size and torch.cuda.is_available():
        cuda: Any = torch.cuda.cudart()
        if int(cuda.cudaHostRegister(buffer.data_ptr(), size, 0)) == 0:
            # The address may be given to others later. At the process's end the driver sees to it.
            weakref.finalize(buffer, cuda.cudaHostUnregister, buffer.data_ptr()).atexit = False
        else:
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # CUDA tells an error once more, to the next kernel
            rank_zero_warn(f"{size / 2**30:.0f} GiB of CPU memory could not be pinned: parking an optimiser is slower.")
    return buffer


def is_bf16_optimizer(zero: Any) -> bool:
    """Whether this is the class that DeepSpeed takes for bf16 at stage 1, and calls things differently."""
    return hasattr(zero, "fp32_groups_flat_partition")


def let_go_of_views(zero: Any) -> None:
    """Of the master weights and the optimiser's state, at stages 1 and 2; `_link_all_hp_params` makes them anew."""
    if not is_bf16_optimizer(zero):
        zero._clear_hp_buffer_references()
        return
    for master in zero.fp32_groups_flat_partition:
        master.grad = None
    for weight in chain.from_iterable(zero.bf16_groups):
        weight._hp_mapping = None


def kept(engine: Any) -> Iterator[Tensor]:
    """The tensors on the device that only a step needs: the optimiser's state, and master weights that are no weights
    themselves, as they are at stage 0, and of float32 networks at stage 3. Counters stay where they are."""
    device = torch.device(engine.device)
    stage = engine.zero_optimization_stage()
    masters: list[Tensor] = []
    if stage in (1, 2):
        zero = engine.optimizer
        masters = zero.fp32_groups_flat_partition if is_bf16_optimizer(zero) else zero.single_partition_of_fp32_groups
    elif stage == 3:
        own, weights = engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.fp16_partitioned_groups_flat
        masters = [master for master, weight in zip(own, weights, strict=True) if master is not weight]
    states = (value for state in engine.basic_optimizer.state.values() for value in state.values())
    for tensor in [*masters, *states]:
        if isinstance(tensor, Tensor) and tensor.dim() > 0 and tensor.device.type == device.type:
            yield tensor
