"""What every kind of discriminator is, and the scores it gives."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prism_pl.batch import SequenceBatch
from prism_pl.processor import Processor


class RowScores(NamedTuple):
    """What a discriminator's forward pass returns.

    Attributes:
        scores_N: one a sequence, float32.
        sums: what `Discriminator.aux_loss` and `metrics` need, as sums over this pass, so that the passes of an update
            can be added up.
        diagnostics: scalars for the logs, means over the sequences.
    """

    scores_N: Tensor
    sums: dict[str, Tensor]
    diagnostics: dict[str, Tensor]


@dataclass
class Scores:
    """Scores of B responses.

    Attributes:
        by_expert: (B,) each; NaN where `valid_B` is False: mask before use.
        valid_B: True where a response has segments: well-formed, and none over the cap.
        aux_loss: to be added to the discriminator's loss as it stands; 0 where gradients are off.
        diagnostics: scalars for the logs, of this rank, among them `too_long/<expert>`, the share of well-formed
            responses (demonstrations included) whose segment is over the cap.
        counts: of each diagnostic, how many sequences or responses it is a mean over.
        sums: what `Discriminator.metrics` needs, of this rank, detached.
    """

    by_expert: dict[str, Tensor]
    valid_B: Tensor
    aux_loss: Tensor
    diagnostics: dict[str, Tensor]
    counts: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def take(self, index: Sequence[int]) -> "Scores":
        """The scores of the responses at `index`."""
        rows = torch.tensor(list(index), device=self.valid_B.device, dtype=torch.long)
        by_expert = {expert: values[rows] for expert, values in self.by_expert.items()}
        return replace(self, by_expert=by_expert, valid_B=self.valid_B[rows])


class Discriminator(nn.Module):
    """What every kind of discriminator is. Its class is named in YAML; `forward` is one pass over N sequences.

    Attributes:
        experts: names of the segments it reads, see `prism_pl.chat.segments`.
        processor: encodes prompts and segments.
        max_segment_tokens: longest segment, end token included. Nothing is cut: a response with a longer one counts as
            malformed, and a demonstration with one stops the run.
    """

    experts: tuple[str, ...]
    processor: Processor
    max_segment_tokens: int

    @abstractmethod
    def forward(self, sequences: SequenceBatch, expert_N: Tensor) -> RowScores:
        """Score each sequence at its last token by the expert that reads it."""

    @abstractmethod
    def save(self, folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        """Write everything that loading it alone needs."""

    def shares(self, sequences: SequenceBatch, expert_B: Tensor) -> Tensor | None:
        """(B,) numbers, equal for sequences whose prompt runs once for all of them; None where each has a row of its
        own."""
        return None

    def aux_loss(self, sums: Mapping[str, Tensor]) -> Tensor:
        """What to add to the loss of an update, already weighted.

        Args:
            sums: added up over all passes of this rank. Divide by counts over all ranks (`prism_pl.strategy.share`).
        """
        return torch.zeros((), device=next(self.parameters()).device)

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars for the logs from the same sums, added up over all ranks too; of a router, see
        `prism_pl.discriminator.routing`."""
        return {}


# In YAML a class_path with init_args, from Python functools.partial: the network is built in configure_model.
DiscriminatorFactory = Callable[[], Discriminator]
