"""The drift meter: how far a policy's responses lie from the supervision's, on prompts that nothing was trained on.

Beside the distances of `prism_pl.evaluation_tables` (descriptive items, reasoning steps, lengths) it measures

* the negative log-likelihood of the supervision's responses under the policy, block by block;
* the energy distance between both sides' responses, embedded by one network that is the same for all checkpoints;
* the AUC of a probe that learns to tell the sides apart (`prism_pl.metrics.probe`), 0.5 where it cannot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from prism_pl.batch import Example, SequenceBatch, in_order, micro_batches
from prism_pl.chat import block_spans, normalise, parse
from prism_pl.evaluation_tables import ALL_FAMILIES, Table, Tables, make_entry
from prism_pl.logprobs import token_logps
from prism_pl.metrics.drift import energy_interval
from prism_pl.metrics.probe import Side, probe_intervals
from prism_pl.policy import PolicySpec, build_policy, hidden_states
from prism_pl.processor import Processor, Prompt
from prism_pl.prompts import same_encoding

# Block of the format -> what its likelihood is called.
NLL_OF = {"caption": "caption", "think": "reasoning", "answer": "answer"}
BlockNLL = dict[str, tuple[float, int]]  # name -> summed nats, tokens


@dataclass
class DriftSpec:
    """What the drift meter needs beside the evaluation's own records.

    Attributes:
        embedder: the network that embeds responses; the base policy, and the same for all checkpoints to be compared.
        num_prompts: how many prompts of a split are measured, the first ones; null: all. The intervals' time and memory
            grow with the square.
        num_folds: of the probe's cross-validation, by prompt.
        micro_batch_tokens: padded tokens that either network reads at once.
    """

    embedder: PolicySpec
    num_prompts: int | None = 256
    num_folds: int = 5
    micro_batch_tokens: int = 16_384

    def __post_init__(self) -> None:
        """ValueError for numbers that cannot be."""
        if self.num_folds < 2:
            raise ValueError(f"drift.num_folds is {self.num_folds}: a probe is judged on what it has not seen, give 2")
        if self.num_prompts is not None and self.num_prompts < self.num_folds:
            raise ValueError(
                f"drift.num_prompts is {self.num_prompts}: give at least one prompt a fold, num_folds={self.num_folds}"
            )


class DriftSide(TypedDict):
    """A prompt's G responses of one side: texts with white space normalised, lengths in tokens, embeddings (G, H)."""

    texts: list[str]
    lengths: list[int]
    embeddings: np.ndarray


class DriftRow(TypedDict):
    """Both sides of one prompt."""

    id: str
    question: str
    split: str
    policy: DriftSide
    supervision: DriftSide


class DriftMeter:
    """Measures rows one batch after the other; `drift_tables` makes the numbers of all of them.

    Args:
        spec: its options.
        policy, processor: the checkpoint that is evaluated.
        embedder: built from `spec.embedder`, on the policy's device.
    """

    def __init__(self, spec: DriftSpec, policy: Any, processor: Processor, embedder: Any) -> None:
        self.spec, self.policy, self.processor, self.embedder = spec, policy, processor, embedder
        own = spec.embedder.processor()
        self.embedder_processor = processor if same_encoding(own, processor) else own

    def __call__(
        self, examples: Sequence[Example], responses: Sequence[Sequence[str]]
    ) -> "tuple[list[BlockNLL | None], list[DriftRow]]":
        """Measure P prompts, all with a demonstration.

        Args:
            responses: the policy's, G a prompt.

        Returns:
            For each the `BlockNLL` of its demonstration (None where that is malformed), and its row.
        """
        prompts = [self.processor.prompt(example) for example in examples]
        nll = demonstration_nll(self.policy, self.processor, examples, prompts, self.spec.micro_batch_tokens)
        if self.embedder_processor is not self.processor:
            prompts = [self.embedder_processor.prompt(example) for example in examples]
        return nll, self._rows(examples, responses, prompts)

    def _rows(
        self, examples: Sequence[Example], responses: Sequence[Sequence[str]], prompts: Sequence[Prompt]
    ) -> list[DriftRow]:
        sides = [
            ([normalise(str(example.response))], [normalise(text) for text in of_prompt])
            for example, of_prompt in zip(examples, responses, strict=True)
        ]
        # Equal texts are one sequence: their embeddings are equal to the last bit, and much work is often spared.
        distinct = list(dict.fromkeys((p, text) for p, both in enumerate(sides) for side in both for text in side))
        ids = [self.embedder_processor.response_ids(text) for _, text in distinct]
        batch = self.embedder_processor.sequences(prompts, ids, [p for p, _ in distinct])
        embeddings_NH = in_pieces(self.embedder, batch, self.spec.micro_batch_tokens, self._embed).numpy()
        number = {key: n for n, key in enumerate(distinct)}

        def made(p: int, texts: list[str]) -> DriftSide:
            found = [number[p, text] for text in texts]
            return DriftSide(texts=texts, lengths=[len(ids[n]) for n in found], embeddings=embeddings_NH[found])

        return [
            DriftRow(
                id=example.id,
                question=example.question,
                split=str(example.meta.get("split", "test")),
                policy=made(p, sides[p][1]),
                supervision=made(p, sides[p][0]),
            )
            for p, example in enumerate(examples)
        ]

    def _embed(self, batch: SequenceBatch) -> Tensor:
        """Mean of the last hidden states over each response, (B, H), read behind its prompt and images."""
        hidden_BSH = hidden_states(self.embedder.model, batch).float()
        index_BTH = batch.response_index_BT[..., None].expand(-1, -1, hidden_BSH.shape[-1])
        mask_BT1 = batch.mask_BT[..., None]
        return (hidden_BSH.gather(1, index_BTH) * mask_BT1).sum(1) / mask_BT1.sum(1)


def build_embedder(spec: DriftSpec) -> Any:
    """The embedder's network, frozen."""
    return build_policy(spec.embedder).eval().requires_grad_(False)


def demonstration_nll(
    policy: Any,
    processor: Processor,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    micro_batch_tokens: int | None,
) -> list[BlockNLL | None]:
    """For each example the negative log-likelihood of its demonstration's blocks under the policy; None where the
    demonstration is malformed. A token belongs to the block that it begins in, the end token to the answer, so that the
    blocks add up to the whole response."""
    texts = [str(example.response) for example in examples]
    batch = processor.sequences(prompts, [processor.response_ids(text) for text in texts], range(len(texts)))
    logps_BT = in_pieces(policy, batch, micro_batch_tokens, lambda piece: token_logps(policy, piece).logps_BT)
    found: list[BlockNLL | None] = []
    for text, logps_T in zip(texts, logps_BT.double().numpy(), strict=True):
        if not parse(text).valid:
            found.append(None)
            continue
        starts_T = np.array(processor.response_starts(text))
        spans = block_spans(text)
        block_T = np.searchsorted([start for start, _ in spans.values()], starts_T, side="right") - 1
        nll_T = -logps_T[: len(starts_T)]
        found.append(
            {NLL_OF[b]: (float(nll_T[block_T == n].sum()), int((block_T == n).sum())) for n, b in enumerate(spans)}
        )
    return found


@torch.no_grad()
def in_pieces(
    network: Any, batch: SequenceBatch, micro_batch_tokens: int | None, run: Callable[[SequenceBatch], Tensor]
) -> Tensor:
    """`run` over micro-batches on the network's device; its rows in the batch's order, on the CPU, in float32,
    without gradients."""
    from lightning.fabric.utilities import move_data_to_device

    device = next(network.parameters()).device
    order, parts = [], []
    for rows, piece in micro_batches(batch, micro_batch_tokens):
        order.append(rows)
        parts.append(run(move_data_to_device(piece, device)).float().cpu())
    return in_order(order, parts)


def drift_tables(rows: Sequence[DriftRow], num_folds: int, num_resamples: int, seed: int) -> Tables:
    """Split -> all families -> energy distance and AUCs, each with its 95% interval over prompts."""
    splits = dict.fromkeys(row["split"] for row in rows)
    return {
        split: {ALL_FAMILIES: _table([row for row in rows if row["split"] == split], num_folds, num_resamples, seed)}
        for split in splits
    }


def _table(rows: Sequence[DriftRow], num_folds: int, num_resamples: int, seed: int) -> Table:
    rows = sorted(rows, key=lambda row: row["id"])  # resampling and folds go by position
    policy, supervision = (_pooled([row[side] for row in rows]) for side in ("policy", "supervision"))
    # In units of the supervision's spread: a few directions of hidden states are far larger than all others.
    mean_H, std_H = supervision.embeddings_NH.mean(0), supervision.embeddings_NH.std(0)
    policy_NH, supervision_NH = (
        (side.embeddings_NH - mean_H) / np.where(std_H > 0, std_H, 1) for side in (policy, supervision)
    )
    energy = energy_interval(policy_NH, policy.prompt_N, supervision_NH, supervision.prompt_N, num_resamples, seed=seed)
    found = {"embedding_energy": energy}
    probes = probe_intervals(policy, supervision, num_folds, num_resamples, seed=seed)
    found |= {f"probe_{name}": interval for name, interval in probes.items()}
    return {name: make_entry(interval, len(policy.texts)) for name, interval in found.items()}


def _pooled(sides: Sequence[DriftSide]) -> Side:
    return Side(
        texts=[text for side in sides for text in side["texts"]],
        prompt_N=np.repeat(np.arange(len(sides)), [len(side["texts"]) for side in sides]),
        lengths_N=np.array([length for side in sides for length in side["lengths"]]),
        embeddings_NH=np.concatenate([side["embeddings"] for side in sides]),
    )
