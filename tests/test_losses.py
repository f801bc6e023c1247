"""Aggregation, NLL, Bradley-Terry, the discriminator's loss, soft clip, KL estimators: against hand-worked values."""

import math

import pytest
import torch

from prism_pl.discriminator import Scores
from prism_pl.discriminator_loss import discriminator_loss
from prism_pl.losses import (
    aggregate,
    bradley_terry,
    check_kl_placement,
    combine_metrics,
    count,
    kl_estimate,
    masked_nll,
    score_l2,
    soft_clip,
)

NAN = math.nan
ZERO = torch.tensor(0.0)
# Two sequences of 1 and 3 valid tokens; what is masked out is NaN on purpose.
VALUES_BT = torch.tensor([[4.0, NAN, NAN], [1.0, 2.0, 6.0]])
MASK_BT = torch.tensor([[1, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("aggregation", "num", "expected"),
    [
        ("token_mean", 4, 13 / 4),  # (4 + 1 + 2 + 6) / 4
        ("sequence_mean", 2, (4 + 3) / 2),  # means 4 and 9 / 3
        ("constant", 20, 13 / 20),  # 2 sequences x 10
    ],
)
def test_aggregate_divides_the_masked_sum_by_its_count(aggregation, num, expected):
    assert count(MASK_BT, aggregation, 10).item() == num
    assert aggregate(VALUES_BT, MASK_BT, aggregation, constant_length=10).item() == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 5], [1, 4, 2, 1]])
def test_micro_batches_with_one_denominator_sum_to_the_whole_batch(aggregation, sizes):
    generator = torch.Generator().manual_seed(0)
    values_BT = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    mask_BT = torch.arange(5) < torch.tensor([5, 1, 3, 0, 2, 4, 5, 1])[:, None]
    whole = aggregate(values_BT, mask_BT, aggregation, constant_length=7)
    parts = list(zip(values_BT.split(sizes), mask_BT.split(sizes), strict=True))
    denominator = sum(count(mask, aggregation, 7) for _, mask in parts)
    total = sum(aggregate(values, mask, aggregation, denominator) for values, mask in parts)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_a_sequence_masked_away_leaves_no_trace_in_sum_or_denominator(aggregation):
    both = aggregate(VALUES_BT, MASK_BT * torch.tensor([[0], [1]]), aggregation, constant_length=10)
    alone = aggregate(VALUES_BT[1:], MASK_BT[1:], aggregation, constant_length=10)
    assert both.item() == alone.item() != 0.0


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_an_empty_mask_gives_a_zero_that_runs_backward(aggregation):
    values_BT = torch.full((2, 3), NAN, requires_grad=True)
    loss = aggregate(values_BT * 2, torch.zeros(2, 3), aggregation, constant_length=10)
    loss.backward()
    assert loss.item() == 0.0
    assert values_BT.grad is not None
    assert values_BT.grad.abs().sum().item() == 0.0


def test_half_precision_is_summed_in_float32():
    # bfloat16 has 8 bits of precision and cannot hold 4095.
    values_BT = torch.ones(1, 4095, dtype=torch.bfloat16)
    assert aggregate(values_BT, torch.ones(1, 4095), "token_mean", denominator=1).item() == 4095.0


def test_bad_aggregation_options_are_named():
    with pytest.raises(ValueError, match="aggregation: 'mean'"):
        aggregate(VALUES_BT, MASK_BT, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="constant_length: None"):
        aggregate(VALUES_BT, MASK_BT, "constant")
    with pytest.raises(ValueError, match="constant_length: 0"):
        count(MASK_BT, "constant", 0)


def test_combined_metrics_are_those_of_the_batch():
    parts = [
        {"num_tokens": torch.tensor(1), "x": torch.tensor(4.0), "x_min": torch.tensor(4.0), "x_max": torch.tensor(4.0)},
        {"num_tokens": torch.tensor(3), "x": torch.tensor(3.0), "x_min": torch.tensor(1.0), "x_max": torch.tensor(6.0)},
        {"num_tokens": torch.tensor(0), "x": torch.tensor(NAN), "x_min": torch.tensor(NAN), "x_max": torch.tensor(NAN)},
    ]
    merged = {name: value.item() for name, value in combine_metrics(parts).items()}
    # (1 x 4 + 3 x 3) / 4
    assert merged == {"num_tokens": 4, "x": 13 / 4, "x_min": 1.0, "x_max": 6.0}
    assert combine_metrics(parts[2:])["x"].isnan()


def test_masked_nll_by_hand():
    logps_BT = torch.tensor([[-1.0, NAN], [-2.0, -6.0]], requires_grad=True)
    loss, metrics = masked_nll(logps_BT, torch.tensor([[1, 0], [1, 1]]))
    assert loss.item() == pytest.approx(3.0)  # (1 + 2 + 6) / 3
    assert metrics["nll"].item() == pytest.approx(3.0)
    assert metrics["num_tokens"].item() == 3
    loss.backward()
    torch.testing.assert_close(logps_BT.grad, torch.tensor([[-1 / 3, 0.0], [-1 / 3, -1 / 3]]))
    assert masked_nll(logps_BT, torch.tensor([[1, 0], [1, 1]]), 9)[0].item() == pytest.approx(1.0)


def test_bradley_terry_by_hand():
    # Margins log 3, -log 3, 0: sigma = 3/4, 1/4, 1/2; losses log 4/3, log 4, log 2; sum = log(4/3 x 4 x 2) = log(32/3).
    chosen_B = torch.tensor([math.log(3.0), 0.0, 1.0])
    rejected_B = torch.tensor([0.0, math.log(3.0), 1.0])
    loss, metrics = bradley_terry(chosen_B, rejected_B)
    assert loss.item() == pytest.approx(math.log(32 / 3) / 3)
    assert metrics["accuracy"].item() == pytest.approx(0.5)  # a win, a loss and a tie: (1 + 0 + 0.5) / 3
    assert metrics["margin"].item() == pytest.approx(0.0, abs=1e-7)
    assert metrics["num_pairs"].item() == 3.0


def test_bradley_terry_weights_and_label_smoothing_by_hand():
    chosen_B, rejected_B = torch.tensor([math.log(3.0), 5.0]), torch.tensor([0.0, 5.0])
    # 2 x log 4/3 + 1 x log 2 over 3.
    loss, metrics = bradley_terry(chosen_B, rejected_B, weight_B=torch.tensor([2.0, 1.0]))
    assert loss.item() == pytest.approx((2 * math.log(4 / 3) + math.log(2)) / 3)
    assert metrics["accuracy"].item() == pytest.approx((2 + 0.5) / 3)
    # e = 0.1 on the first pair: 0.9 log 4/3 + 0.1 log 4.
    smooth = bradley_terry(chosen_B[:1], rejected_B[:1], label_smoothing=0.1)[0]
    assert smooth.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))
    with pytest.raises(ValueError, match=r"label_smoothing: 0\.5"):
        bradley_terry(chosen_B, rejected_B, label_smoothing=0.5)


def test_label_smoothing_has_no_gradient_at_its_best_margin():
    margin_B = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    bradley_terry(margin_B, torch.zeros(1), label_smoothing=0.1)[0].backward()
    torch.testing.assert_close(margin_B.grad, torch.zeros(1), atol=1e-7, rtol=0.0)


def test_bradley_terry_gradient_is_minus_sigmoid_of_minus_margin():
    chosen_B = torch.tensor([math.log(3.0)], requires_grad=True)
    rejected_B = torch.tensor([0.0], requires_grad=True)
    bradley_terry(chosen_B, rejected_B)[0].backward()
    torch.testing.assert_close(chosen_B.grad, torch.tensor([-0.25]))  # -(1 - 3/4)
    torch.testing.assert_close(rejected_B.grad, torch.tensor([0.25]))


def test_a_pair_left_out_may_hold_nan_and_a_pair_left_in_may_not_hide_it():
    chosen_B = torch.tensor([math.log(3.0), NAN], requires_grad=True)
    loss, metrics = bradley_terry(chosen_B, torch.zeros(2), weight_B=torch.tensor([True, False]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3))
    assert metrics["accuracy"].item() == 1.0
    torch.testing.assert_close(chosen_B.grad, torch.tensor([-0.25, 0.0]))
    loss, metrics = bradley_terry(chosen_B, torch.zeros(2))
    assert loss.isnan()
    assert metrics["accuracy"].isnan()
    assert metrics["margin"].isnan()


def test_no_pair_gives_a_backward_able_zero_and_nan_metrics():
    chosen_B = torch.tensor([NAN, 2.0], requires_grad=True)
    loss, metrics = bradley_terry(chosen_B, torch.zeros(2), weight_B=torch.zeros(2))
    loss.backward()
    assert loss.item() == 0.0
    assert chosen_B.grad is not None
    assert chosen_B.grad.tolist() == [0.0, 0.0]
    assert metrics["accuracy"].isnan()
    assert metrics["margin"].isnan()


def test_bradley_terry_and_score_l2_split_into_micro_batches():
    chosen_B, rejected_B = torch.tensor([1.0, 2.0, -1.0, 0.5]), torch.tensor([0.0, 3.0, 1.0, NAN])
    valid_B = torch.tensor([True, True, True, False])
    for whole, loss in (
        (bradley_terry(chosen_B, rejected_B, valid_B)[0], lambda c, r, v: bradley_terry(c, r, v, denominator=3)[0]),
        (
            score_l2([chosen_B, rejected_B], [valid_B] * 2)[0],
            lambda c, r, v: score_l2([c, r], [v] * 2, denominators=[3, 3])[0],
        ),
    ):
        parts = [loss(chosen_B[i : i + 1], rejected_B[i : i + 1], valid_B[i : i + 1]) for i in range(4)]
        torch.testing.assert_close(sum(parts), whole)


def test_score_l2_by_hand():
    # Four terms of two rows: means of squares (1 + 9) / 2 = 5, 4, 0 and 1; over four: 2.5; x 0.001.
    scores = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, -2.0]), torch.zeros(2), torch.ones(2)]
    loss, metrics = score_l2(scores)
    assert loss.item() == pytest.approx(0.0025)
    assert metrics["score_square"].item() == pytest.approx(2.5)


def test_score_l2_takes_each_term_over_its_own_rows():
    # Demonstrations over all three rows, (1 + 4 + 9) / 3 = 14 / 3; rollouts over the one valid, 4.
    # (14 / 3 + 4) / 2 x 0.3 = 1.3.
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, NAN, NAN])]
    weights = [torch.ones(3), torch.tensor([True, False, False])]
    loss, metrics = score_l2(scores, weights, 0.3)
    assert loss.item() == pytest.approx(1.3)
    assert metrics["score_square"].item() == pytest.approx(13 / 3)
    assert score_l2(scores, weights, 0.3, [6, 2])[0].item() == pytest.approx(0.65)


def test_the_discriminators_loss_by_hand():
    chosen = Scores(
        {"p": torch.tensor([1.0, 2.0]), "r": torch.tensor([0.0, 2.0])}, torch.tensor([True, True]), ZERO, {}
    )
    rolled = Scores(
        {"p": torch.tensor([1.0, NAN]), "r": torch.tensor([0.0, NAN])}, torch.tensor([True, False]), ZERO, {}
    )
    # One pair: both margins are 0, so log 2 an expert. Squares: demonstrations (1 + 4) / 2 and (0 + 4) / 2, rollouts 1
    # and 0: (2.5 + 2 + 1 + 0) / 4 = 1.375. aux_loss 0.
    loss, metrics = discriminator_loss(chosen, rolled, 0.0, 0.1)
    assert loss.item() == pytest.approx(2 * math.log(2) + 0.1375)
    assert metrics["p"]["num_pairs"] == 1
    # Without a pair nothing is left, the demonstrations' squares neither; only aux_loss, of which each pass has one.
    nothing = Scores({e: torch.full((2,), NAN) for e in "pr"}, torch.zeros(2, dtype=torch.bool), ZERO + 0.5, {})
    assert discriminator_loss(chosen, nothing, 0.0, 0.1)[0].item() == 0.5


def test_soft_clip_is_the_identity_near_zero_and_bounded_far_away():
    # u = 1: 10 / sqrt 2. u = 3/4: sqrt(1 + 9/16) = 5/4, 7.5 / 1.25 = 6.
    scores = torch.tensor([0.0, 0.01, 10.0, 7.5, -7.5, 1e5])
    clipped = soft_clip(scores, 10.0)
    torch.testing.assert_close(clipped, torch.tensor([0.0, 0.01, 10 / math.sqrt(2), 6.0, -6.0, 10.0]))
    assert clipped.abs().max().item() <= 10.0
    with pytest.raises(ValueError, match="score_clip: 0"):
        soft_clip(scores, 0)


def test_soft_clip_has_a_gradient_where_clamp_and_tanh_have_none():
    scores = torch.tensor([-10000.0, -200.0, -10.0, 0.0, 10.0, 200.0, 10000.0], requires_grad=True)
    soft_clip(scores, 10.0).sum().backward()
    slopes = scores.grad
    assert slopes is not None
    assert (slopes > 0).all()
    # (1 + 1)^(-3/2) at the limit, 401^(-3/2) at twenty times the limit.
    torch.testing.assert_close(slopes[[3, 4, 5]], torch.tensor([1.0, 2**-1.5, 401**-1.5]))


POLICY_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE_V = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)


def test_kl_estimators_by_hand():
    logps_BT, ref_logps_BT = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    # d = log 2: k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 + log 2 - 1.
    assert kl_estimate(logps_BT, ref_logps_BT, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(logps_BT, ref_logps_BT, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(logps_BT, ref_logps_BT, "k3").item() == pytest.approx(math.log(2) - 0.5)
    with pytest.raises(ValueError, match="kl: 'k4'"):
        kl_estimate(logps_BT, ref_logps_BT, "k4")  # type: ignore[arg-type]


def test_values_of_k1_and_k3_average_to_the_kl_and_that_of_k2_does_not():
    kl = (POLICY_V * (POLICY_V / REFERENCE_V).log()).sum()
    mean = {k: (POLICY_V * kl_estimate(POLICY_V.log(), REFERENCE_V.log(), k)).sum() for k in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], kl)
    torch.testing.assert_close(mean["k3"], kl)
    assert abs(mean["k2"] - kl).item() > 0.001


def test_gradients_as_loss_terms_k1_none_k2_the_kls_k3_the_other_directions():
    def gradient(objective):
        logits_V = POLICY_V.log().clone().requires_grad_()
        objective(logits_V.log_softmax(-1)).backward()
        return logits_V.grad

    def sampled(kind):  # what a loss averages over samples: the sampling probabilities carry no gradient
        return gradient(lambda logps_V: (POLICY_V * kl_estimate(logps_V, REFERENCE_V.log(), kind)).sum())

    forward = gradient(lambda logps_V: (logps_V.exp() * (logps_V - REFERENCE_V.log())).sum())
    backward = gradient(lambda logps_V: (REFERENCE_V * (REFERENCE_V.log() - logps_V)).sum())
    torch.testing.assert_close(sampled("k1"), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(sampled("k2"), forward)
    torch.testing.assert_close(sampled("k3"), backward)
    assert (forward - backward).abs().max().item() > 0.05


def test_no_gradient_reaches_the_reference():
    logps_BT, ref_logps_BT = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-2.0]], requires_grad=True)
    kl_estimate(logps_BT, ref_logps_BT, "k3").sum().backward()
    assert logps_BT.grad is not None
    assert ref_logps_BT.grad is None


@pytest.mark.parametrize(("kind", "place"), [("k1", "reward"), ("k2", "loss"), ("k3", "loss")])
def test_kl_placements_that_work_are_accepted(kind, place):
    check_kl_placement(kind, place)


@pytest.mark.parametrize(
    ("kind", "place", "message"),
    [
        ("k1", "loss", "no gradient in expectation"),
        ("k2", "reward", "'k2' is not offered in the reward"),
        ("k3", "reward", "'k3' is not offered in the reward"),
        ("k9", "loss", "kl: 'k9'"),
        ("k2", "advantage", "kl place: 'advantage'"),
    ],
)
def test_kl_placements_that_do_not_work_are_refused(kind, place, message):
    with pytest.raises(ValueError, match=message):
        check_kl_placement(kind, place)
