"""What `data check` found in the training rows of a data set, and what a run takes over from it.

`checked.npz` holds, for each training row in order, the tokens of its prompt (images expanded) and of its response, and
which reason it is left out for (0: none), and the same of the validation rows; `check.json` the reasons, and the recipe
of the data they belong to.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from prism_pl.fingerprint import differences

CHECK = "check.json"
CHECKED = "checked.npz"
EXCLUDED = "excluded.jsonl"


@runtime_checkable
class Checkable(Protocol):
    """A data module that takes a check over: `row_recipe` says what its rows are made of (`prism_pl.pass_rates`), and
    `selection` which of them are trained on, both in plain values."""

    def row_recipe(self) -> dict[str, Any]: ...

    def selection(self) -> dict[str, Any]: ...


@runtime_checkable
class FiltersPrompts(Protocol):
    """A data module that leaves out rows with longer prompts by itself; None: none."""

    max_prompt_tokens: int | None


@dataclass(frozen=True)
class Checked:
    """What is known of N training rows and of the validation rows.

    Attributes:
        kept: positions of the rows that are trained on.
        lengths: tokens of prompt and response of each row.
        said: how many rows are left out, and why.
        validation: positions of the validation rows that can be used.
        validation_said: as `said`, of these.
    """

    kept: np.ndarray
    lengths: np.ndarray
    said: str
    validation: np.ndarray
    validation_said: str


def read_checked(folder: Path, recipe: dict[str, Any], num_rows: int) -> Checked:
    """What a check found, for the data of this recipe.

    Raises:
        FileNotFoundError: there is no check in `folder`.
        ValueError: it was of other data, or leaves no row.
    """
    if not (folder / CHECK).is_file() or not (folder / CHECKED).is_file():
        raise FileNotFoundError(
            f"data.check_folder: {folder} holds no {CHECK}. Check the data first: python -m prism_pl data check "
            "--config CONFIG --out FOLDER"
        )
    content = json.loads((folder / CHECK).read_text())
    changed = list(differences(content["recipe"], recipe))
    if changed:
        raise ValueError(
            f"data.check_folder: {folder} is a check of other rows than these ({'; '.join(changed)}): check the data "
            "anew"
        )
    with np.load(folder / CHECKED) as arrays:
        reason_N = arrays["reason"]
        lengths_N = arrays["prompt_tokens"].astype(np.int64) + arrays["response_tokens"]
        validation_reason = arrays["validation_reason"]
    assert len(reason_N) == num_rows, "rows are part of the recipe"
    kept = np.flatnonzero(reason_N == 0)
    if not len(kept):
        raise ValueError(f"data.check_folder: {folder} leaves none of {num_rows} rows; {CHECK} says why")
    reasons = content["reasons"]
    validation = np.flatnonzero(validation_reason == 0)
    return Checked(
        kept,
        lengths_N,
        _said(reason_N, reasons, "rows"),
        validation,
        _said(validation_reason, reasons, "validation rows"),
    )


def _said(reason_N: np.ndarray, reasons: list[str], rows: str) -> str:
    counts = Counter(reasons[number - 1] for number in reason_N[reason_N > 0].tolist())
    why = "".join(f"; {count} x {reason}" for reason, count in counts.most_common())
    return f"Data check: {counts.total()} of {len(reason_N)} {rows} left out{why}."
