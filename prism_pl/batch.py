"""One row for every stage (`Example`), and the typed batches that the stages exchange.

Shape legend: B sequences, P prompts, G rollouts a prompt, S tokens of a whole sequence (prompt and response),
T response tokens, I images, N patches, V vocabulary. A suffix names a tensor's axes: `input_ids_BS`, `scores_PG`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prism_pl.strategy.ranks import global_max, world_size

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
        prompt_of_B: sequences with equal numbers have the same prompt.
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
    prompt_of_B: Tensor
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

    def select(self, rows: Tensor) -> "SequenceBatch":
        """Some sequences as a batch of their own, trimmed to the longest of them, with only their images.

        T keeps its width, so that per-token tensors of the whole batch can be indexed alike.

        Args:
            rows: indices into B, at least one.
        """
        runs = self._image_runs()
        used, image_of = self.image_of[[i for row in rows.tolist() for i in range(*runs[row : row + 2])]].unique(
            return_inverse=True
        )
        patches = self.grids_I3.prod(-1).tolist()
        longest = int(self.lengths_B[rows].max())
        pixels = self.pixel_values_NC.split(patches)
        return replace(
            self,
            input_ids_BS=self.input_ids_BS[rows, :longest],
            position_ids_3BS=self.position_ids_3BS[:, rows, :longest],
            lengths_B=self.lengths_B[rows],
            response_index_BT=self.response_index_BT[rows],
            mask_BT=self.mask_BT[rows],
            pixel_values_NC=torch.cat([pixels[i] for i in used.tolist()]) if len(used) else self.pixel_values_NC[:0],
            grids_I3=self.grids_I3[used],
            image_of=image_of,
            images_per_row=[self.images_per_row[row] for row in rows.tolist()],
            prompt_of_B=self.prompt_of_B[rows],
            ids=[self.ids[row] for row in rows.tolist()],
        )

    def groups(self) -> list[list[int]]:
        """Rows that follow each other and have the same prompt."""
        prompts = self.prompt_of_B.tolist()
        groups: list[list[int]] = []
        for row, prompt in enumerate(prompts):
            if groups and prompt == prompts[row - 1]:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def _image_runs(self) -> list[int]:
        """For each sequence, how many image runs stand before it; one entry more for the end."""
        return [0, *torch.tensor(self.images_per_row).cumsum(0).tolist()]


def micro_batches(
    batch: SequenceBatch, max_tokens: int | None, shared_B: Tensor | None = None
) -> Iterator[tuple[Tensor, SequenceBatch]]:
    """Cut a batch along B into pieces whose size stays within `max_tokens` (a single longer sequence stands alone).
    None does not cut. Every piece comes with the indices of the rows it holds.

    Args:
        shared_B: where a piece runs packed (`prism_pl.packing`), numbers that are equal for sequences that read their
            prompt from one place: a piece's size is then what the row holds, each such prompt once. None where it runs
            padded: its size is that of the padded rows.

    Every rank comes here at once and gets as many pieces, since each means a collective operation: a rank with fewer
    splits them further, and where it has not as many rows, a piece comes with no indices and a row that does not count.

    Groups of like length stand together, longest first: less padding, and the piece that needs the most memory comes
    before memory is in pieces. A group (neighbours over the same prompt, such as its rollouts) is not scattered:
    every piece encodes its images anew.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"micro_batch_tokens is {max_tokens}: give at least 1, or null for the whole batch at once")
    pieces = _pieces(batch, max_tokens, shared_B)
    if world_size() > 1 and max_tokens is not None:
        num_pieces = int(global_max(torch.tensor(len(pieces), device=batch.lengths_B.device)))
        pieces = _split_into(pieces, num_pieces)
    if len(pieces) == 1:
        yield torch.arange(len(batch)), batch
        return
    for rows in pieces:
        yield torch.tensor(rows, dtype=torch.long), batch.select(torch.tensor(rows or [0]))


def _pieces(batch: SequenceBatch, max_tokens: int | None, shared_B: Tensor | None) -> list[list[int]]:
    """Rows of each piece."""
    lengths = batch.lengths_B.tolist()
    prompts = batch.response_index_BT[:, 0].tolist()
    shared = [0] * len(batch) if shared_B is None else shared_B.tolist()

    def size(rows: Sequence[int]) -> int:
        if shared_B is None:
            return len(rows) * max(lengths[row] for row in rows)
        once = {shared[row]: prompts[row] for row in rows}
        return sum(lengths[row] - prompts[row] for row in rows) + sum(once.values())

    everything = list(range(len(batch)))
    if max_tokens is None or size(everything) <= max_tokens:
        return [everything]
    groups = batch.groups()
    groups.sort(key=lambda rows: -max(lengths[row] for row in rows))
    # What shares a prompt stands together, so that a cut seldom runs it twice.
    order = [row for rows in groups for row in sorted(rows, key=lambda row: (shared[row], -lengths[row]))]
    pieces: list[list[int]] = [[]]
    for row in order:
        if pieces[-1] and size([*pieces[-1], row]) > max_tokens:
            pieces.append([])
        pieces[-1].append(row)
    return pieces


def _split_into(pieces: list[list[int]], num: int) -> list[list[int]]:
    """The same rows in `num` pieces, the largest of which are halved; empty ones where there are too few rows."""
    while len(pieces) < num:
        k = max(range(len(pieces)), key=lambda k: len(pieces[k]))
        middle = (len(pieces[k]) + 1) // 2
        pieces = [*pieces[:k], pieces[k][:middle], pieces[k][middle:], *pieces[k + 1 :]]
    return pieces


def in_order(rows: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """What was computed piece by piece, in the order of the batch that `micro_batches` cut."""
    return torch.cat(list(parts))[torch.cat(list(rows)).argsort()]
