"""What the training and validation steps of the rollout stages return, for the callbacks to read.

P prompts, G rollouts a prompt, B = P * G, prompt by prompt: rollout g of prompt p stands at p * G + g.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

from torch import Tensor

from prism_pl.batch import Example


class StepOutput(TypedDict, total=False):
    """Alignment fills all but `accuracy`; RLVR leaves out the scores, and the demonstrations where rows have none.

    Keys:
        examples: the P prompts.
        num_rollouts: G.
        rollouts: B full responses as text.
        demonstrations: P full responses of the supervision.
        valid: whether each rollout has the three-block format, (P, G).
        scores: of each expert, for the rollouts, (P, G); what stands at malformed ones is not read.
        demonstration_scores: of each expert, for the demonstrations, (P,).
        score_clip: the limit of the soft clip that the scores went through; None where they did not.
        ranks_per_group: in training, how many neighbouring ranks hold a part of each group.
        rewards: what the policy was given, (P, G).
        accuracy: of the final answers, 0 or 1, (P, G).
    """

    examples: list[Example]
    num_rollouts: int
    rollouts: list[str]
    demonstrations: list[str]
    valid: Tensor
    scores: dict[str, Tensor]
    demonstration_scores: dict[str, Tensor]
    score_clip: float | None
    ranks_per_group: int
    rewards: Tensor
    accuracy: Tensor


def step_output(outputs: object, needs: tuple[str, ...], reader: str) -> Mapping[str, Any]:
    """What a step returned, with the keys `needs` of a StepOutput, or ValueError naming the callback `reader`."""
    found = outputs if isinstance(outputs, Mapping) else {}
    missing = [key for key in needs if key not in found]
    if missing:
        raise ValueError(
            f"callbacks.{reader} needs {', '.join(missing)} in what the step returns, and this module's step does not "
            "give it: take the callback out of trainer.callbacks, or return a prism_pl.outputs.StepOutput"
        )
    return found
