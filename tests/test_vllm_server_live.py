"""The engine for a vLLM server against a real one on the CPU, started by the line that the engine's messages give."""

from dataclasses import replace

import pytest
import torch

from datamodules.digits import DigitsDataModule
from prism_pl.logprobs import token_logps
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import Sampling, TransformersEngine, VLLMServerEngine, rollout_batch, vllm_server_client
from scripts.blank_policy import ROOT
from scripts.serving import kill, serving
from tests.conftest import make_examples
from tests.stubs import equal, shake, weights

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

GREEDY = Sampling(temperature=0.0, max_tokens=32)
SAMPLED = Sampling(max_tokens=24)
PARITY = 2e-5  # nats a token, float32 on both sides
PATH = str(ROOT / "assets" / "sft")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server's process and address. Blocks of 32 let the prefix cache keep a small policy's prompts."""
    with serving(PATH, "cpu", "--block-size", "32", log=tmp_path_factory.mktemp("server") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def processor():
    return PolicySpec(PATH).processor()


@pytest.fixture(scope="module")
def started(server, processor):
    torch.manual_seed(0)
    policy = build_policy(PolicySpec(PATH))
    engine = VLLMServerEngine(server[1])
    engine.start(policy, processor, rank=0)
    yield engine, policy, weights(policy)
    engine.close()


@pytest.fixture
def policy(started):
    return started[1]


@pytest.fixture
def engine(started):
    """The engine as it was at the start, whatever a test did to the weights."""
    engine, policy, first = started
    if not equal(weights(policy), first):
        policy.load_state_dict(first)
        engine.sync(policy.named_parameters())
    engine.draws.load_state_dict({"seed": 7, "num_draws": 0})
    return engine


@pytest.fixture(scope="module")
def rows():
    data = DigitsDataModule(rows="rlvr", num_train=8, num_validation=8)
    return [data.train_rows[i] for i in range(8)]


@pytest.fixture
def examples(rows):
    """Prompts of different lengths: one image, two images, none; the system prompt fills blocks of the prefix cache."""
    long = "Look closely at every digit, at its colour and at its place in the image, before you answer. " * 3
    return [
        replace(rows[0], system=long),
        replace(rows[1], images=[*rows[1].images, *rows[2].images], id="two"),
        replace(rows[3], images=[], id="none"),
    ]


@torch.no_grad()
def difference(policy, processor, examples, rollouts, num_samples, temperature=1.0) -> float:
    """The largest between the server's log-probabilities and the trainer's."""
    prompts = [processor.prompt(example) for example in examples]
    batch, sampler_logps_BT = rollout_batch(processor, prompts, rollouts, num_samples)
    stats = token_logps(policy, batch, temperature=temperature, banned_ids=processor.banned_ids)
    return float((sampler_logps_BT - stats.logps_BT).abs().max())


def ids(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def check_greedy_parity(engine, policy, processor, examples):
    rollouts = engine.generate(examples, 1, GREEDY)
    stock = TransformersEngine()
    stock.start(policy, processor, rank=0)
    assert ids(rollouts) == ids(stock.generate(examples, 1, GREEDY))
    assert difference(policy, processor, examples, rollouts, 1) < PARITY


def test_greedy_tokens_and_logps_are_transformers(engine, policy, processor, examples, rows):
    check_greedy_parity(engine, policy, processor, [*examples, *rows])


def test_parity_holds_after_a_sync_of_other_weights(engine, policy, processor, examples):
    before = ids(engine.generate(examples, 1, GREEDY))
    shake(policy)
    engine.sync(policy.named_parameters())
    assert engine.metrics()["rollout/probe_difference"] < PARITY
    check_greedy_parity(engine, policy, processor, examples)
    assert ids(engine.generate(examples, 1, GREEDY)) != before


@pytest.mark.parametrize("part", ["language_model", "visual"])
def test_a_cache_that_is_kept_breaks_the_contract(engine, policy, examples, part, monkeypatch):
    engine.generate(examples, 1, GREEDY)
    shake(policy, [part])
    with monkeypatch.context() as patch:
        patch.setattr("prism_pl.rollout.vllm_server.forget_prompts", lambda server: None)
        with pytest.raises(ValueError, match=r"rollout contract: after a sync .* cached under the old ones"):
            engine.sync(policy.named_parameters())
    engine.sync(policy.named_parameters())
    assert engine.metrics()["rollout/probe_difference"] < PARITY


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logps_are_the_trainers_without_banned_ids(engine, policy, processor, examples, temperature):
    with torch.no_grad():  # the banned ids become the likeliest by far
        embeddings = policy.get_input_embeddings().weight
        embeddings[processor.banned_ids] = 3 * embeddings[processor.eos_id]
    engine.sync(policy.named_parameters())
    rollouts = engine.generate(examples, 4, replace(SAMPLED, temperature=temperature))
    assert not {token for each in ids(rollouts) for token in each} & set(processor.banned_ids)
    assert difference(policy, processor, examples, rollouts, 4, temperature) < 2 * PARITY


def test_samples_differ_and_draws_are_reproducible(engine, examples):
    state = engine.state_dict()
    first, second = (ids(engine.generate(examples, 4, SAMPLED)) for _ in range(2))
    assert len({tuple(each) for each in first[:4]}) > 1
    assert first != second
    engine.load_state_dict(state)
    engine.generate(examples, 1, replace(SAMPLED, seed=1))  # a seeded call in between counts as no draw
    assert ids(engine.generate(examples, 4, SAMPLED)) == first
    assert ids(engine.generate(examples, 4, SAMPLED)) == second
    seeded = replace(SAMPLED, seed=5)
    assert ids(engine.generate(examples, 2, seeded)) == ids(engine.generate(examples, 2, seeded))


def test_more_prompts_than_one_step_of_the_server_takes(engine, policy, processor, examples):
    """Were they cut into chunks, vLLM would stop at their seeds."""
    many = [replace(examples[0], id=str(i), question=f"{i} " * 60) for i in range(45)]
    rollouts = engine.generate(many, 2, SAMPLED)
    assert sum(len(rollout.prompt_ids) for rollout in rollouts[::2]) > 8192
    assert difference(policy, processor, many, rollouts, 2) < 2 * PARITY


def test_images_of_odd_sizes_are_read_as_the_trainer_reads_them(engine, policy, server):
    """The server's own processor would resize them with another filter."""
    small = PolicySpec(PATH, max_pixels=64 * 64).processor()
    odd = [*make_examples(2, width=150), *make_examples(1, width=70)]
    odd = [replace(example, id=str(i), system=None) for i, example in enumerate(odd)]
    other = VLLMServerEngine(server[1])
    other.start(policy, small, rank=0)
    check_greedy_parity(other, policy, small, odd)
    other.close()
    engine.sync(policy.named_parameters())  # the server is this engine's again
    check_greedy_parity(engine, policy, engine.processor, odd)


def test_another_policy_is_refused(server, policy, processor, monkeypatch):
    monkeypatch.setattr(policy.config.text_config, "num_hidden_layers", 36)
    with pytest.raises(ValueError, match=r"its text_config\.num_hidden_layers is 4, the policy's 36"):
        VLLMServerEngine(server[1]).start(policy, processor, rank=0)


def test_what_the_server_refuses_is_an_error_at_once(engine, examples, monkeypatch):
    monkeypatch.setattr(engine, "model", "other")
    with pytest.raises(ValueError, match=r"refused /v1/chat/completions with 404: The model `other` does not exist"):
        engine.generate(examples, 1, SAMPLED)


def test_a_server_that_dies_is_reported_and_gives_no_rollouts(engine, server, examples, monkeypatch):
    """The last test here: the server is gone."""
    monkeypatch.setattr(vllm_server_client, "FIRST_WAIT", 0.05)
    engine.server.retries = 3
    kill(server[0])
    with pytest.raises(ConnectionError, match=rf"{server[1]} gave no answer .* tried 4 times(?s:.*)python -m vllm"):
        engine.generate(examples, 4, SAMPLED)
    assert engine.metrics()["rollout/server_retries"] >= 3
