"""RLVR: what a step does to the weights, what dynamic sampling trains on, what is logged and refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import modules.rlvr
from callbacks import Completions, StructuralProxies
from modules.rlvr import RLVRModule
from prism_pl.aggregation import aggregate
from prism_pl.groups import shuffled_minibatches
from prism_pl.logprobs import token_logps
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.policy_loss import GRPO, GSPO, PolicyLoss
from prism_pl.prompts import PromptCollator
from prism_pl.rewards import RewardOutput
from prism_pl.rollout.engine import Sampling
from prism_pl.updates import KLPenalty
from tests.conftest import make_examples
from tests.stubs import (
    MALFORMED,
    RIGHT,
    WRONG,
    Gradients,
    Rows,
    ScriptedEngine,
    drift,
    equal,
    fit,
    scalars,
    weights,
)
from tests.stubs import (
    make_rlvr as make,
)

R, W = RIGHT, WRONG


def mean_logps(module: RLVRModule, policy: Any, rows, texts: list[str]) -> torch.Tensor:
    """Mean log-probability a token of one text for each row."""
    processor = module.processor
    prompts = [processor.prompt(row) for row in rows]
    batch = processor.sequences(prompts, [processor.response_ids(t) for t in texts], range(len(texts)))
    stats = token_logps(policy, batch, banned_ids=processor.banned_ids)
    return stats.logps_BT.sum(-1) / batch.mask_BT.sum(-1)


def test_a_step_is_the_hand_computed_one(random_policy, tmp_path):
    module = make(random_policy, [R, W])
    row = make_examples(1)
    trainer, record = fit(module, Rows(row, batch_size=1), tmp_path)
    # Rewards 1 and 0.2: mean 0.6, sample std 0.8 / sqrt 2 = 0.5657, advantages +-0.4 / 0.5657 = +-0.70711. At ratio 1
    # GRPO's gradient is that of -(A_right mean logp_right + A_wrong mean logp_wrong) / 2.
    policy = build_policy(PolicySpec(random_policy))
    before = mean_logps(module, policy, [*row, *row], [R, W])
    (-(0.70711 * before[0] - 0.70711 * before[1]) / 2).backward()
    for (name, old), new in zip(policy.named_parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * old.grad, atol=1e-5, rtol=1e-4, msg=name)
    after = mean_logps(module, module.policy, [*row, *row], [R, W])
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert trainer.global_step == 1
    assert record.steps[0]["rlvr/reward"] == pytest.approx(0.6)
    assert record.steps[0]["rlvr/ratio_mean"] == 1.0


def test_old_log_probabilities_are_of_before_the_first_update_and_the_clip_acts(random_policy, tmp_path, monkeypatch):
    seen: list[tuple[torch.Tensor, float]] = []
    backward = modules.rlvr.policy_backward

    def spy(*args, **options):
        loss, told = backward(*args, **options)
        seen.append((options["old_logps_BT"].clone(), float(told["clip_fraction"])))
        return loss, told

    monkeypatch.setattr(modules.rlvr, "policy_backward", spy)
    module = make(random_policy, [R, W, W, W], lr=1.0, updates_per_batch=2)
    trainer, record = fit(module, Rows(make_examples(2)), tmp_path, max_steps=2)
    (first, clipped_first), (second, clipped_second) = seen
    assert torch.equal(first, second)
    fresh = build_policy(PolicySpec(random_policy))
    prompts = [module.processor.prompt(row) for row in make_examples(2)]
    responses = [module.processor.response_ids(text) for text in (R, W, W, W)]
    batch = module.processor.sequences(prompts, responses, [0, 0, 1, 1])
    expected = token_logps(fresh, batch, banned_ids=module.processor.banned_ids).logps_BT
    torch.testing.assert_close(first, expected.detach(), atol=1e-5, rtol=1e-5)
    assert clipped_first == 0
    assert clipped_second > 0
    assert record.steps[0]["rlvr/clip_fraction"] == pytest.approx(clipped_second / 2)  # the mean over both updates
    assert trainer.global_step == 2


def test_a_clip_that_cannot_act_is_named_once(random_policy, tmp_path, recwarn):
    fit(make(random_policy, [R, W]), Rows(make_examples(2)), tmp_path)
    assert [str(w.message) for w in recwarn if "clip_low" in str(w.message)] == [
        "GRPO: each rollout batch is used for one update, so the importance ratio is exactly 1 and clip_low=0.2, "
        "clip_high=0.2, dual_clip=None cannot act; only the aggregation (sequence_mean) does."
    ]
    recwarn.clear()
    fit(make(random_policy, [R, W], num_minibatches=2), Rows(make_examples(2)), tmp_path)
    assert not [w for w in recwarn if "clip_low" in str(w.message)]
    make(random_policy, [R], kl=KLPenalty(), overlong_buffer=4, overlong_penalty=0.0)
    said = " ".join(str(w.message) for w in recwarn)
    assert "kl.coefficient is 0" in said
    assert "overlong_penalty is 0" in said


def test_overlong_responses_lose_by_hand(random_policy, tmp_path):
    probe = make(random_policy, [R])
    length = len(probe.processor.response_ids(R))
    # max_tokens = length + 2, buffer 4: length - (length + 2 - 4) = 2 of 4 tokens, so half the penalty of 1.
    module = make(random_policy, [R], max_tokens=length + 2, overlong_buffer=4)
    _, record = fit(module, Rows(make_examples(2)), tmp_path)
    assert record.steps[0]["rlvr/overlong"] == pytest.approx(-0.5)
    assert record.steps[0]["rlvr/reward"] == pytest.approx(0.5)
    assert record.outputs[0]["rewards"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    with pytest.raises(ValueError, match=r"overlong_buffer is 61: .*give 1 to 60"):
        make(random_policy, [R], overlong_buffer=61)


def test_minibatches_of_whole_groups_average_to_the_batch(random_policy, tmp_path):
    rows, texts = make_examples(4), [R, W, W, R, MALFORMED, R, R, MALFORMED]
    gradients = []
    for minibatches in (1, 2):
        seen = Gradients()
        module = make(random_policy, texts, lr=0.0, num_minibatches=minibatches)
        fit(module, Rows(rows, batch_size=4), tmp_path, [seen], max_steps=minibatches)
        assert len(seen.steps) == minibatches
        gradients.append({name: sum(g[name] for g in seen.steps) / minibatches for name in seen.steps[0]})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_micro_batches_make_the_same_step(random_policy, tmp_path):
    stepped = []
    for tokens in (None, 300):
        module = make(random_policy, [R, W, W, MALFORMED], num_minibatches=2, micro_batch_tokens=tokens)
        fit(module, Rows(make_examples(4), batch_size=4), tmp_path, max_steps=2)
        stepped.append(weights(module.policy))
    for name, value in stepped[0].items():
        torch.testing.assert_close(stepped[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_shuffled_minibatches_hold_each_group_once_an_epoch_and_depend_on_seed_and_step():
    plan = shuffled_minibatches(5, 2, 2, seed=1, step=7)
    assert [len(part) for part in plan] == [3, 2, 3, 2]
    assert sorted(plan[0] + plan[1]) == sorted(plan[2] + plan[3]) == [0, 1, 2, 3, 4]
    assert plan[:2] != plan[2:]
    assert plan == shuffled_minibatches(5, 2, 2, seed=1, step=7)
    assert plan != shuffled_minibatches(5, 2, 2, seed=1, step=8)
    assert plan != shuffled_minibatches(5, 2, 2, seed=2, step=7)
    assert shuffled_minibatches(2, 4, 1, seed=0, step=0) in ([[0], [1]], [[1], [0]])
    assert shuffled_minibatches(3, 1, 2, seed=0, step=0) == [[0, 1, 2], [0, 1, 2]]


def test_truncated_rollouts_can_be_left_out(random_policy, tmp_path):
    # All responses are cut at 6 tokens, and rewarded apart by a reward of our own: only the mask keeps them out.
    moved = []
    for mask in (False, True):
        loss = GRPO(mask_truncated=mask)
        module = make(random_policy, [R, W], max_tokens=6, reward=InTurn([1.0, 0.0]), policy_loss=loss)
        module.configure_model()
        before = weights(module.policy)
        _, record = fit(module, Rows(make_examples(2)), tmp_path)
        assert record.steps[0]["rlvr/truncated"] == 1.0
        moved.append(not equal(weights(module.policy), before))
    assert moved == [True, False]


class InTurn:
    """Rewards in turn, with no part."""

    def __init__(self, rewards: list[float]) -> None:
        self.rewards = rewards

    def __call__(self, responses, examples):
        return RewardOutput(torch.tensor([self.rewards[b % len(self.rewards)] for b in range(len(responses))]))


def test_a_kl_penalty_pulls_back_to_the_start(random_policy, tmp_path):
    rows, moved = make_examples(8), {}
    for penalty in (None, KLPenalty(0.5), KLPenalty(0.5, kind="k3"), KLPenalty(0.5, "reward", "k1")):
        # Centred rewards only: two rewards divided by their std are +-0.71 whatever a penalty takes off.
        module = make(random_policy, [R, W], kl=penalty, lr=0.03, scale="none")
        _, record = fit(module, Rows(rows), tmp_path, max_steps=4)
        moved[penalty] = drift(module, rows[:2], [R, W])
        if penalty is not None:
            # Nothing to pull at before the first step has moved the policy.
            assert record.steps[0]["rlvr/kl"] == pytest.approx(0, abs=1e-6), penalty
            assert abs(record.steps[2]["rlvr/kl"]) > 1e-3, penalty
            assert moved[penalty] < 0.7 * moved[None], penalty


def test_the_tags_stand_in_the_event_files(random_policy, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = make(random_policy, [R, W, MALFORMED, R], dynamic_sampling=True, updates_per_batch=2, overlong_buffer=8)
    rows = Rows(make_examples(4))
    watching = [Completions(1), StructuralProxies()]
    fit(module, rows, tmp_path, watching, logger=logger, max_steps=4, limit_val_batches=1, val_check_interval=1)
    logger.experiment.flush()
    found = scalars(tmp_path)
    rlvr = (
        "reward accuracy format overlong entropy clip_fraction zero_std_groups response_length truncated policy_loss "
        "ratio_mean ratio_min ratio_max grad_norm refills shortfall skipped reward_timeouts tokens lr"
    )
    tags = [f"rlvr/{name}" for name in rlvr.split()]
    tags += [f"time/{phase}" for phase in ("rollout", "reward", "policy", "sync")]
    tags += [f"proxies/{p}/{w}" for p in ("descriptive_items", "reasoning_steps") for w in ("policy", "distance")]
    for tag in tags:
        assert len(found[tag]) == 2, tag
        assert not any(value != value for value in found[tag]), tag
    assert found["rlvr/val_accuracy"] == [0.5, 0.5]  # the held-out rows get the script's first two: right, wrong
    assert found["rlvr/val_format"] == [1.0, 1.0]
    # Right, wrong; malformed, right: 0.25 (1 + 0.2 + 0 + 1), before the length punishment.
    assert found["rlvr/accuracy"] == [0.5, 0.5]
    assert found["rlvr/format"] == [0.75, 0.75]


def test_a_non_finite_reward_or_loss_stops_before_a_step(random_policy, tmp_path):
    for broken, what in (
        ({"reward": InTurn([1.0, float("nan")])}, "a reward is not finite .*row-0"),
        ({"policy_loss": Broken()}, "loss is not finite .*row-0, row-1"),
    ):
        module = make(random_policy, [R, W], **broken)
        module.configure_model()
        before = weights(module.policy)
        with pytest.raises(ValueError, match=what):
            fit(module, Rows(make_examples(2)), tmp_path)
        assert equal(weights(module.policy), before)


class Broken(PolicyLoss):
    def __call__(self, logps_BT, old_logps_BT, advantages, mask_BT, denominator=None, weights_BT=None):
        return logps_BT.sum() * float("inf"), {"num_tokens": mask_BT.sum()}


class Bare(PolicyLoss):
    """A loss of one's own that tells nothing about itself."""

    def __call__(self, logps_BT, old_logps_BT, advantages, mask_BT, denominator=None, weights_BT=None):
        return aggregate(-advantages[:, None] * logps_BT, mask_BT, self.aggregation, denominator), {}


@pytest.mark.parametrize("options", [{}, {"num_minibatches": 2, "micro_batch_tokens": 300, "updates_per_batch": 2}])
def test_a_loss_of_ones_own_need_not_give_metrics(random_policy, tmp_path, options):
    module = make(random_policy, [R, W], policy_loss=Bare(), **options)
    module.configure_model()
    before = weights(module.policy)
    _, record = fit(module, Rows(make_examples(2)), tmp_path, max_steps=4)
    assert not equal(weights(module.policy), before)
    assert record.steps[0]["rlvr/entropy"] > 0
    assert "rlvr/num_tokens" not in record.steps[0]


def test_what_a_step_returns(random_policy, tmp_path):
    _, record = fit(make(random_policy, [R, MALFORMED]), Rows(make_examples(2)), tmp_path)
    found = record.outputs[0]
    assert [example.id for example in found["examples"]] == ["row-0", "row-1"]
    assert found["num_rollouts"] == 2
    assert found["valid"].tolist() == [[True, False], [True, False]]
    assert found["accuracy"].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert len(found["demonstrations"]) == 2
    bare = [replace(row, response=None) for row in make_examples(2)]
    _, record = fit(make(random_policy, [R, W]), Rows(bare), tmp_path)
    assert "demonstrations" not in record.outputs[0]


def test_epochs_bound_the_schedule_by_all_their_updates(random_policy, tmp_path):
    # Two batches an epoch, two epochs, two passes of one mini-batch: 8 steps, and linear decay ends at 0.
    module = make(random_policy, [R, W], updates_per_batch=2, schedule="linear")
    trainer, record = fit(module, Rows(make_examples(4)), tmp_path, max_steps=-1, max_epochs=2)
    assert trainer.global_step == 8
    assert [step["rlvr/lr"] for step in record.steps] == pytest.approx([0.075, 0.05, 0.025, 0.0])


def test_bad_options_and_rows_are_refused(random_policy, tmp_path):
    for options, message in (
        ({"num_rollouts": 1}, "num_rollouts is 1: a rollout is judged against its group"),
        ({"num_minibatches": 0}, "num_minibatches is 0"),
        ({"max_refills": -1}, "max_refills is -1"),
        ({"num_prompts": 4}, "num_prompts is 4, but only dynamic sampling"),
        ({"overlong_buffer": 4, "overlong_penalty": -1.0}, "overlong_penalty is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(random_policy, [R], **options)
    with pytest.raises(ValueError, match=r"top_p is 0\.9"):
        RLVRModule(PolicySpec(random_policy), ScriptedEngine([R]), torch.optim.SGD, Sampling(top_p=0.9))
    with pytest.raises(ValueError, match="num_minibatches is 3, but only 2 prompts"):
        fit(make(random_policy, [R], num_minibatches=3), Rows(make_examples(2)), tmp_path)
    with pytest.raises(ValueError, match="the reward's part 'accuracy'"):
        fit(make(random_policy, [R], dynamic_sampling=True, reward=InTurn([1.0])), Rows(make_examples(2)), tmp_path)
    silent = [make_examples(1)[0], replace(make_examples(2)[1], answers=[])]
    with pytest.raises(ValueError, match="row 'row-1' has no answers"):
        PromptCollator(make(random_policy, [R]).processor, need_answers=True)(silent)
    with pytest.raises(ValueError, match="row 'row-1' has no answers"):
        fit(make(random_policy, [R]), Rows(silent), tmp_path)


def test_scales_and_sequence_ratio_run(random_policy, tmp_path):
    for scale in ("batch", "none"):
        module = make(random_policy, [R, W], scale=scale, policy_loss=GSPO(), updates_per_batch=2)
        _, record = fit(module, Rows(make_examples(2)), tmp_path, max_steps=2)
        assert record.steps[0]["rlvr/clip_fraction"] > 0


def test_a_reference_that_was_made_anew_meanwhile_is_not_gone_on_with(random_policy):
    module = make(random_policy, [R], kl=KLPenalty(0.1))
    module.configure_model()
    module.rollout.start(module.policy, module.processor, rank=0)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"policy"}
    checkpoint["reference_source"] = checkpoint["reference_source"] | {"sha256": "of an export that was made anew"}
    with pytest.raises(ValueError, match=r"policy\.path: .* other files than when this run began, and its frozen ref"):
        module.on_load_checkpoint(checkpoint)
