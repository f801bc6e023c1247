"""The embedded default: reading and reckoning with real handwriting, on any CPU, nothing downloaded.

`rows` says which rows `fit` trains on; validation and test are the same at every stage. In YAML:

    data:
      class_path: datamodules.digits.DigitsDataModule
      init_args: {rows: align, num_train: 6000, batch_size: 8}
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from datamodules.difficulty import check_keep, keep_by_difficulty
from datamodules.digits_checks import DigitsSceneChecker, caption_items, check_steps, faithfulness, scene_items
from datamodules.digits_questions import FAMILIES
from datamodules.digits_rows import SYSTEM_PROMPT, DigitsDataset, Recipe, corpus, make_example
from datamodules.loading import ordered_loader, train_loader
from prism_pl import chat
from prism_pl.batch import Example

__all__ = [
    "DigitsDataModule",
    "DigitsDataset",
    "Recipe",
    "caption_items",
    "check_steps",
    "corpus",
    "faithfulness",
    "make_example",
    "scene_items",
]


class DigitsDataModule(L.LightningDataModule):
    """Digits rows for every stage.

    The batches are made by the module's `collator`, a callable from a list of Examples to its batch.

    Args:
        rows: what `fit` trains on. `pretrain`: bare answers, captions and explanations, for the base policy; `sft`:
            public and curated demonstrations; `warmup` and `align`: curated demonstrations, two sets apart from each
            other and from `sft`; `rlvr`: prompts with answers.
        num_train, num_validation, num_test, num_hard: rows of each split.
        batch_size: training rows a batch and process.
        eval_batch_size: the same of validation and test rows: rollouts of few rows at once cost as much as of many.
        seed: of the rows and of the training order, which depends on nothing else but the epoch.
        system_prompt: the same at every stage and in evaluation; None is `prism_pl.chat.SYSTEM_PROMPT`.
        pass_rates: with `rows: rlvr`, train only on rows whose pass rate in this file of a `predict` run lies in
            `keep`, bounds included; null trains on all. See `datamodules.difficulty`.
        max_digits, hard_digits, curated, imprecise, skipped, captions, told, explained, families: see
            `digits_rows.Recipe`.
    """

    def __init__(
        self,
        rows: Literal["pretrain", "sft", "warmup", "align", "rlvr"] = "sft",
        num_train: int = 6000,
        num_validation: int = 64,
        num_test: int = 320,
        num_hard: int = 160,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
        system_prompt: str | None = SYSTEM_PROMPT,
        max_digits: int = 3,
        hard_digits: tuple[int, int] = (4, 5),
        curated: float = 0.25,
        imprecise: float = 0.3,
        skipped: float = 0.3,
        captions: float = 0.4,
        told: float = 0.0,
        explained: float = 0.0,
        families: Sequence[str] = FAMILIES,
        num_workers: int = 0,
        pass_rates: str | None = None,
        keep: tuple[float, float] = (0.2, 0.8),
    ) -> None:
        super().__init__()
        if pass_rates is not None and rows != "rlvr":
            raise ValueError(f"pass_rates filters the prompts of RLVR, and rows is {rows!r}: set rows: rlvr, or null")
        self.pass_rates = None if pass_rates is None else Path(pass_rates)
        self.keep = check_keep(keep)
        sizes = {"num_train": num_train, "num_validation": num_validation, "num_test": num_test, "num_hard": num_hard}
        for name, value in {**sizes, "batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        self.recipe = Recipe(
            max_digits=max_digits,
            hard_digits=hard_digits,
            curated=curated,
            imprecise=imprecise,
            skipped=skipped,
            captions=captions,
            told=told,
            explained=explained,
            system_prompt=system_prompt,
            families=tuple(families),
        )
        self.scene_checker = DigitsSceneChecker()
        self.seed = seed
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        brief = rows == "pretrain"
        self.all_train_rows = DigitsDataset(rows, num_train, seed, self.recipe)
        self.train_rows: Dataset[Example] = self.all_train_rows
        self.validation_rows = DigitsDataset("validation", num_validation, seed, self.recipe, brief=brief)
        self.test_rows: Dataset[Example] = ConcatDataset(
            [DigitsDataset("test", num_test, seed, self.recipe), DigitsDataset("hard", num_hard, seed, self.recipe)]
        )

    def setup(self, stage: str) -> None:
        if self.pass_rates is not None and stage == "fit":
            assert self.trainer is not None
            rows, recipe = self.all_train_rows, self.row_recipe()
            self.train_rows = keep_by_difficulty(rows, rows.ids, self.pass_rates, self.keep, self.trainer, recipe)

    def row_recipe(self) -> dict[str, Any]:
        """What the training rows ask; fewer or more of them are the same ones. See `prism_pl.pass_rates.HasRecipe`."""
        asked = {name: getattr(self.recipe, name) for name in ("max_digits", "hard_digits", "families")}
        prompt = self.recipe.system_prompt or chat.SYSTEM_PROMPT
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}
        return {"digits": self.all_train_rows.split, "seed": self.seed, **plain, "system_prompt": prompt}

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return train_loader(
            self.train_rows,
            self.trainer,
            self._collator(),
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader:
        return self._in_order(self.validation_rows)

    def test_dataloader(self) -> DataLoader:
        """Test and hard rows in one loader: `meta["family"]` and `meta["split"]` tell them apart."""
        return self._in_order(self.test_rows)

    def predict_dataloader(self) -> DataLoader:
        """All training rows in order, whatever `pass_rates` keeps of them."""
        return self._in_order(self.all_train_rows)

    def _in_order(self, rows: Dataset[Example]) -> DataLoader:
        return ordered_loader(rows, self._collator(), batch_size=self.eval_batch_size, num_workers=self.num_workers)

    def _collator(self) -> Callable[[list[Example]], Any]:
        assert self.trainer is not None
        return cast("Callable[[list[Example]], Any]", self.trainer.lightning_module.collator)
