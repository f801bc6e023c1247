"""The mean of one value for each prompt with its bootstrap interval, gathered over ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from prism_pl.metrics.bootstrap import bootstrap_interval


class BootstrapMean(Metric):
    """Mean and percentile interval over prompts; the functions in `prism_pl.metrics.bootstrap` as a metric.

    Example:
        >>> metric = BootstrapMean()
        >>> metric.update([1.0, 1.0])
        >>> {key: value.item() for key, value in metric.compute().items()}
        {'mean': 1.0, 'low': 1.0, 'high': 1.0, 'n': 2}
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> None:
        super().__init__()
        self.num_resamples, self.level, self.seed = num_resamples, level, seed
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: Tensor | Sequence[float]) -> None:
        """Add one value for each prompt: the mean over its rollouts, where there are several."""
        values_P = torch.as_tensor(values, dtype=torch.float32, device=self.device)
        if values_P.ndim != 1:
            raise ValueError(f"values must hold one number for each prompt, and has the shape {tuple(values_P.shape)}")
        self.values.append(values_P)

    def compute(self) -> dict[str, Tensor]:
        """`mean`, `low`, `high` and `n` prompts; NaN without prompts."""
        # After a gather torchmetrics leaves one tensor in place of the list; dim_zero_cat takes both, but not [].
        values_P = dim_zero_cat(self.values) if len(self.values) else torch.zeros(0)
        if not values_P.numel():
            nan = torch.tensor(float("nan"), device=self.device)
            return {"mean": nan, "low": nan, "high": nan, "n": torch.tensor(0, device=self.device)}
        interval = bootstrap_interval(values_P.cpu().numpy(), self.num_resamples, self.level, self.seed)
        return {key: torch.tensor(value, device=self.device) for key, value in interval._asdict().items()}
