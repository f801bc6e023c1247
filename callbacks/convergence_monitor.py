"""When the game has settled: both experts' reward gaps lie flat and quiet. Marks the step, and may end the run."""

from collections import deque
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from prism_pl.convergence import settled, trend
from prism_pl.outputs import step_output

NEEDS = ("scores", "demonstration_scores", "valid")


class ConvergenceMonitor(Callback):
    """Logs, over the last `window` steps of each expert's mean reward gap (over all ranks), once there are so many:

    * `health/gap_slope/<expert>`, a step, and `health/gap_variance/<expert>`, see `prism_pl.convergence`;
    * `health/settled`: 1 where every expert's gap moved by at most `max_change` and varies by at most `max_variance`.

    The first step at which that held for `patience` steps in a row is said once, with the gaps, and logged once, as
    `health/settled_at`; reports go by that one. Settled is not won. A gap that lies still far above 0 means that the
    discriminator tells the sides apart and the policy no longer moves. A step without a valid rollout has no gap and is
    passed over; a NaN gap settles nothing.

    Args:
        window: steps.
        max_change: of the line through the window, from its first step to its last, in units of score.
        max_variance: of the gaps in the window.
        patience: steps in a row.
        stop: end the run there, with its checkpoint and exports. Started again, it stays ended.
    """

    def __init__(
        self,
        window: int = 50,
        max_change: float = 0.2,
        max_variance: float = 0.1,
        patience: int = 10,
        stop: bool = False,
    ) -> None:
        if window < 3 or patience < 1 or max_change <= 0 or max_variance <= 0:
            raise ValueError(
                f"ConvergenceMonitor: window={window} must be at least 3, patience={patience} at least 1, "
                f"max_change={max_change} and max_variance={max_variance} positive"
            )
        self.window, self.max_change, self.max_variance = window, max_change, max_variance
        self.patience, self.stop = patience, stop
        self.gaps: dict[str, deque[float]] = {}
        self.in_a_row = 0
        self.settled_at: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stop and self.settled_at is not None:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        from prism_pl.metrics import RewardGapMetric

        step = step_output(outputs, NEEDS, "ConvergenceMonitor")
        for expert, scores_PG in step["scores"].items():
            metric = RewardGapMetric().to(pl_module.device)
            metric.update(step["demonstration_scores"][expert], scores_PG, step["valid"])
            values = metric.compute()
            if values["n"] > 0:
                self.gaps.setdefault(expert, deque(maxlen=self.window)).append(float(values["gap"]))
        if not self.gaps or any(len(gaps) < self.window for gaps in self.gaps.values()):
            return
        trends = {expert: trend(gaps) for expert, gaps in self.gaps.items()}
        flat = settled(list(trends.values()), self.window, self.max_change, self.max_variance)
        self.in_a_row = self.in_a_row + 1 if flat else 0
        for expert, found in trends.items():
            pl_module.log(f"health/gap_slope/{expert}", found.slope)
            pl_module.log(f"health/gap_variance/{expert}", found.variance)
        pl_module.log("health/settled", float(flat))
        if self.in_a_row >= self.patience and self.settled_at is None:
            self.settled_at = trainer.global_step
            for logger in trainer.loggers:  # once, whatever log_every_n_steps passes over
                logger.log_metrics({"health/settled_at": self.settled_at}, step=trainer.fit_loop.total_batch_idx)
            means = ", ".join(f"{expert} {found.mean:+.3f}" for expert, found in trends.items())
            rank_zero_info(
                f"The game has settled at step {self.settled_at}: over {self.window} steps no expert's gap moved by "
                f"more than {self.max_change:g} or varied by more than {self.max_variance:g} (mean gaps: {means})."
                + (" Stopping." if self.stop else "")
            )
            trainer.should_stop = trainer.should_stop or self.stop

    def state_dict(self) -> dict[str, Any]:
        gaps = {expert: list(values) for expert, values in self.gaps.items()}
        return {"gaps": gaps, "in_a_row": self.in_a_row, "settled_at": self.settled_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gaps = {expert: deque(values, maxlen=self.window) for expert, values in state_dict["gaps"].items()}
        self.in_a_row, self.settled_at = state_dict["in_a_row"], state_dict["settled_at"]
