"""Classifiers that see only style, beside the discriminator: if one does as well, style may be all there is to it.

A shadow gets the discriminator's own task, pairs of a demonstration and a rollout of one prompt, and one more: to say
which of a prompt's rollouts the discriminator scores high. Like the discriminator's scores, its predictions of a batch
are made before it learns from that batch (prequential evaluation: Dawid 1984), so it earns nothing by memorising.
"""

from typing import Any, Literal

import torch
from torch import Tensor


class OnlineRegression:
    """A generalised linear model without intercept that takes one Newton step a batch and slowly forgets.

    `logistic` models P(y = 1) = sigmoid(w x), `identity` E(y) = w x. For `identity` without forgetting it is recursive
    least squares, the exact ridge solution of all batches so far; for `logistic` its extension by linearising at the
    last weights (Fahrmeir 1992). float64, on the CPU.

    Args:
        num_features: K.
        link: `logistic` or `identity`.
        keep: what a batch still weighs one batch later; 1 never forgets.
        ridge: precision of the prior around 0 on each weight, which never fades: without evidence weights go to 0.
    """

    def __init__(self, num_features: int, link: Literal["logistic", "identity"], keep: float, ridge: float) -> None:
        self.link, self.keep, self.ridge = link, keep, ridge
        self.weights_K = torch.zeros(num_features, dtype=torch.float64)
        self.precision_KK = ridge * torch.eye(num_features, dtype=torch.float64)

    def predict(self, x_NK: Tensor) -> Tensor:
        """The linear predictor w x, (N,): a logit or a mean."""
        return x_NK @ self.weights_K

    def learn(self, x_NK: Tensor, y_N: Tensor) -> None:
        """Take in a batch of any size, none included."""
        mean_N = self.predict(x_NK)
        variance_N = torch.ones_like(mean_N)
        if self.link == "logistic":
            mean_N = mean_N.sigmoid()
            variance_N = mean_N * (1 - mean_N)
        prior_KK = self.ridge * torch.eye(len(self.weights_K), dtype=torch.float64)
        seen_KK = x_NK.T @ (variance_N[:, None] * x_NK)
        self.precision_KK = self.keep * self.precision_KK + (1 - self.keep) * prior_KK + seen_KK
        # What the precision forgets and the prior fills up pulls to 0, where the prior lies, not to the last weights.
        pull_K = x_NK.T @ (y_N - mean_N) - (1 - self.keep) * self.ridge * self.weights_K
        self.weights_K = self.weights_K + torch.linalg.solve(self.precision_KK, pull_K)

    def state_dict(self) -> dict[str, Tensor]:
        return {"weights_K": self.weights_K, "precision_KK": self.precision_KK}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weights_K, self.precision_KK = state["weights_K"], state["precision_KK"]


class Shadow:
    """A logistic regression on pairs, and a linear one on the discriminator's scores, over the same features.

    Args:
        num_features: K.
        window: steps after which a batch weighs 1 / e: the policy moves, and so does what tells it apart.
    """

    def __init__(self, num_features: int, window: int) -> None:
        keep = 1 - 1 / window
        self.pairs = OnlineRegression(num_features, "logistic", keep, ridge=0.1)
        self.scores = OnlineRegression(num_features, "identity", keep, ridge=0.1)

    def observe(
        self, rollouts_PGK: Tensor, demonstrations_PK: Tensor, scores_PG: Tensor, valid_PG: Tensor
    ) -> dict[str, float]:
        """Predict, then learn from a step.

        Args:
            rollouts_PGK, demonstrations_PK: features.
            scores_PG: the discriminator's, of the rollouts.
            valid_PG: rollouts that have features and a score.

        Returns:
            Sums over the step: `wins` among its pairs, a tie counting one half; `error` and `total`, the squared error
            of the predicted scores and the squared scores, both of deviations from the means of their groups. Those are
            what the policy learns from; between prompts, Bradley-Terry leaves scores free.
        """
        pairs_NK = (demonstrations_PK[:, None] - rollouts_PGK)[valid_PG]
        margins_N = self.pairs.predict(pairs_NK)
        x_NK = deviations(rollouts_PGK, valid_PG)[valid_PG]
        y_N = deviations(scores_PG[..., None], valid_PG)[valid_PG].squeeze(-1)
        error = (y_N - self.scores.predict(x_NK)).square().sum()
        self.pairs.learn(pairs_NK, torch.ones_like(margins_N))
        known_N = y_N.isfinite()
        self.scores.learn(x_NK[known_N], y_N[known_N])
        wins = float(((margins_N.sign() + 1) / 2).sum())
        return {"wins": wins, "error": float(error), "total": float(y_N.square().sum())}

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": self.pairs.state_dict(), "scores": self.scores.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs.load_state_dict(state["pairs"])
        self.scores.load_state_dict(state["scores"])


def deviations(values_PGK: Tensor, valid_PG: Tensor) -> Tensor:
    """What each rollout has above the mean of its group's valid ones; what stands at the others is not read."""
    kept_PGK = torch.where(valid_PG[..., None], values_PGK, 0.0)
    mean_PK = kept_PGK.sum(1) / valid_PG.sum(1, keepdim=True).clamp_min(1)
    return values_PGK - mean_PK[:, None]


def explained_variance(error: float, total: float) -> float:
    """1 - error / total: the share of a variance that predictions account for; negative where they do harm, NaN where
    there is no variance."""
    return 1 - error / total if total != 0 else float("nan")
