"""The difficulty filter: which RLVR prompts are worth training on, from pass rates that `predict` measured.

A prompt that a policy always or never gets right has no spread of rewards in its group and teaches nothing. In YAML, of
any datamodule that takes the two options:

    data: {init_args: {rows: rlvr, pass_rates: runs/filter/pass_rates.jsonl, keep: [0.2, 0.8]}}

The file's format: `prism_pl.pass_rates`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset, Subset

from prism_pl.checkpoint_files import LastCheckpoints
from prism_pl.evaluation import keep_earlier, write_json
from prism_pl.fingerprint import differences
from prism_pl.pass_rates import KEPT_IDS, PASS_RATES, histogram, read_pass_rates, read_recipe


def check_keep(keep: Sequence[float]) -> tuple[float, float]:
    """The least and the largest pass rate that is kept; ValueError unless they are two shares in order."""
    bounds = tuple(keep)
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
        raise ValueError(f"keep is {list(keep)}: give the least and the largest pass rate, such as [0.2, 0.8]")
    return bounds


def keep_by_difficulty(
    rows: Dataset[Any],
    ids: Sequence[str],
    pass_rates: Path,
    keep: Sequence[float],
    trainer: L.Trainer,
    recipe: dict[str, Any] | None = None,
) -> Subset[Any]:
    """The rows whose pass rate lies in `keep`, bounds included, in their order. Says how many of how many, and writes
    `kept_ids.json` into the run's folder.

    Args:
        ids: of the rows, in order: a data set that makes its rows when asked would have to make them all.
        pass_rates: the file, or the folder of the `predict` run that wrote it.
        recipe: of the rows: the file must have been measured on rows of the same one.

    Raises:
        ValueError: pass rates of other data, a row without a pass rate, no row left, or a run that would go on with
            other rows than it began.
        FileNotFoundError, ValueError: see `read_pass_rates`.
    """
    low, high = check_keep(keep)
    file = pass_rates / PASS_RATES if pass_rates.is_dir() else pass_rates
    rates = read_pass_rates(file)
    _check_recipe(file, recipe)
    missing = [id for id in ids if id not in rates]
    if missing:
        others = f" and {len(missing) - 1} rows more" if len(missing) > 1 else ""
        raise ValueError(
            f"{file} has no pass rate of the training row {missing[0]!r}{others}: measure the same rows that are "
            "trained on (python -m prism_pl predict with this data's num_train and seed), or train on fewer of them"
        )
    chosen = [index for index, id in enumerate(ids) if low <= rates[id] <= high]
    shown = histogram([rates[id] for id in ids])
    if not chosen:
        raise ValueError(
            f"keep [{low:g}, {high:g}] leaves none of {len(ids)} rows. Pass rate x rows in {file}: {shown}. Widen "
            "keep, or measure with another policy or more samples a prompt"
        )
    kept = [ids[index] for index in chosen]
    if trainer.is_global_zero:
        _record(Path(trainer.default_root_dir), {"pass_rates": str(file), "keep": [low, high], "ids": kept})
    rank_zero_info(
        f"Difficulty filter: kept {len(kept)} of {len(ids)} rows with pass rates in [{low:g}, {high:g}]. "
        f"Pass rate x rows: {shown}."
    )
    return Subset(rows, chosen)


def _check_recipe(file: Path, recipe: dict[str, Any] | None) -> None:
    measured = read_recipe(file)
    if recipe is None:
        return
    if measured is None or measured["data"] is None:
        rank_zero_info(f"{file} does not say on which data it was measured: rows are matched by their ids alone.")
    elif changed := list(differences(measured["data"], recipe)):
        raise ValueError(
            f"{file} was measured on other data than is trained on, so that equal ids mean other rows "
            f"({'; '.join(changed)}): measure this data (python -m prism_pl predict)"
        )


def _record(folder: Path, kept: dict[str, Any]) -> None:
    file = folder / KEPT_IDS
    if file.exists():
        before = json.loads(file.read_text())
        if before["ids"] == kept["ids"]:
            return
        if LastCheckpoints(folder).to_go_on_from() is not None:
            raise ValueError(
                f"{file}: the run began with {len(before['ids'])} rows, and {kept['pass_rates']} now keeps "
                f"{len(kept['ids'])}, not the same ones. Bring the earlier pass rates back, or start anew with --fresh"
            )
        keep_earlier(file)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(kept, file)
