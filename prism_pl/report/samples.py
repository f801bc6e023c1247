"""Sample responses with their images, picked by a rule that the report states."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from prism_pl.evaluation import PromptRecord, ResponseRecord
from prism_pl.report.figures import Figures
from prism_pl.report.tables import Evaluations

SOME_RIGHT = "one checkpoint answers right and another, well-formed too, wrong"
IMAGE_WIDTH = 224  # pixels on the page


def samples(figures: Figures, evaluations: Evaluations, split: str, num: int) -> list[str]:
    """Prompts with every checkpoint's first response; nothing where no prompt was put to all checkpoints."""
    records = {label: {record["id"]: record for record in e.rows(split)} for label, e in evaluations.items()}
    first = next(iter(records.values()))
    ids = sorted((id for id in first if all(id in by_id for by_id in records.values())), key=_natural)
    if not ids or not num:
        return []
    with_image = [id for id in ids if any(by_id[id].get("images") for by_id in records.values())]
    candidates = with_image or ids
    differing = [id for id in candidates if _disagree([by_id[id]["policy"][0] for by_id in records.values()])]
    chosen = (differing or candidates)[:num]
    among = f"the {len(candidates)} {split} prompts {'whose images were kept' if with_image else '(no image was kept)'}"
    if differing:
        rule = f"of {among} the first {len(chosen)} by id of those {len(differing)} that {SOME_RIGHT}"
    else:
        rule = f"of {among} the first {len(chosen)} by id; there is none that {SOME_RIGHT}"
    lines = [f"Picked by rule: {rule}. Each checkpoint's first response.", ""]
    for id in chosen:
        lines += _sample(figures, evaluations, {label: by_id[id] for label, by_id in records.items()})
    return lines


def _natural(id: str) -> list[tuple[int, int, str]]:
    """Numbers in ids by their value: row-2 before row-10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", id) if part]


def _disagree(responses: Sequence[ResponseRecord]) -> bool:
    """Whether some are right and some wrong. A malformed one is neither: a base policy's always are."""
    return len({response["correct"] for response in responses if response["valid"]}) > 1


def _verdict(response: ResponseRecord) -> str:
    if response["valid"]:
        return "right" if response["correct"] else "wrong"
    return f"malformed ({response['malformed_reason']})"


def _sample(figures: Figures, evaluations: Evaluations, records: dict[str, PromptRecord]) -> list[str]:
    record = next((r for r in records.values() if r.get("images")), next(iter(records.values())))
    lines = [f"### {record['id']} ({record['family']})", ""]
    for label, other in records.items():
        if other is record:
            lines += _images(figures, evaluations[label].folder, record)
    lines += [f"**{_inline(record['question'])}** Answer: {_inline(' | '.join(record['answers']))}", ""]
    responses: dict[tuple[str, str], list[str]] = {}
    for label, other in records.items():
        response = other["policy"][0]
        responses.setdefault((_verdict(response), response["text"]), []).append(label)
    for (verdict, text), labels in responses.items():
        lines += [f"{', '.join(labels)}: **{_inline(verdict)}**", "", *_block(text)]
    if record["supervision"] is not None:
        lines += ["The supervision:", "", *_block(record["supervision"]["text"])]
    return lines


def _images(figures: Figures, folder: Path, record: PromptRecord) -> list[str]:
    """The record's images, copied beside the figures; those that are gone are left out with a line."""
    lines = []
    for name in record.get("images", []):  # evaluations of before images were kept have none
        source = folder / name
        if source.is_file():
            figures.folder.mkdir(parents=True, exist_ok=True)
            copy = figures.folder / f"sample-{source.name}"
            shutil.copyfile(source, copy)
            lines.append(f'<img src="{figures.link(copy)}" width="{IMAGE_WIDTH}" alt="image of {record["id"]}">')
        else:
            lines.append(f"*The image {name} is gone.*")
    return [*lines, ""]


def _inline(text: str) -> str:
    return re.sub(r"([*_`<>|\[\]\\])", r"\\\1", " ".join(text.split()))


def _block(text: str) -> list[str]:
    """As code: Markdown would swallow the tags. The fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return [f"{fence}text", *(text or "(empty)").splitlines(), fence, ""]
