"""Alignment: each player's step, the order of the game, what is logged and refused, resuming."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import Completions, RewardGap, StructuralProxies
from modules.align import AdversarialAlignModule
from prism_pl.chat import render
from prism_pl.discriminator import DedicatedMoEDiscriminator, DenseDiscriminator
from prism_pl.policy import PolicySpec
from prism_pl.policy_loss import PolicyLoss
from prism_pl.rollout.engine import Rollout, Sampling
from prism_pl.rollout.transformers_engine import TransformersEngine
from prism_pl.updates import KLPenalty
from tests.conftest import DEMONSTRATION, make_examples
from tests.stubs import MALFORMED, RIGHT, WRONG, Gradients, Rows, ScriptedEngine, drift, equal, fit, scalars, weights

SGD = torch.optim.SGD
EXPERTS = ("perception", "reasoning")
OTHER_KL = (("loss", "k3"), ("reward", "k1"))


def make(
    path: str,
    texts: Sequence[str] = (RIGHT, WRONG),
    *,
    lr: float = 0.1,
    discriminator_lr: float = 0.1,
    kind: Any = SGD,
    dropout: float = 0.0,
    **options: Any,
) -> AdversarialAlignModule:
    """A module with a discriminator whose random heads are large, so that scores differ well above rounding."""
    torch.manual_seed(0)
    discriminator = partial(BoldDiscriminator, path=path, init_heads=True, dropout=dropout, max_segment_tokens=100)
    settings: dict[str, Any] = {"rollout": ScriptedEngine(texts), "num_rollouts": 2, "max_grad_norm": None}
    settings["sampling"] = Sampling(max_tokens=60)
    return AdversarialAlignModule(
        PolicySpec(path),
        discriminator,
        policy_optimizer=partial(kind, lr=lr),
        discriminator_optimizer=partial(kind, lr=discriminator_lr),
        **(settings | options),
    )


class BoldDiscriminator(DedicatedMoEDiscriminator):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with torch.no_grad():
            for head in self.heads.parameters():
                head.mul_(10)


def moved(module: AdversarialAlignModule, rows: Rows, folder, **options) -> tuple[bool, bool]:
    """Whether a fit moved the policy, and whether it moved the discriminator."""
    module.configure_model()
    policy, discriminator = weights(module.policy), weights(module.discriminator)
    fit(module, rows, folder, **options)
    return not equal(weights(module.policy), policy), not equal(weights(module.discriminator), discriminator)


def test_each_players_update_moves_only_its_own_weights(random_policy, tmp_path):
    rows = Rows(make_examples(2))
    assert moved(make(random_policy, lr=0.0), rows, tmp_path) == (False, True)
    assert moved(make(random_policy, discriminator_lr=0.0), rows, tmp_path) == (True, False)
    assert moved(make(random_policy), rows, tmp_path) == (True, True)


def test_no_gradient_of_one_player_reaches_the_other(random_policy, tmp_path):
    module = make(random_policy)
    seen: dict[str, list[bool]] = {"policy": [], "discriminator": []}
    backward = module.manual_backward

    def watch(loss, *args, **options):
        before = {name: [p.grad for p in module.get_submodule(name).parameters()] for name in seen}
        before = {name: [None if g is None else g.clone() for g in grads] for name, grads in before.items()}
        backward(loss, *args, **options)
        for name, old in before.items():
            new = [p.grad for p in module.get_submodule(name).parameters()]
            seen[name].append(
                any(g is not None and (o is None or not torch.equal(o, g)) for o, g in zip(old, new, strict=True))
            )

    module.manual_backward = watch
    fit(module, Rows(make_examples(2)), tmp_path)
    assert seen == {"policy": [True, False], "discriminator": [False, True]}


def test_the_policy_answers_to_the_discriminator_from_before_its_update(random_policy, tmp_path):
    """However much the discriminator learns in the step, the policy's gradient is the one of the old scores."""
    gradients, rewards = [], []
    for options in ({"discriminator_lr": 0.0}, {"discriminator_lr": 1.0, "discriminator_steps": 10}):
        seen = Gradients()
        _, record = fit(make(random_policy, **options), Rows(make_examples(2)), tmp_path, [seen])
        assert len(seen.steps) == 1
        gradients.append(seen.steps[0])
        rewards.append(record.outputs[0]["rewards"])
    assert equal(gradients[0], gradients[1])
    assert torch.equal(rewards[0], rewards[1])
    assert rewards[0].std() > 1e-3


def test_the_samplers_mismatch_is_measured(random_policy, tmp_path):
    _, record = fit(make(random_policy), Rows(make_examples(2)), tmp_path)
    assert record.steps[0]["align/mismatch_max"] == pytest.approx(0, abs=1e-5)


def test_rollouts_that_are_not_the_policys_own_stop_the_run(random_policy, tmp_path):
    module = make(random_policy)
    generate = module.rollout.generate

    def drifted(*asked: Any) -> list[Rollout]:
        return [replace(r, sampler_logps=[logp - 0.1 for logp in r.sampler_logps]) for r in generate(*asked)]

    module.rollout.generate = drifted
    with pytest.raises(ValueError, match=r"rollout contract: the engine's log-probabilities of the rollouts are 0\.1 "):
        fit(module, Rows(make_examples(2)), tmp_path)


def test_the_same_text_on_both_sides_gives_a_gap_of_exactly_0(random_policy, tmp_path):
    spaced = DEMONSTRATION.replace("\n", " \n ")
    module = make(random_policy, [DEMONSTRATION, spaced])
    trainer, record = fit(module, Rows(make_examples(2)), tmp_path, [RewardGap()], max_steps=1, limit_val_batches=1)
    for expert in EXPERTS:
        assert record.steps[0][f"align/reward_gap/{expert}"] == 0.0
        assert record.steps[0][f"align/discriminator_accuracy/{expert}"] == 0.5
        assert float(trainer.callback_metrics[f"align/val_reward_gap/{expert}"]) == 0.0


def test_the_step_we_count_is_the_policys(random_policy, tmp_path, monkeypatch):
    module = make(random_policy, discriminator_steps=2, discriminator_every=2)
    calls: list[int] = []
    loss = module._discriminator_loss
    monkeypatch.setattr(
        module, "_discriminator_loss", lambda *args: (calls.append(trainer_step(module)), loss(*args))[1]
    )
    trainer, record = fit(module, Rows(make_examples(8)), tmp_path, max_steps=3)
    assert trainer.global_step == 3
    assert len(record.steps) == 3
    # Two updates in the batches 0 and 2, before the policy's step is counted.
    assert calls == [0, 0, 2, 2]


def trainer_step(module: AdversarialAlignModule) -> int:
    return module.trainer.global_step


def test_the_discriminator_learns_to_tell_the_texts_apart(random_policy, tmp_path):
    module = make(random_policy, [WRONG], discriminator_lr=0.05, score_clip=None)
    _, record = fit(module, Rows(make_examples(16)), tmp_path, [RewardGap()], max_steps=8)
    for expert in EXPERTS:
        assert record.steps[-1][f"align/reward_gap/{expert}"] > record.steps[0][f"align/reward_gap/{expert}"] + 0.5
    assert record.steps[-1]["align/discriminator_loss"] < record.steps[0]["align/discriminator_loss"]


@pytest.mark.parametrize("advantage", ["paper", "released"])
def test_the_policy_leaves_what_the_discriminator_scores_low(random_policy, tmp_path, advantage):
    module = make(random_policy, [RIGHT, MALFORMED], advantage=advantage, discriminator_lr=0.0)
    seen: list[torch.Tensor] = []
    module.rollout.generate = watched(module.rollout.generate, seen)
    fit(module, Rows(make_examples(1) * 4, batch_size=1), tmp_path, max_steps=3)
    # The malformed response gets the lower advantage, so its log-probability falls and the other's rises.
    assert seen[2][0] > seen[0][0]
    assert seen[2][1] < seen[0][1]


def watched(generate, seen: list[torch.Tensor]):
    def wrapper(*args):
        rollouts = generate(*args)
        seen.append(torch.tensor([sum(r.sampler_logps) for r in rollouts]))
        return rollouts

    return wrapper


def test_the_tags_stand_in_the_event_files(random_policy, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = make(random_policy, [RIGHT, WRONG, RIGHT, MALFORMED], kl=KLPenalty(0.01))
    watching = [RewardGap(), StructuralProxies(), Completions(1)]
    options = {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 1}
    fit(module, Rows(make_examples(4)), tmp_path, watching, logger=logger, **options)
    logger.experiment.flush()
    found = scalars(tmp_path)
    names = "discriminator_loss policy_loss malformed response_length truncated entropy kl lr tokens"
    tags = [f"align/{name}" for name in (*names.split(), "val_accuracy", "val_format")]
    tags += [f"align/grad_norm/{name}" for name in ("policy", "discriminator")]
    for kind in ("reward_gap", "discriminator_accuracy", "score_std", "val_reward_gap", "too_long"):
        tags += [f"align/{kind}/{expert}" for expert in EXPERTS]
    for proxy in ("descriptive_items", "reasoning_steps"):
        tags += [f"proxies/{proxy}/{what}" for what in ("policy", "supervision", "distance")]
    tags += [f"time/{phase}" for phase in ("rollout", "score", "discriminator", "policy", "sync")]
    for tag in tags:
        assert len(found[tag]) == 2, tag
        assert not any(value != value for value in found[tag]), tag
    assert found["align/malformed"] == [0.25, 0.25]
    assert found["align/val_accuracy"] == [0.5, 0.5]  # one held-out row is answered 10, the other 9


def test_a_non_finite_loss_stops_before_either_player_steps(random_policy, tmp_path, monkeypatch):
    module = make(random_policy, policy_loss=Broken())
    module.configure_model()
    before = weights(module.policy), weights(module.discriminator)
    with pytest.raises(ValueError, match=r"align/policy_loss is not finite .*row-0, row-1"):
        fit(module, Rows(make_examples(2)), tmp_path)
    assert equal(weights(module.policy), before[0])
    assert equal(weights(module.discriminator), before[1])

    module = make(random_policy)
    module.configure_model()
    monkeypatch.setattr("prism_pl.discriminator_loss.score_l2", lambda terms, *_: (sum(terms).sum() * float("nan"), {}))
    with pytest.raises(ValueError, match=r"align/discriminator_loss is not finite .*row-0, row-1.* took no step"):
        fit(module, Rows(make_examples(2)), tmp_path)
    assert equal(weights(module.policy), before[0])
    assert equal(weights(module.discriminator), before[1])


class Broken(PolicyLoss):
    def __call__(self, logps_BT, old_logps_BT, advantages, mask_BT, denominator=None, weights_BT=None):
        return logps_BT.sum() * float("nan"), {"num_tokens": mask_BT.sum()}


def test_a_batch_without_any_valid_rollout_teaches_nothing_and_stops_nothing(random_policy, tmp_path):
    module = make(random_policy, [MALFORMED])
    assert moved(module, Rows(make_examples(4)), tmp_path, max_steps=2) == (False, False)
    _, record = fit(make(random_policy, [MALFORMED]), Rows(make_examples(2)), tmp_path)
    told = record.steps[0]
    assert told["align/malformed"] == 1.0
    assert told["align/num_all_malformed_groups"] == 2
    assert told["align/discriminator_loss"] == 0.0
    assert told["align/grad_norm/policy"] == 0.0
    assert not record.outputs[0]["valid"].any()


def test_micro_batches_make_the_same_step(random_policy, tmp_path):
    rows = make_examples(4)
    stepped = []
    for tokens in (None, 200):
        module = make(random_policy, [RIGHT, WRONG, MALFORMED, RIGHT], micro_batch_tokens=tokens)
        fit(module, Rows(rows, batch_size=4), tmp_path)
        stepped.append((weights(module.policy), weights(module.discriminator)))
    for one, other in zip(*stepped, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4, msg=name)


# The other kinds, which RLVR shares, are in test_rlvr.py.
@pytest.mark.parametrize(
    "kl", [KLPenalty(0.5), *(pytest.param(KLPenalty(0.5, *how), marks=pytest.mark.slow) for how in OTHER_KL)]
)
def test_a_kl_penalty_pulls_back_to_the_start(random_policy, tmp_path, kl):
    rows, texts, moved = make_examples(8), (RIGHT, WRONG), {}
    for penalty in (None, kl):
        module = make(random_policy, texts, kl=penalty, lr=0.03, discriminator_lr=0.0)
        _, record = fit(module, Rows(rows), tmp_path, max_steps=6)
        moved[penalty] = drift(module, rows[:2], texts)
    assert record.steps[0]["align/kl"] == pytest.approx(0, abs=1e-6)
    assert abs(record.steps[2]["align/kl"]) > 1e-3
    assert moved[kl] < 0.5 * moved[None]


def test_the_reference_stays_and_is_left_out_of_the_checkpoint(random_policy, tmp_path):
    module = make(random_policy, kl=KLPenalty(0.1))
    module.configure_model()
    before = weights(module.reference)
    trainer, _ = fit(module, Rows(make_examples(2)), tmp_path)
    assert equal(weights(module.reference), before)
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    saved = torch.load(tmp_path / "step.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"policy", "discriminator"}
    saved["reference_source"]["sha256"] = "of an export that was made anew"
    with pytest.raises(ValueError, match=r"policy\.path: .* other files than when this run began, and its frozen ref"):
        module.on_load_checkpoint(saved)


def test_a_resumed_run_is_the_uninterrupted_one(random_policy, tmp_path):
    rows = make_examples(8)
    options: dict[str, Any] = {"kind": torch.optim.AdamW, "lr": 1e-3, "discriminator_lr": 1e-3, "kl": KLPenalty(0.01)}
    options |= {"schedule": "cosine", "rollout": None, "dropout": 0.1}

    def run(ckpt=None):
        module = make(random_policy, **(options | {"rollout": SamplingEngine()}))
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        loader = Rows(rows, make_examples(2), resumable=True)
        # Held-out batches draw between training batches, at other times after a resume.
        validation = {"limit_val_batches": 1, "val_check_interval": 2 if ckpt is None else 1}
        settings = {"max_steps": 5, "enable_checkpointing": True} | validation
        trainer, record = fit(module, loader, tmp_path, [saving], ckpt, **settings)
        assert trainer.global_step == 5
        return module, [output["rollouts"] for output in record.outputs]

    whole, drawn = run()
    # From the middle of the first epoch (4 batches) into the second.
    resumed, drawn_again = run(tmp_path / "step=2.ckpt")
    assert drawn_again == drawn[2:]
    assert equal(weights(resumed.policy), weights(whole.policy))
    assert equal(weights(resumed.discriminator), weights(whole.discriminator))


class SamplingEngine(TransformersEngine):
    """Real draws; some responses are then said to be well formed, which random weights never are."""

    def generate(self, examples, num_samples, sampling, on_group=None):
        rollouts = super().generate(examples, num_samples, replace(sampling, max_tokens=8))
        forms = (RIGHT, WRONG)
        return [replace(r, text=forms[sum(r.response_ids) % 2].replace("3", str(r.response_ids[0]))) for r in rollouts]


def test_bad_options_are_refused(random_policy):
    for options, message in (
        ({"num_rollouts": 0}, "num_rollouts is 0"),
        ({"discriminator_every": 0}, "discriminator_every is 0"),
        ({"discriminator_steps": 0}, "discriminator_steps is 0"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0: give a positive norm"),
        ({"discriminator_max_grad_norm": -1.0}, r"discriminator_max_grad_norm is -1\.0"),
        ({"alpha": 1.5}, r"alpha is 1\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            make(random_policy, **options)
    with pytest.raises(ValueError, match="k1"):
        KLPenalty(0.1, "loss", "k1")
    with pytest.raises(ValueError, match=r"top_p is 0\.9"):
        AdversarialAlignModule(PolicySpec(random_policy), Any, ScriptedEngine([RIGHT]), SGD, SGD, Sampling(top_p=0.9))


def test_rows_without_a_demonstration_or_with_a_malformed_one_are_named(random_policy, tmp_path):
    rows = make_examples(2)
    with pytest.raises(ValueError, match="row 'row-1' has no response"):
        fit(make(random_policy), Rows([rows[0], replace(rows[1], response=None)]), tmp_path)
    with pytest.raises(ValueError, match="row 'row-1': the demonstration is malformed"):
        fit(make(random_policy), Rows([rows[0], replace(rows[1], response=MALFORMED)]), tmp_path)


def test_a_demonstration_over_the_cap_is_named_and_a_rollout_over_it_is_not_judged(random_policy, tmp_path):
    long = render("- red 3\n" * 60, "1. 3 + 7 = 10", "10")
    rows = make_examples(2)
    with pytest.raises(
        ValueError, match=r"row 'row-1': a segment .* max_segment_tokens=100, .*: raise model\.init_args"
    ):
        fit(make(random_policy), Rows([rows[0], replace(rows[1], response=long)]), tmp_path)
    _, record = fit(make(random_policy, [RIGHT, long], sampling=Sampling(max_tokens=2000)), Rows(rows), tmp_path)
    assert record.outputs[0]["valid"].tolist() == [[True, False]] * 2
    assert record.steps[0]["align/malformed"] == 0.5
    # Two demonstrations and four rollouts, two of them long.
    assert record.steps[0]["align/too_long/perception"] == pytest.approx(2 / 6)
    assert record.steps[0]["align/too_long/reasoning"] == 0.0


def test_both_experts_train_whatever_alpha_and_their_shares_are_logged(random_policy, tmp_path):
    for alpha, share in ((0.0, 0.0), (1.0, 1.0)):
        module = make(random_policy, alpha=alpha)
        module.configure_model()
        before = weights(module.discriminator)
        _, record = fit(module, Rows(make_examples(2)), tmp_path)
        after = weights(module.discriminator)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        for expert in EXPERTS:
            assert f"heads.{expert}.weight" in moved
            assert f"model.language_model.layers.0.mlp.{expert}.up_proj.weight" in moved
        assert record.steps[0]["align/variance_share/perception"] == pytest.approx(share)
        assert record.steps[0]["align/variance_share/reasoning"] == pytest.approx(1 - share)


def test_credit_by_segment_trains_each_segment_by_its_own_expert(random_policy, tmp_path):
    """Rollouts that differ in the reasoning alone: by response it is the caption's tokens too that earn or lose."""
    seen = {}
    texts = [RIGHT, render("- red 3", "1. 3 + 4 = 7", "7")]
    for credit in ("response", "segment"):
        module = make(random_policy, texts, credit=credit, lr=0.0)
        module.configure_model()
        taken: list[torch.Tensor] = []
        watched: Any = module
        backward = module._policy_backward
        watched._policy_backward = lambda *given, b=backward, t=taken: t.append(given[1]) or b(*given)
        fit(module, Rows(make_examples(2)), tmp_path)
        seen[credit] = taken[0]
    assert seen["response"].ndim == 1
    assert float(seen["response"].abs().min()) > 0
    assert float(seen["segment"][:, 0].abs().max()) == 0.0
    assert float(seen["segment"][:, -1].abs().min()) > 0


def test_a_whole_response_discriminator_plays_the_game(random_policy, tmp_path):
    judge: Any = partial(DenseDiscriminator, random_policy, init_heads=True, segments="whole", max_segment_tokens=200)
    module = make(random_policy)
    module.build_discriminator = judge
    _, record = fit(module, Rows(make_examples(2)), tmp_path, [RewardGap()])
    assert record.steps[0]["align/variance_share/response"] == pytest.approx(1.0)
    assert "align/reward_gap/response" in record.steps[0]
    module = make(random_policy, credit="segment")
    module.build_discriminator = judge
    with pytest.raises(ValueError, match="credit is 'segment'"):
        module.configure_model()
