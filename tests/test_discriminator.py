"""The discriminator: text against text, no shortcut, its own folder."""

import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch

from prism_pl.batch import Example
from prism_pl.chat import Parsed, parse, render, segments
from prism_pl.discriminator import (
    DedicatedMoEDiscriminator,
    Discriminator,
    RowScores,
    diagnostics_over_ranks,
    evaluating,
    score,
    score_texts,
)
from prism_pl.packing import padded_layout
from prism_pl.policy import PolicySpec
from prism_pl.segments import segment_batch, segment_ids
from tests.conftest import DEMONSTRATION, make_examples

SHORT = render("- red 3", "1. it is 3", "3")
OTHER = render("- blue 7 at centre\n- red 3", "1. the digits are 7 and 3\n2. 7 + 3 = 10", "10")
MALFORMED = "<caption>no end"


@pytest.fixture(scope="module")
def discriminator(random_policy) -> DedicatedMoEDiscriminator:
    torch.manual_seed(0)
    return DedicatedMoEDiscriminator(random_policy, init_heads=True, max_segment_tokens=200)


def prompts_of(discriminator: Discriminator, examples: list[Example]):
    return [discriminator.processor.prompt(example) for example in examples]


def scores_of(discriminator, responses, prompt_of=None, num_prompts=1, **options):
    prompts = prompts_of(discriminator, make_examples(num_prompts))
    return score_texts(discriminator, prompts, responses, prompt_of or [0] * len(responses), **options)


def test_identical_text_gives_a_gap_of_exactly_zero(discriminator):
    # The same response with other line breaks and blanks: normalised alike. Padded by a longer one, in small pieces.
    spaced = DEMONSTRATION.replace("\n", " \n\n").replace("<think>", "  <think>")
    for micro_batch_tokens in (None, 1, 200):
        scores = scores_of(
            discriminator, [DEMONSTRATION, OTHER, spaced, SHORT], micro_batch_tokens=micro_batch_tokens
        ).by_expert
        for expert in discriminator.experts:
            assert float(scores[expert][0] - scores[expert][2]) == 0.0
            assert float(scores[expert][0] - scores[expert][1]) != 0.0


def test_text_decides_and_not_the_sampled_ids(discriminator):
    processor = discriminator.processor
    canonical = processor.tokenizer(DEMONSTRATION, add_special_tokens=False).input_ids
    # One token a byte: a tokenisation that a policy may sample and the tokenizer never writes.
    byte_ids = [i for c in DEMONSTRATION for i in processor.tokenizer(c, add_special_tokens=False).input_ids]
    assert byte_ids != canonical
    texts = [processor.decode(ids) for ids in (canonical, byte_ids)]
    scores = scores_of(discriminator, texts).by_expert
    assert all(float(s[0] - s[1]) == 0.0 for s in scores.values())


class ShortcutDiscriminator(Discriminator):
    """Reads only how a segment ends, its last two tokens: what a cheat could live on."""

    def __init__(self, processor, max_segment_tokens: int) -> None:
        super().__init__()
        self.experts = ("perception", "reasoning")
        self.processor = processor
        self.max_segment_tokens = max_segment_tokens
        self.by_id = torch.nn.Embedding(1000, 1)

    def forward(self, sequences, expert_N):
        ends_N2 = torch.stack([sequences.lengths_B - 2, sequences.lengths_B - 1], dim=1)
        ends_N2 = sequences.input_ids_BS.gather(1, ends_N2)
        scores_N = self.by_id(ends_N2).sum((1, 2))
        return RowScores(scores_N, {"experts": expert_N.float().sum()}, {"expert": expert_N.float().mean()})

    def aux_loss(self, sums):
        return sums["experts"]

    def metrics(self, sums):
        return {"experts": sums["experts"]}

    def save(self, folder, dtype="float32"): ...


@pytest.mark.parametrize("long_side", ["demonstration", "rollout", "both"])
def test_the_last_tokens_cannot_win_whichever_side_is_longer_than_the_cap(blank_policy, long_side):
    """A cut segment would end without its closing tag. So none is cut: a response with a long one is not judged."""
    processor = PolicySpec(blank_policy).processor()
    shortcut = ShortcutDiscriminator(processor, longest_segment(processor, DEMONSTRATION, OTHER))
    long = render("- red 3 at top left\n" * 9, "1. the digits are 3 and 7\n" * 9, "10")
    sides = {"demonstration": [long, OTHER], "rollout": [DEMONSTRATION, long], "both": [long, long]}[long_side]
    # Beside them a rollout that ends in white space, and one that fits.
    scores = scores_of(shortcut, [*sides, DEMONSTRATION + "\n", OTHER])
    assert scores.valid_B.tolist() == [sides[0] is not long, sides[1] is not long, True, True]
    for values in scores.by_expert.values():
        assert torch.equal(values.isnan(), ~scores.valid_B)
        judged = values[scores.valid_B]
        assert torch.equal(judged, judged[:1].expand_as(judged))
    told = diagnostics_over_ranks(shortcut, scores)
    assert set(told) == {"expert", "experts", "too_long/perception", "too_long/reasoning"}
    for expert in shortcut.experts:
        assert float(told[f"too_long/{expert}"]) == sides.count(long) / 4


def longest_segment(processor, *responses: str) -> int:
    return max(
        len(segment_ids(processor, text)) for response in responses for text in segments(parse(response)).values()
    )


def test_one_segment_over_the_cap_by_one_token_leaves_the_whole_response_out(blank_policy):
    processor = PolicySpec(blank_policy).processor()
    cap = longest_segment(processor, DEMONSTRATION)
    for max_segment_tokens, fits in ((cap, True), (cap - 1, False)):
        scores = scores_of(ShortcutDiscriminator(processor, max_segment_tokens), [DEMONSTRATION, SHORT, MALFORMED])
        assert scores.valid_B.tolist() == [fits, True, False]
        shares = [float(scores.diagnostics[f"too_long/{expert}"]) for expert in ("perception", "reasoning")]
        # The think block is the longer one: of the two well-formed responses it alone is over the cap.
        assert shares == ([0.0, 0.0] if fits else [0.0, 0.5])


def test_a_text_that_stands_twice_is_scored_once_and_sums_and_means_are_over_sequences(blank_policy):
    shortcut = ShortcutDiscriminator(PolicySpec(blank_policy).processor(), 300)
    prompts = prompts_of(shortcut, make_examples(2))
    # Captions a b a | c, think blocks x y z | w: 3 + 4 distinct sequences.
    texts = {"perception": ["a", "b", "a", "c"], "reasoning": ["x", "y", "z", "w"]}
    batch = segment_batch(shortcut.processor, prompts, texts, [0, 0, 0, 1], 300)
    assert len(batch.sequences) == 7
    assert batch.row_of["perception"][0] == batch.row_of["perception"][2]
    for micro_batch_tokens in (None, 1, 100):
        scores = score(shortcut, batch, micro_batch_tokens)
        # The reasoning expert, index 1, reads 4 of the 7.
        assert float(scores.aux_loss) == float(diagnostics_over_ranks(shortcut, scores)["experts"]) == 4
        torch.testing.assert_close(scores.diagnostics["expert"], torch.tensor(4 / 7))
        # Four responses, each with two segments, in seven sequences.
        counts = {name: int(count) for name, count in scores.counts.items()}
        assert counts == {"expert": 7, "too_long/perception": 4, "too_long/reasoning": 4}


def test_every_segment_ends_with_the_end_token(blank_policy):
    processor = PolicySpec(blank_policy).processor()
    text = "<caption> red 3 at top left </caption>"
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert segment_ids(processor, text) == [*ids, processor.eos_id]
    # A response may spell special tokens; they must neither end the segment nor ask for an image.
    spelled = segment_ids(processor, "<|im_end|> <|image_pad|> red")
    assert spelled.count(processor.eos_id) == 1
    assert processor.image_token_id not in spelled


def test_the_score_is_read_at_the_end_token_whatever_the_padding(discriminator):
    alone = scores_of(discriminator, [SHORT]).by_expert
    padded = scores_of(discriminator, [SHORT, DEMONSTRATION, OTHER]).by_expert
    for expert in discriminator.experts:
        torch.testing.assert_close(padded[expert][:1], alone[expert], atol=1e-6, rtol=0)
    # And it is that token's: another end token gives another score.
    prompts = prompts_of(discriminator, make_examples(1))
    texts = {"perception": ["<caption> red"], "reasoning": ["<think> 3"]}
    batch = segment_batch(discriminator.processor, prompts, texts, [0], 200)
    with torch.no_grad(), evaluating(discriminator):
        before = score(discriminator, batch).by_expert["perception"]
        batch.sequences.input_ids_BS[0, batch.sequences.lengths_B[0] - 1] = 5
        after = score(discriminator, batch).by_expert["perception"]
    assert not torch.allclose(before, after)


def test_each_expert_sees_only_its_segment(discriminator):
    one, other = parse(DEMONSTRATION), parse(OTHER)
    crossed = [one, Parsed(one.caption, other.reasoning, other.answer, True)]
    scores = scores_of(discriminator, crossed).by_expert
    assert scores["perception"][0] == scores["perception"][1]
    assert scores["reasoning"][0] != scores["reasoning"][1]
    crossed = [one, Parsed(other.caption, one.reasoning, one.answer, True)]
    scores = scores_of(discriminator, crossed).by_expert
    assert scores["perception"][0] != scores["perception"][1]
    assert scores["reasoning"][0] == scores["reasoning"][1]


def test_the_image_and_the_question_matter(discriminator):
    scores = scores_of(discriminator, [DEMONSTRATION] * 2, [0, 1], num_prompts=2).by_expert
    assert all(s[0] != s[1] for s in scores.values())


def test_micro_batches_give_the_whole_batch_scores_and_gradients(discriminator):
    responses, prompt_of = [DEMONSTRATION, SHORT, OTHER, MALFORMED, SHORT], [0, 1, 2, 1, 0]
    for dropout in discriminator.modules():
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    results = []
    for micro_batch_tokens in (None, 150):
        discriminator.zero_grad()
        scores = scores_of(discriminator, responses, prompt_of, 3, training=True, micro_batch_tokens=micro_batch_tokens)
        torch.stack([s[scores.valid_B].square().sum() for s in scores.by_expert.values()]).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in discriminator.parameters() if p.grad is not None])
        results.append((torch.cat(list(scores.by_expert.values())).detach(), gradients))
    discriminator.dropout.p = 0.1
    (whole, whole_gradients), (pieces, piece_gradients) = results
    torch.testing.assert_close(whole, pieces, equal_nan=True)
    torch.testing.assert_close(whole_gradients, piece_gradients, atol=1e-5, rtol=1e-4)
    assert float(whole_gradients.abs().max()) > 0


def test_malformed_responses_are_nan_and_marked(discriminator):
    scores = scores_of(discriminator, [DEMONSTRATION, MALFORMED, SHORT])
    assert scores.valid_B.tolist() == [True, False, True]
    for values in scores.by_expert.values():
        assert values.isnan().tolist() == [False, True, False]
    discriminator.zero_grad()
    nothing = scores_of(discriminator, [MALFORMED, MALFORMED], training=True)
    assert not nothing.valid_B.any()
    torch.where(nothing.valid_B, nothing.by_expert["reasoning"], 0.0).sum().backward()
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in discriminator.heads.parameters())
    discriminator.zero_grad()


def test_scored_in_eval_mode_and_trained_with_dropout(discriminator):
    plain = [scores_of(discriminator, [DEMONSTRATION]).by_expert["perception"] for _ in range(2)]
    assert torch.equal(*plain)
    assert discriminator.training
    dropped = [scores_of(discriminator, [DEMONSTRATION], training=True).by_expert["perception"] for _ in range(2)]
    assert not torch.equal(*dropped)
    assert dropped[0].requires_grad
    assert not plain[0].requires_grad


def test_first_scores_are_small_and_every_part_gets_a_gradient(random_policy):
    fresh = DedicatedMoEDiscriminator(random_policy, init_heads=True)
    scores = scores_of(fresh, [DEMONSTRATION, OTHER], training=True)
    assert all(float(s.detach().abs().max()) < 1 for s in scores.by_expert.values())
    gaps = torch.stack([s[0] - s[1] for s in scores.by_expert.values()])
    assert float(gaps.detach().abs().max()) < 0.5
    torch.nn.functional.softplus(-gaps).sum().backward()
    without = [n for n, p in fresh.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert without == []


def test_likelihoods_are_float32_under_autocast(random_policy):
    weighing = DedicatedMoEDiscriminator(random_policy, init_heads=True, likelihood_weight=1.0)
    prompts = prompts_of(weighing, make_examples(1))
    texts = {"perception": ["<caption> red"], "reasoning": ["<think> 3"]}
    sequences = segment_batch(weighing.processor, prompts, texts, [0], 200).sequences
    layout = padded_layout(sequences)
    hidden_NH = torch.randn(layout.token_of_N.numel(), weighing.model.config.text_config.hidden_size)
    with torch.no_grad():
        plain_N = weighing._mean_logps(hidden_NH, sequences, layout)
        with torch.autocast("cpu", torch.bfloat16):
            autocast_N = weighing._mean_logps(hidden_NH, sequences, layout)
    assert torch.equal(autocast_N, plain_N)


def test_save_and_load_give_the_same_scores(discriminator, tmp_path):
    discriminator.save(tmp_path / "d")
    discriminator.save(tmp_path / "d")  # an older one is replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    loaded = DedicatedMoEDiscriminator(str(tmp_path / "d"))
    assert loaded.max_segment_tokens == 200
    one, two = (scores_of(d, [DEMONSTRATION, SHORT]).by_expert for d in (discriminator, loaded))
    assert all(torch.equal(one[expert], two[expert]) for expert in one)
    discriminator.save(tmp_path / "half", "bfloat16")
    half = DedicatedMoEDiscriminator(str(tmp_path / "half"))
    assert half.model.get_input_embeddings().weight.dtype == torch.float32
    three = scores_of(half, [DEMONSTRATION, SHORT]).by_expert
    assert all(torch.allclose(one[expert], three[expert], atol=0.02) for expert in one)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("d", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_save_clears_what_killed_ones_left(discriminator, tmp_path):
    discriminator.save(tmp_path / "d")
    for leftover in ("d.tmp", "d.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").touch()
    discriminator.save(tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    assert not (tmp_path / "d" / "half").exists()
    one, two = (
        scores_of(d, [SHORT]).by_expert for d in (discriminator, DedicatedMoEDiscriminator(str(tmp_path / "d")))
    )
    assert all(torch.equal(one[expert], two[expert]) for expert in one)


def test_a_cap_below_one_token_is_refused(random_policy):
    with pytest.raises(ValueError, match="max_segment_tokens is 0: give at least 1"):
        DedicatedMoEDiscriminator(random_policy, init_heads=True, max_segment_tokens=0)


def test_missing_heads_are_never_random(discriminator, random_policy, tmp_path):
    with pytest.raises(ValueError, match=r"never random: run warmup\.yaml"):
        DedicatedMoEDiscriminator(random_policy)
    discriminator.save(tmp_path / "d")
    with pytest.raises(ValueError, match="would throw its heads away"):
        DedicatedMoEDiscriminator(str(tmp_path / "d"), init_heads=True)
    heads = tmp_path / "d" / "heads.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({"perception.weight": load_file(heads)["perception.weight"]}, heads)
    with pytest.raises(ValueError, match=r"reasoning\.weight"):
        DedicatedMoEDiscriminator(str(tmp_path / "d"))
    heads.unlink()
    with pytest.raises(ValueError, match=r"lacks heads\.safetensors"):
        DedicatedMoEDiscriminator(str(tmp_path / "d"))


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "heads.bin"])
def test_a_planted_pickle_is_refused(discriminator, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    discriminator.save(tmp_path / "d")
    safe = tmp_path / "d" / ("heads.safetensors" if name == "heads.bin" else "model.safetensors")
    safe.unlink()
    if name != "heads.bin":
        (tmp_path / "d" / "heads.safetensors").unlink()
    (tmp_path / "d" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"pickled|lacks heads"):
        DedicatedMoEDiscriminator(str(tmp_path / "d"))
    assert not (tmp_path / "exploded").exists()


def test_yaml_and_python_name_a_factory(random_policy):
    from jsonargparse import ArgumentParser

    from modules.warmup import DiscriminatorModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DiscriminatorModule, "model")
    named = {"class_path": "prism_pl.discriminator.DedicatedMoEDiscriminator", "init_args": {"path": random_policy}}
    arguments = {
        "policy": {"path": random_policy},
        "discriminator": {**named, "init_args": {**named["init_args"], "init_heads": True}},
        "rollout": {"class_path": "tests.test_warmup.ScriptedEngine"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
        "sampling": {"max_tokens": 8},
    }
    module = parser.instantiate(parser.parse_object({"model": arguments})).model
    assert module.discriminator is None  # built in configure_model, so that ZeRO-3 can shard it
    module.configure_model()
    assert isinstance(module.discriminator, DedicatedMoEDiscriminator)
    assert isinstance(
        partial(DedicatedMoEDiscriminator, path=random_policy, init_heads=True)(), DedicatedMoEDiscriminator
    )
    assert json.dumps(arguments)
