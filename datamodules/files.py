"""What the data modules that read files have in common: sources, splits, filters, batches and loaders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.batching import Batches, plan_batches
from datamodules.difficulty import check_keep, keep_by_difficulty
from datamodules.fields import Columns
from datamodules.file_rows import FileRows, Reading, ReadRow, with_columns
from datamodules.loading import ordered_loader, train_loader
from datamodules.prompt_lengths import short_enough
from datamodules.sources import Source
from prism_pl.bad_rows import ReadsBadRows, strict
from prism_pl.chat import SYSTEM_PROMPT
from prism_pl.checked import Checked, read_checked
from prism_pl.fingerprint import hash_value
from prism_pl.processor import Processor

Sources = Source | str | list[Source | str]


class FilesDataModule(L.LightningDataModule):
    """Rows of local files or hub repositories. A subclass says how a row is read: `COLUMNS` and `read_row`.

    Args:
        train: one source or several, each a path, a hub id, or a mapping (`datamodules.sources.Source`).
        validation, test: the same; without `validation`, `num_validation` rows are held out of `train`.
        columns: field -> the column it stands in, such as {answers: reward_model.ground_truth}, in place of the
            format's own.
        system_prompt: of every row, at every stage; null is `prism_pl.chat.SYSTEM_PROMPT`.
        keep_system: rows that bring a system prompt of their own keep it.
        num_rows: only the first so many rows; null: all.
        num_validation: rows drawn by `seed` and held out, where `validation` is null.
        batch_size: training rows a batch and process; with `batch_tokens`, at most.
        eval_batch_size: the same of validation, test and predict rows.
        seed: of the training order, which depends on nothing else but the epoch, and of the held-out rows.
        num_workers: processes a loader that read rows and images.
        check_folder: what `python -m prism_pl data check` wrote for this data: rows it lists are left out.
        max_prompt_tokens: rows with a longer prompt, images expanded, are left out and counted; null: none.
        group_by_length: rows of like length share a batch; needs the lengths in `check_folder`.
        batch_tokens: the largest training batch in padded tokens; needs them too.
        pass_rates: train only on rows whose pass rate in this file of a `predict` run lies in `keep`.
        keep: the least and the largest pass rate.
    """

    COLUMNS: ClassVar[Columns]
    read_row: ClassVar[ReadRow]

    def __init__(
        self,
        train: Sources,
        validation: Sources | None = None,
        test: Sources | None = None,
        columns: dict[str, str] | None = None,
        system_prompt: str | None = None,
        keep_system: bool = False,
        num_rows: int | None = None,
        num_validation: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        check_folder: str | None = None,
        max_prompt_tokens: int | None = None,
        group_by_length: bool = False,
        batch_tokens: int | None = None,
        pass_rates: str | None = None,
        keep: tuple[float, float] = (0.2, 0.8),
    ) -> None:
        super().__init__()
        for name, value in {
            "num_rows": num_rows,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "max_prompt_tokens": max_prompt_tokens,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        if validation is not None and num_validation:
            raise ValueError(f"num_validation is {num_validation} and validation is given: leave one of them out")
        if (group_by_length or batch_tokens is not None) and check_folder is None:
            raise ValueError(
                "group_by_length and batch_tokens need the rows' lengths: measure them (python -m prism_pl data check "
                "--config ...) and give the folder as data.check_folder"
            )
        self.sources = {"train": _listed(train), "validation": _listed(validation), "test": _listed(test)}
        given = frozenset(columns or {})
        read_row = type(self).read_row
        self.reading = Reading(read_row, with_columns(self.COLUMNS, columns), given, system_prompt, keep_system)
        self.num_rows, self.num_validation = num_rows, num_validation
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.check_folder = None if check_folder is None else Path(check_folder)
        self.max_prompt_tokens = max_prompt_tokens
        self.group_by_length, self.batch_tokens = group_by_length, batch_tokens
        self.pass_rates = None if pass_rates is None else Path(pass_rates)
        self.keep = check_keep(keep)
        self._rows: dict[str, FileRows] = {}
        self._lengths: np.ndarray | None = None

    def prepare_data(self) -> None:
        """One process a machine turns the files into tables, and fetches images that a hub repository's first row names
        by path; the others find them in the cache."""
        for split, sources in self.sources.items():
            if sources:
                FileRows(sources, self.reading, split).check_columns()

    def setup(self, stage: str) -> None:
        if not self._rows:
            self._open()
        if stage != "fit":
            return
        kept = self._without_excluded()
        self.train_rows: Dataset[Any] = Subset(self._rows["train"], kept)
        if self.pass_rates is not None:
            assert self.trainer is not None
            all_ids = list(self._rows["train"].ids())
            ids = [all_ids[index] for index in kept]
            filtered = keep_by_difficulty(
                self.train_rows, ids, self.pass_rates, self.keep, self.trainer, self.row_recipe()
            )
            self._lengths = None if self._lengths is None else self._lengths[filtered.indices]
            self.train_rows = filtered
            kept = [kept[index] for index in filtered.indices]
        self._trained_on = {"count": len(kept), "hash": hash_value([kept, self._told_lengths()])[:16]}

    def _told_lengths(self) -> list[int] | None:
        """What batches are made of; None where they are not made by length."""
        if not (self.group_by_length or self.batch_tokens is not None):
            return None
        assert self._lengths is not None
        return self._lengths.tolist()

    def _without_excluded(self) -> list[int]:
        """The training rows that the check, whose lengths are then known, and the filter of prompts leave in."""
        kept = self._train_indices
        if (checked := self._checked()) is not None:
            rank_zero_info(checked.said)
            self._lengths = checked.lengths[checked.kept]
            kept = [kept[position] for position in checked.kept]
        if (fitting := self._fitting(self._rows["train"], kept, "training")) is None:
            return kept
        self._lengths = None if self._lengths is None else self._lengths[fitting]
        return [kept[position] for position in fitting]

    def _checked(self) -> Checked | None:
        if self.check_folder is None:
            return None
        return read_checked(self.check_folder, self.row_recipe() | self.selection(), len(self._train_indices))

    def _fitting(self, rows: FileRows, indices: list[int], called: str) -> list[int] | None:
        """Positions of the rows whose prompt is short enough; None where nothing is filtered, or nothing measures."""
        assert self.trainer is not None
        if self.max_prompt_tokens is None or (processor := self.trainer.lightning_module.processor) is None:
            return None
        return short_enough(rows, indices, self.max_prompt_tokens, cast("Processor", processor), called)

    def _validation(self) -> tuple[FileRows, list[int]]:
        """The rows that are validated on, in order; a check leaves out held-out rows alone."""
        if "validation" in self._rows:
            return self._rows["validation"], list(range(len(self._rows["validation"])))
        if (checked := self._checked()) is None or not self._held_out:
            return self._rows["train"], self._held_out
        rank_zero_info(checked.validation_said)
        return self._rows["train"], [self._held_out[position] for position in checked.validation]

    def _open(self) -> None:
        self._rows = {
            split: FileRows(sources, self.reading, split) for split, sources in self.sources.items() if sources
        }
        for split, rows in self._rows.items():
            rows.check_columns()
            rows.check_ids(self.num_rows or len(rows) if split == "train" else len(rows))
        rows = self._rows["train"]
        indices = np.arange(min(len(rows), self.num_rows or len(rows)))
        if self.num_validation >= len(indices):
            raise ValueError(
                f"num_validation is {self.num_validation}, and there are {len(indices)} training rows: give fewer, or 0"
            )
        held_out = np.random.default_rng(self.seed).permutation(indices)[: self.num_validation]
        self._train_indices = np.setdiff1d(indices, held_out).tolist()
        self._held_out = np.sort(held_out).tolist()

    def row_recipe(self) -> dict[str, Any]:
        """What the training rows are made of: what is measured on them fits no others."""
        kept = {"keep_system": True} if self.reading.keep_system else {}
        prompt = self.reading.system_prompt or SYSTEM_PROMPT
        return {"rows": self._rows["train"].fingerprint(), "system_prompt": prompt, **kept}

    def selection(self) -> dict[str, Any]:
        """Which of the rows are trained on."""
        held_out = {"num_validation": self.num_validation, "seed": self.seed} if self.num_validation else {}
        return {"num_rows": len(self._train_indices), **held_out}

    def state_dict(self) -> dict[str, Any]:
        return self.row_recipe() | {"selection": self.selection(), "trained_on": self._trained_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["rows"] != self.row_recipe()["rows"]:
            raise ValueError(
                "data: the files do not hold the rows that this run began with. Bring them back, or start anew with "
                "--fresh"
            )
        if state_dict["selection"] != self.selection():
            raise ValueError(
                f"data: this run began with the rows of {state_dict['selection']} and would go on with those of "
                f"{self.selection()}: set them back, or start anew with --fresh"
            )
        before, now = state_dict["trained_on"], self._trained_on
        if before != now:
            raise ValueError(
                f"data: this run began with {before['count']} rows, and {self._filters()} now leaves {now['count']}, "
                "not the same ones in batches of the same lengths. Bring the earlier files back, or start anew with "
                "--fresh"
            )

    def _filters(self) -> str:
        """The files that say which rows are trained on."""
        given = {"data.check_folder": self.check_folder, "data.pass_rates": self.pass_rates}
        return " with ".join(f"{key} {path}" for key, path in given.items() if path is not None) or "this data"

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        rows, batch_size = self.train_rows, self.batch_size
        if self.group_by_length or self.batch_tokens is not None:
            assert self._lengths is not None
            rows = Batches(rows, plan_batches(self._lengths, self.batch_size, self.batch_tokens, self.seed))
            batch_size = None
        return train_loader(
            rows,
            self.trainer,
            self._collator(),
            batch_size=batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if "validation" not in self._rows and not self._held_out:
            return []
        if isinstance(self._collator(), ReadsBadRows):
            rows = self._rows.get("validation", Subset(self._rows["train"], self._held_out))
            return self._in_order(rows)
        rows, indices = self._validation()
        fitting = self._fitting(rows, indices, "validation")
        return self._in_order(Subset(rows, indices if fitting is None else [indices[n] for n in fitting]))

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._in_order(self._rows["test"]) if "test" in self._rows else []

    def predict_dataloader(self) -> DataLoader:
        """All training rows in order, whatever `pass_rates` keeps of them; without those that `check_folder` leaves
        out, unless the collator reads bad rows, as a check's does."""
        collator = self._collator()
        rows = self._train_indices if isinstance(collator, ReadsBadRows) else self._without_excluded()
        return self._in_order(Subset(self._rows["train"], rows))

    def _in_order(self, rows: Dataset[Any]) -> DataLoader:
        return ordered_loader(rows, self._collator(), batch_size=self.eval_batch_size, num_workers=self.num_workers)

    def _collator(self) -> Callable[[Any], Any]:
        assert self.trainer is not None
        return strict(cast("Callable[[Any], Any]", self.trainer.lightning_module.collator))


def _listed(sources: Sources | None) -> list[Source]:
    if sources is None:
        return []
    items = sources if isinstance(sources, list) else [sources]
    return [Source(item) if isinstance(item, str) else item for item in items]
