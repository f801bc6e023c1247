"""One number for how far a policy's structure is from the supervision's, to choose a checkpoint by."""

from collections.abc import Sequence

from torch import Tensor

from prism_pl.metrics.counting import count_segment
from prism_pl.metrics.drift import DistributionDistance


class StructureDrift(DistributionDistance):
    """Wasserstein-1 between the item counts of both sides as a share of the supervision's mean count, so that captions
    and reasoning, long tasks and short ones, weigh alike: 0 for equal distributions, 1 for a policy without any items.

    A malformed response counts as one without items: a policy that is well-formed only where it is near must not win.

    Example:
        >>> response = "<caption>{}</caption><think>read</think><answer>3</answer>".format
        >>> metric = StructureDrift(segment="caption")
        >>> metric.update(policy=[response("- a 3"), "3"], supervision=[response("- a 3\\n- red")] * 2)
        >>> metric.compute()["drift"].item()
        0.75
    """

    def _counts(self, responses: Sequence[str]) -> list[int]:
        return [count_segment(response, self.segment, self.rule) or 0 for response in responses]

    def compute(self) -> dict[str, Tensor]:
        """`drift`; NaN where a side is empty, or the supervision has no items."""
        values = super().compute()
        return {"drift": values["distance"] / values["supervision"]}
