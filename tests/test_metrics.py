from collections import Counter
from itertools import combinations

import pytest
import torch

from prism_pl.metrics import (
    CaptionFaithfulness,
    PassAtK,
    RewardGapMetric,
    StepCorrectness,
    compare_items,
    pass_at_k,
)

NAN = float("nan")


def test_pass_at_k_hand_values():
    # G = 4. c = 1: pass@1 = 1/4, pass@2 = 1 - C(3,2)/C(4,2) = 1 - 3/6; c = 0: 0; c = 3, k = 2: only one wrong, so 1
    correct_PG = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
    torch.testing.assert_close(pass_at_k(correct_PG, 1), torch.tensor([0.25, 0.0, 0.75]))
    torch.testing.assert_close(pass_at_k(correct_PG, 2), torch.tensor([0.5, 0.0, 1.0]))
    torch.testing.assert_close(pass_at_k(correct_PG, 4), torch.tensor([1.0, 0.0, 1.0]))


def test_pass_at_k_is_the_average_over_all_subsets():
    for num_right in range(7):
        row = [1] * num_right + [0] * (6 - num_right)
        for k in range(1, 7):
            subsets = [max(subset) for subset in combinations(row, k)]
            assert pass_at_k(torch.tensor([row]), k).item() == pytest.approx(sum(subsets) / len(subsets), abs=1e-6)


def test_pass_at_k_averages_over_prompts_with_different_numbers_of_rollouts():
    metric = PassAtK([1, 2])
    metric.update(torch.tensor([[1, 0]]))  # 1/2, 1
    metric.update(torch.tensor([[True, False, False, False], [False] * 4]))  # 1/4, 1/2 and 0, 0
    result = metric.compute()
    assert result["pass_at_1"].item() == pytest.approx(0.75 / 3)
    assert result["pass_at_2"].item() == pytest.approx(1.5 / 3)
    assert result["n"] == 3


def test_pass_at_k_refuses_what_it_cannot_estimate():
    with pytest.raises(ValueError, match=r"k=3 must lie in 1 \.\.\. 2.*sample more"):
        PassAtK([1, 3]).update(torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="besides 0 and 1"):
        PassAtK().update(torch.tensor([[1.0, NAN]]))
    with pytest.raises(ValueError, match="besides 0 and 1"):
        PassAtK().update(torch.tensor([[0.8, 0.2]]))
    with pytest.raises(ValueError, match="prompts x rollouts"):
        PassAtK().update(torch.tensor([1, 0]))
    for k in ([], [0], [2, 2]):
        with pytest.raises(ValueError, match="from 1 up"):
            PassAtK(k)


def test_pass_at_k_without_prompts_is_nan():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert PassAtK().compute()["pass_at_1"].isnan()


def test_reward_gap_hand_values():
    metric = RewardGapMetric()
    # gaps 2-0, 2-2, 2-4 and 1-0, 1-0, 1-0: mean 3 / 6; wins 1, tie, 0, 1, 1, 1 = 4.5 / 6
    # group stds: of 0, 2, 4: sqrt((4 + 0 + 4) / 2) = 2; of 0, 0, 0: 0; mean 1
    metric.update(torch.tensor([2.0, 1.0]), torch.tensor([[0.0, 2.0, 4.0], [0.0, 0.0, 0.0]]))
    result = metric.compute()
    assert result["gap"] == 0.5
    assert result["accuracy"] == 0.75
    assert result["score_std"] == 1.0
    assert (result["n"], result["malformed"]) == (6, 0)


def test_equal_scores_give_a_gap_of_exactly_zero_and_half_the_accuracy():
    metric = RewardGapMetric()
    metric.update(torch.tensor([0.1, -3.3]), torch.tensor([[0.1] * 5, [-3.3] * 5]))
    result = metric.compute()
    assert (result["gap"], result["accuracy"], result["score_std"]) == (0, 0.5, 0)


def test_malformed_rollouts_are_not_read_even_where_they_are_nan():
    metric = RewardGapMetric()
    scores_PG = torch.tensor([[0.0, 2.0, NAN], [NAN, 5.0, NAN], [NAN, NAN, NAN]])
    valid_PG = torch.tensor([[True, True, False], [False, True, False], [False] * 3])
    metric.update(torch.tensor([3.0, 6.0, 0.0]), scores_PG, valid_PG)
    result = metric.compute()
    # gaps 3, 1 and 1; the one group of two has the std sqrt((1 + 1) / 1)
    assert result["gap"].item() == pytest.approx(5 / 3)
    assert result["accuracy"] == 1
    assert result["score_std"].item() == pytest.approx(2**0.5)
    assert (result["n"], result["malformed"]) == (3, 6)


def test_nan_scores_stay_nan():
    metric = RewardGapMetric()
    metric.update(torch.tensor([1.0]), torch.tensor([[0.0, NAN]]))
    metric.update(torch.tensor([1.0]), torch.tensor([[0.0, 0.0]]))
    result = metric.compute()
    assert all(result[key].isnan() for key in ("gap", "accuracy", "score_std"))


def test_without_a_valid_rollout_there_is_no_gap():
    metric = RewardGapMetric()
    metric.update(torch.tensor([1.0]), torch.tensor([[0.0, 0.0]]), torch.tensor([[False, False]]))
    result = metric.compute()
    assert all(result[key].isnan() for key in ("gap", "accuracy", "score_std"))


def test_reward_gap_keeps_no_graph_and_checks_shapes():
    metric = RewardGapMetric()
    metric.update(torch.ones(1, requires_grad=True), torch.zeros(1, 2, requires_grad=True))
    assert not metric.compute()["gap"].requires_grad
    with pytest.raises(ValueError, match=r"\(P, G\).*got \(2,\), \(1, 2\)"):
        metric.update(torch.ones(2), torch.zeros(1, 2))


def test_items_are_compared_as_multisets():
    scene = Counter({"red 3": 2, "blue 5": 1})
    assert compare_items(["red 3", "blue 5", "green 7"], scene) == (2, 1, 1)
    assert compare_items(["red 3"] * 3, scene) == (2, 1, 1)
    assert compare_items({"red 3"}, ["red 3"]).exact
    assert compare_items([], []).exact
    with pytest.raises(ValueError, match="the one string 'red 3'"):
        compare_items("red 3", scene)


def test_caption_faithfulness_hand_values():
    metric = CaptionFaithfulness()
    scene = Counter({"red 3": 2, "blue 5": 1})
    metric.update([Counter(scene), ["red 3", "green 7"], None], [scene, scene, scene])
    result = metric.compute()
    # exact one: 3 true; the second: 1 true, 2 missed, 1 invented; precision 4 / 5, recall 4 / 6
    assert result["precision"].item() == pytest.approx(4 / 5)
    assert result["recall"].item() == pytest.approx(4 / 6)
    assert result["exact"] == 0.5
    assert [result[key].item() for key in ("true", "missed", "invented", "n", "malformed")] == [4, 2, 1, 2, 1]


def test_a_share_of_nothing_is_nan():
    captions, steps = CaptionFaithfulness(), StepCorrectness()
    captions.update([[]], [["red 3"]])
    result = captions.compute()
    assert result["precision"].isnan()
    assert result["recall"] == 0
    steps.update([0], [0], [2])
    assert steps.compute()["right"].isnan()
    with pytest.raises(ValueError, match="1 captions and 0 scenes"):
        captions.update([[]], [])


def test_step_correctness_hand_values():
    metric = StepCorrectness()
    # right (2 + 3) / (4 + 3); present (2 + min(3, 2)) / (3 + 2)
    metric.update(correct=[2, 3], stated=[4, 3], expected=[3, 2])
    result = metric.compute()
    assert result["right"].item() == pytest.approx(5 / 7)
    assert result["present"].item() == pytest.approx(4 / 5)
    assert result["n"] == 2


def test_a_right_step_stated_twice_covers_one_expected_step():
    metric = StepCorrectness()
    metric.update(correct=[2], stated=[2], expected=[2], present=[1])
    assert metric.compute()["present"] == 0.5


def test_step_correctness_refuses_impossible_counts():
    with pytest.raises(ValueError, match=r"response 1: correct=3 must lie in 0 \.\.\. stated=2"):
        StepCorrectness().update([1, 3], [1, 2], [1, 3])
    with pytest.raises(ValueError, match=r"response 0: present=2 must lie in 0 \.\.\. expected=1"):
        StepCorrectness().update([2], [2], [1], [2])
    with pytest.raises(ValueError, match="one number a response"):
        StepCorrectness().update([1], [1, 2], [1, 2])
