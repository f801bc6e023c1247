"""The drift meter: planted drift and none, values by hand, and what evaluation writes of it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prism_pl.chat import block_spans, normalise, parse
from prism_pl.drift_meter import DriftMeter, DriftSpec, build_embedder, demonstration_nll, drift_tables, in_pieces
from prism_pl.logprobs import token_logps
from prism_pl.metrics import energy_distance, energy_interval, probe_intervals
from prism_pl.metrics.pair_bootstrap import pair_interval
from prism_pl.metrics.probe import Side, concordance, length_bins, matching_weights
from prism_pl.policy import PolicySpec, build_policy
from tests.conftest import DEMONSTRATION, make_examples
from tests.stubs import scalars
from tests.test_evaluate import Rows, Scripted, evaluate

WORDS = [f"w{n}" for n in range(40)]
VECTORS = {word: np.random.default_rng(n).normal(size=16) for n, word in enumerate([*WORDS, "indeed"])}


def draw(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))


def side(texts: list[list[str]]) -> Side:
    """Responses of each prompt, embedded as the mean of their words' vectors."""
    flat = [text for of_prompt in texts for text in of_prompt]
    return Side(
        texts=flat,
        prompt_N=np.repeat(np.arange(len(texts)), [len(of_prompt) for of_prompt in texts]),
        lengths_N=np.array([len(text.split()) for text in flat]),
        embeddings_NH=np.stack([np.mean([VECTORS[word] for word in text.split()], 0) for text in flat]),
    )


@pytest.fixture
def supervision() -> list[list[str]]:
    rng = np.random.default_rng(1)
    return [[draw(rng, 8, 20)] for _ in range(120)]


# Planted


def test_the_supervision_s_own_responses_cannot_be_told_apart(supervision):
    found = probe_intervals(side([one * 2 for one in supervision]), side(supervision), num_resamples=200)
    assert {name: interval.mean for name, interval in found.items()} == {"auc": 0.5, "auc_length_matched": 0.5}


def test_others_of_the_same_kind_are_told_apart_by_chance_alone(supervision):
    rng = np.random.default_rng(2)
    policy = [[draw(rng, 8, 20), draw(rng, 8, 20)] for _ in supervision]
    for interval in probe_intervals(side(policy), side(supervision), num_resamples=500).values():
        assert interval.mean == pytest.approx(0.5, abs=0.1)  # over many draws 0.496 with a deviation of 0.04
        assert 0.08 < interval.high - interval.low < 0.25


def test_a_mark_that_only_the_policy_makes_is_found_whatever_the_length(supervision):
    rng = np.random.default_rng(3)
    policy = [[f"{draw(rng, 7, 19)} indeed"] for _ in supervision]
    found = probe_intervals(side(policy), side(supervision), num_resamples=200)
    assert found["auc"].low > 0.9
    assert found["auc_length_matched"].low > 0.9


def test_length_alone_is_found_and_lengths_matched_it_is_nothing(supervision):
    rng = np.random.default_rng(4)
    policy = [[draw(rng, 13, 25), draw(rng, 13, 25)] for _ in supervision]
    found = probe_intervals(side(policy), side(supervision), num_resamples=500)
    assert found["auc"].low > 0.65
    matched = found["auc_length_matched"]
    assert matched.low < 0.5 < matched.high
    assert matched.high < 0.65


def test_no_prompt_is_both_learnt_from_and_judged():
    """Each side repeats a word of its own prompt: who has seen the prompt knows the side, others cannot."""
    policy = [[f"p{n} x"] * 3 for n in range(60)]
    teacher = [[f"t{n} x"] * 3 for n in range(60)]

    def blind(texts: list[list[str]]) -> Side:
        flat = [text for of_prompt in texts for text in of_prompt]
        return Side(flat, np.repeat(np.arange(60), 3), np.full(180, 2), np.zeros((180, 1)))

    auc = probe_intervals(blind(policy), blind(teacher), num_resamples=200)["auc"]
    assert auc.mean == pytest.approx(0.5, abs=0.1)


def test_too_little_to_judge_is_nan(supervision):
    few = probe_intervals(side(supervision[:4]), side(supervision[:4]), num_resamples=100)
    assert all(math.isnan(value) for interval in few.values() for value in interval[:3])
    # No length in common: there is nothing to match.
    rng = np.random.default_rng(5)
    found = probe_intervals(side([[draw(rng, 30, 40)] for _ in supervision]), side(supervision), num_resamples=100)
    assert found["auc"].mean > 0.9
    assert math.isnan(found["auc_length_matched"].mean)


# By hand


def test_pair_intervals_resample_prompts_on_both_sides():
    # Of three prompts the first is worth 1 in every pair, the others 0: two of six pairs. With the first drawn once and
    # another twice one half, (2 x 1) / (2 x 1 + 2 x 1); twice and another once the same; never 0.
    sums = np.zeros((3, 3))
    sums[0] = 1
    found = pair_interval(sums, np.ones((3, 3)), 1000)
    assert found.mean == pytest.approx(1 / 3)
    assert math.isnan(found.low)  # the same prompt three times makes no pair
    # Ten prompts: a resample of n times the first is n (10 - n) of n (10 - n) + ..., by hand from the counts.
    sums, counts = np.arange(100.0).reshape(10, 10), np.ones((10, 10))
    drawn = np.random.default_rng(0).multinomial(10, [0.1] * 10, 50)
    by_hand = []
    for times in drawn:
        pairs = [(p, q, times[p] * times[q]) for p in range(10) for q in range(10) if p != q]
        by_hand.append(sum(w * sums[p, q] for p, q, w in pairs) / sum(w for _, _, w in pairs))
    found = pair_interval(sums, counts, 50)
    assert found[:3] == pytest.approx((49.5, *np.quantile(by_hand, [0.025, 0.975])))
    assert math.isnan(pair_interval(sums[:1, :1], np.ones((1, 1)), 100).low)


def test_concordance_by_hand():
    # Prompt 0: policy 3, teacher 1. Prompt 1: policy 1, teacher 2 and no score. Prompt 2 is of another fold.
    scores = np.array([3.0, 1.0, 9.0, 1.0, 2.0, np.nan, 0.0])
    labels = np.array([1, 1, 1, 0, 0, 0, 0])
    prompts = np.array([0, 1, 2, 0, 1, 1, 2])
    sums, counts = concordance(scores, labels, prompts, np.array([0, 0, 1, 0, 0, 0, 1]), 3)
    assert sums.tolist() == [[1, 1, 0], [0.5, 0, 0], [0, 0, 1]]  # 3 > 1, 3 > 2; 1 = 1, 1 < 2; 9 > 0
    assert counts.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_weights_give_both_sides_the_lengths_they_have_in_common():
    # Shares of the bins: 3/4, 1/4, 0 and 1/4, 1/2, 1/4, in common 1/4, 1/4, 0.
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    bins = np.array([0, 0, 0, 1, 0, 1, 1, 2])
    weights = matching_weights(labels, bins)
    np.testing.assert_allclose(weights, np.array([1 / 3, 1 / 3, 1 / 3, 1, 1, 1 / 2, 1 / 2, 0]) * 2)  # of mean 1
    assert not matching_weights(np.array([1, 0]), np.array([0, 1])).any()


def test_lengths_are_bins_of_their_own_until_there_are_too_many():
    assert length_bins(np.array([7, 3, 7, 5])).tolist() == [2, 0, 2, 1]
    bins = length_bins(np.arange(1000), most=4)
    assert np.bincount(bins).tolist() == [250] * 4


def test_energy_intervals_are_of_pairs_of_different_prompts():
    # sqrt(2 * 3 - 0 - 0), whichever prompts are drawn.
    prompts = np.arange(6)
    zeros, threes = np.zeros((6, 1)), np.full((6, 1), 3.0)
    assert energy_interval(zeros, prompts, threes, prompts, 100)[:3] == pytest.approx([math.sqrt(6)] * 3)
    # Of the same responses nothing is left, of others of the same kind next to nothing, however few they are.
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(80, 3)), rng.normal(size=(40, 3))
    pairs = np.repeat(np.arange(40), 2)
    assert energy_interval(np.repeat(other, 2, 0), pairs, other, np.arange(40), 50)[:3] == (0, 0, 0)
    same = energy_interval(one, pairs, other, np.arange(40), 500)
    assert same.low == 0
    assert same.mean < 0.5 * energy_distance(one, other)
    apart = energy_interval(one + 1, pairs, other, np.arange(40), 500)
    assert apart.low < apart.mean < apart.high
    assert apart.mean == pytest.approx(energy_distance(one + 1, other), rel=0.1)
    # A prompt counts once: of the pairs of different prompts, |4 - 0| and |0 - 0| weigh a half each, |2 - 0| one.
    uneven = energy_interval(np.array([[0.0], [4.0], [2.0]]), np.array([0, 0, 1]), np.zeros((2, 1)), np.arange(2), 50)
    between = 2 * (0.5 * (0 + 4) + 2) / 2
    within = 0.5 * (2 + 2)  # |0 - 2| and |4 - 2|
    assert uneven.mean == pytest.approx(math.sqrt(between - within))


# Networks


def test_blocks_are_the_whole_response():
    text = "  <caption>a</caption> \n<think>b</think><answer>c</answer>\n"
    spans = block_spans(text)
    assert "".join(text[start:stop] for start, stop in spans.values()) == text
    assert text[slice(*spans["think"])] == "<think>b</think>"
    with pytest.raises(ValueError, match="a malformed response has no blocks: <caption> is missing"):
        block_spans("7")


@pytest.fixture(scope="module")
def networks(random_policy):
    spec = PolicySpec(random_policy)
    return build_policy(spec).eval(), spec.processor()


def test_likelihoods_of_the_blocks_add_up_to_the_response_s(networks):
    policy, processor = networks
    examples = make_examples(3)
    examples[1].response = "The answer is 10."
    prompts = [processor.prompt(example) for example in examples]
    first, malformed, last = demonstration_nll(policy, processor, examples, prompts, None)
    assert malformed is None
    assert list(first) == ["caption", "reasoning", "answer"]
    ids = [processor.response_ids(example.response) for example in examples]
    batch = processor.sequences(prompts, ids, range(3))
    with torch.no_grad():
        logps = token_logps(policy, batch).logps_BT.sum(1)
    for row, blocks in ((0, first), (2, last)):
        assert sum(nats for nats, _ in blocks.values()) == pytest.approx(-float(logps[row]), rel=1e-5)
        assert sum(tokens for _, tokens in blocks.values()) == len(ids[row])
    # By the text alone: the tokens before the think block, and those after it begins with <answer>.
    caption, answer = DEMONSTRATION.index("<think>"), DEMONSTRATION.index("<answer>")
    starts = processor.response_starts(DEMONSTRATION)
    assert first["caption"][1] == sum(start < caption for start in starts)
    assert first["answer"][1] == sum(start >= answer for start in starts)
    pieces = demonstration_nll(policy, processor, examples, prompts, 1)
    assert pieces[0]["reasoning"] == pytest.approx(first["reasoning"], rel=1e-4)


def test_embeddings_are_means_over_the_response(networks, random_policy):
    policy, processor = networks
    spec = DriftSpec(PolicySpec(random_policy), num_prompts=None, micro_batch_tokens=1)
    embedder = build_embedder(spec)
    examples = make_examples(2)
    texts = ["red 3", " blue  7 at centre "]
    _, rows = DriftMeter(spec, policy, processor, embedder)(examples, [texts, texts])
    assert rows[0]["policy"]["texts"] == ["red 3", "blue 7 at centre"]
    assert rows[0]["supervision"]["texts"] == [normalise(DEMONSTRATION)]
    ids = processor.response_ids("red 3")
    assert rows[0]["policy"]["lengths"][0] == len(ids)
    batch = processor.sequences([processor.prompt(examples[0])], [ids], [0])
    with torch.no_grad():
        hidden = embedder.model(
            input_ids=batch.input_ids_BS,
            pixel_values=batch.pixel_values_NC,
            image_grid_thw=batch.grids_I3,
            position_ids=batch.position_ids_3BS,
        ).last_hidden_state[0, -len(ids) :]
    np.testing.assert_allclose(rows[0]["policy"]["embeddings"][0], hidden.mean(0).numpy(), atol=1e-4)
    assert not embedder.model.training


def test_pieces_come_back_in_order(networks):
    policy, processor = networks
    examples = make_examples(4)
    prompts = [processor.prompt(example) for example in examples]
    batch = processor.sequences(prompts, [[5] * n for n in (3, 1, 4, 2)], range(4))
    assert in_pieces(policy, batch, 1, lambda piece: piece.lengths_B.float()).tolist() == batch.lengths_B.tolist()


# Evaluation


class Supervised(Scripted):
    """Answers every prompt with its demonstration, changed as told."""

    def __init__(self, change=lambda text: text):
        super().__init__([""])
        self.change = change

    def generate(self, examples, num_samples, sampling, on_group=None):
        self.texts = [self.change(example.response) for example in examples]
        made = []
        for text in self.texts:
            rollouts = SimpleNamespace(text=text, response_ids=[1] * 10, finish_reason="stop")
            made += [rollouts] * num_samples
        return made


def measured(folder, policy, change=lambda text: text, **options):
    drift = DriftSpec(PolicySpec(policy), **{"num_prompts": 10, **options})
    return evaluate(folder, policy, [], Rows(12), engine=Supervised(change), drift=drift)


def test_a_policy_that_answers_as_the_supervision_has_not_drifted(random_policy, tmp_path):
    module = measured(tmp_path, random_policy)
    table = module.tables["test"]["all"]
    assert table["embedding_energy"]["mean"] == 0
    assert table["probe_auc"]["mean"] == 0.5
    assert table["probe_auc_length_matched"]["mean"] == 0.5
    assert table["response_length/distance"]["mean"] > 0  # ten tokens, as the engine says
    assert (table["probe_auc"]["prompts"], table["probe_auc"]["responses"]) == (10, 20)
    assert "probe_auc" not in module.tables["test"]["sum"]
    # A random policy over a vocabulary of some hundred tokens: about the logarithm of its size, in every block.
    size = math.log(build_policy(PolicySpec(random_policy)).config.text_config.vocab_size)
    for block in ("caption", "reasoning", "answer"):
        entry = module.tables["test"]["sum"][f"teacher_nll_{block}"]
        assert entry["mean"] == pytest.approx(size, rel=0.3)
        assert entry["prompts"] == 2
    assert [record["split"] for record in module.records if "nll" in record["supervision"]].count("test") == 10
    tags = scalars(tmp_path)
    assert tags["evaluate/test/all/probe_auc"] == [0.5]
    assert "evaluate/test/sum/teacher_nll_answer" in tags


def test_a_planted_mark_is_drift(random_policy, tmp_path):
    module = measured(tmp_path, random_policy, lambda text: text.replace("</think>", " indeed</think>"))
    table = module.tables["test"]["all"]
    assert table["probe_auc"]["mean"] == 1
    assert table["embedding_energy"]["low"] > 0


def test_tables_do_not_depend_on_the_order_of_the_rows(random_policy, networks):
    policy, processor = networks
    spec = DriftSpec(PolicySpec(random_policy))
    examples = make_examples(12)
    texts = [[f"{DEMONSTRATION[: 40 + n]}"] for n in range(12)]
    _, rows = DriftMeter(spec, policy, processor, build_embedder(spec))(examples, texts)
    assert repr(drift_tables(rows, 5, 100, 0)) == repr(drift_tables(rows[::-1], 5, 100, 0))  # NaN equals NaN so
    assert not parse(texts[0][0]).valid  # malformed responses are measured like any other


@pytest.mark.parametrize(
    ("options", "said"),
    [({"num_folds": 1}, r"drift\.num_folds is 1"), ({"num_prompts": 3}, r"drift\.num_prompts is 3: give at least one")],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        DriftSpec(PolicySpec("x"), **options)
