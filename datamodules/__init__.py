"""Sources of examples: one LightningDataModule a source."""

from datamodules.digits import DigitsDataModule

__all__ = ["DigitsDataModule"]
