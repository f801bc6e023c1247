"""`data check`: every row of every split, as a run would read it, without a model.

    python -m prism_pl data check --config sft.yaml --out runs/check
    python -m prism_pl data check --config align.yaml --against evaluate.yaml --exclude duplicates overlap
    python -m prism_pl data check --config benchmarks.yaml

It counts what the stage of the configuration could not use, and why; lengths with images expanded; rows that stand
twice; and what the splits share with each other and with the test rows of other configurations. A run leaves out what
the check lists with `--data.check_folder runs/check`. Where there are test rows alone, they are what is checked.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from lightning import LightningDataModule, Trainer

from prism_pl.checked import CHECK, CHECKED, EXCLUDED, Checkable, FiltersPrompts
from prism_pl.data.facts import FactFinder, Facts
from prism_pl.data.overlap import Found, Split, overlap
from prism_pl.data.reading import LOADERS, DataCLI, DataOnlyCLI, has_split, read_split
from prism_pl.data.report import report
from prism_pl.errors import UsageError
from prism_pl.evaluation import write_json, write_lines
from prism_pl.row_needs import HasRowNeeds, RowNeeds
from prism_pl.shipped import stage_of

TOLD_EVERY = 10.0  # seconds


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and takes no shortened options: they may be the run's."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"data check: {message}. All options: python -m prism_pl data check --help")


def run(args: list[str]) -> None:
    """Check the data of a configuration; what follows is fit's command line with options of its own.

    Raises:
        UsageError: the command line.
        ValueError, FileNotFoundError: the data cannot be opened at all.
    """
    options, rest = _parser().parse_known_args(args)
    cli = DataCLI(rest)
    stage: Any = cli.model
    processor = stage.processor
    needs = stage.row_needs if isinstance(stage, HasRowNeeds) else RowNeeds()
    if options.max_tokens is not None:
        needs = replace(needs, max_length=options.max_tokens)
    data: Any = cli.datamodule
    names = [name for name in LOADERS if has_split(data, name)]
    if "train" not in names and (options.against or options.exclude):
        raise UsageError(
            "data check: --against and --exclude are about training rows, and this configuration has test rows alone: "
            "leave them out, or give the configuration of a training stage"
        )
    limit = data.max_prompt_tokens if isinstance(data, FiltersPrompts) else None
    finder = FactFinder(processor, needs, pixels=not options.headers_only, max_prompt_tokens=limit)
    splits = {name: collect(cli.datamodule, cli.trainer, name, finder) for name in names}
    splits = {name: split for name, split in splits.items() if split.facts}
    others = {}
    for config in options.against:
        # Over a whole configuration, since it may hold the data alone.
        other = DataOnlyCLI(["--config", "evaluate.yaml", "--config", config])
        name = stage_of(Path(config))
        reader = FactFinder(None, RowNeeds(), pixels=not options.headers_only)
        others[name] = collect(other.datamodule, other.trainer, "test", reader, name)
    found = overlap(splits, others)
    if "train" in splits:
        exclude(splits["train"], found, options.exclude)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, splits, cli.datamodule)
    text = report(splits, others, found, needs, folder)
    (folder / "check.md").write_text(text)
    print(text)


def _parser() -> Parser:
    parser = Parser(prog="python -m prism_pl data check", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="runs/check", help="folder for check.md, check.json and excluded.jsonl")
    parser.add_argument("--against", action="append", default=[], metavar="CONFIG", help="look for its test rows here")
    choices = ("duplicates", "overlap")
    parser.add_argument("--exclude", nargs="+", default=[], choices=choices, help="list these rows to leave out, too")
    parser.add_argument("--headers_only", action="store_true", help="do not decode images: faster, finds less")
    parser.add_argument("--max_tokens", type=int, help="longest row, prompt and response; the default is the stage's")
    return parser


def collect(
    datamodule: LightningDataModule, trainer: Trainer, split: str, finder: FactFinder, name: str | None = None
) -> Split:
    """The facts of a split's rows, in order."""
    found = Split(name or split)
    begun = told = time.monotonic()
    for batch in read_split(datamodule, trainer, split, finder):
        found.facts += batch
        if time.monotonic() - told > TOLD_EVERY:
            told = time.monotonic()
            print(f"{found.name}: {len(found.facts):,} rows in {told - begun:.0f} s", flush=True)
    return found


def exclude(train: Split, found: Found, kinds: list[str]) -> None:
    """Mark training rows that stand earlier or in other splits and sets as unusable, where asked for."""
    for number, facts in enumerate(train.facts):
        if facts.unusable:
            continue
        if "duplicates" in kinds and number in found.duplicates.get("train", {}):
            first = train.facts[found.duplicates["train"][number]]
            facts.unusable, facts.detail = "duplicate", f"row {facts.id!r} is row {first.id!r} again"
        elif "overlap" in kinds and number in found.shared_rows:
            where, what = found.shared_rows[number]
            facts.unusable, facts.detail = f"overlap with {where}", f"row {facts.id!r} has {what} of {where}"


def write(folder: Path, splits: Mapping[str, Split], datamodule: Any) -> None:
    """The files that a run reads, see `prism_pl.checked`; of test rows alone only which cannot be used."""
    if "train" not in splits:
        write_lines(_excluded([facts for split in splits.values() for facts in split.facts]), folder / EXCLUDED)
        return
    train = splits["train"].facts
    validation = splits["validation"].facts if "validation" in splits else []
    reasons = list(dict.fromkeys(facts.unusable for facts in [*train, *validation] if facts.unusable))
    recipe = datamodule.row_recipe() | datamodule.selection() if isinstance(datamodule, Checkable) else None
    np.savez(
        folder / CHECKED,
        prompt_tokens=np.array([facts.prompt_tokens for facts in train], dtype=np.int32),
        response_tokens=np.array([facts.response_tokens for facts in train], dtype=np.int32),
        reason=_numbered(train, reasons),
        validation_reason=_numbered(validation, reasons),
    )
    write_json({"recipe": recipe, "reasons": reasons}, folder / CHECK)
    write_lines(_excluded([*train, *validation]), folder / EXCLUDED)


def _numbered(facts: list[Facts], reasons: list[str]) -> np.ndarray:
    return np.array([reasons.index(each.unusable) + 1 if each.unusable else 0 for each in facts], dtype=np.int16)


def _excluded(facts: list[Facts]) -> Iterator[dict[str, str]]:
    yield from ({"id": f.id, "reason": f.unusable, "detail": f.detail} for f in facts if f.unusable)
