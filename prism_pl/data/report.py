"""What `data check` found, as a page of text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from prism_pl.checked import CHECK, EXCLUDED
from prism_pl.data.facts import BAD_IMAGE, BAD_ROW, FILTERED
from prism_pl.data.overlap import Found, Split
from prism_pl.report.tables import markdown_table
from prism_pl.row_needs import RowNeeds

NUM_SHOWN = 3
NUM_BINS = 12
BAR = 40


def report(
    splits: Mapping[str, Split], others: Mapping[str, Split], found: Found, needs: RowNeeds, folder: Path
) -> str:
    """The page: rows, what cannot be used and why, lengths, duplicates, overlap, and what a run will do.

    Args:
        others: the sets that the training rows were compared with, beside the splits.
    """
    sets = {**splits, **others}
    lines = ["# Data check", "", f"What the stage needs of a row: {_needs(needs)}.", ""]
    header = ["split", "rows", "usable", "with an image", "again", "with control tokens spelled out"]
    lines += [*markdown_table(header, [_row(split, found) for split in sets.values()]), ""]
    for split in sets.values():
        lines += _unusable(split)
    for split in splits.values():
        lines += _lengths(split)
    lines += _shared(found)
    return "\n".join([*lines, *_verdict(splits, folder), *_not_compared(sets, found), ""])


def _needs(needs: RowNeeds) -> str:
    told = {
        name: value for name, value in asdict(needs).items() if value and name not in ("experts", "unless_rejected")
    }
    wanted = [name if value is True else f"{name} {value}" for name, value in told.items()]
    return ", ".join(wanted).replace("_", " ") or "nothing but a question"


def _row(split: Split, found: Found) -> list[str]:
    facts = split.facts
    usable = sum(not row.unusable for row in facts)
    images = sum(row.num_images > 0 for row in facts)
    control = sum(row.control_tokens for row in facts)
    again = len(found.duplicates[split.name]) or (0 if split.shows_images else None)
    return [split.name, *map(_number, (len(facts), usable, images, again, control))]


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _unusable(split: Split) -> list[str]:
    counts = Counter(row.unusable for row in split.facts if row.unusable)
    if not counts:
        return []
    lines = [f"## What cannot be used of {split.name}", ""]
    for reason, count in counts.most_common():
        lines.append(f"* {count:,} x {reason}")
        shown = [row.detail for row in split.facts if row.unusable == reason][:NUM_SHOWN]
        lines += [f"    * {detail}" for detail in shown]
    return [*lines, ""]


def _lengths(split: Split) -> list[str]:
    rows = [row for row in split.facts if row.prompt_tokens]
    if not rows:
        return []
    lines = [f"## Tokens of {split.name}, images expanded", ""]
    columns = {
        "prompt": [row.prompt_tokens for row in rows],
        "response": [row.response_tokens for row in rows if row.response_tokens],
        "both": [row.prompt_tokens + row.response_tokens for row in rows],
    }
    columns = {name: sorted(lengths) for name, lengths in columns.items() if lengths}
    header = ["", "rows", "least", "median", "90%", "99%", "most"]
    table = [
        [name, *(f"{number:,}" for number in [len(lengths), *_quantiles(lengths)])] for name, lengths in columns.items()
    ]
    return [*lines, *markdown_table(header, table), "", "```text", *histogram(columns["both"]), "```", ""]


def _quantiles(ordered: Sequence[int]) -> list[int]:
    last = len(ordered) - 1
    return [ordered[round(share * last)] for share in (0, 0.5, 0.9, 0.99, 1)]


def histogram(lengths: Sequence[int]) -> list[str]:
    """A line of text a range of lengths, with a bar for the rows in it."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // NUM_BINS))
    counts = Counter((length - low) // width for length in lengths)
    most = max(counts.values())
    lines = []
    for number in range((high - low) // width + 1):
        start = low + number * width
        bar = "#" * -(-counts[number] * BAR // most)
        lines.append(f"{start:>7} to {start + width - 1:>7}  {counts[number]:>9,}  {bar}".rstrip())
    return lines


def _shared(found: Found) -> list[str]:
    if not found.shared:
        return []
    kinds = list(next(iter(found.shared.values())))
    rows = [[*pair, *(_number(counts[kind]) for kind in kinds)] for pair, counts in found.shared.items()]
    lines = ["## Rows that share something", "", *markdown_table(["rows of", "with", *kinds], rows), ""]
    for (_, other, what), (one, two) in found.examples.items():
        lines.append(f"* {what}: row {one!r} and row {two!r} of {other}")
    return [*lines, ""]


def _verdict(splits: Mapping[str, Split], folder: Path) -> list[str]:
    if "train" not in splits:
        return [_of_an_evaluation(split, folder) for split in splits.values()]
    lines = []
    for name in (name for name in ("train", "validation") if name in splits):
        rows, called = splits[name].facts, "training" if name == "train" else name
        stopping = sum(row.unusable not in ("", FILTERED) for row in rows)
        if filtered := sum(row.unusable == FILTERED for row in rows):
            lines.append(f"{filtered:,} of {len(rows):,} {called} rows are {FILTERED}.")
        if not stopping:
            left = len(rows) - filtered
            lines.append(f"A run can use all {left:,} {'other ' if filtered else ''}{called} rows.")
        else:
            lines.append(f"A run stops at the first of the {stopping:,} {called} rows that it cannot use.")
    if any(line.startswith("A run stops") for line in lines):
        lines.append(
            f"To leave them out, counted: --data.check_folder {folder} ({EXCLUDED} lists them, {CHECK} belongs to "
            "these rows alone). Rows of a validation file of its own have to be mended."
        )
    return lines


def _of_an_evaluation(split: Split, folder: Path) -> str:
    unusable = sum(bool(row.unusable) for row in split.facts)
    if not unusable:
        return f"An evaluation can use all {len(split.facts):,} {split.name} rows."
    return (
        f"An evaluation does not begin: it cannot use {unusable:,} of {len(split.facts):,} {split.name} rows "
        f"({folder / EXCLUDED} lists them). Raise the limits that are named, scale images down with "
        "model.policy.max_pixels, or mend the rows."
    )


def _not_compared(sets: Mapping[str, Split], found: Found) -> list[str]:
    """What the comparison has not seen, so that nobody takes it for a clean one."""
    if not found.shared:
        return []
    lines = []
    for name, split in sets.items():
        unread = sum(row.unusable in (BAD_ROW, BAD_IMAGE) for row in split.facts)
        if unread and name != "train":
            lines.append(
                f"{unread:,} of {len(split.facts):,} rows of {name} could not be read: what training rows share with "
                "them is not known. Mend them, and check again."
            )
    if any(None in counts.values() for counts in found.shared.values()):
        lines.append("- stands where images were not compared: no pixels were read (--headers_only reads none).")
    return lines
