"""The correction for a sampler whose probabilities are not quite the trainer's."""

import math
from dataclasses import replace

import pytest
import torch

from prism_pl.losses import grpo
from prism_pl.mismatch import MismatchCorrection
from prism_pl.rollout.transformers_engine import TransformersEngine
from tests.conftest import make_examples
from tests.stubs import RIGHT, WRONG, Gradients, Rows, ScriptedEngine, fit, make_rlvr

LOG2, LOG3 = math.log(2), math.log(3)
# Ratios pi_trainer / pi_sampler: 3, 1, 1/4 and 2, 1, padding.
SAMPLER_BT = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, 0.0]])
TRAINER_BT = SAMPLER_BT + torch.tensor([[LOG3, 0.0, -2 * LOG2], [LOG2, 0.0, math.nan]])
MASK_BT = torch.tensor([[True, True, True], [True, True, False]])


def test_token_truncation_caps_each_ratio():
    weights_BT, metrics = MismatchCorrection("tis", "token", high=1.5)(TRAINER_BT, SAMPLER_BT, MASK_BT)
    # 3 -> 1.5, 1, 1/4; 2 -> 1.5, 1, padding counts as a match
    torch.testing.assert_close(weights_BT, torch.tensor([[1.5, 1.0, 0.25], [1.5, 1.0, 1.0]]))
    assert metrics["mismatch_truncated"] == pytest.approx(2 / 5)


def test_sequence_truncation_caps_the_product():
    weights_B1, metrics = MismatchCorrection("tis", "sequence", high=1.5)(TRAINER_BT, SAMPLER_BT, MASK_BT)
    # 3 x 1 x 1/4 = 0.75; 2 x 1 = 2 -> 1.5
    torch.testing.assert_close(weights_B1, torch.tensor([[0.75], [1.5]]))
    assert metrics["mismatch_truncated"] == pytest.approx(2 / 5)  # both tokens of the second sequence, of five


def test_token_masking_drops_both_sides():
    weights_BT, metrics = MismatchCorrection("mis", "token", low=0.5, high=2.5)(TRAINER_BT, SAMPLER_BT, MASK_BT)
    # 3 above, 1/4 below; 2 inside
    torch.testing.assert_close(weights_BT, torch.tensor([[0.0, 1.0, 0.0], [2.0, 1.0, 1.0]]))
    assert metrics["mismatch_masked"] == pytest.approx(2 / 5)


def test_sequence_masking_drops_whole_responses():
    weights_B1, metrics = MismatchCorrection("mis", "sequence", low=0.5, high=1.5)(TRAINER_BT, SAMPLER_BT, MASK_BT)
    torch.testing.assert_close(weights_B1, torch.tensor([[0.75], [0.0]]))
    assert metrics["mismatch_masked"] == pytest.approx(2 / 5)


def test_measured_by_percentiles_of_the_difference():
    weights_BT, metrics = MismatchCorrection("off")(TRAINER_BT, SAMPLER_BT, MASK_BT)
    assert weights_BT is None
    # |differences| sorted: 0, 0, log 2, log 3, 2 log 2; outside [0.9, 1.1]: three of five
    assert metrics["mismatch_p50"] == pytest.approx(LOG2)
    assert metrics["mismatch_p95"] == pytest.approx(2 * LOG2)
    assert metrics["mismatch_max"] == pytest.approx(2 * LOG2)
    assert metrics["mismatch_outside"] == pytest.approx(3 / 5)


def test_nothing_trained_measures_as_nan():
    metrics = MismatchCorrection("tis")(TRAINER_BT, SAMPLER_BT, torch.zeros_like(MASK_BT)).metrics
    assert all(value.isnan() for value in metrics.values())


def test_a_match_changes_no_loss_and_weights_carry_no_gradient():
    logps_BT = SAMPLER_BT.clone().requires_grad_()
    weights_BT = MismatchCorrection("tis")(logps_BT, SAMPLER_BT, MASK_BT).weights_BT
    assert weights_BT is not None
    assert not weights_BT.requires_grad
    advantages_B = torch.tensor([1.0, -1.0])
    plain, _ = grpo(logps_BT, SAMPLER_BT, advantages_B, MASK_BT)
    corrected, _ = grpo(logps_BT, SAMPLER_BT, advantages_B, MASK_BT, weights_BT=weights_BT)
    assert plain == corrected


def test_automatic_correction_follows_the_samplers_precision():
    correction = MismatchCorrection()
    assert correction.resolve(torch.float32).kind == "off"
    assert correction.resolve(torch.bfloat16).kind == "tis"
    assert MismatchCorrection("mis").resolve(torch.float32).kind == "mis"


@pytest.mark.parametrize(
    ("options", "named"),
    [({"kind": "tip"}, "kind"), ({"level": "word"}, "level"), ({"low": 1.0}, "low"), ({"high": 1.0}, "high")],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=rf"mismatch\.{named}: {options[named]!r}"):
        MismatchCorrection(**options)


class DriftedEngine(ScriptedEngine):
    """Reports log-probabilities that lie log 4 below the trainer's: every ratio is 4."""

    def generate(self, examples, num_samples, sampling, on_group=None):
        rollouts = super().generate(examples, num_samples, sampling)
        return [replace(r, sampler_logps=[logp - math.log(4) for logp in r.sampler_logps]) for r in rollouts]


@pytest.mark.parametrize(
    ("correction", "factor"),
    [(MismatchCorrection("tis", high=3.0), 3.0), (MismatchCorrection("mis", high=3.0), 0.0)],
)
def test_a_step_is_scaled_by_the_weight(random_policy, tmp_path, correction, factor):
    """Every policy token's ratio is 4: truncated to 3 the gradient is three times as large, masked it is 0."""
    steps = []
    for mismatch in (MismatchCorrection("off"), correction):
        module = make_rlvr(random_policy, [RIGHT, WRONG], mismatch=mismatch)
        module.rollout = DriftedEngine([RIGHT, WRONG])
        gradients = Gradients()
        _, record = fit(module, Rows(make_examples(1), batch_size=1), tmp_path, callbacks=[gradients])
        steps.append(gradients.steps[0])
        # The mean |difference| is what was planted, up to the rounding of subtracting it.
        assert record.steps[0]["rlvr/mismatch_p50"] == pytest.approx(math.log(4), abs=1e-5)
        assert record.steps[0]["rlvr/mismatch_outside"] == 1
    for name, plain in steps[0].items():
        torch.testing.assert_close(steps[1][name], factor * plain)


def test_rollouts_that_are_not_the_trainers_stop_a_float32_run(random_policy, tmp_path):
    # Several updates a batch: it is the policy that sampled that they are compared with.
    module = make_rlvr(random_policy, [RIGHT, WRONG], lr=10.0, updates_per_batch=3)
    _, record = fit(module, Rows(make_examples(1), batch_size=1), tmp_path, max_steps=3)
    assert record.steps[0]["rlvr/mismatch_max"] < 1e-4
    module = make_rlvr(random_policy, [RIGHT, WRONG])
    module.rollout = DriftedEngine([RIGHT, WRONG])
    stopped = r"rollout contract: the engine's log-probabilities of the rollouts are 1\.39 nats .*mismatch\.kind"
    with pytest.raises(ValueError, match=stopped):
        fit(module, Rows(make_examples(1), batch_size=1), tmp_path)


@pytest.mark.parametrize("precise", [False, True])
def test_a_mismatch_below_float32_on_either_side_stops_nothing(random_policy, tmp_path, precise):
    module = make_rlvr(random_policy, [RIGHT, WRONG])
    engine = DriftedEngine([RIGHT, WRONG])
    module.rollout = engine
    if not precise:
        engine.dtype = lambda: torch.bfloat16
    _, record = fit(
        module, Rows(make_examples(1), batch_size=1), tmp_path, precision="bf16-mixed" if precise else "32-true"
    )
    assert record.steps[0]["rlvr/mismatch_p95"] > 1


def test_a_sampler_in_bf16_is_corrected_without_being_asked(random_policy, tmp_path):
    seen = {}
    for precision in ("32-true", "bf16-mixed"):
        module = make_rlvr(random_policy, [], max_tokens=8)
        module.rollout = TransformersEngine()
        _, record = fit(module, Rows(make_examples(1), batch_size=1), tmp_path, precision=precision)
        seen[precision] = record.steps[0]
    assert "rlvr/mismatch_truncated" not in seen["32-true"]
    assert seen["32-true"]["rlvr/mismatch_max"] < 1e-4
    assert "rlvr/mismatch_truncated" in seen["bf16-mixed"]
