"""The policy-gradient losses, as functions and as classes: against values and gradients worked out by hand."""

import math
from functools import partial

import pytest
import torch

from prism_pl.losses import cispo, combine_metrics, dapo, dr_grpo, grpo, gspo
from prism_pl.policy_loss import CISPO, DAPO, GRPO, GSPO, DrGRPO, PolicyLoss, ReleasedDAPO, ReleasedGRPO, ReleasedGSPO

NAN = math.nan
# Ratios chosen; two sequences of 3 and 1 valid tokens, A = +1 and -1. Masked-out positions are NaN on purpose.
RATIO_BT = torch.tensor([[1.5, 1.0, 0.5], [0.5, NAN, NAN]])
MASK_BT = torch.tensor([[1, 1, 1], [1, 0, 0]])
ADVANTAGES_B = torch.tensor([1.0, -1.0])
OLD_BT = torch.full((2, 3), -1.0)


def logps_of(ratio_BT, old_BT=OLD_BT):
    return (old_BT + ratio_BT.log()).requires_grad_()


# Token losses, clip 0.2 / 0.2. A = 1: -min(1.5, 1.2) = -1.2; -1; -min(0.5, 0.8) = -0.5. A = -1: max(0.5, 0.8) = 0.8.
@pytest.mark.parametrize(
    ("loss_fn", "options", "expected"),
    [
        (grpo, {}, (-2.7 / 3 + 0.8) / 2),
        (grpo, {"aggregation": "token_mean"}, (-2.7 + 0.8) / 4),
        (dr_grpo, {"constant_length": 10}, (-2.7 + 0.8) / 20),
        (dapo, {}, (-1.28 - 1 - 0.5 + 0.8) / 4),  # the upper clip is at 1.28
        (grpo, {"denominator": 1}, -2.7 / 3 + 0.8),
        (dapo, {"denominator": torch.tensor(8)}, (-2.78 + 0.8) / 8),
    ],
)
def test_clipped_losses_by_hand(loss_fn, options, expected):
    loss, _ = loss_fn(logps_of(RATIO_BT), OLD_BT, ADVANTAGES_B, MASK_BT, **options)
    assert loss.item() == pytest.approx(expected)


def test_clipped_tokens_have_no_gradient_and_the_others_minus_ratio_times_advantage():
    logps_BT = logps_of(RATIO_BT)
    grpo(logps_BT, OLD_BT, ADVANTAGES_B, MASK_BT, aggregation="token_mean")[0].backward()
    # 1.5 with A > 0 and 0.5 with A < 0 are clipped; the others -w A / 4.
    torch.testing.assert_close(logps_BT.grad, torch.tensor([[0.0, -1.0 / 4, -0.5 / 4], [0.0, 0.0, 0.0]]))


def test_metrics_by_hand():
    _, metrics = grpo(logps_of(RATIO_BT), OLD_BT, ADVANTAGES_B, MASK_BT)
    values = {name: value.item() for name, value in metrics.items()}
    # Of the four tokens 1.5 (A > 0) is clipped above and 0.5 (A < 0) below.
    assert values["clip_fraction_high"] == pytest.approx(0.25)
    assert values["clip_fraction_low"] == pytest.approx(0.25)
    assert values["clip_fraction"] == pytest.approx(0.5)
    assert values["dual_clip_fraction"] == 0.0
    assert values["ratio_mean"] == pytest.approx((1.5 + 1 + 0.5 + 0.5) / 4)
    assert (values["ratio_min"], values["ratio_max"]) == pytest.approx((0.5, 1.5))
    # Sorted 0.5 0.5 1 1.5: 5% of four values is the first, 95% the fourth.
    assert (values["ratio_p05"], values["ratio_p95"]) == pytest.approx((0.5, 1.5))
    # Mean of (w - 1) - log w: the first parts add to -0.5, the logs to log(1.5 x 0.25).
    assert values["approx_kl"] == pytest.approx((-0.5 - math.log(0.375)) / 4)
    assert values["num_tokens"] == 4


@pytest.mark.parametrize(("dual_clip", "expected", "gradient"), [(None, 10.0, 10.0), (3.0, 3.0, 0.0)])
def test_dual_clip_bounds_an_exploded_ratio_where_the_advantage_is_negative(dual_clip, expected, gradient):
    ratio_BT, old_BT = torch.tensor([[10.0]]), torch.tensor([[-5.0]])
    logps_BT = logps_of(ratio_BT, old_BT)
    loss, metrics = grpo(logps_BT, old_BT, torch.tensor([-1.0]), torch.ones(1, 1), dual_clip=dual_clip)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # max(10, 1.2) = 10, then min(10, 3)
    assert logps_BT.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert metrics["dual_clip_fraction"].item() == (0.0 if dual_clip is None else 1.0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
@pytest.mark.parametrize("loss_fn", [grpo, dapo, partial(dr_grpo, constant_length=2), gspo, cispo])
def test_a_log_ratio_of_200_leaves_loss_gradient_and_metrics_finite(loss_fn, log_ratio, advantage):
    # Unbounded, e^200 is infinite in float32; where the clip acts its gradient would be 0 x inf = NaN.
    old_BT = torch.tensor([[-201.0, -1.0]])
    logps_BT = (old_BT + torch.tensor([[log_ratio, 0.0]])).requires_grad_()
    loss, metrics = loss_fn(logps_BT, old_BT, torch.tensor([advantage]), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite()
    assert logps_BT.grad.isfinite().all()
    # The other token learns as ever.
    assert logps_BT.grad[0, 1] != 0 or loss_fn is gspo
    assert all(value.isfinite() for value in metrics.values()), metrics
    if loss_fn is grpo and log_ratio > 0:
        assert metrics["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-5)


def test_dual_clip_leaves_positive_advantages_and_small_ratios_alone():
    ratio_BT = torch.tensor([[10.0, 2.0]])
    old_BT = torch.full((1, 2), -5.0)
    advantages_BT = torch.tensor([[1.0, -1.0]])
    loss, metrics = grpo(logps_of(ratio_BT, old_BT), old_BT, advantages_BT, torch.ones(1, 2), dual_clip=3.0)
    assert loss.item() == pytest.approx((-1.2 + 2.0) / 2)
    assert metrics["dual_clip_fraction"].item() == 0.0


# Sequence 1: w = 1.02, 0.99, 1: s = (1.02 x 0.99)^(1/3) = 1.0098^(1/3). Sequence 2: s = 0.9 (one token).
GSPO_RATIO_BT = torch.tensor([[1.02, 0.99, 1.0], [0.9, NAN, NAN]], dtype=torch.float64)
S1, S2 = 1.0098 ** (1 / 3), 0.9


def test_gspo_by_hand():
    old_BT = OLD_BT.double()
    # Wide clip: A = 1 and -1: (-s1 + s2) / 2.
    loss, metrics = gspo(logps_of(GSPO_RATIO_BT, old_BT), old_BT, ADVANTAGES_B, MASK_BT, clip_low=0.2, clip_high=0.2)
    assert loss.item() == pytest.approx((-S1 + S2) / 2)
    assert metrics["ratio_mean"].item() == pytest.approx((3 * S1 + S2) / 4)
    # Default clip: s1 = 1.00326 > 1.0004 with A > 0, s2 = 0.9 < 0.9997 with A < 0: both sequences are clipped.
    loss, metrics = gspo(logps_of(GSPO_RATIO_BT, old_BT), old_BT, ADVANTAGES_B, MASK_BT)
    assert loss.item() == pytest.approx((-1.0004 + 0.9997) / 2)
    assert metrics["clip_fraction"].item() == 1.0


def test_gspo_gradient_is_that_of_the_sequence_ratio():
    old_BT = OLD_BT.double()
    logps_BT = logps_of(GSPO_RATIO_BT, old_BT)
    gspo(logps_BT, old_BT, ADVANTAGES_B, MASK_BT, clip_low=0.2, clip_high=0.2)[0].backward()
    # d s / d logp_t = s / |y|; mean over the two sequences; -A s / |y| / 2.
    expected = torch.tensor([[-S1 / 3 / 2] * 3, [S2 / 1 / 2, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logps_BT.grad, expected)
    # And by autograd on the sequence form itself.
    plain_BT = logps_of(torch.nan_to_num(GSPO_RATIO_BT, 1.0), old_BT)
    s_B = (((plain_BT - old_BT) * MASK_BT).sum(1) / MASK_BT.sum(1)).exp()
    (-(s_B * ADVANTAGES_B).mean()).backward()
    torch.testing.assert_close(logps_BT.grad, plain_BT.grad)


def test_gspo_lets_advantages_differ_by_token():
    old_BT = OLD_BT.double()[:1]
    logps_BT = logps_of(GSPO_RATIO_BT[:1], old_BT)
    advantages_BT = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    gspo(logps_BT, old_BT, advantages_BT, MASK_BT[:1], clip_low=0.2, clip_high=0.2)[0].backward()
    torch.testing.assert_close(logps_BT.grad, -S1 / 3 * advantages_BT)


def test_cispo_by_hand_and_with_a_gradient_where_the_clip_kills_grpos():
    ratio_BT = torch.tensor([[8.0, 1.0, 0.01]])
    old_BT, ones_BT = torch.full((1, 3), -4.0), torch.ones(1, 3)
    logps_BT = logps_of(ratio_BT, old_BT)
    loss, metrics = cispo(logps_BT, old_BT, torch.tensor([2.0]), ones_BT)
    loss.backward()
    # Weights min(w, 5): 5, 1, 0.01; gradient -weight A / 3 at every token; value -sum weight A logp / 3.
    weights = (5.0, 1.0, 0.01)
    logps = (-4 + math.log(8), -4.0, -4 + math.log(0.01))
    assert loss.item() == pytest.approx(-2 * sum(w * p for w, p in zip(weights, logps, strict=True)) / 3, rel=1e-5)
    torch.testing.assert_close(logps_BT.grad, torch.tensor([[-10 / 3, -2 / 3, -0.02 / 3]]))
    assert metrics["clip_fraction_high"].item() == pytest.approx(1 / 3)
    assert metrics["clip_fraction_low"].item() == 0.0

    dead_BT = logps_of(ratio_BT, old_BT)
    grpo(dead_BT, old_BT, torch.tensor([2.0]), ones_BT)[0].backward()
    assert dead_BT.grad[0, 0].item() == 0.0
    # With a lower bound at 0.8 the third weight is 0.8.
    bounded_BT = logps_of(ratio_BT, old_BT)
    _, metrics = cispo(bounded_BT, old_BT, torch.tensor([2.0]), ones_BT, clip_low=0.2)
    assert metrics["clip_fraction_low"].item() == pytest.approx(1 / 3)


ALL_LOSSES = [grpo, dapo, dr_grpo, gspo, cispo]


@pytest.mark.parametrize("loss_fn", ALL_LOSSES)
def test_at_ratio_one_every_loss_is_the_policy_gradient(loss_fn):
    logps_BT = OLD_BT.clone().requires_grad_()
    loss, metrics = loss_fn(
        logps_BT, logps_BT.detach(), ADVANTAGES_B, MASK_BT, aggregation="token_mean", constant_length=3
    )
    loss.backward()
    torch.testing.assert_close(logps_BT.grad, -ADVANTAGES_B[:, None] * MASK_BT / 4)
    assert metrics["clip_fraction"].item() == 0.0
    assert metrics["approx_kl"].item() == 0.0


@pytest.mark.parametrize("loss_fn", ALL_LOSSES)
def test_weights_multiply_token_losses_and_carry_no_gradient(loss_fn):
    weights_BT = torch.tensor([[2.0, 2.0, 2.0], [0.5, NAN, NAN]], requires_grad=True)
    options = {"aggregation": "token_mean", "denominator": 1}
    logps_BT, plain_BT = logps_of(RATIO_BT), logps_of(RATIO_BT)
    loss, _ = loss_fn(logps_BT, OLD_BT, ADVANTAGES_B, MASK_BT, weights_BT=weights_BT, **options)
    loss.backward()
    loss_fn(plain_BT, OLD_BT, ADVANTAGES_B, MASK_BT, **options)[0].backward()
    assert weights_BT.grad is None
    torch.testing.assert_close(logps_BT.grad, plain_BT.grad * torch.tensor([[2.0], [0.5]]))


def test_a_weight_for_each_sequence_needs_its_own_dimension():
    square_BT = torch.zeros(2, 2)
    with pytest.raises(AssertionError, match="weights"):
        grpo(square_BT, square_BT, ADVANTAGES_B, torch.ones(2, 2), weights_BT=torch.ones(2))
    grpo(square_BT, square_BT, ADVANTAGES_B, torch.ones(2, 2), weights_BT=torch.ones(2, 1))


@pytest.mark.parametrize("loss_fn", ALL_LOSSES)
def test_an_empty_mask_gives_a_backward_able_zero_and_nan_metrics(loss_fn):
    logps_BT = torch.full((2, 3), -400.0, requires_grad=True)
    loss, metrics = loss_fn(logps_BT, OLD_BT, torch.tensor([NAN, 1.0]), torch.zeros(2, 3), constant_length=3)
    loss.backward()
    assert loss.item() == 0.0
    assert logps_BT.grad.abs().sum().item() == 0.0
    assert metrics["clip_fraction"].isnan()
    assert metrics["ratio_max"].isnan()
    assert metrics["num_tokens"].item() == 0


CLASSES = [
    GRPO(),
    DAPO(),
    DrGRPO(constant_length=6),
    GSPO(clip_low=0.1, clip_high=0.1),
    CISPO(),
    ReleasedGRPO(),
    ReleasedDAPO(),
    ReleasedGSPO(),
    GSPO(aggregation="token_mean"),
    CISPO(aggregation="sequence_mean"),
]


@pytest.mark.parametrize("policy_loss", CLASSES, ids=lambda loss: f"{type(loss).__name__}-{loss.aggregation}")
@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5]])
def test_eight_micro_batches_are_one_batch(policy_loss, sizes):
    generator = torch.Generator().manual_seed(1)
    old_BT = -torch.rand(8, 5, generator=generator, dtype=torch.float64)
    logps_BT = old_BT + 0.4 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    advantages_B = torch.randn(8, generator=generator, dtype=torch.float64)
    mask_BT = torch.arange(5) < torch.tensor([5, 1, 3, 0, 2, 4, 5, 1])[:, None]

    whole_BT = logps_BT.clone().requires_grad_()
    whole, whole_metrics = policy_loss(whole_BT, old_BT, advantages_B, mask_BT)
    whole.backward()
    split_BT = logps_BT.clone().requires_grad_()
    batches = list(zip(*(x.split(sizes) for x in (split_BT, old_BT, advantages_B, mask_BT)), strict=True))
    denominator = sum(policy_loss.count(batch[3]) for batch in batches)
    losses, metrics = zip(*(policy_loss(*batch, denominator=denominator) for batch in batches), strict=True)
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split_BT.grad, whole_BT.grad, rtol=1e-12, atol=1e-12)
    merged = combine_metrics(metrics)
    for name in ("clip_fraction", "dual_clip_fraction", "ratio_mean", "ratio_min", "ratio_max", "num_tokens"):
        torch.testing.assert_close(merged[name], whole_metrics[name], check_dtype=False, msg=name)


@pytest.mark.parametrize(
    ("policy_loss", "aggregation", "clip_low", "clip_high", "dual_clip"),
    [
        (GRPO(), "sequence_mean", 0.2, 0.2, None),
        (DAPO(), "token_mean", 0.2, 0.28, None),
        (DrGRPO(constant_length=8), "constant", 0.2, 0.2, None),
        (GSPO(), "sequence_mean", 3e-4, 4e-4, None),
        (ReleasedGRPO(), "token_mean", 0.2, 0.2, 3.0),
        (ReleasedDAPO(), "token_mean", 0.2, 0.28, 10.0),
        (ReleasedGSPO(), "sequence_mean", 3e-4, 4e-4, None),
    ],
)
def test_presets_hold_the_papers_and_the_releases_options(policy_loss, aggregation, clip_low, clip_high, dual_clip):
    assert policy_loss.aggregation == aggregation
    assert (policy_loss.clip_low, policy_loss.clip_high, policy_loss.dual_clip) == (clip_low, clip_high, dual_clip)
    assert policy_loss.mask_truncated is False


@pytest.mark.parametrize(
    ("policy_loss", "loss_fn"),
    [
        (GRPO(dual_clip=3.0), lambda *a: grpo(*a, dual_clip=3.0)),
        (DAPO(clip_high=0.6), lambda *a: dapo(*a, clip_high=0.6)),
        (DrGRPO(constant_length=8), lambda *a: dr_grpo(*a, constant_length=8)),
        (GSPO(clip_low=0.3), lambda *a: gspo(*a, clip_low=0.3)),
        (CISPO(clip_high=0.1), lambda *a: cispo(*a, clip_high=0.1)),
        (CISPO(clip_low=0.1), lambda *a: cispo(*a, clip_low=0.1)),
    ],
)
def test_classes_pass_their_options_to_the_functions(policy_loss, loss_fn):
    arguments = (logps_of(RATIO_BT), OLD_BT, ADVANTAGES_B, MASK_BT)
    assert policy_loss(*arguments)[0].item() == loss_fn(*arguments)[0].item()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPO(aggregation="mean"), "aggregation: 'mean'"),  # type: ignore[arg-type]
        (lambda: GRPO(clip_low=1.2), r"clip_low: 1\.2"),
        (lambda: DAPO(clip_high=-0.1), r"clip_high: -0\.1"),
        (lambda: GRPO(dual_clip=1.0), r"dual_clip: 1\.0"),
        (lambda: DrGRPO(), "constant_length: None"),
        (lambda: GRPO(constant_length=0), "constant_length: 0"),
        (lambda: CISPO(dual_clip=3.0), r"dual_clip: 3\.0"),
    ],
)
def test_bad_options_are_named_with_their_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_of_ones_own_needs_a_call_and_nothing_else():
    class Reinforce(PolicyLoss):
        def __call__(self, logps_BT, old_logps_BT, advantages, mask_BT, denominator=None, weights_BT=None):
            total = -(logps_BT * advantages[:, None] * mask_BT).sum()
            return total / denominator, {}

    loss = Reinforce()
    assert loss.count(MASK_BT).item() == 4
    # -(1 x 3 x -1 + -1 x 1 x -1) / 4 = 2 / 4
    assert loss(OLD_BT, OLD_BT, ADVANTAGES_B, MASK_BT, denominator=loss.count(MASK_BT))[0].item() == pytest.approx(0.5)


def test_yaml_names_a_loss_by_class_and_options():
    from jsonargparse import ArgumentParser

    class Module:
        def __init__(self, policy_loss: PolicyLoss) -> None:
            self.policy_loss = policy_loss

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Module, "model")
    block = {"class_path": "prism_pl.policy_loss.DAPO", "init_args": {"dual_clip": 10.0}}
    model = parser.instantiate(parser.parse_object({"model": {"policy_loss": block}})).model
    assert model.policy_loss == DAPO(dual_clip=10.0)
