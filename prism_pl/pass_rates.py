"""Pass rates as `predict` writes them, and the file's readers share: a line that says what was measured, and one a row.

{"recipe": {"data": {"rows": "5f1c...", "system_prompt": "..."}, "policy": "runs/align/export", "sampling": {...}}}
{"id": "digits-rlvr-0-0", "pass_rate": 0.375, "num_samples": 8, "num_correct": 3, "format_rate": 1.0}

A file without the first line, made elsewhere, is read as well: its rows are known by their ids alone.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from prism_pl.policy import PolicySpec
    from prism_pl.rollout.engine import Sampling

PASS_RATES = "pass_rates.jsonl"
KEPT_IDS = "kept_ids.json"


class PassRate(TypedDict):
    """A line: the shares of a prompt's samples that are right, and that have the format."""

    id: str
    pass_rate: float
    num_samples: int
    num_correct: int
    format_rate: float


@runtime_checkable
class HasRecipe(Protocol):
    """A data module that can say what its training rows are made of, in plain values: measurements on rows of one
    recipe fit no rows of another, though their ids may be the same."""

    def row_recipe(self) -> dict[str, Any]: ...


def measured_with(datamodule: object, policy: "PolicySpec", sampling: "Sampling", num_samples: int) -> dict[str, Any]:
    """What samples of training rows were made of, in plain values: the recipe of the file that they go into."""
    return {
        "data": datamodule.row_recipe() if isinstance(datamodule, HasRecipe) else None,
        "policy": policy.path,
        "sampling": asdict(sampling),
        "num_samples": num_samples,
    }


def read_recipe(file: Path) -> dict[str, Any] | None:
    """What the pass rates were measured on and with; None where the file does not say."""
    with file.open() as lines:
        first = lines.readline()
    try:
        content = json.loads(first)
    except json.JSONDecodeError:
        return None
    return content.get("recipe") if isinstance(content, dict) else None


def read_pass_rates(file: Path) -> dict[str, float]:
    """Row id -> pass rate.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no pass rate, an id that stands twice, or an empty file; names file and line.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"data.pass_rates: there is no file {file}. Measure pass rates first: python -m prism_pl predict "
            "--config filter.yaml --model.policy.path POLICY --trainer.default_root_dir FOLDER"
        )
    rates: dict[str, float] = {}
    for number, line in enumerate(file.read_text().split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith('{"recipe":')):
            continue
        where = f"{file}, line {number}"
        id, rate = _pass_rate(line, where)
        if id in rates:
            raise ValueError(f"{where}: the row {id!r} stands twice; give each row one pass rate")
        rates[id] = rate
    if not rates:
        raise ValueError(f"{file} holds no pass rates: measure them anew (python -m prism_pl predict)")
    return rates


def _pass_rate(line: str, where: str) -> tuple[str, float]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON object ({error.msg}): {line[:60]!r}") from None
    if not isinstance(row, dict) or "id" not in row or "pass_rate" not in row:
        raise ValueError(f'{where}: give an object with "id" and "pass_rate", not {line[:60]!r}')
    rate = row["pass_rate"]
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not number or not math.isfinite(rate) or not 0 <= rate <= 1:
        raise ValueError(f"{where}: pass_rate is {rate!r}; it is a share, from 0 to 1")
    return str(row["id"]), float(rate)


def histogram(rates: Sequence[float], most: int = 17) -> str:
    """How many rows have each pass rate, `0 x 3, 0.5 x 1`; tenths where more than `most` rates occur."""
    counts = Counter(rates)
    if len(counts) <= most:
        return ", ".join(f"{rate:.3g} x {counts[rate]}" for rate in sorted(counts))
    tenths = Counter(min(int(rate * 10), 9) for rate in rates)
    return ", ".join(f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f} x {tenths[tenth]}" for tenth in sorted(tenths))
