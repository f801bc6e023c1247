"""From texts to scores: segments of both sides in one forward pass, cut into micro-batches where memory asks for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prism_pl.aggregation import Metrics
from prism_pl.batch import in_order, micro_batches
from prism_pl.chat import Parsed, parse, segments
from prism_pl.discriminator.interface import Discriminator, RowScores, Scores
from prism_pl.processor import Prompt
from prism_pl.segments import SegmentBatch, segment_batch
from prism_pl.strategy.ranks import metrics_over_ranks, sums_over_ranks


def score(discriminator: Discriminator, batch: SegmentBatch, micro_batch_tokens: int | None = None) -> Scores:
    """Score a batch on the discriminator's device, in its present mode, with gradients where they are on.

    Args:
        micro_batch_tokens: tokens run at once, padding and a shared prompt counted as the discriminator runs them (see
            `micro_batches`); with gradients each piece is computed again in the backward
            pass, which bounds the memory to one piece. None runs the whole batch. The auxiliary loss is that of the
            whole batch either way.
    """
    from lightning.fabric.utilities import move_data_to_device

    batch = move_data_to_device(batch, next(discriminator.parameters()).device)
    order: list[Tensor] = []
    parts: list[RowScores] = []
    shared_N = discriminator.shares(batch.sequences, batch.expert_N)
    pieces = list(micro_batches(batch.sequences, micro_batch_tokens, shared_N))
    # Decided by what all ranks have alike: computing again gathers sharded weights again.
    recomputed = len(pieces) > 1 and torch.is_grad_enabled()
    for rows, piece in pieces:
        expert_N = batch.expert_N[rows] if len(rows) else batch.expert_N[:1]
        if recomputed:
            part = RowScores(*checkpoint(discriminator, piece, expert_N, use_reentrant=False))
        else:
            part = discriminator(piece, expert_N)
        parts.append(part if len(rows) else _uncounted(part))
        order.append(rows)
    scores_N = in_order(order, [part.scores_N for part in parts])
    by_expert = {}
    for expert, row_B in batch.row_of.items():
        scores_B = scores_N[row_B.clamp_min(0)]
        by_expert[expert] = torch.where(row_B >= 0, scores_B, torch.full_like(scores_B, torch.nan))
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum(0) for name in parts[0].sums}
    aux_loss = discriminator.aux_loss(sums) if torch.is_grad_enabled() else scores_N.new_zeros(())
    means, too_long = _means(parts), {f"too_long/{expert}": share for expert, share in batch.too_long.items()}
    num_scored = torch.tensor(sum(len(part.scores_N) for part in parts), device=scores_N.device)
    counts = dict.fromkeys(means, num_scored) | dict.fromkeys(too_long, batch.num_well_formed)
    detached = {name: value.detach() for name, value in sums.items()}
    return Scores(by_expert, batch.valid_B, aux_loss, means | too_long, counts, detached)


def diagnostics_over_ranks(discriminator: Discriminator, scores: Scores) -> Metrics:
    """What the scoring of all ranks' responses tells for the logs, the same on each: the diagnostics, and the
    discriminator's own metrics of sums over all ranks, with those over the sequences that a rank scores: of a group on
    several ranks each scores the demonstration. A collective operation."""
    told = metrics_over_ranks(scores.diagnostics, scores.counts)
    return told | discriminator.metrics(sums_over_ranks(scores.sums))


def _uncounted(part: RowScores) -> RowScores:
    """Of a row that only keeps this rank in step with the others: in the graph, and in no sum."""
    return RowScores(part.scores_N[:0], {name: 0 * value for name, value in part.sums.items()}, part.diagnostics)


def _means(parts: Sequence[RowScores]) -> dict[str, Tensor]:
    """Diagnostics of the pieces, weighted by their numbers of sequences."""
    sizes = torch.tensor([len(part.scores_N) for part in parts], dtype=torch.float32)
    means = {}
    for name in parts[0].diagnostics:
        values = torch.stack([part.diagnostics[name].detach() for part in parts])
        means[name] = (values * (sizes / sizes.sum()).to(values.device)).sum()
    return means


def score_texts(
    discriminator: Discriminator,
    prompts: Sequence[Prompt],
    responses: Sequence[Parsed | str],
    prompt_of: Sequence[int],
    *,
    training: bool = False,
    micro_batch_tokens: int | None = None,
) -> Scores:
    """Score B responses, demonstrations and rollouts alike, in one forward pass.

    Args:
        prompts: P prompts, encoded by the discriminator's processor.
        responses: as text or parsed; malformed ones and those with a segment over the cap get NaN.
        prompt_of: for each response, the index of its prompt.
        training: with gradients and dropout, for the discriminator's own loss. Otherwise in eval mode without
            gradients, for rewards and metrics.
    """
    parsed = [parse(response) if isinstance(response, str) else response for response in responses]
    parts = [segments(response, discriminator.experts) if response.valid else None for response in parsed]
    texts = {expert: [None if part is None else part[expert] for part in parts] for expert in discriminator.experts}
    batch = segment_batch(discriminator.processor, prompts, texts, prompt_of, discriminator.max_segment_tokens)
    if training:
        assert discriminator.training, "the discriminator is trained with dropout: put it in training mode"
        return score(discriminator, batch, micro_batch_tokens)
    with torch.no_grad(), evaluating(discriminator):
        return score(discriminator, batch, micro_batch_tokens)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode meanwhile, the mode from before afterwards."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
