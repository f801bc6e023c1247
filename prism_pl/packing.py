"""Where the tokens of B sequences run through the text layers: one padded row each, or all of them in one packed row.

Packed, nothing is padded, and sequences that continue the same prompt read it from one place: with G rollouts and a
demonstration, each in two segments, a prompt runs once and not 2 (G + 1) times. Its images are placed once too. Each
segment attends to its prompt and to itself; positions are those that the sequences have alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prism_pl.batch import SequenceBatch

ATTENTION = "prism_packed"


@dataclass
class Blocks:
    """Stretches of a packed row of N places: U blocks of queries one after the other, each with a prefix.

    Attributes:
        lengths_U: places of each block.
        prefix_start_U, prefix_length_U: the stretch that all queries of a block see besides their own block up to
            themselves; length 0 where there is none.
    """

    lengths_U: Tensor
    prefix_start_U: Tensor
    prefix_length_U: Tensor
    longest: int
    longest_keys: int

    @cached_property
    def starts_U(self) -> Tensor:
        """Where each block starts."""
        return self.lengths_U.cumsum(0) - self.lengths_U

    @cached_property
    def last_U1(self) -> Tensor:
        """The last place of each block."""
        return (self.starts_U + self.lengths_U - 1)[:, None]

    @cached_property
    def key_UK(self) -> Tensor:
        """Places of each block's keys, those of its prefix first. Padding repeats the last place."""
        at_K = torch.arange(self.longest_keys, device=self.lengths_U.device)
        prefix_U1 = self.prefix_length_U[:, None]
        own_UK = (self.starts_U[:, None] + at_K - prefix_U1).minimum(self.last_U1)
        return torch.where(at_K < prefix_U1, self.prefix_start_U[:, None] + at_K, own_UK)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """For attention over padded blocks: places of the queries (U, Q), who sees whom (U, 1, Q, K), and where each of
        the N places stands among the queries. Padding repeats the last place."""
        device = self.lengths_U.device
        at_Q, at_K = torch.arange(self.longest, device=device), torch.arange(self.longest_keys, device=device)
        query_UQ = (self.starts_U[:, None] + at_Q).minimum(self.last_U1)
        mask_UQK = at_K <= self.prefix_length_U[:, None, None] + at_Q[:, None]
        found_N = (at_Q < self.lengths_U[:, None]).flatten().nonzero().squeeze(1)
        return query_UQ, mask_UQK[:, None], found_N

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Attention without padding: bounds of the blocks' queries and keys, (U + 1,) each, and the keys' places."""
        lengths_U = self.prefix_length_U + self.lengths_U
        bounds = [nn.functional.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (self.lengths_U, lengths_U)]
        real_UK = torch.arange(self.longest_keys, device=lengths_U.device) < lengths_U[:, None]
        return bounds[0], bounds[1], self.key_UK[real_UK]


@dataclass
class Layout:
    """Places of the tokens of B sequences, in `shape` rows and columns, N in all.

    Attributes:
        token_of_N: the token that runs in each place, an index into (B, S) flattened.
        place_of_BS: the place where each token runs; without meaning at padding.
        real_BS: False at padding.
        images: the images of the places, in order, indices into the batch's.
        blocks: of a packed row; None where each sequence has a row of its own.
    """

    shape: tuple[int, int]
    token_of_N: Tensor
    place_of_BS: Tensor
    real_BS: Tensor
    images: Sequence[int]
    blocks: Blocks | None = None

    def readers_KN(self, kind_B: Tensor, num_kinds: int) -> Tensor:
        """How many sequences of each of K kinds read each place, float32; 0 at padding."""
        num_places = self.token_of_N.numel()
        index_BS = kind_B[:, None] * num_places + self.place_of_BS
        counts = torch.bincount(index_BS[self.real_BS], minlength=num_kinds * num_places)
        return counts.view(num_kinds, num_places).float()


def padded_layout(batch: SequenceBatch) -> Layout:
    """A row for each sequence, as the batch has them."""
    places_BS = torch.arange(batch.input_ids_BS.numel(), device=batch.input_ids_BS.device).view_as(batch.input_ids_BS)
    rows, columns = places_BS.shape
    return Layout((rows, columns), places_BS.flatten(), places_BS, _real(batch), batch.image_of.tolist())


def packed_layout(batch: SequenceBatch, shared_B: Tensor) -> Layout:
    """One row for all.

    Args:
        shared_B: sequences with equal numbers have the same prompt and read it from one place.
    """
    device, width = batch.input_ids_BS.device, batch.input_ids_BS.shape[1]
    lengths, prompts = batch.lengths_B.tolist(), batch.response_index_BT[:, 0].tolist()
    runs = batch.image_of.cpu().split(batch.images_per_row)
    place_of_BS = torch.zeros(len(batch), width, dtype=torch.long)
    tokens: list[Tensor] = []
    images: list[int] = []
    blocks: list[tuple[int, int, int]] = []
    place = 0
    for rows in _alike(shared_B.tolist()):
        prompt, first = prompts[rows[0]], place
        images += runs[rows[0]].tolist()
        blocks.append((prompt, 0, 0))
        tokens.append(torch.arange(prompt) + rows[0] * width)
        place += prompt
        for row in rows:
            length = lengths[row] - prompt
            blocks.append((length, first, prompt))
            tokens.append(torch.arange(prompt, lengths[row]) + row * width)
            place_of_BS[row, :prompt] = torch.arange(first, first + prompt)
            place_of_BS[row, prompt : lengths[row]] = torch.arange(place, place + length)
            place += length
    lengths_U, starts_U, prefixes_U = torch.tensor(blocks, device=device).unbind(1)
    return Layout(
        shape=(1, place),
        token_of_N=torch.cat(tokens).to(device),
        place_of_BS=place_of_BS.to(device),
        real_BS=_real(batch),
        images=images,
        blocks=Blocks(
            lengths_U=lengths_U,
            prefix_start_U=starts_U,
            prefix_length_U=prefixes_U,
            longest=max(length for length, _, _ in blocks),
            longest_keys=max(length + prefix for length, _, prefix in blocks),
        ),
    )


def _real(batch: SequenceBatch) -> Tensor:
    width = batch.input_ids_BS.shape[1]
    return torch.arange(width, device=batch.lengths_B.device) < batch.lengths_B[:, None]


def _alike(keys: Sequence[int]) -> list[list[int]]:
    """Indices of equal keys together, in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def attend_packed(model: Any) -> None:
    """Let the text layers of a Qwen3-VL backbone attend by `packed_attention`. ValueError where they use no sdpa."""
    from transformers import AttentionInterface

    config = model.language_model.config
    if config._attn_implementation != "sdpa":
        raise ValueError(
            f"attn_implementation is {config._attn_implementation!r}: packed sequences need 'sdpa' (which takes flash "
            "attention where the device has it). Use it, or set packed to false"
        )
    AttentionInterface.register(ATTENTION, packed_attention)
    config._attn_implementation_internal = ATTENTION


def packed_attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    blocks: Blocks,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each block of a packed row, and of each block to its prefix.

    Args:
        blocks: of the row; a keyword of the text model's forward pass.

    Returns:
        The attended values, (1, N, H, D), and no weights.
    """
    assert attention_mask is None
    assert dropout == 0.0
    query, key, value = (x[0].transpose(0, 1) for x in (query_1HND, key_1HND, value_1HND))
    if torch.is_autocast_enabled(query.device.type):
        # The norms of queries and keys give float32 back; autocast does not know the kernel below.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        query_bounds, key_bounds, key_M = blocks.varlen
        key, value = (x.index_select(0, key_M).repeat_interleave(groups, dim=1) for x in (key, value))
        longest = blocks.longest, blocks.longest_keys
        out = varlen_attn(
            query.contiguous(), key, value, query_bounds, key_bounds, *longest, scale=scaling, window_size=(-1, 0)
        )
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    query_UQ, mask_U1QK, found_N = blocks.padded
    query = _places(query, query_UQ).transpose(1, 2)
    key, value = (_places(x, blocks.key_UK).repeat_interleave(groups, dim=2).transpose(1, 2) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask_U1QK, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, found_N).unsqueeze(0), None


def _places(values_NHD: Tensor, place_UK: Tensor) -> Tensor:
    """(U, K, H, D). Not by plain indexing, whose backward pass is several times slower on a CPU."""
    return values_NHD.index_select(0, place_UK.flatten()).unflatten(0, place_UK.shape)
