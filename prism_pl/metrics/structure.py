"""The structural proxies as metrics: numbers of reasoning steps and of descriptive items in full responses."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from prism_pl.metrics.counting import DEFAULT_RULE, Rule, Segment, check_rule, count_segment, describe_rule


class _SegmentItems(Metric):
    """Mean and spread of the item counts of one segment, over valid responses.

    The states are integer sums, so any split of the responses over ranks gives the same numbers to the last bit.
    """

    full_state_update = False
    segment: Segment
    what: str
    total: Tensor
    total_squares: Tensor
    num_valid: Tensor
    num_malformed: Tensor

    def __init__(self, rule: Rule = DEFAULT_RULE) -> None:
        super().__init__()
        check_rule(rule)
        self.rule: Rule = rule
        for name in ("total", "total_squares", "num_valid", "num_malformed"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, responses: Sequence[str]) -> None:
        """Count the items of each full response; malformed ones are counted apart and left out of the mean."""
        counts = [count_segment(response, self.segment, self.rule) for response in responses]
        valid = [count for count in counts if count is not None]
        self.total += sum(valid)
        self.total_squares += sum(count * count for count in valid)
        self.num_valid += len(valid)
        self.num_malformed += len(counts) - len(valid)

    def compute(self) -> dict[str, Tensor]:
        """`mean` and `std` (dividing by n: the spread of these responses) of the counts, `n` valid responses and
        `malformed` ones. Without a valid response mean and std are NaN."""
        n = self.num_valid
        # n * sum(x^2) - sum(x)^2 stays in integers: equal counts give a std of exactly 0.
        std = (n * self.total_squares - self.total**2).float().sqrt() / n
        return {"mean": self.total / n, "std": std, "n": n, "malformed": self.num_malformed}

    def describe(self) -> str:
        """What is counted, and by which rule."""
        return f"{self.what} per valid response, counted as {describe_rule(self.rule)}"


class ReasoningSteps(_SegmentItems):
    """Number of reasoning steps: the items of the think block.

    Example:
        >>> steps = ReasoningSteps(rule="lines")
        >>> steps.update(["<caption>a 3</caption><think>read 3\\nadd 4</think><answer>7</answer>", "7"])
        >>> {key: value.item() for key, value in steps.compute().items()}
        {'mean': 2.0, 'std': 0.0, 'n': 1, 'malformed': 1}
    """

    segment: Segment = "reasoning"
    what = "reasoning steps"


class DescriptiveItems(_SegmentItems):
    """Number of descriptive items: the items of the caption block. Used like `ReasoningSteps`."""

    segment: Segment = "caption"
    what = "descriptive items"
