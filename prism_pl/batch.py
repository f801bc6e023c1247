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
    """

    input_ids_BS: Tensor
    position_ids_3BS: Tensor
    lengths_B: Tensor
    response_index_BT: Tensor
    mask_BT: Tensor
    pixel_values_NC: Tensor
    grids_I3: Tensor
    image_of: Tensor

    def __len__(self) -> int:
        return self.input_ids_BS.shape[0]

    @property
    def response_ids_BT(self) -> Tensor:
        """Ids of the response tokens; meaningless where `mask_BT` is False."""
        return self.input_ids_BS.gather(1, self.response_index_BT)
