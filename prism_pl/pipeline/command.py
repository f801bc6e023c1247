"""`python -m prism_pl pipeline ...`: reads the command line, plans, runs, and says how it ended."""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from prism_pl.errors import UsageError, did_you_mean
from prism_pl.fingerprint import versions
from prism_pl.folders import free_folder
from prism_pl.ledger import LOCK, Ledger, locked, plain
from prism_pl.pipeline.execute import Execution
from prism_pl.pipeline.fork import follow, fork
from prism_pl.pipeline.graph import Graph, build_graph, command_of
from prism_pl.pipeline.inputs import missing_inputs, outside_inputs
from prism_pl.pipeline.jobs import ProcessRunner, Runner
from prism_pl.pipeline.plan import (
    Step,
    Wanted,
    make_plan,
    other_versions,
    refuse_changes,
    refuse_missing,
    took,
    with_stage_names,
)
from prism_pl.pipeline.schema import Pipeline, load_pipeline
from prism_pl.shipped import find_config, stage_of

ABOUT = """Run all stages of a pipeline, each as a command of its own, and keep a ledger of them (ledger.json).
The same command goes on: finished stages are skipped, one that was interrupted is resumed."""
EXAMPLES = """
  --STAGE.KEY VALUE     a setting of one stage, such as --sft.trainer.max_steps 100

examples:
  python -m prism_pl pipeline --config pipeline.yaml
  python -m prism_pl pipeline --config pipeline.yaml --config mine.yaml --dry-run
  python -m prism_pl pipeline --config pipeline.yaml --rlvr.model.optimizer.init_args.lr 1e-4 --update
  python -m prism_pl pipeline --config pipeline.yaml --from rlvr --rlvr.trainer.max_steps 80
"""


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. All options: {self.prog} --help")


def run(args: list[str], runner: Runner | None = None) -> None:
    """Run a pipeline.

    Args:
        args: `["pipeline", "--config", "pipeline.yaml", ...]`.
        runner: starts the stages; None: real ones.

    Raises:
        UsageError: the command line, a YAML, or a run folder that does not fit them.
        PipelineFailed: a stage failed.
        Stopped: Ctrl+C.
    """
    if "LOCAL_RANK" in os.environ:
        raise UsageError("The pipeline is started once, not by torchrun: its stages start their own processes.")
    options, settings = split_settings(_parser(), args[1:])
    command = "python -m prism_pl " + shlex.join(args)
    pipeline = load_pipeline(options.config, _overrides(options, settings))
    graph = build_graph(pipeline)
    if options.print_config:
        print(as_yaml(pipeline), end="")
        return
    folder = Path(pipeline.options.run_folder or Path("runs") / stage_of(find_config(options.config[0])))
    if options.from_stage is not None:
        if options.from_stage not in graph:
            near = did_you_mean(options.from_stage, graph)
            raise UsageError(f"--from {options.from_stage}: there is no such stage.{near} Stages: {', '.join(graph)}.")
        ledger = fork(graph, options.from_stage, folder, options.to, command)
        command = _in_folder(args, ledger.folder)
    else:
        ledger = None
        if options.fresh:
            folder = free_folder(folder, LOCK)
            command = _in_folder(args, folder)
    start = Start(pipeline, graph, options.update, command)
    if options.dry_run:
        start.try_out(ledger or Ledger.read(folder) or Ledger.new(folder, command), runner or ProcessRunner())
        return
    with locked(ledger.folder if ledger else folder) as lock:
        # Read under the lock: until now another pipeline may have written it.
        ledger = ledger or Ledger.read(folder) or Ledger.new(folder, command)
        start.run(ledger, runner or ProcessRunner(lock, pipeline.options.parallel))


class Start:
    """One start of a pipeline.

    Args:
        pipeline, graph: what is to be.
        update: whether changed stages may run anew.
        command: what goes on with it, for the ledger and for messages.
    """

    def __init__(self, pipeline: Pipeline, graph: Graph, update: bool, command: str) -> None:
        self.pipeline, self.graph, self.update, self.command = pipeline, graph, update, command
        self.wanted: dict[str, Wanted] = {}

    def plan(self, ledger: Ledger, runner: Runner) -> dict[str, Step]:
        """Resolve every stage's command, and decide and print what to do with each. Nothing is written."""
        for name in [name for name in ledger.stages if name not in self.graph]:
            ledger.content["dropped"][name] = ledger.stages.pop(name)
        for name in [name for name in ledger.content["dropped"] if name in self.graph]:
            ledger.stages[name] = ledger.content["dropped"].pop(name)
        follow(ledger)
        self.wanted = self._resolve(ledger, runner, set())
        plan = make_plan(self.graph, self.wanted, ledger, self.update, lambda kind: partial(runner.complete, kind))
        anew = {name for name, step in plan.items() if step.action == "rerun"}
        if any(ledger.stages[name]["taken_from"] for name in anew & ledger.stages.keys()):
            # What was taken from another pipeline runs anew in this one's folder.
            self.wanted = self._resolve(ledger, runner, anew)
        print(f"Pipeline in {ledger.folder}:")
        width = max(map(len, plan))
        for name, step in plan.items():
            print(f"  {step.action:<6}  {name:<{width}}  {step.reason}")
        for name in ledger.content["dropped"]:
            print(f"  {'-':<6}  {name:<{width}}  no longer in the pipeline; left as it is")
        if others := other_versions(ledger, versions(), plan):
            print(f"warning: stages ran on other versions than are here now: {'; '.join(others)}")
        return plan

    def try_out(self, ledger: Ledger, runner: Runner) -> None:
        """Print what `run` would do."""
        plan = self.plan(ledger, runner)
        try:
            self._refuse(plan, ledger)
        except UsageError as error:
            print(f"\nIt would stop: {error}")
        else:
            commands = [self.wanted[name].args for name, step in plan.items() if step.action != "skip"]
            print("\nIt would run:" if commands else "\nEverything is finished: nothing would run.")
            for args in commands:
                print(f"  python -m prism_pl {shlex.join(args)}")
        print("\nA dry run: nothing was started, and nothing written.")

    def run(self, ledger: Ledger, runner: Runner) -> None:
        """Plan, and do it."""
        plan = self.plan(ledger, runner)
        self._refuse(plan, ledger)
        if all(step.action == "skip" for step in plan.values()):
            before = Ledger.read(ledger.folder)
            ledger.content["status"] = "finished"
            if before is None or before.content != ledger.content:  # stages were dropped, or all were taken over
                ledger.write()
            seconds = sum(entry["seconds"] or 0 for entry in ledger.stages.values())
            print(
                f"{ledger.folder} was finished already: {len(plan)} stages in {took(seconds)}. Nothing to do. Change "
                "settings and give --update, fork with --from STAGE, or start anew with --fresh."
            )
            return
        ledger.content["command"] = self.command
        options = self.pipeline.options
        Execution(
            self.graph, self.wanted, plan, ledger, runner, options.parallel, self.command, options.keep_going
        ).run()
        reports = [ledger.path(e) / "report.md" for e in ledger.stages.values() if e["kind"] == "report"]
        print(f"\n{ledger.folder} is finished: {len(plan)} stages.", *(f"Report: {report}" for report in reports))
        print(f"TensorBoard: tensorboard --logdir {ledger.folder}")

    def _refuse(self, plan: dict[str, Step], ledger: Ledger) -> None:
        refuse_changes(plan, ledger.folder)
        refuse_missing(plan, self.wanted, ledger)

    def _resolve(self, ledger: Ledger, runner: Runner, anew: set[str]) -> dict[str, Wanted]:
        def folder_of(name: str) -> Path:
            entry = ledger.stages.get(name)
            return ledger.path(entry) if entry and name not in anew else ledger.folder / name

        folders = {name: folder_of(name) for name in self.graph}
        configs: dict[str, dict[str, Any]] = {}
        wanted, hashes = {}, {}
        while len(wanted) < len(self.graph):
            # The settings that a stage takes over from others are known first.
            open_nodes = [node for name, node in self.graph.items() if name not in wanted]
            node = next(node for node in open_nodes if node.consulted <= wanted.keys())
            name = node.name
            args = command_of(node, ledger.folder, folder_of, configs)
            try:
                configs[name] = plain(runner.resolve(args))
            except UsageError as error:
                where = self.pipeline.sources.where("stages", name)
                raise UsageError(f"{where}: python -m prism_pl {shlex.join(args)}: {error}") from None
            config = with_stage_names(configs[name], folders)
            wanted[name] = Wanted(args, config, outside_inputs(config, hashes), missing_inputs(config))
        return wanted


def as_yaml(pipeline: Pipeline) -> str:
    """The pipeline as one YAML: all files and options laid over each other, defaults filled in."""
    stages = {name: {k: v for k, v in asdict(stage).items() if v} for name, stage in pipeline.stages.items()}
    return yaml.safe_dump(asdict(pipeline.options) | {"stages": stages}, sort_keys=False, width=120)


def split_settings(parser: Parser, args: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str, str]]]:
    """The options of a command line, and the stages' settings: (stage, key, value)."""
    settings, others, words = [], [], list(args)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not (name.startswith("--") and "." in name):
            others.append(word)
            continue
        if not equals and not words:
            raise UsageError(f"{word} needs a value.")
        stage, _, key = name.removeprefix("--").partition(".")
        if not equals:
            value = words.pop(0)
            if value.startswith("--"):
                raise UsageError(f"{word} needs a value, and {value} is an option. If it is meant: {word}={value}")
        settings.append((stage, key, value))
    options, unknown = parser.parse_known_args(others)
    if unknown:
        near = did_you_mean(unknown[0], parser._option_string_actions)
        raise UsageError(f"There is no option {unknown[0]}.{near} All options: {parser.prog} --help")
    return options, settings


def _parser() -> Parser:
    parser = Parser(
        prog="python -m prism_pl pipeline",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "-c", "--config", action="append", required=True, metavar="FILE", help="a YAML of this folder, or a shipped one"
    )
    add("--run_folder", metavar="DIR", help="where everything is written; default runs/NAME_OF_THE_CONFIG")
    add("--parallel", metavar="N", help="stages at once, with the cores shared among them")
    add("--shared_filter", metavar="true|false", help="the first filter's pass rates serve every RLVR stage")
    add("--dry-run", "--dry_run", action="store_true", help="print what would happen, and change nothing")
    add("--update", action="store_true", help="run changed stages and what depends on them anew; keep the old folders")
    add("--from", dest="from_stage", metavar="STAGE", help="run STAGE and what depends on it in a new run folder")
    add(
        "--to",
        type=Path,
        metavar="DIR",
        help="the new run folder of --from; default: the next free, such as runs/demo-2",
    )
    add("--fresh", action="store_true", help="run everything, in the next free run folder")
    add("--print_config", action="store_true", help="print the complete pipeline and stop")
    return parser


def _overrides(options: argparse.Namespace, settings: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """The command line as a YAML tree over the files."""
    for one, other in (("from_stage", "fresh"), ("from_stage", "update")):
        if getattr(options, one) and getattr(options, other):
            raise UsageError(f"--from runs what changed in a new folder; --{other} does not go with it.")
    if options.to is not None and options.from_stage is None:
        raise UsageError("--to names the new folder of --from STAGE. For a whole run give --run_folder.")
    tree: dict[str, Any] = {"run_folder": options.run_folder}
    for key in ("parallel", "shared_filter"):
        tree[key] = None if getattr(options, key) is None else yaml.safe_load(getattr(options, key))
    tree = {key: value for key, value in tree.items() if value is not None}
    stages: dict[str, Any] = {}
    for stage, key, value in settings:
        stages.setdefault(stage, {"set": {}})["set"][key] = value
    return tree | ({"stages": stages} if stages else {})


def _in_folder(args: Sequence[str], folder: Path) -> str:
    """The command that goes on in a new folder that another one has chosen."""
    words, kept = list(args), []
    while words:
        word = words.pop(0)
        if word in ("--from", "--to", "--run_folder"):
            words.pop(0)
        elif word != "--fresh" and not word.startswith(("--from=", "--to=", "--run_folder=")):
            kept.append(word)
    return "python -m prism_pl " + shlex.join([*kept, "--run_folder", str(folder)])
