"""Whether captions and reasoning are true, where the scene behind the image is known.

Nothing here knows what a scene is. The data side turns a caption line into a canonical string and a scene into the
strings a perfect caption would hold (for the digits, for example, `"red 3"`), and judges each stated step; these
metrics compare and count. All states are integer sums: exact under data parallelism.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from prism_pl.metrics.shares import CAPTION_SHARES, STEP_SHARES, Counts, Share, present_steps

# The strings a caption states, or a scene holds, each as often as it does so.
Items = Iterable[str]


class ItemCounts(NamedTuple):
    """How the items of one caption compare with the scene's."""

    true: int
    missed: int
    invented: int

    @property
    def exact(self) -> bool:
        """Everything stated, nothing invented."""
        return not self.missed and not self.invented


def compare_items(stated: Items, scene: Items) -> ItemCounts:
    """Compare as multisets: two red 3s in a scene are two items, and a caption that states one of them misses one.

    Example:
        >>> compare_items(["red 3", "blue 5"], Counter({"red 3": 2}))
        ItemCounts(true=1, missed=1, invented=1)
    """
    stated_counts, scene_counts = _multiset(stated), _multiset(scene)
    true = (stated_counts & scene_counts).total()
    return ItemCounts(true, scene_counts.total() - true, stated_counts.total() - true)


class CaptionFaithfulness(Metric):
    """Items true of the image, missed and invented, summed over captions."""

    full_state_update = False
    num_true: Tensor
    num_missed: Tensor
    num_invented: Tensor
    num_exact: Tensor
    num_valid: Tensor
    num_malformed: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("num_true", "num_missed", "num_invented", "num_exact", "num_valid", "num_malformed"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, stated: Sequence[Items | None], scenes: Sequence[Items]) -> None:
        """Add one caption's items, or None for a malformed response, and its scene's for each response.

        A Counter counts with its multiplicities. Items match when their strings are equal.
        """
        if len(stated) != len(scenes):
            raise ValueError(f"{len(stated)} captions and {len(scenes)} scenes: give one scene for each response")
        pairs = zip(stated, scenes, strict=True)
        valid = [compare_items(items, scene) for items, scene in pairs if items is not None]
        self.num_true += sum(counts.true for counts in valid)
        self.num_missed += sum(counts.missed for counts in valid)
        self.num_invented += sum(counts.invented for counts in valid)
        self.num_exact += sum(counts.exact for counts in valid)
        self.num_valid += len(valid)
        self.num_malformed += len(stated) - len(valid)

    def compute(self) -> dict[str, Tensor]:
        """Over valid responses: `precision` (true / stated items), `recall` (true / items in the scenes), `exact`
        (share of captions with nothing missed or invented); the totals `true`, `missed`, `invented`; `n` valid
        responses and `malformed` ones, which enter nothing else. A share of nothing is NaN."""
        totals = {"true": self.num_true, "missed": self.num_missed, "invented": self.num_invented}
        counts = {**totals, "exact": self.num_exact, "valid": self.num_valid}
        return _shares(CAPTION_SHARES, counts) | totals | {"n": self.num_valid, "malformed": self.num_malformed}


class StepCorrectness(Metric):
    """Share of the stated reasoning steps that are right, and of the expected steps that are there.

    Example:
        >>> metric = StepCorrectness()
        >>> metric.update(correct=[2], stated=[4], expected=[5])
        >>> {key: round(value.item(), 3) for key, value in metric.compute().items()}
        {'right': 0.5, 'present': 0.4, 'n': 1}
    """

    full_state_update = False
    num_correct: Tensor
    num_stated: Tensor
    num_present: Tensor
    num_expected: Tensor
    num_responses: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("num_correct", "num_stated", "num_present", "num_expected", "num_responses"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        correct: Sequence[int],
        stated: Sequence[int],
        expected: Sequence[int],
        present: Sequence[int] | None = None,
    ) -> None:
        """Add one number of each kind for every valid response.

        Args:
            correct: stated steps that are right.
            stated: all stated steps.
            expected: steps a full derivation has.
            present: expected steps that were stated and right. None takes min(correct, expected), which is right as
                long as no right step is stated twice.

        Raises:
            ValueError: different lengths, or `correct` above `stated`, or `present` above `expected`.
        """
        if present is None:
            present = [present_steps(*pair) for pair in zip(correct, expected, strict=False)]
        if len({len(correct), len(stated), len(expected), len(present)}) > 1:
            sizes = f"{len(correct)}, {len(stated)}, {len(expected)} and {len(present)}"
            raise ValueError(f"correct, stated, expected and present need one number a response, and hold {sizes}")
        for part_name, part, whole_name, whole in (
            ("correct", correct, "stated", stated),
            ("present", present, "expected", expected),
        ):
            for index, (few, many) in enumerate(zip(part, whole, strict=True)):
                if not 0 <= few <= many:
                    raise ValueError(f"response {index}: {part_name}={few} must lie in 0 ... {whole_name}={many}")
        self.num_correct += sum(correct)
        self.num_stated += sum(stated)
        self.num_present += sum(present)
        self.num_expected += sum(expected)
        self.num_responses += len(correct)

    def compute(self) -> dict[str, Tensor]:
        """`right` (correct / stated), `present` (expected steps that are there / expected), `n` responses. Shares are
        of all steps together, so a long response weighs more; a share of nothing is NaN."""
        counts = {
            "correct": self.num_correct,
            "stated": self.num_stated,
            "present": self.num_present,
            "expected": self.num_expected,
        }
        return _shares(STEP_SHARES, counts) | {"n": self.num_responses}


def _shares(shares: Mapping[str, Share], counts: Counts) -> dict[str, Tensor]:
    parts = {name: share(counts) for name, share in shares.items()}
    return {name: numerator / denominator for name, (numerator, denominator) in parts.items()}


def _multiset(items: Items) -> Counter[str]:
    if isinstance(items, str):
        raise ValueError(f"items must be a collection of strings, and is the one string {items!r}")
    # Unary plus drops zero and negative multiplicities.
    return +Counter(items)
