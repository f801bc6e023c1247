"""The reward gap D_k(x, y+) - D_k(x, y-), the curve PRISM judges convergence by. The only place that logs it."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from prism_pl.outputs import step_output

NEEDS = ("scores", "demonstration_scores", "valid")


class RewardGap(Callback):
    """Logs, for each expert, over valid rollouts, each paired with its prompt's demonstration:

    * `align/reward_gap/<expert>`: the mean gap;
    * `align/discriminator_accuracy/<expert>`: the share of pairs with a gap above 0, a tie counting one half;
    * `align/score_std/<expert>`: the spread of the scores inside a group, which is what the policy learns from;
    * `align/val_reward_gap/<expert>`: the mean gap over a validation run; the training gap alone hides memorised
      demonstrations.

    A NaN score, or a step without any valid rollout, is logged as NaN. A group must arrive whole.
    """

    def __init__(self) -> None:
        self._validation: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics: dict[str, Any] = {}
        _update(metrics, step_output(outputs, NEEDS, "RewardGap"), pl_module)
        for expert, metric in metrics.items():
            values = metric.compute()
            pl_module.log(f"align/reward_gap/{expert}", values["gap"])
            pl_module.log(f"align/discriminator_accuracy/{expert}", values["accuracy"])
            pl_module.log(f"align/score_std/{expert}", values["score_std"])

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        _update(self._validation, step_output(outputs, NEEDS, "RewardGap"), pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for expert, metric in self._validation.items():
            pl_module.log(f"align/val_reward_gap/{expert}", metric.compute()["gap"], sync_dist=True)


def _update(metrics: dict[str, Any], step: Mapping[str, Any], pl_module: LightningModule) -> None:
    """Add a step to the metric of each expert, made here on first sight of the expert."""
    from prism_pl.metrics import RewardGapMetric

    for expert, scores_PG in step["scores"].items():
        if expert not in metrics:
            metrics[expert] = RewardGapMetric().to(pl_module.device)
        metrics[expert].update(step["demonstration_scores"][expert], scores_PG, step["valid"])
