"""Which of a run's checkpoints is taken, and why: chosen on validation rows, written down, reported on test rows.

Structure can be near the supervision's in the middle of the game and drift away again; the published recipe takes the
last step all the same.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

CHOICE = "choice.json"
DRIFT = "proxies/val_drift"


class Choice:
    """The validation with the least drift so far.

    Args:
        validations: (step, drift) of each so far.
    """

    def __init__(self, validations: Sequence[Sequence[float]] = ()) -> None:
        self.validations = [(int(step), float(drift)) for step, drift in validations]

    @property
    def step(self) -> int | None:
        """The step chosen: of the least drift, the earliest of equals; None before there is one that is a number."""
        known = [(drift, step) for step, drift in self.validations if not math.isnan(drift)]
        return min(known)[1] if known else None

    def add(self, step: int, drift: float) -> bool:
        """Take in a validation. Returns whether it is the one to take."""
        self.validations = [each for each in self.validations if each[0] < step] + [(step, drift)]
        return self.step == step

    def write(self, file: Path) -> None:
        """Write down what was chosen, and from what."""
        from prism_pl.checkpoint_files import whole_file  # imports torch, which a report does without

        validations = [{"step": step, DRIFT: None if math.isnan(drift) else drift} for step, drift in self.validations]
        content = {"choice": "least_drift", "step": self.step, "validations": validations}
        with whole_file(file) as out:
            out.write((json.dumps(content, indent=2) + "\n").encode())
