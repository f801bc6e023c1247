"""The two segments of each response as token sequences, made alike for demonstrations and rollouts.

The parsed, white-space-normalised text is tokenised here (never the sampled ids, which can spell the same text
otherwise) and closed with the same end token. A segment over the cap makes its response malformed: cut, it would end
without its closing tag, and a discriminator would win wherever one side is longer. A sequence that stands twice in a
batch is kept once, so that identical text has exactly one score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_pl.batch import SequenceBatch
from prism_pl.processor import Processor, Prompt


@dataclass
class SegmentBatch:
    """The segments of B responses as N distinct sequences (prompt, segment, end token).

    Attributes:
        sequences: the N sequences; those of a prompt stand together and share its images.
        expert_N: which expert reads each sequence, an index into `experts`.
        experts: names.
        row_of: for each expert, the sequence (B,) of each response; -1 where the response is malformed or too long.
        too_long: for each expert, the share of well-formed responses whose segment is over the cap; NaN without any.
        num_well_formed: of the B responses.
    """

    sequences: SequenceBatch
    expert_N: Tensor
    experts: tuple[str, ...]
    row_of: dict[str, Tensor]
    too_long: dict[str, Tensor]
    num_well_formed: Tensor

    @property
    def valid_B(self) -> Tensor:
        """True where a response has segments."""
        return self.row_of[self.experts[0]] >= 0


def segment_ids(processor: Processor, text: str) -> list[int]:
    """Token ids of a segment and the end token, never cut. The same function for demonstrations and rollouts. A special
    token spelled out in the text stays ordinary text."""
    ids = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return [*ids, processor.eos_id]


def segment_batch(
    processor: Processor,
    prompts: Sequence[Prompt],
    texts: Mapping[str, Sequence[str | None]],
    prompt_of: Sequence[int],
    max_segment_tokens: int,
) -> SegmentBatch:
    """Put the segments of B responses behind their prompts.

    Args:
        prompts: P prompts, encoded by `processor`.
        texts: for each expert its B segments; None where a response is malformed.
        prompt_of: for each response, the index of its prompt.
        max_segment_tokens: end token included; a response with a longer segment has none, for either expert.
    """
    experts = tuple(texts)
    valid = [text is not None for text in texts[experts[0]]]
    ids: dict[str, list[tuple[int, ...] | None]] = {}
    for expert in experts:
        assert [text is not None for text in texts[expert]] == valid, "a response has all its segments or none"
        ids[expert] = [None if text is None else tuple(segment_ids(processor, text)) for text in texts[expert]]
    over = {e: [each is not None and len(each) > max_segment_tokens for each in ids[e]] for e in experts}
    left_out = [not well_formed or any(over[e][b] for e in experts) for b, well_formed in enumerate(valid)]
    keys: dict[str, list[tuple[int, int, tuple[int, ...]] | None]] = {
        expert: [
            None if each is None or out else (p, k, each)
            for each, out, p in zip(ids[expert], left_out, prompt_of, strict=True)
        ]
        for k, expert in enumerate(experts)
    }
    # Sequences of a prompt side by side: a micro-batch then runs the vision tower over few images.
    distinct = sorted({key for rows in keys.values() for key in rows if key is not None})
    # Without any segment one bare prompt runs, so that ranks stay in step and a loss of weight 0 has a graph.
    distinct = distinct or [(0, 0, (processor.eos_id,))]
    found = {key: row for row, key in enumerate(distinct)}
    row_of = {e: torch.tensor([-1 if key is None else found[key] for key in rows]) for e, rows in keys.items()}
    too_long = {e: torch.tensor([float(o) for o, v in zip(over[e], valid, strict=True) if v]).mean() for e in experts}
    return SegmentBatch(
        sequences=processor.sequences(prompts, [key[2] for key in distinct], [key[0] for key in distinct]),
        expert_N=torch.tensor([key[1] for key in distinct]),
        experts=experts,
        row_of=row_of,
        too_long=too_long,
        num_well_formed=torch.tensor(sum(valid)),
    )
