"""The transformers engine: the contract with the trainer's log-probabilities, stock `generate`, draws and options."""

from dataclasses import replace

import pytest
import torch

from prism_pl.logprobs import token_logps
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import RolloutEngine, Sampling, TransformersEngine, check_training_sampling, rollout_batch
from tests.conftest import make_examples

SHORT = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def processor(random_policy):
    return PolicySpec(random_policy).processor()


@pytest.fixture
def policy(random_policy):
    policy = build_policy(PolicySpec(random_policy))
    # Blank weights give nearly flat distributions and, tied to the embeddings, repeat the last token. A head of its own
    # (logits of spread 2) makes the temperature count, and a bias on the end-of-turn token ends responses early.
    head = policy.lm_head
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * 2 / head.in_features**0.5)
    set_bias(policy, [PolicySpec(random_policy).processor().eos_id], 5.0)
    return policy


def set_bias(policy, token_ids, value) -> None:
    bias = torch.zeros(policy.lm_head.out_features)
    bias[token_ids] = value
    policy.lm_head.bias = torch.nn.Parameter(bias)


def started(policy, processor, rank=0, batch_size=128) -> TransformersEngine:
    engine = TransformersEngine(batch_size)
    engine.start(policy, processor, rank=rank)
    return engine


def mixed_examples():
    """Prompts of different lengths: one image, two images of other sizes, none."""
    one, two, none = make_examples(3)
    wide = make_examples(1, width=160)[0]
    return [one, replace(two, images=[*wide.images, *two.images]), replace(none, images=[])]


def ids(rollouts):
    return [rollout.response_ids for rollout in rollouts]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [128, 4])
def test_sampler_logps_are_the_trainers(policy, processor, temperature, batch_size):
    examples = mixed_examples()
    # A policy's own generation defaults must not bend the distribution.
    policy.generation_config.update(repetition_penalty=2.0, top_k=1, temperature=3.0)
    engine = started(policy, processor, batch_size=batch_size)
    rollouts = engine.generate(examples, 3, Sampling(temperature=temperature, max_tokens=24))
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 1
    batch, sampler_logps_BT = rollout_batch(processor, [processor.prompt(e) for e in examples], rollouts, 3)
    assert sampler_logps_BT.shape == batch.mask_BT.shape
    with torch.no_grad():
        trainer = token_logps(policy, batch, temperature=temperature, banned_ids=processor.banned_ids).logps_BT
    assert trainer.min() < -0.1
    torch.testing.assert_close(sampler_logps_BT, trainer, atol=1e-4, rtol=0)


def test_top_k_and_top_p_logps_are_renormalised(policy, processor):
    one = started(policy, processor).generate(make_examples(2), 2, replace(SHORT, top_k=1))
    assert all(logp == 0 for rollout in one for logp in rollout.sampler_logps)
    nucleus = started(policy, processor).generate(make_examples(2), 2, replace(SHORT, top_p=1e-6))
    assert ids(nucleus) == ids(one)


@torch.no_grad()
def test_greedy_tokens_equal_stock_generate(policy, processor):
    examples = mixed_examples()
    rollouts = started(policy, processor).generate(examples, 1, Sampling(temperature=0, max_tokens=24))
    policy.eval()
    policy.model.visual.config._attn_implementation_internal = "sdpa"
    for example, rollout in zip(examples, rollouts, strict=True):
        prompt = processor.prompt(example)
        input_ids = torch.tensor([prompt.ids])
        images = {
            "pixel_values": prompt.pixel_values_NC,
            "image_grid_thw": prompt.grids_I3,
            "mm_token_type_ids": (input_ids == processor.image_token_id).int(),
        }
        stock = policy.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=24,
            suppress_tokens=processor.banned_ids,
            **(images if example.images else {}),
        )
        assert rollout.response_ids == stock[0, len(prompt.ids) :].tolist()


def test_greedy_logps_are_of_temperature_one(policy, processor):
    examples = mixed_examples()
    rollouts = started(policy, processor).generate(examples, 1, replace(SHORT, temperature=0))
    batch, sampler_logps_BT = rollout_batch(processor, [processor.prompt(e) for e in examples], rollouts, 1)
    with torch.no_grad():
        trainer = token_logps(policy, batch, banned_ids=processor.banned_ids).logps_BT
    torch.testing.assert_close(sampler_logps_BT, trainer, atol=1e-4, rtol=0)


def test_draws_are_reproducible_and_leave_the_global_generator_alone(policy, processor):
    examples = make_examples(2)
    torch.manual_seed(7)
    engine, twin = started(policy, processor), started(policy, processor)
    before = torch.get_rng_state()
    first = ids(engine.generate(examples, 2, SHORT))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert ids(twin.generate(examples, 2, SHORT)) == first
    assert ids(twin.generate(examples, 2, SHORT)) != first
    assert ids(started(policy, processor, rank=1).generate(examples, 2, SHORT)) != first
    torch.manual_seed(8)
    assert ids(started(policy, processor).generate(examples, 2, SHORT)) != first


def test_state_dict_continues_the_draws(policy, processor):
    examples = make_examples(1)
    engine = started(policy, processor)
    engine.generate(examples, 2, SHORT)
    state = engine.state_dict()
    expected = ids(engine.generate(examples, 2, SHORT))
    torch.manual_seed(99)
    resumed = started(policy, processor)
    resumed.load_state_dict(state)
    assert ids(resumed.generate(examples, 2, SHORT)) == expected


def test_a_sampling_seed_fixes_a_call_and_counts_as_no_draw(policy, processor):
    examples = make_examples(1)
    seeded = replace(SHORT, seed=3)
    engine = started(policy, processor)
    state = engine.state_dict()
    first = ids(engine.generate(examples, 2, seeded))
    assert engine.state_dict() == state
    engine.generate(examples, 2, SHORT)
    assert ids(engine.generate(examples, 2, seeded)) == first
    assert ids(engine.generate(examples, 2, replace(SHORT, seed=4))) != first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_ids_never_appear(policy, processor, temperature):
    set_bias(policy, processor.banned_ids, 1e3)  # the likeliest by far
    rollouts = started(policy, processor).generate(make_examples(2), 2, replace(SHORT, temperature=temperature))
    drawn = {token for rollout in rollouts for token in rollout.response_ids}
    assert drawn
    assert not drawn & set(processor.banned_ids)


def test_samples_of_a_prompt_differ_and_stand_prompt_by_prompt(policy, processor):
    examples = mixed_examples()
    rollouts = started(policy, processor, batch_size=2).generate(examples, 3, SHORT)
    assert len(rollouts) == 9
    expected = [processor.prompt(example).ids for example in examples for _ in range(3)]
    assert [rollout.prompt_ids for rollout in rollouts] == expected
    assert len({tuple(rollout.response_ids) for rollout in rollouts[:3]}) == 3


def test_finish_reasons_and_trimming(policy, processor):
    engine = started(policy, processor)
    stops = {processor.eos_id, processor.pad_id}
    for rollout in engine.generate(make_examples(2), 8, Sampling(max_tokens=40)):
        assert 1 <= len(rollout.response_ids) <= 40
        assert len(rollout.sampler_logps) == len(rollout.response_ids)
        assert not stops & set(rollout.response_ids[:-1])
        if rollout.finish_reason == "stop":
            assert rollout.response_ids[-1] in stops
        else:
            assert len(rollout.response_ids) == 40
            assert rollout.response_ids[-1] not in stops
        assert "<|im_end|>" not in rollout.text
    set_bias(policy, [processor.eos_id], 1e3)
    (rollout,) = engine.generate(make_examples(1), 1, SHORT)
    assert (rollout.response_ids, rollout.finish_reason, rollout.text) == ([processor.eos_id], "stop", "")


def test_the_policy_is_left_as_it_was(policy, processor):
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.visual.eval()
    modes = [module.training for module in policy.modules()]
    defaults = policy.generation_config
    plain = ids(started(policy, processor).generate(make_examples(1), 2, SHORT))
    assert [module.training for module in policy.modules()] == modes
    assert policy.generation_config is defaults
    assert all(parameter.grad is None for parameter in policy.parameters())
    policy.gradient_checkpointing_disable()
    assert ids(started(policy, processor).generate(make_examples(1), 2, SHORT)) == plain


def test_the_engine_reads_the_live_weights(policy, processor):
    engine = started(policy, processor)
    greedy = replace(SHORT, temperature=0)
    before = ids(engine.generate(make_examples(1), 1, greedy))
    with torch.no_grad():
        policy.lm_head.weight.neg_()
    engine.sync(policy.named_parameters())
    assert ids(engine.generate(make_examples(1), 1, greedy)) != before


def test_another_prompt_than_the_trainers_breaks_the_contract(policy, processor):
    examples = make_examples(2)
    rollouts = started(policy, processor).generate(examples, 1, SHORT)
    prompts = [processor.prompt(example) for example in [examples[0], replace(examples[1], system="Another.")]]
    with pytest.raises(ValueError, match=r"rollout contract: .*'row-1'"):
        rollout_batch(processor, prompts, rollouts, 1)


@pytest.mark.parametrize(("key", "value"), [("temperature", 0), ("top_p", 0.9), ("top_k", 20)])
def test_training_refuses_what_the_trainer_cannot_follow(key, value):
    check_training_sampling(Sampling(temperature=0.7))
    with pytest.raises(ValueError, match=f"sampling.{key} is {value}"):
        check_training_sampling(replace(Sampling(), **{key: value}))


@pytest.mark.parametrize(("key", "value"), [("temperature", -1.0), ("max_tokens", 0), ("top_p", 0.0), ("top_k", -1)])
def test_sampling_refuses_values_out_of_range(key, value):
    with pytest.raises(ValueError, match=f"sampling.{key} is {value}"):
        Sampling(**{key: value})


def test_it_fits_the_protocol():
    assert isinstance(TransformersEngine(), RolloutEngine)
    with pytest.raises(ValueError, match="batch_size is 0"):
        TransformersEngine(0)


def test_a_cache_that_appends_in_place_holds_what_transformers_own_would():
    from transformers.cache_utils import DynamicLayer

    from prism_pl.rollout.growing_cache import ROOM, GrowingLayer

    torch.manual_seed(0)
    own, theirs = GrowingLayer(), DynamicLayer()
    for step, length in enumerate((5, 1, 1, ROOM, 1, 2)):
        if step == 2:  # rows chosen anew: the buffer no longer holds what the layer does
            for layer in (own, theirs):
                layer.batch_select_indices(torch.tensor([0, 0, 1]))
        rows = 2 if step < 2 else 3
        states = torch.randn(2, rows, 2, length, 4)
        for held, wanted in zip(own.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(held, wanted)
    assert own.get_seq_length() == theirs.get_seq_length() == 10 + ROOM


def test_a_token_is_appended_without_copying_those_before_it():
    from prism_pl.rollout.growing_cache import GrowingLayer

    layer = GrowingLayer()
    keys, _ = layer.update(torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4))
    assert layer.update(torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4))[0].data_ptr() == keys.data_ptr()
