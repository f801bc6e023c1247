"""Each kind of discriminator: how it grows from a dense policy, what its experts see, its folder."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning import LightningModule
from safetensors.torch import load_file, save_file

from callbacks.discriminator_health import parameters_by_expert
from prism_pl.chat import parse, render, segments
from prism_pl.discriminator import (
    DedicatedMoEDiscriminator,
    DenseDiscriminator,
    Discriminator,
    SparseMoEDiscriminator,
    TextOnlyDiscriminator,
    TextOnlySparseMoEDiscriminator,
    dedicated,
    score_texts,
    sparse,
    upcycling,
)
from prism_pl.discriminator.upcycling import upcycle
from prism_pl.policy import load_safetensors
from prism_pl.processor import Processor
from prism_pl.prompts import PromptCollator, same_encoding
from tests.conftest import DEMONSTRATION, make_examples

SHORT = render("- red 3", "1. it is 3", "3")
OTHER = render("- blue 7 at centre\n- red 3", "1. the digits are 7 and 3\n2. 7 + 3 = 10", "10")
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (DenseDiscriminator, {}),
    (DenseDiscriminator, {"segments": "whole"}),
    (DedicatedMoEDiscriminator, {"likelihood_weight": 0.5}),
    (SparseMoEDiscriminator, {}),
    (SparseMoEDiscriminator, {"heads": "per_expert", "num_experts": 3}),
    (TextOnlyDiscriminator, {"max_pixels": 4096}),
    (TextOnlySparseMoEDiscriminator, {}),
]
NAMES = [f"{kind.__name__}-{'-'.join(map(str, options.values()))}" for kind, options in KINDS]
all_kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=NAMES)


def build(kind: Any, path: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(path, init_heads=True, **({"max_segment_tokens": 200} | options))


def scores_of(discriminator: Discriminator, responses=(DEMONSTRATION, SHORT, OTHER), **options):
    prompts = [discriminator.processor.prompt(example) for example in make_examples(2)]
    return score_texts(discriminator, prompts, responses, [i % 2 for i in range(len(responses))], **options)


def stacked(scores) -> torch.Tensor:
    return torch.stack(list(scores.by_expert.values()))


def without_gradient(discriminator: Discriminator) -> list[str]:
    return [n for n, p in discriminator.named_parameters() if p.requires_grad and p.grad is None]


@all_kinds
def test_a_kind_saves_and_loads_to_the_same_scores_and_refuses_another_kind(random_policy, tmp_path, kind, options):
    made = build(kind, random_policy, **options)
    made.save(tmp_path / "d")
    loaded = kind(str(tmp_path / "d"))
    assert loaded.settings == made.settings
    weights, again = made.state_dict(), loaded.state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert torch.equal(stacked(scores_of(made)), stacked(scores_of(loaded)))
    other = DenseDiscriminator if kind is not DenseDiscriminator else SparseMoEDiscriminator
    with pytest.raises(ValueError, match=rf"was warm-started as {kind.__name__}, not as {other.__name__}"):
        other(str(tmp_path / "d"))
    # One forward pass over anything touches every weight: the gradients of ranks meet.
    stacked(scores_of(made, [SHORT], training=True)).sum().backward()
    assert without_gradient(made) == []


@all_kinds
def test_every_parameter_of_a_kind_is_in_one_of_the_panels_gradient_norms(random_policy, kind, options):
    judge = build(kind, random_policy, **options)
    module = LightningModule()
    module.discriminator = judge
    found = parameters_by_expert(module)
    assert sum(len(each) for each in found.values()) == len(list(judge.parameters()))
    own = kind in (DedicatedMoEDiscriminator, TextOnlyDiscriminator) or options.get("heads") == "per_expert"
    assert set(found) == ({"shared", "perception", "reasoning"} if own else {"shared"})


@all_kinds
def test_missing_and_misshapen_weights_are_never_random(random_policy, tmp_path, kind, options):
    build(kind, random_policy, **options).save(tmp_path / "d")
    file = tmp_path / "d" / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if "layers.1.mlp." in n)
    save_file({n: w for n, w in weights.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its own config, e\.g\. 'language_model\.layers\.1\.mlp"):
        kind(str(tmp_path / "d"))
    save_file(weights | {name: weights[name][..., :-1].contiguous()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\..* of the shape"):
        kind(str(tmp_path / "d"))


@pytest.fixture(scope="module")
def dense(random_policy) -> Any:
    from transformers import Qwen3VLModel

    return load_safetensors(Qwen3VLModel, random_policy, "sdpa")


def upcycled(dense: Any, noise_std: float, num_experts: int = 4) -> Any:
    torch.manual_seed(0)
    options = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    return upcycle(dense.config, lambda: dense, num_experts, 2, noise_std, **options)


@pytest.mark.parametrize("kind", [SparseMoEDiscriminator, DedicatedMoEDiscriminator])
def test_at_zero_3_a_rank_that_gets_its_shards_from_the_first_loads_no_dense_model(random_policy, monkeypatch, kind):
    # As `build_sharded` acts on another rank than the first: the weights are never asked for.
    asked_for: list[Any] = []
    monkeypatch.setattr(upcycling, "builds_sharded", lambda: True)
    monkeypatch.setattr(
        upcycling, "build_sharded", lambda kind, config, weights, **options: kind._from_config(config, **options)
    )
    for module in (sparse, dedicated):
        monkeypatch.setattr(module, "load_safetensors", lambda *_: asked_for.append(1))
    torch.manual_seed(0)
    there = kind(random_policy, init_heads=True).model.state_dict()
    assert asked_for == []
    monkeypatch.undo()
    here = kind(random_policy, init_heads=True).model.state_dict()
    assert {name: weight.shape for name, weight in there.items()} == {n: weight.shape for n, weight in here.items()}


def test_upcycling_leaves_the_generator_alike_whoever_makes_the_weights(dense, monkeypatch):
    after = []
    for makes in (True, False):
        if not makes:
            monkeypatch.setattr(upcycling, "from_weights", lambda *_, **options: None)
        upcycled(dense, 0.01)
        after.append(torch.rand(1))
    assert after[0] == after[1]


def test_upcycled_without_noise_the_forward_pass_is_the_dense_one(random_policy, dense):
    one = build(DenseDiscriminator, random_policy)
    sparse = build(SparseMoEDiscriminator, random_policy, noise_std=0.0)
    sparse.heads.load_state_dict(one.heads.state_dict())
    torch.testing.assert_close(stacked(scores_of(sparse)), stacked(scores_of(one)), atol=1e-5, rtol=0)
    noisy = build(SparseMoEDiscriminator, random_policy, noise_std=0.01)
    noisy.heads.load_state_dict(one.heads.state_dict())
    assert float((stacked(scores_of(noisy)) - stacked(scores_of(one))).abs().max()) > 1e-4


def test_upcycling_copies_every_mlp_with_noise_and_draws_a_router(dense):
    moe = upcycled(dense, 0.01)
    text, plain = moe.config.text_config, dense.config.text_config
    assert (text.num_experts, text.num_experts_per_tok, text.decoder_sparse_step) == (4, 2, 1)
    assert text.moe_intermediate_size == plain.intermediate_size
    assert text.rope_parameters == plain.rope_parameters
    assert moe.config.vision_config.to_dict() | {"model_type": ""} == dense.config.vision_config.to_dict() | {
        "model_type": ""
    }
    routers = []
    for grown, layer in zip(moe.language_model.layers, dense.language_model.layers, strict=True):
        gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        for noise in (
            grown.mlp.experts.gate_up_proj - gate_up,
            grown.mlp.experts.down_proj - layer.mlp.down_proj.weight,
        ):
            assert noise.detach().std() == pytest.approx(0.01, rel=0.05)
            assert float((noise[0] - noise[1]).detach().abs().max()) > 0.01
        routers.append(grown.mlp.gate.weight)
        assert torch.equal(grown.self_attn.q_proj.weight, layer.self_attn.q_proj.weight)
    assert torch.cat(routers).detach().std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(moe.visual.merger.linear_fc1.weight, dense.visual.merger.linear_fc1.weight)


def test_a_square_expert_is_not_transposed_by_its_folder(dense, random_policy, tmp_path):
    """The published Qwen3-VL-MoE has its experts the other way round, and transformers turns them by their shape. Where
    both are alike it must leave them."""
    from transformers import Qwen3VLModel

    config = type(dense.config).from_dict(dense.config.to_dict())
    config.text_config.intermediate_size = config.text_config.hidden_size
    square = Qwen3VLModel._from_config(config)
    moe = upcycled(square, 0.01)
    moe.save_pretrained(tmp_path / "square")
    again = load_safetensors(type(moe), str(tmp_path / "square"), "sdpa").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in moe.state_dict().items())


def test_a_captions_loss_gives_the_reasoning_expert_no_gradient(random_policy):
    for expert, silent in (("perception", "reasoning"), ("reasoning", "perception")):
        judge = build(DedicatedMoEDiscriminator, random_policy, likelihood_weight=0.5)
        for micro_batch_tokens in (None, 150):
            judge.zero_grad()
            scores = scores_of(judge, training=True, micro_batch_tokens=micro_batch_tokens)
            scores.by_expert[expert].sum().backward()
            assert without_gradient(judge) == []
            largest = {n: float(p.grad.abs().max()) for n, p in judge.named_parameters()}
            assert {n for n, size in largest.items() if size == 0} == {n for n in largest if f".{silent}." in n}
            assert sum(f".{silent}." in n for n in largest) == 4 * 3 + 1  # three weights a layer and a head


def test_a_rank_with_one_sequence_computes_its_pieces_again_as_the_others_do(random_policy, monkeypatch):
    # The other of two ranks has two pieces; here the second holds no row. At ZeRO-3 each pass gathers weights.
    monkeypatch.setattr("prism_pl.batch.world_size", lambda: 2)
    monkeypatch.setattr("prism_pl.batch.global_max", lambda own: torch.full_like(own, 2))
    judge = build(DenseDiscriminator, random_policy, segments="whole", dropout=0.0)
    passes = []
    judge.register_forward_pre_hook(lambda *_: passes.append(1))
    for micro_batch_tokens, expected in ((300, (2, 4)), (None, (1, 1))):
        passes.clear()
        scores = scores_of(judge, [DEMONSTRATION], training=True, micro_batch_tokens=micro_batch_tokens)
        forward = len(passes)
        stacked(scores).sum().backward()
        assert (forward, len(passes)) == expected


@all_kinds
def test_a_micro_batch_of_one_segment_kind_touches_every_expert(random_policy, kind, options):
    """As on a rank whose piece holds captions alone: a parameter without a gradient there would stop the others."""
    judge = build(kind, random_policy, **options)
    seen = []
    judge.register_forward_pre_hook(lambda _, args: seen.append(args))
    scores_of(judge)
    sequences, expert_N = seen[0]
    for expert in range(len(judge.experts)):
        judge.zero_grad()
        rows = (expert_N == expert).nonzero().squeeze(1)
        judge(sequences.select(rows), expert_N[rows]).scores_N.sum().backward()
        assert without_gradient(judge) == []


def test_experts_start_as_the_dense_mlps_and_part_ways(random_policy):
    one = build(DenseDiscriminator, random_policy)
    judge = build(DedicatedMoEDiscriminator, random_policy)
    for head in judge.heads.values():
        head.load_state_dict(one.heads["shared"].state_dict())
    torch.testing.assert_close(stacked(scores_of(judge)), stacked(scores_of(one)), atol=1e-5, rtol=0)
    with torch.no_grad():
        for layer in judge.model.language_model.layers:
            layer.mlp["reasoning"].down_proj.weight.zero_()
    moved = (stacked(scores_of(judge)) - stacked(scores_of(one))).abs().amax(1)
    assert float(moved[0]) < 1e-5
    assert float(moved[1]) > 1e-3


def test_one_head_or_one_for_each_expert(random_policy):
    shared = build(SparseMoEDiscriminator, random_policy)
    assert list(shared.heads) == ["shared"]
    each = build(SparseMoEDiscriminator, random_policy, heads="per_expert")
    before = stacked(scores_of(each))
    with torch.no_grad():
        each.heads["reasoning"].weight.mul_(2)
    torch.testing.assert_close(stacked(scores_of(each)), before * torch.tensor([[1.0], [2.0]]))


def test_a_whole_response_is_one_segment(random_policy):
    judge = build(DenseDiscriminator, random_policy, segments="whole")
    assert judge.experts == ("response",)
    parts = segments(parse(DEMONSTRATION))
    assert segments(parse(DEMONSTRATION), judge.experts) == {"response": f"{parts['perception']}\n{parts['reasoning']}"}
    assert list(scores_of(judge).by_expert) == ["response"]


def test_the_text_only_kind_sees_no_image(random_policy):
    judge = build(TextOnlyDiscriminator, random_policy)
    one, two = make_examples(1)[0], make_examples(4)[3]  # the same question, another image
    prompts = [judge.processor.prompt(example) for example in (one, two)]
    scores = stacked(score_texts(judge, prompts, [DEMONSTRATION] * 2, [0, 1]))
    assert torch.equal(scores[:, 0], scores[:, 1])
    assert prompts[0].ids.count(judge.processor.image_token_id) == 0
    assert not any(p.requires_grad for p in judge.model.visual.parameters())
    # A mark of where an image stands goes with it.
    marked = replace(one, question=f"<image>{one.question}")
    assert judge.processor.prompt(marked).ids == prompts[0].ids
    # The collator must not give it the policy's prompts.
    processor = Processor.from_path(random_policy)
    assert not same_encoding(processor, judge.processor)
    batch = PromptCollator(processor, discriminator_processor=judge.processor)([one])
    assert len(batch.discriminator_prompts[0].grids_I3) == 0
    assert len(batch.prompts[0].grids_I3) == 1


def test_what_the_warm_start_read_is_what_is_read_later(random_policy, tmp_path):
    build(DedicatedMoEDiscriminator, random_policy, max_pixels=4096, max_segment_tokens=150).save(tmp_path / "d")
    path = str(tmp_path / "d")
    loaded = DedicatedMoEDiscriminator(path, max_segment_tokens=150)
    assert loaded.processor.image_processor.size["longest_edge"] == 4096
    assert loaded.max_segment_tokens == 150
    kind: Any = DedicatedMoEDiscriminator
    for name, value, held in (("max_pixels", 9999, 4096), ("max_segment_tokens", 99, 150), ("likelihood_weight", 1, 0)):
        with pytest.raises(ValueError, match=rf"{name} is {value}, and '.*' was warm-started with {held}"):
            kind(path, **{name: value})


def test_numbers_of_an_upcycling_that_is_done_are_not_taken_in_silence(random_policy, tmp_path):
    build(SparseMoEDiscriminator, random_policy, num_experts=3).save(tmp_path / "d")
    path, kind = str(tmp_path / "d"), SparseMoEDiscriminator
    refused = {
        "num_experts": (8, "num_experts is 8, and '.*' was warm-started with 3: leave num_experts out"),
        "top_k": (1, "top_k is 1, and '.*' was warm-started with 2"),
        "noise_std": (0.01, "noise_std is 0.01, and '.*' is warm-started, its noise long drawn: leave noise_std out"),
    }
    for name, (value, message) in refused.items():
        with pytest.raises(ValueError, match=message):
            kind(path, **{name: value})  # pyright: ignore[reportArgumentType]
    assert kind(path, num_experts=3, top_k=2).model.config.text_config.num_experts == 3


def test_a_folder_of_an_older_format_says_so(random_policy, tmp_path):
    build(DenseDiscriminator, random_policy).save(tmp_path / "d")
    file = tmp_path / "d" / "discriminator.json"
    file.write_text(json.dumps({"experts": ["perception"], "max_segment_tokens": 128}))
    with pytest.raises(ValueError, match=r"was warm-started as None, .* or run warmup\.yaml"):
        DenseDiscriminator(str(tmp_path / "d"))


def test_checkpointed_layers_give_the_same_gradients(random_policy):
    for kind in (DedicatedMoEDiscriminator, SparseMoEDiscriminator):
        gradients = []
        for gradient_checkpointing in (False, True):
            judge = build(kind, random_policy, gradient_checkpointing=gradient_checkpointing, dropout=0.0)
            scores = scores_of(judge, training=True, micro_batch_tokens=400)
            (stacked(scores).square().sum() + scores.aux_loss).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in judge.parameters()]))
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_options_out_of_range_are_refused(random_policy):
    refused: list[tuple[dict[str, Any], str]] = [
        ({"top_k": 5}, "top_k is 5: give 1 to num_experts=4"),
        ({"noise_std": -1.0}, "noise_std is -1.0"),
        ({"attn_implementation": "eager"}, "attn_implementation is 'eager': packed sequences need 'sdpa'"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            SparseMoEDiscriminator(random_policy, init_heads=True, **options)
