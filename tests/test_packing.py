"""Packed sequences: the same hidden states, positions and gradients as one by one."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from prism_pl.batch import SequenceBatch, micro_batches
from prism_pl.discriminator import (
    DedicatedMoEDiscriminator,
    DenseDiscriminator,
    SparseMoEDiscriminator,
    TextOnlyDiscriminator,
    evaluating,
)
from prism_pl.packing import packed_layout, padded_layout
from prism_pl.processor import Processor
from prism_pl.segments import segment_ids
from tests.conftest import make_examples
from tests.test_discriminator_kinds import build, scores_of, stacked

TEXTS = ["<caption> red 3 </caption>", "<think> 1. it is 3\n2. 3 + 7 = 10 </think>", "<think> 3 </think>", "red"]
CHOSEN = [(0, 0, 0), (0, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 3), (1, 1, 2), (2, 1, 0)]  # prompt, expert, text


@pytest.fixture(scope="module")
def processor(random_policy) -> Processor:
    return Processor.from_path(random_policy)


def sequences_of(processor: Processor) -> tuple[SequenceBatch, torch.Tensor]:
    """Seven sequences of three prompts: one image, two of other sizes, none. The second and third are the same."""
    one, two, none = make_examples(3)
    two = replace(two, images=[*two.images, Image.new("RGB", (64, 128), "red")])
    prompts = [processor.prompt(example) for example in (one, two, replace(none, images=[]))]
    ids = [segment_ids(processor, TEXTS[t]) for _, _, t in CHOSEN]
    batch = processor.sequences(prompts, ids, [p for p, _, _ in CHOSEN])
    return batch, torch.tensor([e for _, e, _ in CHOSEN])


def test_a_prompt_that_sequences_share_stands_once(processor):
    batch, expert_N = sequences_of(processor)
    prompts, lengths = batch.response_index_BT[:, 0], batch.lengths_B
    segments = int((lengths - prompts).sum())
    layout = packed_layout(batch, batch.prompt_of_B)
    assert layout.shape == (1, segments + int(prompts[[0, 3, 6]].sum()))
    assert layout.images == [0, 1, 2]
    # Apart by expert: prompts 0 and 1 twice.
    layout = packed_layout(batch, batch.prompt_of_B * 2 + expert_N)
    assert layout.shape == (1, segments + int(prompts[[0, 1, 3, 5, 6]].sum()))
    assert layout.images == [0, 0, 1, 2, 1, 2]
    # A prompt's places have as many readers as it has sequences, a segment's one.
    readers_KN = packed_layout(batch, batch.prompt_of_B).readers_KN(expert_N, 2)
    assert readers_KN[:, 0].tolist() == [2, 2]
    assert int(readers_KN.sum()) == int(lengths.sum())
    assert int(padded_layout(batch).readers_KN(expert_N, 2).sum()) == int(lengths.sum())


def test_every_token_keeps_its_id_and_its_position(processor):
    batch, _ = sequences_of(processor)
    layout = packed_layout(batch, batch.prompt_of_B)
    ids = batch.input_ids_BS.flatten()[layout.token_of_N]
    positions = batch.position_ids_3BS.flatten(1)[:, layout.token_of_N]
    for row, length in enumerate(batch.lengths_B.tolist()):
        places = layout.place_of_BS[row, :length]
        assert torch.equal(ids[places], batch.input_ids_BS[row, :length])
        assert torch.equal(positions[:, places], batch.position_ids_3BS[:, row, :length])


@pytest.mark.parametrize(
    "kind", [DenseDiscriminator, DedicatedMoEDiscriminator, SparseMoEDiscriminator, TextOnlyDiscriminator]
)
def test_packed_equals_one_by_one_and_identical_texts_have_no_gap(random_policy, kind):
    results = []
    for packed in (True, False):
        judge = build(kind, random_policy, packed=packed, dropout=0.0, likelihood_weight=1.0)
        batch, expert_N = sequences_of(judge.processor)
        scores_N = judge(batch, expert_N).scores_N
        if packed:
            assert float((scores_N[1] - scores_N[2]).detach().abs()) <= 1e-6
        else:
            assert float((scores_N[1] - scores_N[2]).detach()) == 0.0
            alone = [judge(batch.select(torch.tensor([i])), expert_N[i : i + 1]).scores_N for i in range(len(batch))]
            torch.testing.assert_close(torch.cat(alone), scores_N, atol=1e-5, rtol=0)
        (scores_N * torch.arange(1.0, 8.0)).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in judge.parameters() if p.requires_grad])
        results.append((scores_N.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-3)
    assert float(results[0][0].std()) > 1e-3


def planned(segments: dict[tuple[int, int], list[int]], prompts: list[int]) -> tuple[SequenceBatch, torch.Tensor]:
    """A batch by lengths alone: (prompt, expert) -> its segments' lengths."""
    rows = [(p, e, length) for (p, e), lengths in segments.items() for length in lengths]
    lengths_B = torch.tensor([prompts[p] + length for p, _, length in rows])
    first_B1 = torch.tensor([[prompts[p]] for p, _, _ in rows])
    ids_BS = torch.zeros(len(rows), int(lengths_B.max()), dtype=torch.long)
    nothing = torch.zeros(0, 3, dtype=torch.long)
    batch = SequenceBatch(
        ids_BS, ids_BS.expand(3, -1, -1), lengths_B, first_B1, first_B1 > 0, nothing.float(), nothing, nothing[:, 0],
        [0] * len(rows), torch.tensor([p for p, _, _ in rows]), [str(p) for p, _, _ in rows],
    )  # fmt: skip
    return batch, torch.tensor([e for _, e, _ in rows])


def test_a_packed_piece_counts_a_shared_prompt_once():
    """One prompt of 1200 tokens and nine responses with segments of 300 and 900: 1200 + 9 x 1200 = 12,000 in a row,
    and with a prompt for each expert 13,200; padded 18 x 2100."""
    batch, expert_N = planned({(0, 0): [300] * 9, (0, 1): [900] * 9}, [1200])
    by_expert = batch.prompt_of_B * 2 + expert_N
    assert packed_layout(batch, batch.prompt_of_B).shape == (1, 12_000)
    assert packed_layout(batch, by_expert).shape == (1, 13_200)
    for shared_B, fits in ((batch.prompt_of_B, 12_000), (by_expert, 13_200), (None, 37_800)):
        assert len(list(micro_batches(batch, fits, shared_B))) == 1
        assert len(list(micro_batches(batch, fits - 1, shared_B))) == 2
    # Cut, each piece is as long a row as may be, and every sequence is in one.
    batch, expert_N = planned({(p, e): [50, 40, 30] for p in range(3) for e in (0, 1)}, [200, 100, 300])
    shared_B = batch.prompt_of_B * 2 + expert_N
    pieces = list(micro_batches(batch, 500, shared_B))
    sizes = [packed_layout(piece, shared_B[rows]).shape[1] for rows, piece in pieces]
    # Each expert's three segments are 120 tokens; longest prompt first: 300 + 120, again, 200 + 120, then 200 + 120 and
    # the first of the next prompt, 100 + 50, then its rest, 100 + 70, and 100 + 120.
    assert sizes == [420, 420, 320, 470, 390]
    assert sorted(torch.cat([rows for rows, _ in pieces]).tolist()) == list(range(len(batch)))


@pytest.mark.parametrize("packed", [True, False])
def test_scores_are_cut_by_what_a_pass_runs(random_policy, packed):
    judge = build(SparseMoEDiscriminator, random_policy, packed=packed)
    passes = []
    judge.register_forward_pre_hook(lambda _, args: passes.append(args[0]))
    whole = stacked(scores_of(judge))
    (batch,) = passes
    row = packed_layout(batch, batch.prompt_of_B).shape[1]
    again = stacked(scores_of(judge, micro_batch_tokens=row))
    assert (len(passes) == 2) is packed
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=0)


def test_the_vision_tower_runs_once_an_image(random_policy):
    judge = build(DedicatedMoEDiscriminator, random_policy)
    batch, expert_N = sequences_of(judge.processor)
    seen = []
    judge.model.visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad(), evaluating(judge):
        judge(batch, expert_N)
    assert seen == [len(batch.pixel_values_NC)]
    assert len(batch.grids_I3) == 3


def test_bf16_autocast_runs_packed(random_policy):
    judge = build(DedicatedMoEDiscriminator, random_policy)
    batch, expert_N = sequences_of(judge.processor)
    with torch.no_grad(), evaluating(judge):
        plain_N = judge(batch, expert_N).scores_N
        with torch.autocast("cpu", torch.bfloat16):
            half_N = judge(batch, expert_N).scores_N
    assert half_N.dtype == torch.float32
    torch.testing.assert_close(half_N, plain_N, atol=0.05, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [DedicatedMoEDiscriminator, SparseMoEDiscriminator])
def test_packed_equals_padded_on_a_gpu(random_policy, kind, dtype):
    """float32 attends over padded blocks, bf16 by the variable-length kernel."""
    scores, gradients = [], []
    for packed in (True, False):
        judge = build(kind, random_policy, packed=packed, dropout=0.0).cuda()
        batch, expert_N = sequences_of(judge.processor)
        from lightning.fabric.utilities import move_data_to_device

        batch, expert_N = move_data_to_device((batch, expert_N), torch.device("cuda"))
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            scores.append(judge(batch, expert_N).scores_N)
        scores[-1].sum().backward()
        weight = judge.model.language_model.layers[0].self_attn.k_proj.weight
        gradients.append(weight.grad)
    near = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(*scores, atol=near, rtol=0)
    size = float(gradients[1].norm())
    assert float((gradients[0] - gradients[1]).norm()) < (1e-3 if dtype == torch.float32 else 0.1) * size
