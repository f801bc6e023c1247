"""What is known of each evaluated prompt: one record, written to `evaluation.json`.

All numbers of the tables follow from the records, so two checkpoints can be compared prompt by prompt afterwards.
"""

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict, TypeVar, runtime_checkable

from prism_pl.chat import lenient_answer, parse
from prism_pl.metrics.counting import Rule, count_segment

if TYPE_CHECKING:  # reports read records without torch
    from prism_pl.batch import Example
    from prism_pl.metrics.scene import SceneChecker

IMAGES = "images"

Side = Literal["policy", "supervision"]
# What a judge model made of the rule's verdict.
Judged = Literal["kept", "to_right", "to_wrong", "silent"]
Record = TypeVar("Record", bound=Mapping[str, Any])
SIDES: tuple[Side, ...] = ("policy", "supervision")


class ResponseRecord(TypedDict):
    """One response. `items`, `steps`, `caption` and `reasoning` are None where malformed, and the last two where no
    scene is known; `correct` is through the format, `lenient` wherever the answer stands. `nll` has the supervision's
    response where the drift meter measured it: block -> summed negative log-likelihood under the policy, and tokens."""

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
    judged: NotRequired[Judged]  # where a judge model was asked
    nll: NotRequired[dict[str, tuple[float, int]]]


class PromptRecord(TypedDict):
    """One prompt with the policy's samples and, where the row has one, the supervision's response. `images` are the
    files kept of its images, relative to the evaluation's folder; empty where none were kept.

    Prompts of one `unit` are resampled together; without one a prompt stands alone. `scores` are those over the
    questions of a unit that its prompts count in, each as its `part` (`prism_pl.metrics.unit_scores`)."""

    id: str
    family: str
    split: str
    question: str
    answers: list[str]
    policy: list[ResponseRecord]
    supervision: ResponseRecord | None
    images: list[str]
    unit: NotRequired[str]
    part: NotRequired[str]
    scores: NotRequired[list[str]]


@runtime_checkable
class KnowsRightAnswers(Protocol):
    """A datamodule with a rule of its own for its answers, as benchmarks have. `answer` is no whole response."""

    def is_right(self, answer: str, example: "Example") -> bool: ...


class Judge:
    """Turns responses into records.

    Args:
        rule: how items and steps are counted.
        checker: checks captions and steps against the scene; None where scenes are unknown.
        is_right: says which answers are right; None is `rewards.is_right`, any of the row's answers.
    """

    def __init__(
        self,
        rule: Rule,
        checker: "SceneChecker | None" = None,
        is_right: "Callable[[str, Example], bool] | None" = None,
    ) -> None:
        from prism_pl import rewards

        self.rule: Rule = rule
        self.checker = checker
        self.is_right = is_right or rewards.is_right

    def __call__(self, text: str, example: "Example", tokens: int, truncated: bool = False) -> ResponseRecord:
        """Judge one response of `tokens` tokens. ValueError for a row without answers."""
        parsed = parse(text)
        # The answer block's text where the response is well-formed, so both verdicts come from one answer.
        right = self.is_right(lenient_answer(text), example)
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
            correct=right and parsed.valid,
            lenient=right,
            tokens=tokens,
            truncated=truncated,
            items=count_segment(text, "caption", self.rule),
            steps=count_segment(text, "reasoning", self.rule),
            caption=caption,
            reasoning=reasoning,
        )


def after_judge(record: ResponseRecord, verdict: bool | None) -> ResponseRecord:
    """A record with a judge model's verdict in the place of the rule's; None leaves that one."""
    if verdict is None:
        return {**record, "judged": "silent"}
    turned: Judged = "kept" if verdict == record["lenient"] else "to_right" if verdict else "to_wrong"
    return {**record, "lenient": verdict, "correct": verdict and record["valid"], "judged": turned}


def responses_of(record: PromptRecord, side: Side) -> list[ResponseRecord]:
    """The responses of one side: G of the policy, one or none of the supervision."""
    if side == "policy":
        return record["policy"]
    return [] if record["supervision"] is None else [record["supervision"]]


def keep_images(example: "Example", folder: Path, side: int = 512) -> list[str]:
    """Write the example's images as PNG files, no side longer than `side` pixels. Returns their paths in `folder`."""
    from prism_pl.images import open_image

    files = []
    for number, image in enumerate(example.images):
        # Ids may hold any character, and two of them must not end in one file.
        name = re.sub(r"[^\w.-]", "_", example.id)[:80]
        name += "" if name == example.id else f"-{zlib.crc32(example.id.encode()):08x}"
        file = folder / IMAGES / f"{name}-{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = open_image(image, example.id)
        picture.thumbnail((side, side))
        picture.save(file)
        files.append(file.relative_to(folder).as_posix())
    return files


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
