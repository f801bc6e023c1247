"""Sources of examples: one LightningDataModule a source."""

from datamodules.demonstrations import DemonstrationsDataModule
from datamodules.digits import DigitsDataModule
from datamodules.pairs import PairsDataModule
from datamodules.prompts import PromptsDataModule

__all__ = ["DemonstrationsDataModule", "DigitsDataModule", "PairsDataModule", "PromptsDataModule"]
