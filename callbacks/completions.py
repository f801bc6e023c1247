"""Rollouts to look at: TensorBoard pictures and text of image, question, response, demonstration, scores, verdict."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from prism_pl.chat import parse
from prism_pl.completion_picture import Completion, completions_markdown, draw_completions
from prism_pl.outputs import step_output
from prism_pl.tensorboard import tensorboard_writers


class Completions(Callback):
    """Shows the first rollout of the first prompts of a batch, as the image and the text `completions`.

    Args:
        every_n_steps: how often, from the first step on.
        num_rows: prompts shown.
    """

    def __init__(self, every_n_steps: int = 50, num_rows: int = 3) -> None:
        if every_n_steps < 1 or num_rows < 1:
            raise ValueError(f"Completions: every_n_steps={every_n_steps} and num_rows={num_rows} must be at least 1")
        self.every_n_steps = every_n_steps
        self.num_rows = num_rows

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Batches, as the stages log their scalars; global_step counts policy steps, of which a batch may take several.
        step = trainer.fit_loop.total_batch_idx
        writers = tensorboard_writers(trainer)
        if step % self.every_n_steps or not writers:
            return
        found = step_output(outputs, ("examples", "rollouts", "num_rollouts"), "Completions")
        rows = [_completion(found, p) for p in range(min(self.num_rows, len(found["examples"])))]
        picture = np.asarray(draw_completions(rows))
        for writer in writers:
            writer.add_image("completions", picture, step, dataformats="HWC")
            writer.add_text("completions", completions_markdown(rows), step)


def _completion(step: Mapping[str, Any], p: int) -> Completion:
    """The first rollout of prompt p."""
    example, response = step["examples"][p], step["rollouts"][p * step["num_rollouts"]]
    parsed = parse(response)
    verdict, good = ("valid", None) if parsed.valid else (f"malformed ({parsed.reason})", False)
    if "accuracy" in step:
        right = bool(step["accuracy"][p, 0] > 0)
        verdict, good = f"{'right' if right else 'wrong'}, {verdict}", right and parsed.valid
    numbers = []
    if parsed.valid:
        for expert, scores_PG in step.get("scores", {}).items():
            score, other = float(scores_PG[p, 0]), float(step["demonstration_scores"][expert][p])
            numbers.append(f"{expert}: {score:+.2f}, demonstration {other:+.2f}, gap {other - score:+.2f}")
    if "rewards" in step:
        reward = float(step["rewards"][p, 0])
        # Alignment scores no malformed response, so its mixed reward is NaN there; RLVR rewards it like any other.
        numbers.append("reward: malformed" if math.isnan(reward) and not parsed.valid else f"reward: {reward:+.2f}")
    demonstrations = step.get("demonstrations")
    return Completion(
        images=list(example.images),
        question=example.question,
        answers=example.answers,
        response=response,
        demonstration=demonstrations[p] if demonstrations else None,
        verdict=verdict,
        good=good,
        numbers=numbers,
    )
