"""Advantages, every corner of the `paper` and `released` tables: against values worked out by hand."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prism_pl.advantages import (
    group_advantages,
    groups_with_variance,
    mixed_rewards,
    paper_advantages,
    released_advantages,
    segment_advantages,
    variance_shares,
)

NAN = math.nan
EPS = 1e-6


def scores_of(perception, reasoning):
    return {"perception": torch.tensor(perception), "reasoning": torch.tensor(reasoning)}


def valid_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_paper_mixes_first_and_then_normalises():
    # alpha 0.25: r = 0.25 (1, 2, 3) + 0.75 (4, 0, 2) = (3.25, 0.5, 2.25): mean 2, deviations 1.25 -1.5 0.25,
    # squares 1.5625 + 2.25 + 0.0625 = 3.875, variance 1.9375.
    advantages, metrics = paper_advantages(
        scores_of([[1.0, 2.0, 3.0]], [[4.0, 0.0, 2.0]]), valid_of([1, 1, 1]), alpha=0.25
    )
    std = math.sqrt(1.9375)
    assert advantages[0].tolist() == pytest.approx([1.25 / std, -1.5 / std, 0.25 / std], abs=2e-6)
    assert {name: value.item() for name, value in metrics.items()} == {
        "num_zero_std_groups": 0,
        "num_all_malformed_groups": 0,
        "num_malformed": 0,
    }


def test_released_normalises_first_and_then_mixes():
    # Perception (1, 2, 3): std 1: (-1, 0, 1). Reasoning (4, 0, 2): mean 2, std 2: (1, -1, 0). alpha 0.25.
    scores = scores_of([[1.0, 2.0, 3.0]], [[4.0, 0.0, 2.0]])
    advantages, _ = released_advantages(scores, valid_of([1, 1, 1]), alpha=0.25)
    assert advantages[0].tolist() == pytest.approx([-0.25 + 0.75, -0.75, 0.25], abs=2e-6)
    advantages, _ = released_advantages(scores, valid_of([1, 1, 1]))
    assert advantages[0].tolist() == pytest.approx([0.0, -0.5, 0.5], abs=2e-6)


def test_alpha_weighs_perception():
    scores, valid_PG = scores_of([[0.0, 1.0]], [[1.0, 0.0]]), valid_of([1, 1])
    for advantages_fn in (paper_advantages, released_advantages):
        # Perception alone: deviations -0.5 and 0.5, std sqrt(0.5).
        expected = [-0.5 / math.sqrt(0.5), 0.5 / math.sqrt(0.5)]
        assert advantages_fn(scores, valid_PG, alpha=1.0)[0][0].tolist() == pytest.approx(expected, abs=2e-6)
        assert advantages_fn(scores, valid_PG, alpha=0.0)[0][0].tolist() == pytest.approx(expected[::-1], abs=2e-6)


def test_paper_gives_a_malformed_response_the_lowest_valid_mixture_minus_one():
    # r = (2, NaN, 4) -> (2, 1, 4): mean 7/3, deviations -1/3 -4/3 5/3, squares (1 + 16 + 25) / 9, variance 21/9.
    scores = scores_of([[1.0, NAN, 5.0]], [[3.0, NAN, 3.0]])
    advantages, metrics = paper_advantages(scores, valid_of([1, 0, 1]))
    std = math.sqrt(21 / 9)
    assert advantages[0].tolist() == pytest.approx([-1 / 3 / std, -4 / 3 / std, 5 / 3 / std], abs=2e-6)
    assert metrics["num_malformed"].item() == 1


def test_released_gives_each_experts_lowest_minus_one_and_then_the_penalty():
    # Perception (1, NaN, 5) -> (1, 0, 5): mean 2, deviations -1 -2 3, variance 7.
    # Reasoning (3, NaN, 3) -> (3, 2, 3): mean 8/3, deviations 1/3 -2/3 1/3, variance 1/3.
    scores = scores_of([[1.0, NAN, 5.0]], [[3.0, NAN, 3.0]])
    advantages, metrics = released_advantages(scores, valid_of([1, 0, 1]))
    p, r = math.sqrt(7), math.sqrt(1 / 3)
    expected = [0.5 * (-1 / p + 1 / 3 / r), 0.5 * (-2 / p - 2 / 3 / r) - 1.5, 0.5 * (3 / p + 1 / 3 / r)]
    assert advantages[0].tolist() == pytest.approx(expected, abs=3e-6)
    assert metrics["num_malformed"].item() == 1
    softer, _ = released_advantages(scores, valid_of([1, 0, 1]), malformed_penalty=0.25)
    assert softer[0].tolist() == pytest.approx([expected[0], expected[1] + 1.25, expected[2]], abs=3e-6)


@pytest.mark.parametrize("advantages_fn", [paper_advantages, released_advantages])
@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf, 1e30, 0.0])
def test_a_malformed_rows_scores_are_never_read(advantages_fn, garbage):
    valid_PG = valid_of([1, 0, 1], [1, 1, 1])
    result = advantages_fn(scores_of([[1.0, garbage, 5.0], [1.0, 2.0, 3.0]], [[3.0, garbage, 3.0]] * 2), valid_PG)[0]
    # The second group's middle row is valid, so only the first group is compared.
    clean = advantages_fn(scores_of([[1.0, -7.0, 5.0], [1.0, 2.0, 3.0]], [[3.0, -7.0, 3.0]] * 2), valid_PG)[0]
    assert result[0].isfinite().all()
    assert result[0].tolist() == clean[0].tolist()


def test_a_group_without_a_valid_response():
    scores, valid_PG = scores_of([[NAN, 3.0], [0.0, 1.0]], [[NAN, 9.0], [0.0, 1.0]]), valid_of([0, 0], [1, 1])
    half = 0.5 / math.sqrt(0.5)
    paper, paper_metrics = paper_advantages(scores, valid_PG)
    assert paper[0].tolist() == [0.0, 0.0]
    assert paper[1].tolist() == pytest.approx([-half, half], abs=2e-6)
    released, released_metrics = released_advantages(scores, valid_PG)
    assert released[0].tolist() == [-1.5, -1.5]
    assert released[1].tolist() == pytest.approx([-half, half], abs=2e-6)
    for metrics in (paper_metrics, released_metrics):
        assert metrics["num_all_malformed_groups"].item() == 1
        assert metrics["num_zero_std_groups"].item() == 0
        assert metrics["num_malformed"].item() == 2


def test_groups_of_one():
    scores = scores_of([[3.0], [NAN]], [[1.0], [NAN]])
    valid_PG = valid_of([1], [0])
    paper, metrics = paper_advantages(scores, valid_PG)
    assert paper.tolist() == [[0.0], [0.0]]
    assert (metrics["num_zero_std_groups"].item(), metrics["num_all_malformed_groups"].item()) == (1, 1)
    released, metrics = released_advantages(scores, valid_PG, alpha=0.75)
    # 0.75 x 3 + 0.25 x 1 = 2.5; malformed: -1 - 1.5.
    assert released[:, 0].tolist() == pytest.approx([2.5 / (1 + EPS), -1 / (1 + EPS) - 1.5], rel=1e-7)
    assert (metrics["num_zero_std_groups"].item(), metrics["num_all_malformed_groups"].item()) == (0, 1)
    grouped, metrics = group_advantages(torch.tensor([[0.7]]))
    assert grouped.tolist() == [[0.0]]
    assert metrics["num_zero_std_groups"].item() == 1


@pytest.mark.parametrize("value", [0.1, 9.7, -1e4])
def test_equal_scores_give_exactly_zero_also_with_float_noise(value):
    # Neighbouring float32 numbers: std in the order of the last digit, which eps alone would not silence.
    exact = torch.full((1, 7), value)
    noisy = exact.clone()
    noisy[0, ::2] = torch.nextafter(exact[0, ::2], torch.tensor(math.inf))
    for values in (exact, noisy):
        scores = {"perception": values, "reasoning": values}
        for advantages_fn in (paper_advantages, released_advantages):
            advantages, metrics = advantages_fn(scores, torch.ones(1, 7, dtype=torch.bool))
            assert advantages.abs().max().item() == 0.0
            assert metrics["num_zero_std_groups"].item() == 1
        for scale in ("group", "batch", "none"):
            advantages, metrics = group_advantages(values, scale)
            assert advantages.abs().max().item() == 0.0
            assert metrics["num_zero_std_groups"].item() == 1


def test_small_but_real_differences_are_not_silenced():
    # Scores of a discriminator early on: std 1e-4 sqrt(0.5) is a hundred times the floor.
    scores = scores_of([[0.0, 1e-4]], [[0.0, 1e-4]])
    half = 0.5e-4 / (1e-4 * math.sqrt(0.5) + EPS)
    for advantages_fn in (paper_advantages, released_advantages):
        advantages, metrics = advantages_fn(scores, valid_of([1, 1]))
        assert advantages[0].tolist() == pytest.approx([-half, half], rel=1e-5)
        assert metrics["num_zero_std_groups"].item() == 0


def test_released_group_with_one_silent_expert_still_trains():
    # Perception is constant and gives 0; reasoning (0, 1) gives -+0.5 / sqrt 0.5, halved.
    advantages, metrics = released_advantages(scores_of([[2.0, 2.0]], [[0.0, 1.0]]), valid_of([1, 1]))
    assert advantages[0].tolist() == pytest.approx([-0.25 / math.sqrt(0.5), 0.25 / math.sqrt(0.5)], abs=2e-6)
    assert metrics["num_zero_std_groups"].item() == 0


@pytest.mark.parametrize("advantages_fn", [paper_advantages, released_advantages])
def test_nan_in_a_valid_row_is_seen_and_stays_in_its_group(advantages_fn):
    scores = scores_of([[NAN, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]])
    advantages, _ = advantages_fn(scores, valid_of([1, 1], [1, 1]))
    assert advantages[0].isnan().all()
    assert advantages[1].isfinite().all()
    alone, _ = advantages_fn(scores_of([[NAN]], [[1.0]]), valid_of([1]))
    assert alone.isnan().all()


def test_group_advantages_by_hand():
    # Group 1: (1, 0, 0, 1) mean 1/2, variance 4 x 1/4 / 3 = 1/3. Group 2: (1, 0, 0, 0) mean 1/4, variance
    # (9/16 + 3/16) / 3 = 1/4. Group 3: no variance.
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    advantages, metrics = group_advantages(rewards_PG)
    a = 0.5 / math.sqrt(1 / 3)
    assert advantages[0].tolist() == pytest.approx([a, -a, -a, a], abs=3e-6)
    assert advantages[1].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=5e-6)
    assert advantages[2].tolist() == [0.0] * 4
    assert metrics["num_zero_std_groups"].item() == 1

    centred = [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0.0] * 4]
    advantages, metrics = group_advantages(rewards_PG, "none")
    assert advantages.tolist() == centred
    assert metrics["num_zero_std_groups"].item() == 1
    # Batch: 7 ones of 12, variance 12/11 x 7/12 x 5/12 = 35/132.
    advantages, _ = group_advantages(rewards_PG, "batch")
    torch.testing.assert_close(advantages, torch.tensor(centred) / (math.sqrt(35 / 132) + EPS))


def test_groups_with_variance_are_those_that_teach():
    accuracy_PG = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert groups_with_variance(accuracy_PG).tolist() == [True, False, False]
    assert groups_with_variance(accuracy_PG[:, :1]).tolist() == [False, False, False]


def test_bad_options_are_named_with_their_value():
    scores, valid_PG = scores_of([[1.0, 2.0]], [[1.0, 2.0]]), valid_of([1, 1])
    with pytest.raises(ValueError, match=r"alpha: 1\.5"):
        paper_advantages(scores, valid_PG, alpha=1.5)
    with pytest.raises(ValueError, match=r"malformed_penalty: -1\.5"):
        released_advantages(scores, valid_PG, malformed_penalty=-1.5)
    with pytest.raises(ValueError, match=r"experts \['caption'\]"):
        paper_advantages({"caption": scores["perception"]}, valid_PG)
    with pytest.raises(ValueError, match="scale: 'std'"):
        group_advantages(scores["perception"], "std")  # type: ignore[arg-type]


def test_results_keep_the_inputs_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        scores = {name: torch.tensor([[1.0, 2.0]], dtype=dtype) for name in ("perception", "reasoning")}
        assert paper_advantages(scores, valid_of([1, 1]))[0].dtype == dtype
        assert group_advantages(scores["perception"])[0].dtype == dtype


class NoFloat64(TorchDispatchMode):
    """Refuses float64 anywhere but on the CPU, as MPS does, and counts what it looked at off the CPU."""

    def __init__(self):
        super().__init__()
        self.num_elsewhere = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
                self.num_elsewhere += 1
                assert tensor.dtype != torch.float64, func
        return out


def test_float64_stays_on_the_cpu_and_results_go_back_to_their_device():
    # Tensors of a device that need not be there: shapes, dtypes and devices are right, and nothing is computed.
    with FakeTensorMode(), NoFloat64() as watch:
        scores = {expert: torch.zeros(2, 4, device="cuda") for expert in ("perception", "reasoning")}
        valid_PG = torch.zeros(2, 4, dtype=torch.bool, device="cuda")
        found = [advantages(scores, valid_PG) for advantages in (paper_advantages, released_advantages)]
        found += [group_advantages(scores["reasoning"], scale) for scale in ("group", "batch", "none")]
        tensors = [tensor for advantages, metrics in found for tensor in (advantages, *metrics.values())]
        tensors.append(groups_with_variance(scores["reasoning"]))
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        assert {advantages.dtype for advantages, _ in found} == {torch.float32}
        assert watch.num_elsewhere > len(tensors)


def test_a_whole_responses_score_is_its_reward_whatever_alpha():
    scores = {"response": torch.tensor([[1.0, 2.0, 3.0]])}
    valid = valid_of([1, 1, 1])
    for alpha in (0.0, 0.5):
        assert paper_advantages(scores, valid, alpha)[0][0].tolist() == pytest.approx([-1, 0, 1], abs=2e-6)
        assert released_advantages(scores, valid, alpha)[0][0].tolist() == pytest.approx([-1, 0, 1], abs=2e-6)
        assert torch.equal(mixed_rewards(scores, alpha), scores["response"])
    pair = scores_of([[1.0, 2.0]], [[4.0, 0.0]])
    assert mixed_rewards(pair, 0.25)[0].tolist() == [0.25 + 3.0, 0.5]


def test_segment_advantages_by_hand():
    # Normalised: perception (1, 2, 3) -> (-1, 0, 1), reasoning (4, 0, 2) -> (1, -1, 0). Times 2 alpha, 2 (1 - alpha).
    scores, valid = scores_of([[1.0, 2.0, 3.0]], [[4.0, 0.0, 2.0]]), valid_of([1, 1, 1])
    for mixing in ("paper", "released"):
        by_expert, _ = segment_advantages(scores, valid, mixing, alpha=0.25)
        assert by_expert["perception"][0].tolist() == pytest.approx([-0.5, 0.0, 0.5], abs=2e-6)
        assert by_expert["reasoning"][0].tolist() == pytest.approx([1.5, -1.5, 0.0], abs=2e-6)
    # The third malformed: filled with the lowest minus 1, (1, 2, 0) and (4, 0, -1); the release takes 1.5 off.
    valid = valid_of([1, 1, 0])
    paper, told = segment_advantages(scores, valid, "paper")
    released, _ = segment_advantages(scores, valid, "released")
    assert paper["perception"][0].tolist() == pytest.approx([0.0, 1.0, -1.0], abs=2e-6)
    assert released["perception"][0].tolist() == pytest.approx([0.0, 1.0, -2.5], abs=2e-6)
    assert told["num_malformed"] == 1
    # Their mean is what `released` gives every token.
    mean = (released["perception"] + released["reasoning"]) / 2
    torch.testing.assert_close(mean, released_advantages(scores, valid)[0])


def test_segment_advantages_of_silent_groups():
    nothing = scores_of([[NAN, NAN], [1.0, 1.0]], [[NAN, NAN], [1.0, 3.0]])
    valid = valid_of([0, 0], [1, 1])
    by_expert, told = segment_advantages(nothing, valid, "paper")
    assert by_expert["perception"].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert by_expert["reasoning"][1].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)], abs=2e-6)
    assert told["num_all_malformed_groups"] == 1
    assert told["num_zero_std_groups"] == 0
    with pytest.raises(ValueError, match="malformed_penalty: -1"):
        segment_advantages(nothing, valid, "paper", malformed_penalty=-1)


def test_variance_shares_by_hand():
    # Terms at alpha 0.5: (0, 1) and (0, 3), centred (-0.5, 0.5) and (-1.5, 1.5), sum (-2, 2): variance 8, covariances
    # 2 x 1 and 2 x 3. A malformed row counts nowhere, and a second group adds what it has, here nothing.
    scores = scores_of([[0.0, 2.0, NAN], [5.0, 5.0, 5.0]], [[0.0, 6.0, NAN], [1.0, 1.0, 1.0]])
    valid = valid_of([1, 1, 0], [1, 1, 1])
    shares, variance = variance_shares(scores, valid, "paper", 0.5)
    assert variance.item() == pytest.approx(8)
    assert shares["perception"].item() == pytest.approx(0.25)
    assert shares["reasoning"].item() == pytest.approx(0.75)
    for alpha, share in ((0.0, 0.0), (1.0, 1.0)):
        assert variance_shares(scores, valid, "paper", alpha)[0]["perception"].item() == share
    # Normalised scores have one size: 0.5 each. With the malformed row filled in, (0, 2, -1) has a std of sqrt(7 / 3)
    # and (0, 6, -1) one of sqrt(43 / 3), so the valid two differ by 1.3093 and 1.5848: 1.3093 / 2.8941.
    whole = scores_of([[0.0, 2.0]], [[0.0, 6.0]])
    assert variance_shares(whole, valid_of([1, 1]), "released")[0]["perception"].item() == pytest.approx(0.5)
    assert variance_shares(scores, valid, "released")[0]["perception"].item() == pytest.approx(0.4524, abs=1e-4)
    # An expert that pulls against the sum: terms (0, -1) and (0, 3), sum (0, 2), centred 0.5 -0.5 against -1 1.
    against = scores_of([[0.0, -2.0]], [[0.0, 6.0]])
    assert variance_shares(against, valid_of([1, 1]), "paper")[0]["perception"].item() == pytest.approx(-0.5)
    silent, nothing = variance_shares(scores_of([[1.0, 1.0]], [[1.0, 1.0]]), valid_of([1, 1]), "paper")
    assert nothing == 0
    assert all(share.isnan() for share in silent.values())
