"""The engine for a vLLM server against a fake one: troubles of the connection, and the contract."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import RolloutEngine, Sampling, VLLMServerEngine, vllm_server_client
from tests.conftest import make_examples
from tests.fake_vllm import CUT, FakeVLLM

SAMPLED = Sampling(max_tokens=60)
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def processor(random_policy):
    return PolicySpec(random_policy).processor()


@pytest.fixture(scope="module")
def policy(random_policy):
    return build_policy(PolicySpec(random_policy))


@pytest.fixture
def fake(processor, policy, monkeypatch):
    monkeypatch.setattr(vllm_server_client, "FIRST_WAIT", 0.01)
    fake = FakeVLLM(processor, policy.config)
    yield fake
    fake.close()


@pytest.fixture
def engine(fake, policy, processor):
    """Started, and its weights already sent."""
    engine = VLLMServerEngine(fake.url, retries=3, timeout=20)
    engine.start(policy, processor, rank=0)
    engine.generate(examples(1), 1, SAMPLED)
    engine.draws.load_state_dict({"seed": 7, "num_draws": 0})
    fake.asked.clear()
    fake.called.clear()
    yield engine
    engine.close()


def examples(num=3):
    return [replace(example, images=[], question=f"question {i}") for i, example in enumerate(make_examples(num))]


def ids(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def test_it_fits_the_protocol():
    assert isinstance(VLLMServerEngine("http://localhost:8000"), RolloutEngine)


def test_rollouts_stand_prompt_by_prompt(engine, fake, processor):
    rows = examples()
    rollouts = engine.generate(rows, 2, SAMPLED)
    seeds = {body["messages"][1]["content"][0]["text"]: body["seed"] for body in fake.asked}
    assert [rollout.text for rollout in rollouts] == [str(seeds[row.question] + g) for row in rows for g in range(2)]
    assert [r.prompt_ids for r in rollouts] == [processor.prompt(row).ids for row in rows for _ in range(2)]
    assert all(rollout.sampler_logps == [-0.5] * len(rollout.response_ids) for rollout in rollouts)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop"}


def test_a_request_says_everything_that_bends_a_distribution(engine, fake, processor):
    engine.generate(examples(1), 2, Sampling(temperature=0.7, max_tokens=60))
    (body,) = fake.asked
    assert (body["model"], body["n"], body["temperature"], body["top_p"], body["top_k"]) == ("served", 2, 0.7, 1.0, 0)
    assert body["max_completion_tokens"] == 60
    assert body["logit_bias"] == {str(i): -100.0 for i in processor.banned_ids}
    assert (body["stop_token_ids"], body["ignore_eos"]) == ([processor.eos_id, processor.pad_id], True)


def test_a_greedy_call_asks_once_a_prompt(engine, fake):
    rollouts = engine.generate(examples(2), 3, replace(SAMPLED, temperature=0.0))
    assert [body["n"] for body in fake.asked] == [1, 1]
    assert ids(rollouts)[0] == ids(rollouts)[2] != ids(rollouts)[3]


def test_a_server_that_is_busy_is_asked_again(engine, fake, caplog):
    fake.trouble = [503, 503]
    rollouts = engine.generate(examples(), 1, SAMPLED)
    assert len(rollouts) == 3
    assert len(fake.asked) == 5
    said = [record.message for record in caplog.records if "retry" in record.message]
    assert len(said) == 1  # once a retry, not once a request
    assert f"{fake.url}: it answered 503: as the test wants it; retry 1 of 3" in said[0]
    assert engine.metrics()["rollout/server_retries"] == 1


def test_an_answer_that_is_cut_off_is_asked_for_again(engine, fake):
    fake.trouble = [CUT, 0, CUT]
    assert len(engine.generate(examples(), 2, SAMPLED)) == 6
    assert len(fake.asked) == 5


def test_retries_wait_longer_each_time(engine, fake, monkeypatch):
    monkeypatch.setattr(vllm_server_client, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(vllm_server_client, "LONGEST_WAIT", 0.03)
    waited = []
    real = vllm_server_client.asyncio.sleep
    monkeypatch.setattr(vllm_server_client.asyncio, "sleep", lambda s: (waited.append(s), real(s))[1])
    fake.trouble = [500, 500, 500]
    engine.generate(examples(1), 1, SAMPLED)
    assert [wait for wait in waited if wait] == [0.02, 0.03, 0.03]


def test_half_a_batch_is_no_batch(engine, fake):
    """Of three prompts one never gets its answer."""
    fake.refuse = {"question 1": 500}
    with pytest.raises(ConnectionError) as raised:
        engine.generate(examples(), 1, SAMPLED)
    message = str(raised.value)
    assert f"the rollout server {fake.url} gave no answer to {PATH} (it answered 500" in message
    assert "tried 4 times), and no answer of this call is used: is it running? This starts it:" in message
    assert "VLLM_SERVER_DEV_MODE=1 TORCH_COMPILE_DISABLE=1 python -m vllm.entrypoints" in message
    assert sum(body["messages"][1]["content"][0]["text"] == "question 1" for body in fake.asked) == 4


def test_a_refusal_is_an_error_at_once(engine, fake):
    fake.refuse = {"question 1": 400}
    with pytest.raises(ValueError, match=f"refused {PATH} with 400: as the test wants it"):
        engine.generate(examples(), 1, SAMPLED)
    assert len(fake.asked) <= 3


def test_a_server_that_is_gone_is_named_with_the_line_that_starts_it(engine, fake, random_policy):
    fake.close()
    with pytest.raises(ConnectionError, match=rf"{fake.url} gave no answer .*(?s:.*)--model {random_policy} "):
        engine.generate(examples(), 1, SAMPLED)


def test_a_server_that_does_not_answer_is_given_up(engine, fake):
    fake.before_answer = lambda: __import__("time").sleep(0.5)
    engine.server.timeout, engine.server.retries = 0.1, 1
    with pytest.raises(ConnectionError, match=r"no answer within 0\.1 s; tried 2 times"):
        engine.generate(examples(1), 1, SAMPLED)


def test_another_prompt_is_found_out(engine, fake):
    fake.change = lambda answer: answer | {"prompt_token_ids": answer["prompt_token_ids"][1:]}
    with pytest.raises(ValueError, match="rollout contract: the engine read another prompt"):
        engine.generate(examples(), 1, SAMPLED)


def test_banned_ids_and_responses_that_are_not_whole_are_found_out(engine, fake, processor):
    def changed(**parts):
        return lambda answer: answer | {"choices": [choice | parts for choice in answer["choices"]]}

    fake.change = changed(finish_reason="abort")
    with pytest.raises(ValueError, match=r"rollout contract: .* 'row-0' is not whole: .* finish reason 'abort'"):
        engine.generate(examples(1), 1, SAMPLED)
    fake.change = changed(token_ids=[5])
    with pytest.raises(ValueError, match="is not whole: 1 tokens"):
        engine.generate(examples(1), 1, SAMPLED)
    banned = processor.banned_ids[0]
    fake.change = changed(token_ids=[banned], logprobs={"content": [{"logprob": -1.0}]})
    with pytest.raises(ValueError, match=rf"holds the banned ids \[{banned}\]"):
        engine.generate(examples(1), 1, SAMPLED)


def test_seeds_differ_between_requests_calls_and_ranks_and_go_on_after_a_resume(engine, fake):
    state = engine.state_dict()
    first, second = (ids(engine.generate(examples(), 2, SAMPLED)) for _ in range(2))
    assert len({tuple(each) for each in [*first, *second]}) == 12
    engine.load_state_dict(state)
    seeded = [ids(engine.generate(examples(), 1, replace(SAMPLED, seed=1))) for _ in range(2)]  # these count as no draw
    assert seeded[0] == seeded[1]
    assert ids(engine.generate(examples(), 2, SAMPLED)) == first
    engine.load_state_dict(state)
    engine.draws.rank = 1
    assert not {tuple(each) for each in ids(engine.generate(examples(), 2, SAMPLED))} & {tuple(each) for each in first}


def test_a_server_that_was_started_anew_is_sent_the_weights_and_asked_again(engine, fake, caplog):
    state = engine.state_dict()
    first = ids(engine.generate(examples(), 1, SAMPLED))
    engine.load_state_dict(state)
    fake.asked.clear()
    fake.called.clear()

    def restart():
        fake.version, fake.before_answer = None, lambda: None

    fake.before_answer = restart
    assert ids(engine.generate(examples(), 1, SAMPLED)) == first
    assert len(fake.asked) == 6
    assert fake.called.count("prism_load") == 1
    assert "it was started anew" in caplog.text


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "start it with --logprobs-mode processed_logprobs"),
        ({"generation_config": "auto"}, "start it with --generation-config vllm"),
        ({"max_model_len": 512}, r"was started anew with other options \(max_model_len 512, 2048 before\)"),
        ({"dtype": "bfloat16"}, r"was started anew with other options \(dtype bfloat16, float32 before\)"),
    ],
)
@pytest.mark.parametrize("seen_by", ["sync", "load", "generate"])
def test_a_server_that_comes_back_with_other_options_is_refused(engine, fake, policy, facts, message, seen_by):
    def restart():
        fake.version, fake.facts = None, replace(fake.facts, **facts)
        return CUT

    engine.probe.example = None  # the fake has no log-probabilities to probe
    if seen_by == "sync":
        restart()
    elif seen_by == "load":  # it dies of the load
        fake.before_load = restart
    else:
        fake.before_answer = restart
    calls = {"generate": lambda: engine.generate(examples(), 1, SAMPLED)}
    call = calls.get(seen_by, lambda: engine.sync(policy.named_parameters()))
    with pytest.raises(ValueError, match=message):
        call()


def test_a_server_that_comes_back_under_another_name_is_refused(engine, fake, policy):
    fake.version, fake.model = None, "other"
    with pytest.raises(ValueError, match="was started anew and calls its model 'other', 'served' before"):
        engine.sync(policy.named_parameters())


def test_a_server_that_comes_back_as_it_was_is_synced(engine, fake, policy, caplog):
    engine.probe.example = None
    fake.version = None
    engine.sync(policy.named_parameters())
    assert fake.version == engine.version
    assert "it was started anew" in caplog.text


def test_a_server_that_comes_back_before_the_first_weights_is_met_again(fake, policy, processor):
    engine = VLLMServerEngine(fake.url)
    engine.start(policy, processor, rank=0)
    fake.facts = replace(fake.facts, logprobs_mode="raw_logprobs")
    with pytest.raises(ValueError, match="start it with --logprobs-mode processed_logprobs"):
        engine.generate(examples(1), 1, SAMPLED)


def test_a_server_that_comes_back_has_lost_its_group_of_nccl(engine, fake, policy):
    fake.version = None
    engine.weights.transfer = SimpleNamespace(close=lambda: None)  # any but a folder
    with pytest.raises(ConnectionError, match="was started anew, without the policy's weights, in the middle"):
        engine.sync(policy.named_parameters())


def test_two_runs_at_one_server_are_found_out(engine, fake):
    fake.version = "another-3"
    with pytest.raises(ValueError, match=r"holds the weights of another run \(another-3\)"):
        engine.generate(examples(), 1, SAMPLED)


def test_every_cache_is_dropped_after_the_weights_have_come(engine, fake, policy):
    engine._load(policy.named_parameters())
    resets = ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
    assert fake.called == ["prism_version", "prism_load", *resets]


def test_weights_that_change_on_their_way_are_found_out(engine, fake, policy):
    fake.spoil = 1
    with pytest.raises(ValueError, match=r"rollout contract: the part of the weight sync .* with other values"):
        engine.sync(policy.named_parameters())


def test_a_sync_must_send_every_parameter_once(engine, policy):
    with pytest.raises(ValueError, match="rollout contract: a sync must send every parameter"):
        engine.sync(list(policy.named_parameters())[1:])


def test_a_parameter_that_the_server_keeps_is_named(engine, fake, policy):
    engine.weights.held = [{"visual.bias"}]
    with pytest.raises(ValueError, match=r"1 parameters of the engine kept their old weights .*visual\.bias"):
        engine.sync(policy.named_parameters())


def test_files_are_gone_after_a_sync(engine, policy, tmp_path, fake, processor):
    shared = tmp_path / "shared"
    other = VLLMServerEngine(fake.url, folder=str(shared))
    other.start(policy, processor, rank=0)
    other._load(policy.named_parameters())
    (own,) = shared.iterdir()
    assert list(own.iterdir()) == []
    other.close()
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"version": "0.50.0"}, r"is vLLM 0\.50\.0; the engine is made for 0\.24 to 0\.32"),
        ({"logprobs_mode": "raw_logprobs"}, "start it with --logprobs-mode processed_logprobs"),
        ({"generation_config": "auto"}, "start it with --generation-config vllm"),
        ({"chunked_prefill": True}, "start it with --no-enable-chunked-prefill"),
    ],
)
def test_a_server_without_an_option_is_refused(facts, message, policy, processor):
    fake = FakeVLLM(processor, policy.config, **facts)
    with pytest.raises(ValueError, match=message):
        VLLMServerEngine(fake.url).start(policy, processor, rank=0)
    fake.close()


def test_a_server_that_would_make_images_smaller_is_refused(fake, policy, random_policy):
    large = PolicySpec(random_policy, max_pixels=10**8).processor()
    with pytest.raises(ValueError, match=r"start it with --mm-processor-kwargs '\{\"size\": .*: 100000000\}\}'"):
        VLLMServerEngine(fake.url).start(policy, large, rank=0)


def test_images_are_sent_at_the_size_of_their_patches(processor, random_policy):
    small = PolicySpec(random_policy, max_pixels=64 * 64).processor()
    for reader in (processor, small):
        for width in (70, 96, 150):
            (example,) = make_examples(1, width=width)
            sent = replace(example, images=[reader.resized(example.images[0])])
            assert sent.images[0].size == reader.resized(sent.images[0]).size
            ours, theirs = reader.prompt(example), reader.prompt(sent)
            assert ours.ids == theirs.ids == processor.prompt(sent).ids
            assert torch.equal(ours.pixel_values_NC, theirs.pixel_values_NC)
            assert torch.equal(ours.pixel_values_NC, processor.prompt(sent).pixel_values_NC)


def test_another_model_is_refused_at_the_start(fake, policy, processor):
    wide = fake.facts.architecture | {"text_config.hidden_size": 4096}
    fake.facts = replace(fake.facts, architecture=wide)
    with pytest.raises(ValueError, match=r"its text_config\.hidden_size is 4096, the policy's .* \(1 keys"):
        VLLMServerEngine(fake.url).start(policy, processor, rank=0)


def test_another_prism_pl_is_refused(fake, policy, processor, monkeypatch):
    monkeypatch.setattr(fake, "_rpc", lambda method, args: {"version": "0.32.0"})
    with pytest.raises(ValueError, match="runs another prism_pl: install the trainer's version there"):
        VLLMServerEngine(fake.url).start(policy, processor, rank=0)


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_without_our_worker_is_refused_at_once(fake, policy, processor, status):
    fake.rpc_status = status
    with pytest.raises((ValueError, ConnectionError), match=r"no prism_facts here(?s:.*)python -m vllm.*ServerWorker"):
        VLLMServerEngine(fake.url).start(policy, processor, rank=0)
    assert fake.called == ["prism_facts"]


def test_nccl_between_cpus_is_refused(fake, policy, processor):
    with pytest.raises(ValueError, match="engine transfer is nccl, which needs the policy and the server on GPUs"):
        VLLMServerEngine(fake.url, transfer="nccl").start(policy, processor, rank=0)


def test_a_sleeping_server_is_refused_where_it_cannot_and_woken_by_a_call(fake, policy, processor):
    with pytest.raises(ValueError, match="start it with --enable-sleep-mode"):
        VLLMServerEngine(fake.url, sleep=True).start(policy, processor, rank=0)
    fake.facts = replace(fake.facts, sleep_mode=True)
    engine = VLLMServerEngine(fake.url, sleep=True)
    engine.start(policy, processor, rank=0)
    engine.generate(examples(1), 1, SAMPLED)
    engine.sleep()
    fake.called.clear()
    engine.generate(examples(1), 1, SAMPLED)
    assert fake.called[:4] == ["prism_version", "/wake_up?tags=weights", "prism_load", "/wake_up?tags=kv_cache"]
    engine.close()


def test_what_vllm_would_bend_is_refused(engine):
    with pytest.raises(ValueError, match=r"row 'row-0': a prompt of .* do not fit .* --max-model-len"):
        engine.generate(examples(1), 1, Sampling(max_tokens=10**6))
    with pytest.raises(ValueError, match=r"sampling.temperature is 0.001: vLLM"):
        engine.generate(examples(1), 1, Sampling(temperature=0.001))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "other-machine:8000"}, "give the server's address, such as http://other-machine:8000"),
        ({"url": "http://a", "retries": -1}, "retries is -1"),
        ({"url": "http://a", "timeout": 0}, "timeout is 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VLLMServerEngine(**options)


def test_a_call_inside_a_running_loop_works(engine):
    """As in a notebook."""

    async def cell():
        return engine.generate(examples(1), 1, SAMPLED)

    assert len(vllm_server_client.asyncio.run(cell())) == 1
