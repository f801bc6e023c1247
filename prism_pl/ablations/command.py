"""`python -m prism_pl ablations ...`: all arms over all seeds as one pipeline, then the tables."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from prism_pl.ablations.arms import Merged, merge
from prism_pl.ablations.schema import Ablations, arm_name, chosen, load_ablations, load_arms
from prism_pl.errors import PipelineFailed, Stopped, UsageError
from prism_pl.ledger import Ledger, locked, write_whole
from prism_pl.pipeline.command import Parser, Start, as_yaml, split_settings
from prism_pl.pipeline.graph import build_graph
from prism_pl.pipeline.jobs import ProcessRunner, Runner
from prism_pl.pipeline.schema import Pipeline
from prism_pl.shipped import find_config, stage_of

PAGE = "ablations.md"
ABOUT = """Run every variant of the method over several seeds as one pipeline with a ledger, and print their tables.
What variants have in common runs once a seed. The same command goes on: finished stages are skipped."""
EXAMPLES = """
  --STAGE.KEY VALUE     a setting of one stage in every arm that has it, such as --rlvr.trainer.max_steps 4

examples:
  python -m prism_pl ablations --config ablations.yaml --dry-run
  python -m prism_pl ablations --config ablations.yaml --arms full no-alignment --seeds 1
  python -m prism_pl ablations --config ablations.yaml --scale gpu
  python -m prism_pl ablations --config ablations.yaml --scale gpu --tables
"""


def run(args: list[str], runner: Runner | None = None) -> None:
    """Run the ablations.

    Args:
        args: `["ablations", "--config", "ablations.yaml", ...]`.
        runner: starts the stages; None: real ones.

    Raises:
        UsageError: the command line, a YAML, or a run folder that does not fit them.
        PipelineFailed: a stage failed; the tables of what is there are printed first.
        Stopped: Ctrl+C.
    """
    if "LOCAL_RANK" in os.environ:
        raise UsageError("The ablations are started once, not by torchrun: their stages start their own processes.")
    parser = make_parser()
    options, settings = split_settings(parser, args[1:])
    file = find_config(options.config)
    ablations = load_ablations(file)
    per_stage: dict[str, dict[str, str]] = {}
    for stage, key, value in settings:
        per_stage.setdefault(stage, {})[key] = value
    parallel = {} if options.parallel is None else {"parallel": yaml.safe_load(options.parallel)}
    arms = load_arms(ablations, options.scale, per_stage, parallel)
    whole = merge(arms, ablations)
    seeds = [int(seed) for seed in chosen("seeds", options.seeds, list(map(str, ablations.seeds)))]
    wanted = chosen("arms", options.arms, list(arms))
    part = whole.only(wanted, seeds)
    folder = Path(options.run_folder or Path("runs") / "-".join(filter(None, (stage_of(file), options.scale))))
    command = "python -m prism_pl " + shlex.join(args)
    if options.print_config:
        print(as_yaml(part.pipeline), end="")
        return
    if options.tables:
        _print_tables(folder, whole, ablations, write=False)
        return
    _print_arms(arms, part, wanted, seeds)
    start = Start(part.pipeline, build_graph(part.pipeline), options.update, command)
    if options.dry_run:
        start.try_out(Ledger.read(folder) or Ledger.new(folder, command), runner or ProcessRunner())
        return
    with locked(folder) as lock:
        ledger = Ledger.read(folder) or Ledger.new(folder, command)
        try:
            start.run(ledger, runner or ProcessRunner(lock, part.pipeline.options.parallel))
        except (PipelineFailed, Stopped):
            _print_tables(folder, whole, ablations, write=True)
            raise
        _print_tables(folder, whole, ablations, write=True)


def make_parser() -> Parser:
    """The options of `ablations`."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python -m prism_pl ablations",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=style,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", required=True, metavar="FILE", help="a YAML of this folder, or a shipped one")
    add("--scale", metavar="NAME", help="other sizes of all arms, such as gpu; a run folder of its own")
    add("--arms", nargs="+", default=[], metavar="ARM", help="only these; default: all of the YAML")
    add("--seeds", nargs="+", default=[], metavar="N", help="only these of the YAML's")
    add("--run_folder", metavar="DIR", help="where everything is written; default runs/NAME_OF_THE_CONFIG[-SCALE]")
    add("--parallel", metavar="N", help="stages at once, with the cores shared among them")
    add("--dry-run", "--dry_run", action="store_true", help="print what would happen, and change nothing")
    add("--update", action="store_true", help="run changed stages and what depends on them anew; keep the old folders")
    add("--print_config", action="store_true", help="print the pipeline of all arms and seeds and stop")
    add("--tables", action="store_true", help="only print the tables of what the run folder holds")
    return parser


def _print_arms(arms: dict[str, Pipeline], part: Merged, wanted: Sequence[str], seeds: Sequence[int]) -> None:
    """What each arm has of its own; the rest it shares with arms before it."""
    cells = sum(len(arms[arm].stages) for arm in wanted) * len(seeds)
    num_stages = len(part.pipeline.stages)
    print(f"{len(wanted)} arms x {len(seeds)} seeds: {cells} stages, {num_stages} of them different.")
    width = max(map(len, wanted))
    for arm in wanted:
        own = [stage for stage in arms[arm].stages if f"s{seeds[0]}-{arm}-{stage}" in part.pipeline.stages]
        print(f"  {arm:<{width}}  {', '.join(own) or 'nothing of its own'}")


def _print_tables(folder: Path, whole: Merged, ablations: Ablations, write: bool) -> None:
    from prism_pl.ablations.tables import make_page

    ledger = Ledger.read(folder)
    if ledger is None:
        raise UsageError(f"{folder} holds no ablations yet (--run_folder names it). Run the command without --tables.")
    page = make_page(ledger, whole.name_of, arm_name(ablations.arms[0]), ablations.tables)
    print(f"\n{page}")
    if write:
        write_whole(folder / PAGE, page + "\n")
        print(f"written to {folder / PAGE}")
