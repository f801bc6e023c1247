"""Training loaders whose order depends on seed and epoch alone and that go on in the middle of an epoch."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from prism_pl.batch import Example
from prism_pl.stop_request import leave_to_the_run


class ShuffledSampler(DistributedSampler):
    """DistributedSampler (also used on one process: its order is a function of seed and epoch) that can leave out the
    first `skip` rows of its share."""

    skip: int = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.skip, None)


class ResumableLoader(DataLoader):
    """A loader that Lightning saves with the checkpoint. After a resume it goes on behind the last batch trained on,
    in the same order; an epoch that was finished is not gone into again."""

    _epoch = 0
    _num_batches = 0

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that workers start with the first batch: by then Lightning has told the sampler the epoch.
        sampler = self.sampler
        if isinstance(sampler, ShuffledSampler):
            resumed = sampler.epoch == self._epoch and self._num_batches < len(self)
            self._num_batches = self._num_batches if resumed else 0
            self._epoch = sampler.epoch
            sampler.skip = self._num_batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._num_batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "num_rows": self._num_batches * self._rows_a_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # By rows, so that a run that goes on with more or fewer ranks goes on in the same place.
        self._epoch, self._num_batches = state["epoch"], state["num_rows"] // self._rows_a_batch

    @property
    def _rows_a_batch(self) -> int:
        """Of all ranks."""
        ranks = self.sampler.num_replicas if isinstance(self.sampler, ShuffledSampler) else 1
        return (self.batch_size or 1) * ranks


def train_loader(
    rows: Dataset[Any],
    trainer: L.Trainer,
    collator: Callable[[list[Example]], Any],
    *,
    batch_size: int | None,
    seed: int,
    num_workers: int = 0,
) -> ResumableLoader:
    """Shuffled batches of `rows` for this process; an incomplete last batch is left out, so that all ranks do the same
    number of steps. Ranks that share groups (`ranks_per_group` of the module) get the same rows.

    Args:
        batch_size: None where the rows are batches already (`datamodules.batching.Batches`).

    Raises:
        ValueError: there is not one full batch for each process, or not one batch where the rows are batches.
    """
    ranks = trainer.lightning_module.hparams.get("ranks_per_group", 1)
    sampler = ShuffledSampler(
        rows,
        num_replicas=max(1, trainer.world_size // ranks),
        rank=trainer.global_rank // ranks,
        seed=seed,
        drop_last=trainer.world_size > ranks,
    )
    if batch_size is None and not len(sampler):
        num_batches = len(rows)  # pyright: ignore[reportArgumentType]
        raise ValueError(
            f"rows of like length make too few batches, {num_batches} for {sampler.num_replicas} processes: give a "
            "smaller batch_size or batch_tokens, or more rows"
        )
    if batch_size is not None and len(sampler) < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but each of {trainer.world_size} processes has only {len(sampler)} training "
            "rows: give a smaller batch_size or more rows"
        )
    return ResumableLoader(
        rows,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collator,
        num_workers=num_workers,
        drop_last=batch_size is not None,
        worker_init_fn=leave_to_the_run,
    )


def ordered_loader(
    rows: Dataset[Any], collator: Callable[[Any], Any], *, batch_size: int, num_workers: int = 0
) -> DataLoader:
    """Batches of all rows in order, for validation, test and measurements."""
    return DataLoader(
        rows,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        worker_init_fn=leave_to_the_run,
    )
