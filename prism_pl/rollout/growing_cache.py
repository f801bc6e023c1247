"""A key-value cache that appends in place.

transformers' `DynamicLayer` puts old and new keys together anew for every token. On a CPU, with a hundred sequences of
a small policy, those copies took more than half of the time of a decoding step.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens: few copies, and little memory that nothing is written to


class GrowingLayer(DynamicLayer):
    """Keys and values (B, H, S, D) as views of buffers with room behind them."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}  # and the view of it that was given out last

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self._append("keys", length, key_states)
        self.values = self._append("values", length, value_states)
        return self.keys, self.values

    def _append(self, name: str, length: int, states_BHTD: Tensor) -> Tensor:
        held_BHSD = getattr(self, name)
        buffer, view = self._buffers.get(name, (None, None))
        end = length + states_BHTD.shape[2]
        # Rows that were selected since, or a length that was cut, are another tensor than the view.
        if buffer is None or held_BHSD is not view or end > buffer.shape[2]:
            sequences, heads, _, width = states_BHTD.shape
            buffer = states_BHTD.new_empty(sequences, heads, end + ROOM, width)
            if length:
                buffer[:, :, :length] = held_BHSD
        buffer[:, :, length:end] = states_BHTD
        self._buffers[name] = (buffer, buffer[:, :, :end])
        return self._buffers[name][1]
