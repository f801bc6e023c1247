"""The panel: what flags style and what does not, its numbers by hand, the same after a resume.

Over two ranks: tests/test_metrics_distributed.py.
"""

import math
import warnings

import numpy as np
import pytest
import torch

from callbacks import DiscriminatorHealth
from prism_pl.health.features import length_features, surface_features
from prism_pl.health.panel import SATURATED_MARGIN, SATURATED_SHARE, ExpertPanel, Judged, joined, judged
from prism_pl.health.shadow import OnlineRegression, Shadow, deviations, explained_variance
from prism_pl.losses import soft_clip
from tests.style_game import Game
from tests.test_callbacks import Stage, fit, read, scalars, step_outputs


def play(game: Game, panel: ExpertPanel, num_steps: int) -> dict[str, float]:
    numbers = {}
    for _ in range(num_steps):
        numbers = panel.update(judged(game.step())["perception"], 10.0)
    return numbers


def test_longer_demonstrations_are_flagged():
    numbers = play(Game(longer=2), ExpertPanel(window=20), 30)
    assert numbers["accuracy/discriminator"] > 0.85
    assert numbers["accuracy/length"] > numbers["accuracy/discriminator"] - 0.03
    assert numbers["explained/length"] > 0.5
    assert numbers["style/length"] == 1


@pytest.mark.parametrize("token", ["- indeed", "**", "- ✓"])
def test_a_token_that_only_demonstrations_have_is_flagged(token):
    numbers = play(Game(token=token), ExpertPanel(window=20), 40)
    assert numbers["accuracy/discriminator"] > 0.95
    assert numbers["accuracy/surface"] > 0.95
    assert numbers["style/surface"] == 1


def test_content_alone_is_not_flagged():
    numbers = play(Game(true=(1.0, 0.1)), ExpertPanel(window=20), 60)
    assert numbers["accuracy/discriminator"] > 0.85
    for shadow in ("length", "surface"):
        assert numbers[f"accuracy/{shadow}"] < 0.65
        assert numbers[f"explained/{shadow}"] < 0.2
        assert numbers[f"style/{shadow}"] == 0


def test_a_game_in_which_nothing_tells_the_sides_apart_is_not_flagged():
    """The end of a good game: the shadows are as good as the discriminator, and none is better than chance."""
    numbers = play(Game(), ExpertPanel(window=40), 60)
    assert abs(numbers["accuracy/discriminator"] - 0.5) < 0.1
    assert abs(numbers["accuracy/length"] - 0.5) < 0.1
    panel = ExpertPanel(window=2)
    chance = {"accuracy/discriminator": 0.52, "accuracy/length": 0.525, "explained/length": 0.1}
    assert panel._flag(chance, "length") == 0
    assert panel._flag(chance | {"accuracy/length": 0.56}, "length") == 1
    assert panel._flag(chance | {"explained/length": 0.51}, "length") == 1
    assert panel._flag(chance | {"explained/length": math.nan}, "length") == 0
    assert math.isnan(panel._flag(chance | {"accuracy/discriminator": math.nan}, "length"))


def test_within_three_points_and_not_four():
    panel = ExpertPanel()
    numbers = {"accuracy/discriminator": 0.93, "accuracy/length": 0.905, "explained/length": 0.5}
    assert panel._flag(numbers, "length") == 1
    assert panel._flag(numbers | {"accuracy/length": 0.89}, "length") == 0


# By hand


def plain(scores, demonstration, valid=None) -> Judged:
    """Judged prompts whose texts are all alike."""
    scores_PG = torch.tensor(scores, dtype=torch.float64)
    valid_PG = torch.ones_like(scores_PG, dtype=torch.bool) if valid is None else torch.tensor(valid)
    panel = ExpertPanel()
    widths = {name: len(shadow.pairs.weights_K) for name, shadow in panel.shadows.items()}
    return Judged(
        scores_PG,
        torch.tensor(demonstration, dtype=torch.float64),
        valid_PG,
        {name: torch.zeros(*scores_PG.shape, k, dtype=torch.float64) for name, k in widths.items()},
        {name: torch.zeros(len(scores_PG), k, dtype=torch.float64) for name, k in widths.items()},
    )


def test_accuracy_spread_and_saturation_by_hand():
    nan = float("nan")
    # Pairs: 9 - 1, 9 - 3, 4 - 4; the malformed rollout's NaN is not read.
    step = plain([[1.0, 3.0], [4.0, nan]], [9.0, 4.0], [[True, True], [True, False]])
    numbers = ExpertPanel().update(step, score_clip=10.0)
    assert numbers["accuracy/discriminator"] == pytest.approx(2.5 / 3)
    assert numbers["score_std"] == pytest.approx(math.sqrt(2))  # of 1 and 3; a single rollout has no spread
    assert pytest.approx(math.log(99)) == SATURATED_MARGIN
    assert numbers["saturated_margins"] == pytest.approx(2 / 3)  # 8 and 6, above 4.6
    assert numbers["saturated_scores"] == 0  # of 1, 3, 4, 9, 4 none is beyond 9.77
    assert ExpertPanel().update(step, score_clip=9.1)["saturated_scores"] == pytest.approx(1 / 5)  # beyond 8.89
    # Texts that are all alike: every pair is a tie, and nothing of the scores is explained.
    assert numbers["accuracy/length"] == 0.5
    assert numbers["explained/surface"] == 0.0
    assert not any(name.startswith("style/") for name in numbers)  # the window is not full
    assert "saturated_scores" not in ExpertPanel().update(step)


def test_a_saturated_score_has_a_hundredth_of_its_gradient_left():
    limit = 10.0
    score = torch.tensor(limit * SATURATED_SHARE / math.sqrt(1 - SATURATED_SHARE**2), requires_grad=True)
    clipped = soft_clip(score, limit)
    clipped.backward()
    assert float(clipped) == pytest.approx(limit * SATURATED_SHARE)
    assert float(score.grad) == pytest.approx(0.01, rel=1e-4)


def test_numbers_are_sums_over_the_window():
    panel = ExpertPanel(window=2)
    panel.update(plain([[0.0]], [9.0]))
    panel.update(plain([[5.0, 5.0, 5.0]], [4.0]))
    # The first step, a won pair, has left the window: 3 lost pairs and a won one.
    assert panel.update(plain([[0.0]], [9.0]))["accuracy/discriminator"] == pytest.approx(1 / 4)


def test_a_nan_score_is_nan_and_leaves_with_its_step():
    panel = ExpertPanel(window=2)
    nan = float("nan")
    numbers = panel.update(plain([[nan, 1.0]], [2.0]), 10.0)
    for name in ("accuracy/discriminator", "score_std", "saturated_margins", "saturated_scores", "explained/length"):
        assert math.isnan(numbers[name]), name
    numbers = panel.update(plain([[0.0, 1.0]], [2.0]), 10.0)
    assert math.isnan(numbers["style/length"])
    numbers = panel.update(plain([[0.0, 1.0]], [2.0]), 10.0)
    assert numbers["accuracy/discriminator"] == 1
    assert numbers["explained/length"] == 0  # the shadow's weights did not become NaN


def test_a_step_without_a_valid_rollout_has_no_numbers():
    numbers = ExpertPanel().update(plain([[0.0]], [2.0], [[False]]), 10.0)
    assert math.isnan(numbers["accuracy/discriminator"])
    assert math.isnan(numbers["accuracy/length"])
    assert math.isnan(numbers["explained/length"])


def test_explained_variance_by_hand():
    # Scores 1, 3 and 2, 6 lie -1, 1, -2, 2 from the means of their groups; predicted -1, 1, -1, 1: errors 0, 0, 1, 1.
    scores_PG = torch.tensor([[1.0, 3.0], [2.0, 6.0]])
    valid_PG = torch.ones(2, 2, dtype=torch.bool)
    assert deviations(scores_PG[..., None], valid_PG).flatten().tolist() == [-1, 1, -2, 2]
    assert explained_variance(error=2, total=10) == pytest.approx(0.8)
    assert math.isnan(explained_variance(0, 0))
    shadow = Shadow(1, window=10**9)
    features_PGK = torch.tensor([[0.0, 2.0], [0.0, 2.0]], dtype=torch.float64)[..., None]  # deviations -1, 1, -1, 1
    shadow.scores.weights_K = torch.ones(1, dtype=torch.float64)
    told = shadow.observe(features_PGK, torch.full((2, 1), 3.0, dtype=torch.float64), scores_PG.double(), valid_PG)
    assert (told["error"], told["total"]) == (2, 10)
    assert told["wins"] == 2  # every pair is a tie before it has learned that 3 lies above 0 and 2
    # Ridge regression: (2 + 4 + prior) / (4 + 0.1) with the prior 0.1 at the weight it had, 1.
    assert shadow.scores.weights_K.item() == pytest.approx(1 + (6 - 4) / 4.1)


def test_without_forgetting_the_regression_is_the_ridge_solution_of_all_batches():
    x_NK, y_N = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    model = OnlineRegression(4, "identity", keep=1.0, ridge=0.5)
    for rows in (slice(0, 7), slice(7, 7), slice(7, 30)):
        model.learn(x_NK[rows], y_N[rows])
    expected = torch.linalg.solve(x_NK.T @ x_NK + 0.5 * torch.eye(4, dtype=torch.float64), x_NK.T @ y_N)
    torch.testing.assert_close(model.weights_K, expected)


def test_what_is_forgotten_gives_way_to_the_prior():
    """Precision 0.5 around 0, one look at (1, 1): the weight is 1 / 1.5. n batches without evidence later the look
    weighs 0.9^n and the prior what it did, so that the weight is 0.9^n / (0.9^n + 0.5)."""
    model = OnlineRegression(1, "identity", keep=0.9, ridge=0.5)
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)
    model.learn(one, one[0])
    for n in range(200):
        assert model.weights_K.item() == pytest.approx(0.9**n / (0.9**n + 0.5))
        model.learn(none, none[:, 0])
    assert abs(model.weights_K.item()) < 1e-8


def test_with_forgetting_the_regression_is_the_weighted_ridge_solution():
    x_BNK, y_BN = torch.randn(6, 5, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    model = OnlineRegression(3, "identity", keep=0.8, ridge=0.5)
    precision_KK, evidence_K = 0.5 * torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for age, (x_NK, y_N) in zip(range(5, -1, -1), zip(x_BNK, y_BN, strict=True), strict=True):
        model.learn(x_NK, y_N)
        precision_KK, evidence_K = precision_KK + 0.8**age * x_NK.T @ x_NK, evidence_K + 0.8**age * x_NK.T @ y_N
    torch.testing.assert_close(model.weights_K, torch.linalg.solve(precision_KK, evidence_K))


def test_the_logistic_regression_comes_to_sklearns_solution_and_follows_a_change():
    from sklearn.linear_model import LogisticRegression

    truth_K = torch.tensor([1.5, -1.0, 0.0], dtype=torch.float64)
    x_NK = torch.randn(4000, 3, dtype=torch.float64)
    y_N = (torch.rand(4000, dtype=torch.float64) < (x_NK @ truth_K).sigmoid()).double()
    model = OnlineRegression(3, "logistic", keep=1.0, ridge=0.1)
    for rows in range(0, 4000, 40):
        model.learn(x_NK[rows : rows + 40], y_N[rows : rows + 40])
    fitted = LogisticRegression(C=10.0, fit_intercept=False).fit(x_NK.numpy(), y_N.numpy())
    np.testing.assert_allclose(model.weights_K.numpy(), fitted.coef_[0], atol=0.05)
    model.keep = 0.9
    for rows in range(0, 4000, 40):
        model.learn(x_NK[rows : rows + 40], 1 - y_N[rows : rows + 40])
    assert model.weights_K[0] < -1


def test_surface_does_not_see_length_or_values():
    one = "- a red 3 at top left\n- a blue 45 at the centre"
    assert surface_features(one) == pytest.approx(surface_features(f"{one}\n{one}"), abs=0.02)
    assert surface_features(one) == surface_features(one.replace("3", "9").replace("45", "61"))
    assert surface_features(one) != surface_features(one.replace("- ", "* "))
    assert surface_features(one) != surface_features(one.replace("a red", "A red"))
    assert length_features(one)[0] < length_features(f"{one}\n{one}")[0]
    assert length_features(one) == length_features(one.replace("- ", "* "))
    assert len(surface_features("")) == len(surface_features(one))


def test_groups_that_span_ranks_are_put_together():
    whole = judged(Game(longer=1).step(num_prompts=2, num_rollouts=4))["perception"]
    # Four ranks: two hold the first prompt, two the second, each two of its rollouts.
    parts = [_part(whole, slice(p, p + 1), slice(g, g + 2)) for p in (0, 1) for g in (0, 2)]
    again = joined(parts, ranks_per_group=2)
    assert torch.equal(again.scores_PG, whole.scores_PG)
    assert torch.equal(again.demonstration_P, whole.demonstration_P)
    assert torch.equal(again.valid_PG, whole.valid_PG)
    for name in whole.rollouts:
        assert torch.equal(again.rollouts[name], whole.rollouts[name])
        assert torch.equal(again.demonstrations[name], whole.demonstrations[name])


def _part(step: Judged, prompts: slice, rollouts: slice) -> Judged:
    return Judged(
        step.scores_PG[prompts, rollouts],
        step.demonstration_P[prompts],
        step.valid_PG[prompts, rollouts],
        {name: value[prompts, rollouts] for name, value in step.rollouts.items()},
        {name: value[prompts] for name, value in step.demonstrations.items()},
    )


# The callback


class Playing(Stage):
    """A stage whose steps are a game's."""

    def __init__(self, game: Game) -> None:
        super().__init__()
        self.game = game
        self.discriminator = torch.nn.ModuleDict(
            {"perception": torch.nn.Linear(3, 1, bias=False), "trunk": torch.nn.Linear(1, 2, bias=False)}
        )

    def training_step(self, batch, batch_idx):
        self.discriminator.zero_grad()
        # Gradients (3, 0, 4) of the expert's own, a norm of 5, and (5, 12) of the rest, a norm of 13.
        own, rest = self.discriminator["perception"].weight, self.discriminator["trunk"].weight
        self.manual_backward((own * torch.tensor([3.0, 0.0, 4.0])).sum() + (rest.T * torch.tensor([5.0, 12.0])).sum())
        return self.game.step()


def test_the_panel_is_logged_and_warns_once_with_the_numbers(tmp_path):
    callback = DiscriminatorHealth(window=8, every_n_steps=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, [callback], Playing(Game(longer=2)), num_steps=12)
    events = read(tmp_path)
    for reader in ("discriminator", "length", "surface"):
        assert [step for step, _ in scalars(events, f"health/accuracy/perception/{reader}")] == list(range(12))
    assert [step for step, _ in scalars(events, "health/style/perception/length")] == list(range(7, 12))
    assert scalars(events, "health/style/perception/length")[-1][1] == 1
    assert scalars(events, "health/grad_norm/perception")[0][1] == pytest.approx(5)
    assert scalars(events, "health/grad_norm/shared")[0][1] == pytest.approx(13)
    assert scalars(events, "health/saturated_scores/perception")[0][1] == 0
    assert [event.step for event in events.Histograms("health/margin/perception")] == [0, 5, 10]
    assert events.Histograms("health/margin/perception")[0].histogram_value.num == 16
    said = [str(w.message) for w in caught if "may be rewarding style" in str(w.message)]
    assert sum(text.count("length alone") for text in said) == 1
    about_length = next(text for text in said if "length alone" in text)
    accuracies = [scalars(events, f"health/accuracy/perception/{name}") for name in ("discriminator", "length")]
    when = next(step for step, flag in scalars(events, "health/style/perception/length") if flag)
    one, other = (f"{dict(values)[when]:.1%}" for values in accuracies)
    assert f"Over the last 8 steps the expert perception ranks {one} of the pairs right, length alone {other}" in (
        about_length
    )


def test_the_panel_needs_both_sides(tmp_path):
    outputs = step_outputs()
    del outputs["demonstrations"]
    with pytest.raises(
        ValueError, match=r"callbacks\.DiscriminatorHealth needs demonstrations, score_clip, ranks_per_group"
    ):
        fit(tmp_path, [DiscriminatorHealth()], Stage(outputs))
    for options in ({"window": 1}, {"every_n_steps": 0}, {"accuracy_margin": 0.5}, {"max_explained": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            DiscriminatorHealth(**options)


def test_a_resumed_panel_goes_on_to_the_last_bit(tmp_path):
    game = Game(longer=1)
    steps = [judged(game.step())["perception"] for _ in range(8)]
    whole, first = DiscriminatorHealth(window=5), DiscriminatorHealth(window=5)
    for callback, part in ((whole, steps), (first, steps[:5])):
        for step in part:
            callback._newly_flagged("perception", callback._panel("perception").update(step, 10.0))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = DiscriminatorHealth(window=5)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.warned == first.warned
    for step in steps[5:]:
        again = resumed._panel("perception").update(step, 10.0)
    assert again == numbers_of(whole, steps)
    one, other = (c._panel("perception").shadows["surface"].pairs for c in (whole, resumed))
    assert torch.equal(one.weights_K, other.weights_K)
    assert torch.equal(one.precision_KK, other.precision_KK)


def numbers_of(whole: DiscriminatorHealth, steps: list[Judged]) -> dict[str, float]:
    """The whole run's last numbers, played anew."""
    panel = ExpertPanel(whole.window)
    return [panel.update(step, 10.0) for step in steps][-1]
