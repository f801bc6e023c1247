"""vLLM on the tiny SFT policy, against the trainer's own log-probabilities and transformers' tokens."""

import gc
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.digits import DigitsDataModule
from prism_pl.errors import EngineStopped
from prism_pl.logprobs import token_logps
from prism_pl.lora import LoraSpec, whole_parameters
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import (
    AutoEngine,
    RolloutEngine,
    Sampling,
    TransformersEngine,
    VLLMEngine,
    rollout_batch,
    vllm_engine,
)
from prism_pl.rollout.vllm_compat import import_vllm, version_of
from prism_pl.rollout.vllm_launch import _llm_options, blank_folder, write_blank
from scripts.blank_policy import ROOT
from tests.conftest import make_examples
from tests.stubs import equal, shake, weights

pytest.importorskip("vllm")

GREEDY = Sampling(temperature=0.0, max_tokens=32)
SAMPLED = Sampling(max_tokens=24)
PARITY = 2e-5  # nats a token, float32 on both sides


@pytest.fixture(scope="module")
def spec():
    return PolicySpec(str(ROOT / "assets" / "sft"))


@pytest.fixture(scope="module")
def processor(spec):
    return spec.processor()


@pytest.fixture(scope="module")
def started(spec, processor):
    """One engine for all tests of this file, with its policy and a copy of the policy's first weights."""
    torch.manual_seed(0)
    policy = build_policy(spec)
    engine = VLLMEngine()
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
def trainer_logps(policy, processor, examples, rollouts, num_samples, temperature=1.0):
    prompts = [processor.prompt(example) for example in examples]
    batch, sampler_logps_BT = rollout_batch(processor, prompts, rollouts, num_samples)
    stats = token_logps(policy, batch, temperature=temperature, banned_ids=processor.banned_ids)
    return sampler_logps_BT, stats.logps_BT


def ids(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def check_greedy_parity(engine, policy, processor, examples):
    rollouts = engine.generate(examples, 1, GREEDY)
    stock = TransformersEngine()
    stock.start(policy, processor, rank=0)
    assert ids(rollouts) == ids(stock.generate(examples, 1, GREEDY))
    sampler, trainer = trainer_logps(policy, processor, examples, rollouts, 1)
    torch.testing.assert_close(sampler, trainer, atol=PARITY, rtol=0)


def test_greedy_tokens_and_logps_are_transformers(engine, policy, processor, examples, rows):
    check_greedy_parity(engine, policy, processor, [*examples, *rows])


def test_parity_holds_after_a_sync_of_other_weights(engine, policy, processor, examples):
    before = ids(engine.generate(examples, 1, GREEDY))
    shake(policy)
    engine.sync(policy.named_parameters())
    check_greedy_parity(engine, policy, processor, examples)
    assert ids(engine.generate(examples, 1, GREEDY)) != before


def test_a_sync_without_a_cache_reset_breaks_the_contract(engine, policy, examples, monkeypatch):
    """Either reset left out, and the probe finds what the cache kept of the old weights."""
    llm = engine.launched.llm
    for owner, reset, part in (
        (llm, "reset_prefix_cache", "language_model"),
        (llm.llm_engine, "reset_encoder_cache", "visual"),
    ):
        engine.generate(examples, 1, GREEDY)
        shake(policy, [part])
        with monkeypatch.context() as patch:
            patch.setattr(owner, reset, lambda: True)
            with pytest.raises(ValueError, match=r"rollout contract: after a sync .* cached under the old ones"):
                engine.sync(policy.named_parameters())
        engine.sync(policy.named_parameters())
        assert engine.metrics()["rollout/probe_difference"] < PARITY


def test_a_prefix_cache_that_vllm_keeps_breaks_the_contract(engine, policy, examples, monkeypatch):
    engine.generate(examples, 1, GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(engine.launched.llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(ValueError, match="rollout contract: vLLM did not forget"):
            engine.sync(policy.named_parameters())


def test_old_weights_break_the_contract(engine, policy, examples, monkeypatch):
    engine.generate(examples, 1, GREEDY)
    shake(policy)
    monkeypatch.setattr(engine.sender, "send", lambda *_: None)
    with pytest.raises(ValueError, match=r"rollout contract: after a sync the engine's '.*did not arrive"):
        engine.sync(policy.named_parameters())
    monkeypatch.setattr(engine.read_back, "check", lambda *_: None)
    with pytest.raises(ValueError, match=r"rollout contract: after a sync .* samples from other weights"):
        engine.sync(policy.named_parameters())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logps_are_the_trainers_without_banned_ids(engine, policy, processor, examples, temperature):
    with torch.no_grad():  # the banned ids become the likeliest by far
        embeddings = policy.get_input_embeddings().weight
        embeddings[processor.banned_ids] = 3 * embeddings[processor.eos_id]
    engine.sync(policy.named_parameters())
    rollouts = engine.generate(examples, 4, replace(SAMPLED, temperature=temperature))
    assert not {token for each in ids(rollouts) for token in each} & set(processor.banned_ids)
    sampler, trainer = trainer_logps(policy, processor, examples, rollouts, 4, temperature)
    assert trainer.min() < -0.5
    torch.testing.assert_close(sampler, trainer, atol=2 * PARITY, rtol=0)


@torch.no_grad()
def test_draws_follow_the_trainers_distribution(engine, policy, processor, examples):
    shake(policy, scale=0.5)  # flat enough for many tokens to be drawn
    engine.sync(policy.named_parameters())
    num = 600
    rollouts = engine.generate(examples[:1], num, Sampling(temperature=0.7, max_tokens=1))
    prompt = processor.prompt(examples[0])
    vocabulary = [[i] for i in range(len(processor.tokenizer)) if i not in processor.banned_ids]
    batch = processor.sequences([prompt], vocabulary, [0] * len(vocabulary))
    logps_BT = token_logps(policy, batch, temperature=0.7, banned_ids=processor.banned_ids).logps_BT
    drawn = np.bincount([r.response_ids[0] for r in rollouts], minlength=len(processor.tokenizer))
    for (token,), logp in zip(vocabulary, logps_BT[:, 0].tolist(), strict=True):
        p = np.exp(logp)
        assert abs(drawn[token] - num * p) <= 5 * np.sqrt(num * p * (1 - p)) + 2, (token, drawn[token], num * p)


def test_samples_differ_and_draws_are_reproducible(engine, examples):
    state = engine.state_dict()
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = ids(engine.generate(examples, 4, SAMPLED))
    second = ids(engine.generate(examples, 4, SAMPLED))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert len({tuple(each) for each in first[:4]}) > 1
    assert first != second
    engine.load_state_dict(state)
    engine.generate(examples, 1, replace(SAMPLED, seed=1))  # a seeded call in between counts as no draw
    assert ids(engine.generate(examples, 4, SAMPLED)) == first
    assert ids(engine.generate(examples, 4, SAMPLED)) == second


def test_groups_are_handed_over_when_they_are_finished(engine, examples):
    """One by one, before the last: the short answer does not wait for the long ones."""
    told = []
    sampling = Sampling(temperature=1.0, max_tokens=48, seed=5)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        execute = engine.launched.llm.llm_engine.step
        patch.setattr(engine.launched.llm.llm_engine, "step", lambda: (steps.append(1), execute())[1])
        on_group = lambda p, group: told.append((len(steps), p, group))  # noqa: E731
        rollouts = engine.generate(examples, 2, sampling, on_group)
    assert sorted(p for _, p, _ in told) == [0, 1, 2]
    assert [group for _, _, group in sorted(told, key=lambda each: each[1])] == [rollouts[i : i + 2] for i in (0, 2, 4)]
    assert len({step for step, _, _ in told}) > 1
    with pytest.raises(KeyError, match="mine"):  # what the listener raises is raised, and the engine stays usable
        engine.generate(examples, 1, sampling, lambda p, group: {}["mine"])
    assert engine.generate(examples, 2, sampling) == rollouts


def test_the_record_of_log_probabilities_is_vllms_own(engine, examples, monkeypatch):
    from vllm.v1.engine.logprobs import LogprobsProcessor

    own, seeded = LogprobsProcessor._update_sample_logprobs, replace(SAMPLED, seed=5)
    kept = engine.generate(examples, 4, seeded)
    assert LogprobsProcessor._update_sample_logprobs is own
    monkeypatch.setattr(vllm_engine, "sampled_logps_alone", nullcontext)
    assert engine.generate(examples, 4, seeded) == kept


def test_a_seed_fixes_a_call(engine, examples):
    seeded = replace(SAMPLED, seed=5)
    first = ids(engine.generate(examples, 2, seeded))
    engine.generate(examples, 2, SAMPLED)
    assert ids(engine.generate(examples, 2, seeded)) == first
    assert ids(engine.generate(examples, 2, replace(SAMPLED, seed=6))) != first


def test_top_k_and_top_p_are_followed(engine, examples):
    one = engine.generate(examples, 2, replace(SAMPLED, top_k=1))
    assert ids(one) == ids(engine.generate(examples, 2, replace(GREEDY, max_tokens=SAMPLED.max_tokens)))
    assert all(logp == 0 for rollout in one for logp in rollout.sampler_logps)
    assert ids(engine.generate(examples, 2, replace(SAMPLED, top_p=1e-6))) == ids(one)


def test_finish_reasons_and_text(engine, processor, examples):
    (stopped,) = engine.generate(examples[:1], 1, Sampling(temperature=0.0, max_tokens=200))
    assert stopped.finish_reason == "stop"
    assert stopped.response_ids[-1] in (processor.eos_id, processor.pad_id)
    assert "<|im_end|>" not in stopped.text
    (cut,) = engine.generate(examples[:1], 1, Sampling(temperature=0.0, max_tokens=5))
    assert (cut.finish_reason, cut.response_ids) == ("length", stopped.response_ids[:5])


def test_a_gpu_too_full_to_wake_on_is_said_with_the_way_out(monkeypatch):
    def full(tags):
        raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:163")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 << 30, 140 << 30))
    engine = VLLMEngine()
    engine.launched = SimpleNamespace(llm=SimpleNamespace(wake_up=full))
    with pytest.raises(EngineStopped, match=r"kv_cache.*2\.0 of 140\.0 GiB.*gpu_memory.*park_optimizer_states"):
        engine._wake("kv_cache")
    with pytest.raises(EngineStopped, match="no room for it to wake"):
        engine._wake("kv_cache")  # nothing is trained on an engine in between


def test_vllm_computes_outside_of_autocast_and_with_torchs_own_linear_layers(monkeypatch):
    assert torch.nn.functional.linear is torch._C._nn.linear
    monkeypatch.setattr(torch.nn.functional, "linear", replaced := lambda *args: None)
    seen = []

    def generate(requests, params, use_tqdm):
        seen.append((torch.is_autocast_enabled("cpu"), torch.nn.functional.linear))

    counter = SimpleNamespace(counter=0)
    inside = SimpleNamespace(generate=generate, request_counter=counter, llm_engine=SimpleNamespace(step=None))
    engine = VLLMEngine()
    engine.launched, engine.on_cpu = SimpleNamespace(llm=inside), True
    with torch.autocast("cpu", torch.bfloat16):
        engine._run([], None, [], lambda p, output: None)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, torch._C._nn.linear)]
    assert torch.nn.functional.linear is replaced


def test_it_samples_under_a_trainer_of_bf16_mixed(engine, examples):
    expected = engine.generate(examples, 1, GREEDY)
    with torch.autocast("cpu", torch.bfloat16):
        assert ids(engine.generate(examples, 1, GREEDY)) == ids(expected)


def test_equal_policies_start_from_one_folder_in_every_run_and_rank(spec, processor, started, tmp_path):
    policy = started[1]
    write = partial(write_blank, policy, processor)
    folder = blank_folder(write, tmp_path)
    assert (folder / "config.json").exists()
    assert blank_folder(write, tmp_path) == folder
    (folder / "config.json").unlink()  # as something that clears caches would
    assert blank_folder(write, tmp_path) == folder
    assert (folder / "config.json").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_of_two_ranks_that_write_the_folder_at_once_both_have_it(tmp_path):
    def write(new):
        (new / "config.json").write_text("{}")

    def write_second(new):
        write(new)
        first.append(blank_folder(write, tmp_path))  # another rank is done in the meantime

    first = []
    assert blank_folder(write_second, tmp_path) == first[0]
    assert [path.name for path in first[0].iterdir()] == ["config.json"]
    assert list(tmp_path.iterdir()) == first


def test_a_sleeping_engine_wakes_with_the_weights_of_now(engine, policy, processor, examples):
    engine.generate(examples, 1, SAMPLED)
    engine.sleep()
    assert engine.asleep
    assert engine.launched.llm.llm_engine.is_sleeping()
    shake(policy)
    engine.sync(policy.named_parameters())
    assert not engine.asleep
    assert not engine.launched.llm.llm_engine.is_sleeping()
    check_greedy_parity(engine, policy, processor, examples)
    engine.sleep()
    shake(policy)
    check_greedy_parity(engine, policy, processor, examples)  # woken by the call itself
    engine.wake()
    assert not engine.asleep


def test_a_sync_sends_adapters_merged(spec, processor, examples):
    policy = build_policy(replace(spec, lora=LoraSpec(rank=2)))
    engine = VLLMEngine()
    engine.start(policy, processor, rank=0)
    engine.generate(examples, 1, GREEDY)
    shake(policy, [".lora_A."])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    base = {name.replace(".base_layer", ""): p for name, p in policy.named_parameters() if ".lora_" not in name}
    with pytest.raises(ValueError, match=r"rollout contract: after a sync the engine's .*_proj.* is not the trainer's"):
        engine.sync(base.items())
    engine.sync(whole_parameters(policy))
    check_greedy_parity(engine, policy, processor, examples)
    engine.close()


def test_an_engine_between_two_policies_is_not_used_again(engine, policy, processor, examples):
    named = list(policy.named_parameters())
    with pytest.raises(ValueError, match=r"every parameter of the policy; 1 are missing: model.visual.patch_embed"):
        engine.sync(named[1:])
    with pytest.raises(EngineStopped, match="a weight sync broke off and left it between two policies"):
        engine.generate(examples, 1, GREEDY)
    engine.start(policy, processor, rank=0)
    check_greedy_parity(engine, policy, processor, examples)


def test_a_head_of_its_own_under_a_tied_config_is_refused(spec, processor):
    policy = build_policy(spec)
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.clone())
    with pytest.raises(ValueError, match="tie_word_embeddings: false"):
        VLLMEngine().start(policy, processor, rank=0)


def test_another_limit_of_pixels_is_found_out(engine, spec, rows, monkeypatch):
    small = replace(spec, max_pixels=64 * 64).processor()
    monkeypatch.setattr(engine, "processor", small)
    with pytest.raises(ValueError, match=r"rollout contract: .* 9 image tokens in the engine and 4 in the trainer"):
        engine.generate(rows[:1], 1, GREEDY)


def test_prompt_ids_are_known_from_image_sizes(processor, examples):
    for example in [*examples, *make_examples(1, width=150)]:
        prompt = processor.prompt(example)
        assert processor.prompt_ids(prompt.text, example.images) == prompt.ids


def test_what_vllm_would_bend_is_refused(engine, examples):
    many = replace(examples[0], id="many", images=examples[0].images * 5)
    with pytest.raises(ValueError, match=r"row 'many' has 5 images, and the engine takes 4: raise its max_images"):
        engine.generate([examples[0], many], 1, SAMPLED)
    with pytest.raises(ValueError, match=f"row '{examples[0].id}': a prompt of .* do not fit"):
        engine.generate(examples, 1, Sampling(max_tokens=10**6))
    with pytest.raises(ValueError, match=r"sampling.temperature is 0.001: vLLM"):
        engine.generate(examples, 1, Sampling(temperature=0.001))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel is 0"),
        ({"max_images": 0}, "max_images is 0"),
        ({"gpu_memory": 1.5}, "gpu_memory is 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(**options)


@pytest.mark.parametrize(("asked", "on_cpu", "taken"), [(0, 0, False), (1, 0, True), (0, 1, True)])
def test_an_engine_compiles_unless_told_otherwise_or_on_a_cpu(asked, on_cpu, taken, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert _llm_options(VLLMEngine(enforce_eager=bool(asked)).options, bool(on_cpu))["enforce_eager"] is taken


def test_the_process_is_left_as_it_was(engine):
    """`engine` has started long ago."""
    assert torch.set_num_threads.__name__ == "set_num_threads"
    assert gc.get_freeze_count() == 0
    assert torch.get_default_dtype() == torch.float32


def test_auto_takes_vllm_where_it_imports_and_says_so(capsys, monkeypatch):
    said = []
    monkeypatch.setattr("prism_pl.rollout.auto.rank_zero_info", said.append)
    auto = AutoEngine(batch_size=32)
    assert isinstance(auto, RolloutEngine)
    assert isinstance(auto._choose(), VLLMEngine)
    assert said == [f"Rollouts by vLLM {import_vllm().__version__}."]

    def broken():
        raise ImportError("No module named 'vllm'")

    monkeypatch.setattr("prism_pl.rollout.vllm_compat.import_vllm", broken)
    chosen = auto._choose()
    assert isinstance(chosen, TransformersEngine)
    assert chosen.batch_size == 32
    assert "vLLM cannot be imported (No module named 'vllm')" in said[1]


def test_a_length_beyond_the_policys_positions_is_refused_with_the_way_out(policy, processor):
    told = "engine max_model_len is 8192, and the policy has 2048 positions .*: give at most that, or leave it out"
    with pytest.raises(ValueError, match=told):
        VLLMEngine(max_model_len=8192).start(policy, processor, rank=0)


def test_versions_never_tried_are_refused(monkeypatch):
    assert version_of("0.24.1.dev3+cpu") == (0, 24)
    monkeypatch.setattr(import_vllm(), "__version__", "0.50.0")
    with pytest.raises(ValueError, match=r"vllm 0\.50\.0 is installed; .*TransformersEngine"):
        import_vllm()


def test_it_fits_the_protocol():
    assert isinstance(VLLMEngine(), RolloutEngine)


def test_an_engine_that_dies_is_reported_with_its_reason(engine, examples, monkeypatch):
    """The last test here: a dead engine is not used again."""
    monkeypatch.setattr(engine.launched.llm.llm_engine, "step", partial(_die, "no space left in the cache"))
    with pytest.raises(RuntimeError, match=r"rollout engine \(vLLM\) stopped on rows \['.*no space left"):
        engine.generate(examples, 1, GREEDY)
    with pytest.raises(RuntimeError, match="stopped before: OSError: no space left"):
        engine.generate(examples, 1, GREEDY)


def _die(reason):
    raise OSError(reason)
