"""The rows of an evaluation, looked at before anything is sampled: one without use would stop it hours later."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset

from prism_pl.data.facts import BAD_IMAGE, BAD_ROW, FactFinder, Facts
from prism_pl.processor import Processor
from prism_pl.row_needs import RowNeeds
from prism_pl.strategy.ranks import gathered_values

NUM_NAMED = 100  # rows of one reason


def check_usable(
    loaders: Iterable[Any], num_batches: Sequence[float], processor: Processor, needs: RowNeeds, called: str
) -> None:
    """Read texts and the headers of images of every row that a run is about to sample from, in the loaders' workers.
    Loaders without rows that can be read twice are passed over.

    Args:
        loaders: of this rank; all ranks come here.
        num_batches: of each loader, how many the run takes; inf: all.
        called: what the rows are called in the message.

    Raises:
        ValueError: rows cannot be used; each is named with the reason, up to `NUM_NAMED` of one.
    """
    finder = FactFinder(processor, needs, pixels=False)
    # A loader's start and a shuffle draw from the generators that the run goes on to draw from.
    with isolate_rng(include_cuda=False):
        each = zip(loaders, num_batches, strict=True)
        facts = [row for loader, num in each for batch in _looked_at(loader, num, finder) for row in batch]
    told = [(row.id, row.unusable, row.detail) for row in facts if row.unusable]
    unusable: dict[str, dict[str, str]] = {}
    for id, reason, detail in (row for of_rank in gathered_values(told) for row in of_rank):
        unusable.setdefault(reason, {})[id] = detail
    num_rows = sum(gathered_values(len(facts)))
    if unusable:
        raise ValueError(
            f"{sum(map(len, unusable.values())):,} of {num_rows:,} {called} rows cannot be used, so nothing was "
            f"sampled: {'; '.join(_said(reason, rows) for reason, rows in unusable.items())}. Raise the limits that "
            "are named, scale images down with model.policy.max_pixels, or mend the rows; `python -m prism_pl data "
            "check` lists them all"
        )
    rank_zero_info(f"All {num_rows:,} {called} rows can be used.")


def _looked_at(loader: Any, num_batches: float, finder: FactFinder) -> Iterator[list[Facts]]:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not loader.batch_sampler:
        return
    batches = loader.batch_sampler if num_batches == float("inf") else islice(loader.batch_sampler, int(num_batches))
    yield from DataLoader(
        loader.dataset,
        batch_sampler=list(batches),
        collate_fn=finder,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
    )


def _said(reason: str, rows: Mapping[str, str]) -> str:
    """A reason with its rows; where a file is at fault, also with what is wrong with the first."""
    named = ", ".join(map(repr, list(rows)[:NUM_NAMED]))
    more = f" and {len(rows) - NUM_NAMED:,} more" if len(rows) > NUM_NAMED else ""
    first = f" (the first: {next(iter(rows.values()))})" if reason in (BAD_ROW, BAD_IMAGE) else ""
    return f"{reason}: {named}{more}{first}"
