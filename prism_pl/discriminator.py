"""The discriminator: one score an expert for what each response says, text against text.

The segments are made by `prism_pl.segments`, the same way on both sides; a score is read at the end token that closes
each. `TwoHeadDiscriminator` is a vision-language backbone with one head for each expert; other kinds are further
subclasses of `Discriminator`.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prism_pl.batch import SequenceBatch, in_order, micro_batches
from prism_pl.chat import EXPERTS, Parsed, parse, segments
from prism_pl.logprobs import response_logps
from prism_pl.policy import (
    batch_vision_attention,
    check_policy_path,
    freeze_matching,
    fresh_temporary,
    hidden_states,
    load_safetensors,
    put_in_place,
    save_processor,
    set_dtype,
)
from prism_pl.processor import Processor, Prompt
from prism_pl.segments import SegmentBatch, segment_batch
from prism_pl.strategy.sharding import gathered_state, is_first_rank

SETTINGS = "discriminator.json"
HEADS = "heads.safetensors"


class RowScores(NamedTuple):
    """What a discriminator's forward pass returns.

    Attributes:
        scores_N: one a sequence, float32.
        aux_loss: scalar, already weighted, e.g. a router's load balance; 0 where there is none.
        diagnostics: scalars for the logs, means over the sequences.
    """

    scores_N: Tensor
    aux_loss: Tensor
    diagnostics: dict[str, Tensor]


@dataclass
class Scores:
    """Scores of B responses.

    Attributes:
        by_expert: (B,) each; NaN where `valid_B` is False: mask before use.
        valid_B: True where a response has segments: well-formed, and none over the cap.
        aux_loss: to be added to the discriminator's loss as it stands.
        diagnostics: scalars for the logs, among them `too_long/<expert>`, the share of well-formed responses
            (demonstrations included) whose segment is over the cap.
    """

    by_expert: dict[str, Tensor]
    valid_B: Tensor
    aux_loss: Tensor
    diagnostics: dict[str, Tensor]

    def take(self, index: Sequence[int]) -> "Scores":
        """The scores of the responses at `index`."""
        rows = torch.tensor(list(index), device=self.valid_B.device, dtype=torch.long)
        by_expert = {expert: values[rows] for expert, values in self.by_expert.items()}
        return Scores(by_expert, self.valid_B[rows], self.aux_loss, self.diagnostics)


class Discriminator(nn.Module):
    """What every kind of discriminator is. Its class is named in YAML; `forward` is one pass over N sequences.

    Attributes:
        experts: names, keys of `prism_pl.chat.segments`.
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


# In YAML a class_path with init_args, from Python functools.partial: the network is built in configure_model.
DiscriminatorFactory = Callable[[], Discriminator]


def score(discriminator: Discriminator, batch: SegmentBatch, micro_batch_tokens: int | None = None) -> Scores:
    """Score a batch on the discriminator's device, in its present mode, with gradients where they are on.

    Args:
        micro_batch_tokens: padded tokens run at once; with gradients each piece is computed again in the backward
            pass, which bounds the memory to one piece. None runs the whole batch.
    """
    from lightning.fabric.utilities import move_data_to_device

    batch = move_data_to_device(batch, next(discriminator.parameters()).device)
    order: list[Tensor] = []
    parts: list[RowScores] = []
    for rows, piece in micro_batches(batch.sequences, micro_batch_tokens):
        expert_N = batch.expert_N[rows]
        expert_N = expert_N if len(rows) else batch.expert_N[:1]
        if len(rows) < len(batch.expert_N) and torch.is_grad_enabled():
            part = RowScores(*checkpoint(discriminator, piece, expert_N, use_reentrant=False))
        else:
            part = discriminator(piece, expert_N)
        parts.append(part._replace(scores_N=part.scores_N[: len(rows)]))
        order.append(rows)
    share = torch.tensor([len(part.scores_N) / len(batch.expert_N) for part in parts])

    def mean(values: Sequence[Tensor]) -> Tensor:
        return (torch.stack(list(values)) * share.to(values[0].device)).sum()

    scores_N = in_order(order, [part.scores_N for part in parts])
    by_expert = {}
    for expert, row_B in batch.row_of.items():
        scores_B = scores_N[row_B.clamp_min(0)]
        by_expert[expert] = torch.where(row_B >= 0, scores_B, torch.full_like(scores_B, torch.nan))
    diagnostics = {name: mean([part.diagnostics[name].detach() for part in parts]) for name in parts[0].diagnostics}
    diagnostics |= {f"too_long/{expert}": value for expert, value in batch.too_long.items()}
    return Scores(by_expert, batch.valid_B, mean([part.aux_loss for part in parts]), diagnostics)


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
    parts = [segments(response) if response.valid else None for response in parsed]
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


class Head(nn.Linear):
    """In float32 also under bf16 autocast and on bf16 weights: bf16 keeps 8 bits, too few to rank near-equal scores."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float())


class TwoHeadDiscriminator(Discriminator):
    """A Qwen3-VL backbone with a head (dropout, linear without bias, as in PRISM's release) for each expert.

    Args:
        path: a folder (or hub id) that holds a warm-started discriminator; with `init_heads` a policy to start from.
        init_heads: draw the heads anew, on the backbone of the policy at `path`. Only the warm start wants this.
        dropout: before each head.
        max_segment_tokens: see `Discriminator`; None takes the warm start's, or 4096 with `init_heads`.
        likelihood_weight: each score gets this times the segment's mean token log-likelihood under the backbone. A head
            at the last token learns style in a few steps, and is far slower to notice one false word among forty; the
            likelihood notices it at once, and Bradley-Terry trains it as SPIN does (arXiv 2401.01335). Needs tied
            embeddings. None takes the warm start's, or 0 (the papers' discriminator) with `init_heads`.
        freeze: name patterns of parameters that stay as they are, e.g. `model.visual.*`.
        attn_implementation, gradient_checkpointing, max_pixels: as in `PolicySpec`.

    ValueError where trained heads are expected and missing: they are never random in silence.
    """

    def __init__(
        self,
        path: str,
        init_heads: bool = False,
        dropout: float = 0.1,
        max_segment_tokens: int | None = None,
        likelihood_weight: float | None = None,
        freeze: Sequence[str] = (),
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        max_pixels: int | None = None,
    ) -> None:
        from transformers import Qwen3VLModel

        super().__init__()
        check_policy_path(path, "discriminator.path")
        if max_segment_tokens is not None and max_segment_tokens < 1:
            raise ValueError(
                f"max_segment_tokens is {max_segment_tokens}: give at least 1, or null for the warm start's (4096 anew)"
            )
        settings = _settings(path, init_heads)
        self.experts = EXPERTS
        given_cap = settings.get("max_segment_tokens", 4096) if max_segment_tokens is None else max_segment_tokens
        self.max_segment_tokens: int = given_cap
        given = settings.get("likelihood_weight", 0.0) if likelihood_weight is None else likelihood_weight
        self.likelihood_weight: float = given
        self.processor = Processor.from_path(path, max_pixels)
        self.model: Any = load_safetensors(Qwen3VLModel, path, attn_implementation)
        if self.likelihood_weight and not self.model.config.tie_word_embeddings:
            raise ValueError(
                f"likelihood_weight is {self.likelihood_weight}, and {path!r} has no tied embeddings: set 0"
            )
        batch_vision_attention(self)
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.dropout = nn.Dropout(dropout)
        hidden = self.model.config.text_config.hidden_size
        heads = {expert: Head(hidden, 1, bias=False) for expert in self.experts}
        self.heads = nn.ModuleDict(heads)
        if init_heads:
            # Hidden states leave the last norm with entries near 1, so scores start near 0.1 in size: the first gaps
            # are close to 0, and the backbone gets a gradient from the first step, which zero heads would not give it.
            for head in heads.values():
                nn.init.normal_(head.weight, std=0.1 / math.sqrt(hidden))
        else:
            self.heads.load_state_dict(_load_heads(path, self.heads))
        freeze_matching(self, freeze)
        self.train()

    def forward(self, sequences: SequenceBatch, expert_N: Tensor) -> RowScores:
        hidden_NSH = hidden_states(self.model, sequences)
        rows = torch.arange(len(sequences), device=hidden_NSH.device)
        last_NH = hidden_NSH[rows, sequences.lengths_B - 1]
        by_head = [self.heads[expert](self.dropout(last_NH)) for expert in self.experts]
        scores_N = torch.cat(by_head, dim=1).gather(1, expert_N[:, None]).squeeze(1)
        diagnostics = {}
        if self.likelihood_weight:
            likelihood_N = self._mean_logps(hidden_NSH, sequences)
            scores_N = scores_N + self.likelihood_weight * likelihood_N
            diagnostics["segment_logp"] = likelihood_N.detach().mean()
        return RowScores(scores_N, scores_N.new_zeros(()), diagnostics)

    def _mean_logps(self, hidden_NSH: Tensor, sequences: SequenceBatch) -> Tensor:
        """Mean log-likelihood (nats a token) of each segment, so that length alone is worth nothing."""
        mask_NT = sequences.mask_BT
        # In float32 also under bf16 autocast, as the heads: a false word among forty moves the mean by little.
        with torch.autocast(hidden_NSH.device.type, enabled=False):
            stats = response_logps(hidden_NSH.float(), sequences, self.model.get_input_embeddings())
        return stats.logps_BT.sum(-1) / mask_NT.sum(-1)

    def save(self, folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        """Write backbone and heads (safetensors), settings, tokenizer and processor; a kill leaves no half folder.
        Every rank comes here, and the first writes."""
        from safetensors.torch import save_file

        weights = gathered_state(self.model.state_dict(keep_vars=True), getattr(torch, dtype))
        # Heads are a few numbers: they keep float32.
        heads = gathered_state(self.heads.state_dict(keep_vars=True), torch.float32)
        if not is_first_rank():
            return
        temporary = fresh_temporary(folder)
        self.model.save_pretrained(temporary, state_dict=weights)
        set_dtype(temporary / "config.json", dtype)
        save_file({name: tensor.cpu().contiguous() for name, tensor in heads.items()}, temporary / HEADS)
        settings: dict[str, Any] = {"experts": list(self.experts), "max_segment_tokens": self.max_segment_tokens}
        settings["likelihood_weight"] = self.likelihood_weight
        (temporary / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        save_processor(self.processor, temporary)
        put_in_place(temporary, folder)


def _find(path: str, name: str) -> Path | None:
    """A file of a folder or hub id; None where it does not exist."""
    from transformers.utils.hub import cached_file

    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def _settings(path: str, init_heads: bool) -> dict[str, Any]:
    """The settings a warm-started discriminator was saved with; {} for a policy."""
    file = _find(path, SETTINGS)
    if init_heads:
        if file is not None:
            raise ValueError(
                f"{path!r} is a warm-started discriminator and init_heads would throw its heads away: leave init_heads "
                "out, or name a policy"
            )
        return {}
    if file is None:
        raise ValueError(
            f"{path!r} is no warm-started discriminator (no {SETTINGS}), and missing head weights are never random: "
            "run warmup.yaml and name its export/ folder"
        )
    return json.loads(file.read_text())


def _load_heads(path: str, heads: nn.ModuleDict) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = _find(path, HEADS)
    if file is None:
        raise ValueError(
            f"{path!r} lacks {HEADS}, and missing head weights are never random: run warmup.yaml and name its export/ "
            "folder"
        )
    found = load_file(file)
    wanted = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    held = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if held != wanted:
        raise ValueError(f"{file} holds the heads {held} where {wanted} are needed: run warmup.yaml anew")
    return found
