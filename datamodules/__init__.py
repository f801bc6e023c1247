"""Sources of examples: one LightningDataModule a source."""

from datamodules.benchmarks import BenchmarksDataModule
from datamodules.demonstrations import DemonstrationsDataModule
from datamodules.digits import DigitsDataModule
from datamodules.pairs import PairsDataModule
from datamodules.prompts import PromptsDataModule

__all__ = [
    "BenchmarksDataModule",
    "DemonstrationsDataModule",
    "DigitsDataModule",
    "PairsDataModule",
    "PromptsDataModule",
]
