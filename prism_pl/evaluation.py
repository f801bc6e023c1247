"""What is known of each evaluated prompt: one record, written to `evaluation.json`.

All numbers of the tables follow from the records, so two checkpoints can be compared prompt by prompt afterwards.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from prism_pl.batch import Example
from prism_pl.chat import parse
from prism_pl.metrics.counting import Rule, count_items
from prism_pl.metrics.scene import SceneChecker

PASS_RATES = "pass_rates.jsonl"

Side = Literal["policy", "supervision"]
Record = TypeVar("Record", bound=Mapping[str, Any])
SIDES: tuple[Side, ...] = ("policy", "supervision")


class ResponseRecord(TypedDict):
    """One response. `items`, `steps`, `caption` and `reasoning` are None where malformed, and the last two where no
    scene is known; `correct` is through the format, `lenient` wherever the answer stands."""

    text: str
    valid: bool
    malformed_reason: str
    correct: bool
    lenient: bool
    tokens: int
    truncated: bool
    items: int | None
    steps: int | None
    caption: dict[str, int] | None
    reasoning: dict[str, int] | None


class PromptRecord(TypedDict):
    """One prompt with the policy's samples and, where the row has one, the supervision's response."""

    id: str
    family: str
    split: str
    question: str
    answers: list[str]
    policy: list[ResponseRecord]
    supervision: ResponseRecord | None


class Judge:
    """Turns responses into records.

    Args:
        rule: how items and steps are counted.
        checker: checks captions and steps against the scene; None where scenes are unknown.
    """

    def __init__(self, rule: Rule, checker: SceneChecker | None = None) -> None:
        from prism_pl.rewards import AccuracyFormatReward

        self.rule: Rule = rule
        self.checker = checker
        self.strict = AccuracyFormatReward(strict=True)
        self.lenient = AccuracyFormatReward(strict=False)

    def __call__(self, text: str, example: Example, tokens: int, truncated: bool = False) -> ResponseRecord:
        """Judge one response of `tokens` tokens. ValueError for a row without answers."""
        parsed = parse(text)
        caption = reasoning = None
        if parsed.valid and self.checker is not None:
            said = self.checker.check_caption(parsed.caption, example)
            caption = {"true": said.true, "missed": said.missed, "invented": said.invented, "exact": int(said.exact)}
            steps = self.checker.check_steps(parsed.reasoning, example)
            reasoning = {"correct": steps.correct, "stated": steps.stated, "expected": steps.expected}
        return ResponseRecord(
            text=text,
            valid=parsed.valid,
            malformed_reason=parsed.reason,
            correct=bool(self.strict([text], [example]).parts["accuracy"].item()),
            lenient=bool(self.lenient([text], [example]).parts["accuracy"].item()),
            tokens=tokens,
            truncated=truncated,
            items=count_items(parsed.caption, self.rule) if parsed.valid else None,
            steps=count_items(parsed.reasoning, self.rule) if parsed.valid else None,
            caption=caption,
            reasoning=reasoning,
        )


def responses_of(record: PromptRecord, side: Side) -> list[ResponseRecord]:
    """The responses of one side: G of the policy, one or none of the supervision."""
    if side == "policy":
        return record["policy"]
    return [] if record["supervision"] is None else [record["supervision"]]


def write_json(content: Any, file: Path) -> None:
    """Write to a temporary name and rename, so that a kill never leaves half a file. NaN becomes null."""
    _write_text(json.dumps(_without_nan(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n", file)


def write_lines(rows: Iterable[Any], file: Path) -> None:
    """One JSON object a line, written as `write_json` does."""
    _write_text("".join(json.dumps(_without_nan(row), ensure_ascii=False) + "\n" for row in rows), file)


def _write_text(text: str, file: Path) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(file)


def keep_earlier(file: Path) -> None:
    """Rename a file that is there already to the first free of `<stem>-1`, `<stem>-2`, ...: nothing is overwritten."""
    if not file.exists():
        return
    number = 1
    while (earlier := file.with_stem(f"{file.stem}-{number}")).exists():
        number += 1
    file.rename(earlier)


def gathered(records: Sequence[Record], split: str) -> list[Record]:
    """The records of all ranks, each prompt once: samplers repeat rows to give every rank as many. Two rows with one id
    are a ValueError: they could not be told apart in a comparison."""
    import torch

    parts: list[list[Record]] = [list(records)]
    if torch.distributed.is_initialized():
        parts = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, list(records))
    by_id: dict[str, Record] = {}
    for record in (record for part in parts for record in part):
        other = by_id.setdefault(record["id"], record)
        repeated_by_sampler = len(parts) > 1 and other.get("question") == record.get("question")
        if other is not record and not repeated_by_sampler:
            raise ValueError(f"two rows have the id {record['id']!r}: give every row of the {split} data its own")
    return list(by_id.values())


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
