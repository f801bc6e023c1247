"""A configuration's data module (and model, unbuilt), read without a run: `data check` and `data distill` use them."""

from collections.abc import Callable, Iterator
from typing import Any

from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden

from prism_pl.cli import PrismCLI, import_systems


class DataCLI(PrismCLI):
    """Reads a command line of fit and makes its model and data, but runs nothing and writes nothing."""

    def __init__(self, args: list[str]) -> None:
        import_systems()
        super().__init__(["fit", *args])

    def before_instantiate_classes(self) -> None: ...
    def _run_subcommand(self, subcommand: str) -> None: ...

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


class DataOnlyCLI(DataCLI):
    """Makes the data alone: a model's policy need not be there."""

    def instantiate_classes(self) -> None:
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=True)
        config: Any = self.config
        made: Any = parser.instantiate_classes(Namespace(data=config.fit.data))
        self.datamodule = made.data
        self.trainer = self.instantiate_trainer()


class _Reader(LightningModule):
    """What a data module asks of a run's module: its collator. Without a processor no row is left out by length."""

    processor = None

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        super().__init__()
        self.collator = collator


# Split -> the stage that a data module is set up for, and the hook that gives the loader.
LOADERS = {
    "train": ("predict", "predict_dataloader"),
    "validation": ("validate", "val_dataloader"),
    "test": ("test", "test_dataloader"),
}


def has_split(datamodule: LightningDataModule, split: str) -> bool:
    """Whether a data module has a loader for a split of `LOADERS`: benchmarks have test rows alone."""
    return is_overridden(LOADERS[split][1], datamodule)


def read_split(
    datamodule: LightningDataModule, trainer: Trainer, split: str, collator: Callable[[list[Any]], Any]
) -> Iterator[Any]:
    """What the collator makes of each batch of a split, in order. Nothing of a split that the data does not have.

    Args:
        split: one of `LOADERS`; training rows are those of the predict loader.
    """
    trainer.strategy.connect(_Reader(collator))
    datamodule.trainer = trainer
    stage, hook = LOADERS[split]
    datamodule.prepare_data()
    datamodule.setup(stage)
    loaders: Any = getattr(datamodule, hook)()
    for each in loaders if isinstance(loaders, list | tuple) else [loaders]:
        yield from each
