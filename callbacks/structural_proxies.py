"""Structure of the policy's responses against the supervision's, step by step. The only place that logs it."""

from collections import deque
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from prism_pl.metrics.counting import DEFAULT_RULE, Rule, Segment, check_rule, describe_rule
from prism_pl.outputs import step_output
from prism_pl.tensorboard import tensorboard_writers

PROXIES: dict[str, Segment] = {"descriptive_items": "caption", "reasoning_steps": "reasoning"}


class StructuralProxies(Callback):
    """Logs `proxies/{descriptive_items,reasoning_steps}/{policy,supervision,distance}` in training: mean counts over
    valid responses, and the Wasserstein-1 distance between the two sides' counts. Without demonstrations only the
    policy's mean is logged; without a valid response it is NaN.

    Over each validation with demonstrations it logs `proxies/{descriptive_items,reasoning_steps}/val_drift`, see
    `prism_pl.metrics.StructureDrift`, and their mean, `proxies/val_drift`, which `callbacks.Export` can choose by.

    Args:
        rule: how items are counted, see `prism_pl.metrics.counting`; named in TensorBoard's text tab.
        every_n_steps: how often to log, from the first step on.
        window: steps that the numbers are taken over. A few responses lie some way from any distribution, their own
            included, so the distance of a single small batch never gets near 0.
    """

    def __init__(self, rule: Rule = DEFAULT_RULE, every_n_steps: int = 1, window: int = 8) -> None:
        check_rule(rule)
        if every_n_steps < 1 or window < 1:
            raise ValueError(f"StructuralProxies: every_n_steps={every_n_steps} and window={window} must be at least 1")
        self.rule: Rule = rule
        self.every_n_steps = every_n_steps
        self.window: deque[tuple[list[str], list[str]]] = deque(maxlen=window)
        self._validation: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for writer in tensorboard_writers(trainer):
            writer.add_text("proxies/rule", f"items and steps are counted as {describe_rule(self.rule)}", 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        from prism_pl.metrics import DistributionDistance

        found = step_output(outputs, ("rollouts",), "StructuralProxies")
        self.window.append((found["rollouts"], found.get("demonstrations", [])))
        # Batches, as the stages log their scalars; global_step counts policy steps, of which a batch may take several.
        step = trainer.fit_loop.total_batch_idx
        if step % self.every_n_steps:
            return
        scalars: dict[str, Tensor] = {}
        for name, segment in PROXIES.items():
            metric = DistributionDistance(self.rule, segment).to(pl_module.device)
            for rollouts, demonstrations in self.window:
                metric.update(policy=rollouts, supervision=demonstrations)
            values = metric.compute()
            supervised = any(demonstrations for _, demonstrations in self.window)
            for what in ("policy", "supervision", "distance") if supervised else ("policy",):
                scalars[f"proxies/{name}/{what}"] = values[what]
        # Checkpoints may monitor them. Lightning's logging would repeat them at the steps between.
        pl_module.log_dict(scalars, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in scalars.items()}, step)

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
        from prism_pl.metrics import StructureDrift

        found = step_output(outputs, ("rollouts",), "StructuralProxies")
        if not found.get("demonstrations"):
            return
        for name, segment in PROXIES.items():
            if name not in self._validation:
                self._validation[name] = StructureDrift(self.rule, segment).to(pl_module.device)
            self._validation[name].update(policy=found["rollouts"], supervision=found["demonstrations"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._validation:
            return
        drifts = {name: metric.compute()["drift"] for name, metric in self._validation.items()}
        told = {f"proxies/{name}/val_drift": drift for name, drift in drifts.items()}
        told["proxies/val_drift"] = sum(drifts.values()) / len(drifts)
        pl_module.log_dict(told, sync_dist=True)  # the same on every rank, and Lightning warns where it is not told so

    def state_dict(self) -> dict[str, Any]:
        """The window, so that a resumed run logs what the whole one would have."""
        return {"window": list(self.window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.window.clear()
        self.window.extend(state_dict["window"])
