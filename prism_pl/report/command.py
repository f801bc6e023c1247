"""`python -m prism_pl report RUN [RUN ...]`: its options, what it writes, and its exit code. Light until it runs."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prism_pl.errors import EXIT_RUN, UsageError

ABOUT = """Write one Markdown file with figures about finished runs, made only from what the runs wrote.

A RUN is the folder that holds the run folders of stages and evaluations, such as runs/demo; a single stage or
evaluation is one too. Several runs are shown side by side. What a run lacks is left out with a line that says so."""

EXAMPLE = """example:
  python -m prism_pl report runs/demo --pairs align:sft rlvr:align --require align:sft:accuracy:up"""


class Parser(argparse.ArgumentParser):
    """Raises what argparse would exit with."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"report: {message}. All options: python -m prism_pl report --help")


def make_parser() -> Parser:
    """The options of `report`."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m prism_pl report", description=ABOUT, epilog=EXAMPLE, formatter_class=style)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, help="the Markdown file; default RUN/report.md, needed with several runs")
    parser.add_argument("--pairs", nargs="+", default=[], help="name:name, compared as the first less the second")
    parser.add_argument("--splits", nargs="+", default=[], help="default: all that were evaluated")
    parser.add_argument(
        "--require", nargs="+", default=[], help="name:name:metric:up|down|kept, on the test split; else exit code 1"
    )
    parser.add_argument("--num_samples", type=int, default=4, help="prompts shown with their responses (4)")
    parser.add_argument("--num_resamples", type=int, default=10_000, help="of the paired bootstrap (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the paired bootstrap (0)")
    return parser


def run(args: list[str]) -> None:
    """Run `["report", "runs/demo", ...]`. Exits with 1 where a requirement is not met; the report is written first."""
    options = make_parser().parse_args(args[1:])
    page = _page(options.runs, options.out)
    if options.num_resamples < 1 or options.num_samples < 0:
        raise UsageError("report: give --num_resamples of at least 1 and --num_samples of at least 0.")

    from prism_pl.report.comparisons import unmet
    from prism_pl.report.document import Options, make_report
    from prism_pl.report.runs import read_runs

    runs = read_runs(options.runs)
    settings = Options(
        splits=_words(options.splits),
        pairs=_words(options.pairs),
        num_resamples=options.num_resamples,
        seed=options.seed,
        num_samples=options.num_samples,
    )
    # First: a requirement that is none should not cost the time of the figures.
    sentences = unmet(_words(options.require), runs, options.num_resamples, options.seed)
    page.parent.mkdir(parents=True, exist_ok=True)
    text = make_report(runs, settings, page, shlex.join(["python", "-m", "prism_pl", *args]))
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(page)
    print(f"written to {page}")
    if sentences:
        print(f"\nnot met: {'; '.join(sentences)}", file=sys.stderr)
        sys.exit(EXIT_RUN)


def _page(runs: Sequence[Path], out: Path | None) -> Path:
    if out is None and len(runs) > 1:
        raise UsageError("report: name the file for several runs with --out, such as --out runs/comparison.md.")
    page = out or (runs[0] if runs[0].is_dir() else runs[0].parent) / "report.md"
    if page.is_dir():
        raise UsageError(f"report: --out {page} is a folder. Name a file, such as {page / 'report.md'}.")
    return page


def _words(values: Sequence[str]) -> list[str]:
    """A pipeline's YAML gives several values as one."""
    return [word for value in values for word in re.split(r"[\s,]+", value) if word]
