"""What each share is of: numerator and denominator from counts.

The only place that says it. Metrics divide counts summed over ranks; evaluation resamples the same two numbers prompt
by prompt. Counts are numbers or tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any

Counts = Mapping[str, Any]
Share = Callable[[Counts], tuple[Any, Any]]

# Of items: `true` of the scene, `missed`, `invented`; of captions: `exact` and `valid` ones.
CAPTION_SHARES: dict[str, Share] = {
    "precision": lambda counts: (counts["true"], counts["true"] + counts["invented"]),
    "recall": lambda counts: (counts["true"], counts["true"] + counts["missed"]),
    "exact": lambda counts: (counts["exact"], counts["valid"]),
}
# Of steps: `stated`, and `correct` among them; `expected`, and `present` among them.
STEP_SHARES: dict[str, Share] = {
    "right": lambda counts: (counts["correct"], counts["stated"]),
    "present": lambda counts: (counts["present"], counts["expected"]),
}


def present_steps(correct: int, expected: int) -> int:
    """Expected steps that are there, of a response: right as long as no right step is stated twice."""
    return min(correct, expected)
