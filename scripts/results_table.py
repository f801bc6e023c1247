"""One table of several evaluations, and the paired differences between some of them.

Launch: python scripts/results_table.py runs/evaluate-* --pairs align:sft rlvr:align [--splits test hard] [--out FILE]
Exit 1 where a result is not what it should be: --require align:sft:caption_exact:kept rlvr:sft:accuracy:up
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prism_pl.metrics.bootstrap import Interval
from prism_pl.report import Evaluation, differences, differences_table, read_evaluation, results_table

# What a difference's 95% interval has to be.
WANTED: dict[str, Callable[[Interval], bool]] = {
    "up": lambda interval: interval.low > 0,
    "down": lambda interval: interval.high < 0,
    "kept": lambda interval: interval.high >= 0,  # not shown to be lower
}


def make_report(
    paths: Sequence[Path], pairs: Sequence[str], splits: Sequence[str], num_resamples: int, seed: int
) -> str:
    """The tables as Markdown, a section a split. A pair is `name:name`, the first less the second."""
    evaluations = [read_evaluation(path) for path in paths]
    by_name = {evaluation.name: evaluation for evaluation in evaluations}
    if len(by_name) < len(evaluations):
        raise ValueError(f"two evaluations have one name: {[e.name for e in evaluations]}; set model.init_args.name")
    named = [_pair(pair, by_name) for pair in pairs]
    sections = []
    for split in splits:
        sections += [f"## {split}", "", results_table(evaluations, split), ""]
        if named:
            sections += [differences_table(named, split, num_resamples, seed), ""]
    return "\n".join(sections)


def unmet(paths: Sequence[Path], required: Sequence[str], num_resamples: int, seed: int) -> list[str]:
    """A sentence for each requirement `name:name:metric:up|down|kept` that the test split's differences do not meet."""
    by_name = {evaluation.name: evaluation for evaluation in map(read_evaluation, paths)}
    sentences = []
    for requirement in required:
        pair, metric, wanted = requirement.rsplit(":", 2)
        found = differences(*_pair(pair, by_name), "test", num_resamples, seed)
        if metric not in found or wanted not in WANTED:
            shape = f"name:name:metric:{'|'.join(WANTED)}"
            raise ValueError(f"--require {requirement!r}: give {shape} with a metric of {', '.join(found)}")
        interval = found[metric]
        if not WANTED[wanted](interval):
            sentences.append(
                f"{requirement}: the difference is {interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
            )
    return sentences


def _pair(pair: str, by_name: dict[str, Evaluation]) -> tuple[Evaluation, Evaluation]:
    first, _, second = pair.partition(":")
    for name in (first, second):
        if name not in by_name:
            raise ValueError(f"--pairs {pair!r} names {name!r}; the evaluations are {', '.join(by_name)}")
    return by_name[first], by_name[second]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One table of several evaluations.")
    parser.add_argument("paths", nargs="+", type=Path, help="evaluation.json files or the folders that hold them")
    parser.add_argument("--pairs", nargs="*", default=[], help="name:name, the first less the second")
    parser.add_argument("--splits", nargs="+", default=["test"])
    parser.add_argument("--num_resamples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--require", nargs="*", default=[], help="name:name:metric:up|down|kept, else exit 1")
    parser.add_argument("--out", type=Path, help="also write the report here")
    options = parser.parse_args(arguments)
    try:
        report = make_report(options.paths, options.pairs, options.splits, options.num_resamples, options.seed)
        failed = unmet(options.paths, options.require, options.num_resamples, options.seed)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    command = shlex.join(["python", "scripts/results_table.py", *(sys.argv[1:] if arguments is None else arguments)])
    report += f"\nMade by `{command}`.\n"
    print(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report)
    if failed:
        sys.exit("not met: " + "; ".join(failed))


if __name__ == "__main__":
    main()
