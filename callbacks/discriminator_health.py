"""Whether the discriminator is a judge to learn from: its accuracy, saturation and gradients, and what sees only style.

The panel `health/` of TensorBoard. A discriminator can be right in nearly all pairs and reward nothing but length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from prism_pl.chat import EXPERTS, WHOLE
from prism_pl.health.panel import ExpertPanel, Judged, joined, judged
from prism_pl.outputs import step_output
from prism_pl.strategy.ranks import gathered_values
from prism_pl.tensorboard import tensorboard_writers

NEEDS = ("rollouts", "demonstrations", "valid", "scores", "demonstration_scores", "score_clip", "ranks_per_group")
SHARED = "shared"


class DiscriminatorHealth(Callback):
    """Logs, for each expert, over the last `window` steps and all ranks, as `prism_pl.health.panel` defines them:

    * `health/accuracy/<expert>/discriminator`, and beside it `.../length` and `.../surface`: the same pairs ranked by
      logistic regressions that see nothing but a segment's length, or how it is written;
    * `health/explained/<expert>/<shadow>`: the share of the scores' variance inside groups that those features explain;
    * `health/style/<expert>/<shadow>`: 1 where the expert may be rewarding style: the shadow does as well, or explains
      more than `max_explained`. From the first full window on; the first time of each also a warning;
    * `health/score_std/<expert>`: spread inside groups, which is what the policy learns from;
    * `health/saturated_margins/<expert>`, `health/saturated_scores/<expert>`: shares of pairs that teach nothing any
      more, and of scores that the clip lets learn nothing any more: under 1% of their gradient is left;

    of the step alone `health/grad_norm/<expert>`, before clipping, of the parameters that are the expert's own (it
    stands in their names), and `health/grad_norm/shared` of all others: a kind whose experts have nothing of their own
    has that one alone. And every `every_n_steps` the histogram `health/margin/<expert>`. What a mixture tells about
    its router, load, entropy and mutual information with the segments, the stage itself logs as `align/router/...`, see
    `prism_pl.discriminator.routing`.

    Like the discriminator's scores, a shadow's predictions are from before it learned from the step. A NaN score makes
    the numbers it enters NaN, for as long as it stands in the window. Gradients are this rank's own, from before they
    are reduced; where a strategy shards them (ZeRO 2 and 3) no norm is logged.

    Args:
        window: steps that the numbers are taken over, and that the shadows remember.
        accuracy_margin: how near a shadow may come to the expert's accuracy.
        max_explained: share of the scores' variance that a shadow may explain.
        every_n_steps: how often to draw histograms, from the first step on.
    """

    def __init__(
        self, window: int = 50, accuracy_margin: float = 0.03, max_explained: float = 0.5, every_n_steps: int = 10
    ) -> None:
        if window < 2 or every_n_steps < 1:
            raise ValueError(
                f"DiscriminatorHealth: window={window} must be at least 2 and every_n_steps={every_n_steps} at least 1"
            )
        if not 0 <= accuracy_margin < 0.5 or not 0 < max_explained <= 1:
            raise ValueError(
                f"DiscriminatorHealth: accuracy_margin={accuracy_margin} must lie in [0, 0.5) and "
                f"max_explained={max_explained} in (0, 1]"
            )
        self.window, self.accuracy_margin, self.max_explained = window, accuracy_margin, max_explained
        self.every_n_steps = every_n_steps
        self.panels: dict[str, ExpertPanel] = {}
        self.warned: list[str] = []
        self._own: dict[str, list[nn.Parameter]] = {}
        self._norms: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._own = parameters_by_expert(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In the policy's backward passes the discriminator is frozen and has no gradients.
        for expert, parameters in self._own.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                self._norms[expert] = nn.utils.get_total_norm(gradients)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = step_output(outputs, NEEDS, "DiscriminatorHealth")
        parts = gathered_values(judged(step))
        flagged = []
        for expert in parts[0]:
            seen = joined([part[expert] for part in parts], step["ranks_per_group"])
            numbers = self._panel(expert).update(seen, step["score_clip"])
            pl_module.log_dict({_tag(name, expert): value for name, value in numbers.items()}, batch_size=1)
            flagged += self._newly_flagged(expert, numbers)
            self._draw(trainer, expert, seen)
        self._warn(flagged)
        pl_module.log_dict({f"health/grad_norm/{e}": norm for e, norm in self._norms.items()}, batch_size=1)
        self._norms = {}

    def state_dict(self) -> dict[str, Any]:
        return {"panels": {e: panel.state_dict() for e, panel in self.panels.items()}, "warned": list(self.warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for expert, state in state_dict["panels"].items():
            self._panel(expert).load_state_dict(state)
        self.warned = list(state_dict["warned"])

    def _panel(self, expert: str) -> ExpertPanel:
        if expert not in self.panels:
            self.panels[expert] = ExpertPanel(self.window, self.accuracy_margin, self.max_explained)
        return self.panels[expert]

    def _newly_flagged(self, expert: str, numbers: Mapping[str, float]) -> list[str]:
        """What to say of each shadow that is flagged for the first time."""
        said = []
        for name in self._panel(expert).shadows:
            if numbers.get(f"style/{name}") == 1 and f"{expert}/{name}" not in self.warned:
                self.warned.append(f"{expert}/{name}")
                said.append(
                    f"the expert {expert} ranks {numbers['accuracy/discriminator']:.1%} of the pairs right, {name} "
                    f"alone {numbers[f'accuracy/{name}']:.1%}, and {name} explains "
                    f"{numbers[f'explained/{name}']:.0%} of the variance of its scores inside groups"
                )
        return said

    def _warn(self, flagged: Sequence[str]) -> None:
        if flagged:
            rank_zero_warn(
                f"The discriminator may be rewarding style. Over the last {self.window} steps {'; '.join(flagged)}. "
                f"(Flagged within {self.accuracy_margin:.0%} of its accuracy, or above {self.max_explained:.0%} of the "
                "variance.) Where longer or otherwise written is not better, look at the responses beside their "
                "demonstrations (callbacks.Completions)."
            )

    def _draw(self, trainer: Trainer, expert: str, seen: Judged) -> None:
        step = trainer.fit_loop.total_batch_idx
        margins_N = seen.margins_N[seen.margins_N.isfinite()]
        if step % self.every_n_steps or not len(margins_N):
            return
        for writer in tensorboard_writers(trainer):
            writer.add_histogram(f"health/margin/{expert}", margins_N, step)


def parameters_by_expert(module: LightningModule) -> dict[str, list[nn.Parameter]]:
    """The parameters of the module's `discriminator` by the expert whose own they are: its name is a part of theirs;
    under `shared` those of none. Empty for a module without a discriminator."""
    found: dict[str, list[nn.Parameter]] = {}
    network = dict(module.named_children()).get("discriminator")
    for name, parameter in network.named_parameters() if network is not None else ():
        owner = next((expert for expert in (*EXPERTS, *WHOLE) if expert in name.split(".")), SHARED)
        found.setdefault(owner, []).append(parameter)
    return found


def _tag(name: str, expert: str) -> str:
    """`accuracy/length` of an expert is `health/accuracy/<expert>/length`."""
    return "/".join(["health", name.split("/")[0], expert, *name.split("/")[1:]])
