"""One row for every stage (`Example`), and the typed batches that the stages exchange.

Shape legend: B sequences, P prompts, G rollouts a prompt, S tokens of a whole sequence (prompt and response),
T response tokens, I images, N patches, V vocabulary. A suffix names a tensor's axes: `input_ids_BS`, `scores_PG`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Example:
    """One row of any data set.

    Attributes:
        images: PIL images, paths or encoded bytes, in the order in which the question refers to them.
        response: the supervision's demonstration, for SFT, warm start and alignment.
        answers: accepted final answers, for RLVR and evaluation.
        rejected: a rollout to rank below `response`, for the warm start.
        system: the system prompt; None is `prism_pl.chat.SYSTEM_PROMPT`.
        meta: family, choices, scene, source row.

    Example:
        >>> Example(id="train-0", question="What is the sum of all digits?", answers=["7"]).answers
        ['7']
    """

    id: str
    question: str
    images: list["Image | Path | str | bytes"] = field(default_factory=list)
    response: str | None = None
    answers: list[str] = field(default_factory=list)
    rejected: str | None = None
    system: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class SequenceBatch:
    """B right-padded sequences, each a prompt and a response, over I distinct images.

    Attributes:
        input_ids_BS: token ids, padded at the right.
        position_ids_3BS: M-RoPE positions (temporal, height, width), made on the CPU by the collator.
        lengths_B: real tokens of each sequence.
        response_index_BT: where each response token stands in its sequence; 0 where padded.
        mask_BT: True at real response tokens.
        pixel_values_NC: patches of the I images, in order.
        grids_I3: (time, height, width) of each image in patches.
        image_of: for each image placeholder run, in batch order, which of the I images fills it; images shared by
            several rollouts of a prompt stand once.
        images_per_row: image placeholder runs of each sequence.
        ids: the examples' ids, for messages.
    """

    input_ids_BS: Tensor
    position_ids_3BS: Tensor
    lengths_B: Tensor
    response_index_BT: Tensor
    mask_BT: Tensor
    pixel_values_NC: Tensor
    grids_I3: Tensor
    image_of: Tensor
    images_per_row: list[int]
    ids: list[str]

    def __len__(self) -> int:
        return self.input_ids_BS.shape[0]

    @property
    def response_ids_BT(self) -> Tensor:
        """Ids of the response tokens; meaningless where `mask_BT` is False."""
        return self.input_ids_BS.gather(1, self.response_index_BT)

    @property
    def num_tokens(self) -> int:
        """Real tokens of all sequences."""
        return int(self.lengths_B.sum())

    def rows(self, start: int, stop: int) -> "SequenceBatch":
        """Sequences `start` to `stop` as a batch of their own, trimmed to the longest of them, with only their images.

        T keeps its width, so that per-token tensors of the whole batch can be cut along.
        """
        runs = self._image_runs()
        image_of = self.image_of[runs[start] : runs[stop]]
        used, image_of = image_of.unique(return_inverse=True)
        patches = self.grids_I3.prod(-1).tolist()
        longest = int(self.lengths_B[start:stop].max())
        pixels = self.pixel_values_NC.split(patches)
        return replace(
            self,
            input_ids_BS=self.input_ids_BS[start:stop, :longest],
            position_ids_3BS=self.position_ids_3BS[:, start:stop, :longest],
            lengths_B=self.lengths_B[start:stop],
            response_index_BT=self.response_index_BT[start:stop],
            mask_BT=self.mask_BT[start:stop],
            pixel_values_NC=torch.cat([pixels[i] for i in used.tolist()]) if len(used) else self.pixel_values_NC[:0],
            grids_I3=self.grids_I3[used],
            image_of=image_of,
            ids=self.ids[start:stop],
        )

    def _image_runs(self) -> list[int]:
        """For each sequence, how many image runs stand before it; one entry more for the end."""
        return [0, *torch.tensor(self.images_per_row).cumsum(0).tolist()]


def micro_batches(batch: SequenceBatch, max_tokens: int | None) -> Iterator[tuple[slice, SequenceBatch]]:
    """Cut a batch along B into pieces whose padded size stays within `max_tokens` (a single longer sequence stands
    alone). None does not cut. Every piece comes with the rows it holds."""
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"micro_batch_tokens is {max_tokens}: give at least 1, or null for the whole batch at once")
    if max_tokens is None:
        yield slice(0, len(batch)), batch
        return
    start, longest = 0, 0
    lengths = batch.lengths_B.tolist()
    for row, length in enumerate(lengths):
        if row > start and max(longest, length) * (row - start + 1) > max_tokens:
            yield slice(start, row), batch.rows(start, row)
            start, longest = row, 0
        longest = max(longest, length)
    yield slice(start, len(batch)), batch.rows(start, len(batch))
