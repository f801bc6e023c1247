"""Weights into vLLM's model on a GPU: by its own loaders the first time, and from then on by the copies that they made.

The loaders look up each parameter's place by its name, in Python. For the 713 tensors of a 4B policy that takes longer
than the GPU takes for all of their bytes. Loaders that have torch do more than copy whole weights are asked each time:
those of a rank of several, by tensor parallelism, which take their part of each. What does not go through torch (a
reference kept, `.data` replaced, numpy, a kernel launched by hand) is not seen; vLLM's loaders of Qwen3-VL do nothing
of the kind, and the read-back would find weights that are not there.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prism_pl.rollout.bucket import Bucket, Named
from prism_pl.rollout.contract import StreamDigest


@dataclass(frozen=True)
class View:
    """A view of some storage, as `torch.as_strided` takes it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "View":
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def on(self, tensor: Tensor) -> Tensor:
        """The view of another tensor's storage."""
        return tensor.as_strided(self.size, self.stride, self.offset)


# The model's parameter, which of its values are overwritten, and with which of the bucket's.
Copy = tuple[str, View, View]


class CopyPlan:
    """Loads buckets into one model. A bucket with the names and shapes of one of the first sync's is copied to where
    vLLM's loaders copied that one. Others go through the loaders, and all do where these did anything but copy."""

    def __init__(self) -> None:
        self.copies: dict[int, list[Copy]] | None = None  # by a bucket's checksum of names and shapes

    def load(self, model: Any, buckets: Iterable[Bucket], received: StreamDigest) -> set[str]:
        """The names that vLLM gives what it loaded.

        Args:
            received: adds a bucket up once it is loaded.
        """
        if self.copies is None:
            return self._record(model, buckets, received)
        parameters: dict[str, Tensor] = {}
        loaded: set[str] = set()
        rest = iter(buckets)
        for bucket in rest:
            if not parameters:  # looked up while a GPU packs the first bucket
                parameters = {name: parameter.data for name, parameter in model.named_parameters()}
            copies = self.copies.get(bucket.head())
            if copies is None:
                return loaded | model.load_weights(unpacked(chain([bucket], rest), received))
            places = [place.on(parameters[name]) for name, place, _ in copies]
            torch._foreach_copy_(places, [values.on(bucket.flat) for _, _, values in copies])
            loaded.update(name for name, _, _ in copies)
            received.add(bucket)
        return loaded

    def _record(self, model: Any, buckets: Iterable[Bucket], received: StreamDigest) -> set[str]:
        watch = _Watch(model)
        with watch:
            loaded = model.load_weights(watch.unpacked(buckets, received))
        self.copies = watch.copies if watch.copied_all(loaded) else {}
        return loaded


def unpacked(buckets: Iterable[Bucket], received: StreamDigest) -> Iterator[Named]:
    """The tensors of buckets, one after the other. `received` adds a bucket up when all of it has been taken: what was
    overwritten in the meantime shows. How a value was cast or is kept inside the engine shows in the probe."""
    for bucket in buckets:
        yield from bucket.named()
        received.add(bucket)


class _Watch(TorchDispatchMode):
    """Notes which values of the buckets the loaders copy where, and whether they have torch do anything else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.copies: dict[int, list[Copy]] = {}
        self._num_values: dict[int, int] = {}
        self._only_copied = True
        self._aside = False
        named = dict(model.named_parameters())
        self._names = set(named)
        self._parameters = {_address(parameter): name for name, parameter in named.items()}
        self._buckets: dict[int, int] = {}  # checksums by address, which a later one may take over

    def unpacked(self, buckets: Iterable[Bucket], received: StreamDigest) -> Iterator[Named]:
        """As the function of this name. What it does itself is not the loaders'."""
        stream = unpacked(self._seen(buckets), received)
        while True:
            self._aside = True
            named = next(stream, None)
            self._aside = False
            if named is None:
                return
            yield named

    def _seen(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        for bucket in buckets:
            head = bucket.head()
            self._buckets[_address(bucket.flat)] = head
            self.copies[head] = []
            self._num_values[head] = sum(math.prod(shape) for shape in bucket.shapes)
            yield bucket

    def copied_all(self, loaded: set[str]) -> bool:
        """Whether of each bucket as many values were copied as it has, to each parameter that is said to be loaded, and
        nothing else was done."""
        num_copied = {head: sum(math.prod(v.size) for _, _, v in copies) for head, copies in self.copies.items()}
        names = {name for copies in self.copies.values() for name, _, _ in copies}
        return self._only_copied and self._num_values == num_copied and names >= loaded & self._names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._aside and not func.is_view:
            self._only_copied &= self._noted(func, args)
        return func(*args, **(kwargs or {}))

    def _noted(self, func: Any, args: Any) -> bool:
        """Whether a call copies values of a bucket to a parameter, or fills rows of padding where there are none."""
        if func is torch.ops.aten.copy_.default:
            place, values = args[:2]
            name, head = self._parameters.get(_address(place)), self._buckets.get(_address(values))
            if name is not None and head is not None:
                self.copies[head].append((name, View.of(place), View.of(values)))
                return True
        return func is torch.ops.aten.fill_.Scalar and args[0].numel() == 0


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
