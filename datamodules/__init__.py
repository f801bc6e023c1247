"""Sources of examples: one LightningDataModule a source."""

from datamodules.benchmarks import BenchmarksDataModule
from datamodules.digits import DigitsDataModule

__all__ = ["BenchmarksDataModule", "DigitsDataModule"]
