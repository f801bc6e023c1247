"""Weights on their way to an engine: many tensors in one flat buffer.

A network of 4B parameters has some 700 tensors. Cast, added up and moved one by one, they cost more in kernel launches
than in bytes.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_pl.strategy.sharding import whole_numel

Named = tuple[str, Tensor]

_WORD = 8  # bytes that a checksum takes at once
_COLUMNS = 1021  # a prime: rows of a weight do not fall into step with it


@dataclass(frozen=True)
class Bucket:
    """Named tensors of one dtype.

    Attributes:
        names, shapes: of the tensors, in order.
        flat: their values one after the other, each from a multiple of 8 bytes on, zeros between.
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    flat: Tensor

    @classmethod
    def pack(cls, named: Sequence[Named], dtype: torch.dtype) -> "Bucket":
        """Copy tensors of one device into a new buffer, cast to `dtype`."""
        names, tensors = [name for name, _ in named], [tensor.detach() for _, tensor in named]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        size = sum(_room(shape, dtype) for shape in shapes)
        # New for each bucket: whoever loads may keep the views until a layer is complete. Zeros are written where no
        # value comes alone: a bucket of them would be written twice.
        flat = torch.empty(size, dtype=dtype, device=tensors[0].device)
        end = 0
        for shape in shapes:
            start, end = end + math.prod(shape), end + _room(shape, dtype)
            if start < end:
                flat[start:end] = 0
        bucket = cls(names, shapes, flat)
        torch._foreach_copy_([view for _, view in bucket.named()], tensors)
        return bucket

    def named(self) -> Iterator[Named]:
        """Views of the buffer, with their names."""
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            yield name, self.flat[start : start + math.prod(shape)].view(shape)
            start += _room(shape, self.flat.dtype)

    def head(self) -> int:
        """A checksum of names, shapes and dtype."""
        return zlib.crc32(repr((self.names, self.shapes, self.flat.dtype)).encode())

    def bits(self) -> Tensor:
        """A checksum of the values; it stays on the device until it is read. Words are summed by columns, and the
        columns weighted, so that values that changed places show too."""
        words = self.flat.view(torch.int64)
        whole = len(words) // _COLUMNS * _COLUMNS
        columns = words[:whole].view(-1, _COLUMNS).sum(0)
        columns[: len(words) - whole] += words[whole:]
        return (columns * torch.arange(1, 2 * _COLUMNS, 2, device=words.device)).sum()


def cut(named: Iterable[Named], max_numel: int) -> Iterator[list[Named]]:
    """Cut a stream of named tensors into lists of at most `max_numel` elements; a single larger tensor stands alone."""
    part: list[Named] = []
    size = 0
    for name, tensor in named:
        if part and size + whole_numel(tensor) > max_numel:
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size += whole_numel(tensor)
    if part:
        yield part


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    words = _WORD // dtype.itemsize
    return -(-math.prod(shape) // words) * words
