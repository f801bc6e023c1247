"""Who is whose parent, in which order, and each stage's command line.

A value in `set` may hold references in braces:

    {sft.export}                                              what a stage leaves: makes it a parent, see OUTPUTS
    {align.trainer.max_steps + rlvr.trainer.max_steps}        settings of other stages; sums of numbers
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prism_pl.errors import UsageError, did_you_mean
from prism_pl.pipeline.schema import REFERENCE, Pipeline, Stage, on_command_line, shown

# Command -> name in references -> path in the stage's folder.
OUTPUTS: dict[str, dict[str, str]] = {
    "fit": {
        "export": "export",
        "export_best": "export-best",
        "export_last": "export-last",  # where callbacks.Export chose another for export/
        "export_discriminator": "export-discriminator",
        "kept_ids": "kept_ids.json",  # which prompts the difficulty filter left
    },
    "validate": {},
    "test": {"evaluation": "evaluation.json"},
    "predict": {"pass_rates": "pass_rates.jsonl"},
    "report": {"report": "report.md"},
}
SECTIONS = ("model", "data", "trainer", "seed_everything")
IN_BRACES = re.compile(r"\{(" + REFERENCE.pattern + r")\}")

Configs = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Node:
    """A stage and what it refers to.

    Args:
        name: the stage's name.
        stage: its command, config and settings.
        parents: stage -> names of its outputs that are read; empty names for a report, which reads whatever there is.
        consulted: stages whose settings are read.
    """

    name: str
    stage: Stage
    parents: dict[str, tuple[str, ...]] = field(default_factory=dict)
    consulted: frozenset[str] = frozenset()


class Graph(dict[str, Node]):
    """Name -> node, parents before their children."""

    def below(self, names: set[str]) -> set[str]:
        """The stages that depend on one of these, directly or not."""
        found: set[str] = set()
        for name, node in self.items():
            if node.parents.keys() & (names | found):
                found.add(name)
        return found

    def above(self, name: str) -> set[str]:
        """The stages that a stage depends on, directly or not."""
        found: set[str] = set()
        for other in reversed(list(self)):
            if any(other in self[child].parents for child in (found | {name})):
                found.add(other)
        return found


def build_graph(pipeline: Pipeline) -> Graph:
    """Read the references and put the stages in order: parents first, else as the YAML lists them.

    Raises:
        UsageError: a reference leads nowhere, or in a circle.
    """
    stages = _with_shared_filter(pipeline) if pipeline.options.shared_filter else pipeline.stages
    nodes = {name: _node(name, stage, stages, pipeline) for name, stage in stages.items()}
    work = [name for name, stage in stages.items() if stage.command != "report"]
    for name in stages.keys() - set(work):
        nodes[name] = replace(nodes[name], parents={other: () for other in work})
    where = pipeline.sources.where("stages")
    ordered = _in_order({name: set(node.parents) for name, node in nodes.items()}, where)
    _in_order({name: set(node.consulted) for name, node in nodes.items()}, where)
    return Graph({name: nodes[name] for name in ordered})


def _in_order(waits_for: Mapping[str, set[str]], where: str) -> list[str]:
    """The names so that each stands behind those it waits for, else as they come. UsageError for a circle."""
    placed: list[str] = []
    while len(placed) < len(waits_for):
        ready = [name for name, others in waits_for.items() if name not in placed and others <= set(placed)]
        if not ready:
            # Every stage left waits for another one that is left: following them leads into the circle.
            circle = [name for name in waits_for if name not in placed][:1]
            while circle[-1] not in circle[:-1]:
                circle.append(next(name for name in waits_for if name in waits_for[circle[-1]] - set(placed)))
            circle = circle[circle.index(circle[-1]) :]
            raise UsageError(f"{where}: the references go in a circle, {' <- '.join(circle)}. Cut it.")
        placed.append(ready[0])
    return placed


def _with_shared_filter(pipeline: Pipeline) -> dict[str, Stage]:
    filters = [name for name, stage in pipeline.stages.items() if stage.command == "predict"]
    if not filters:
        raise UsageError(
            f"{pipeline.sources.where('shared_filter')} is true, and no stage has the command predict. Set it to false."
        )
    shared, others = filters[0], filters[1:]
    pattern = re.compile(r"\{\s*(" + "|".join(map(re.escape, filters)) + r")\.pass_rates\s*\}")
    return {
        name: replace(
            stage,
            set={
                key: pattern.sub("{" + shared + ".pass_rates}", value) if isinstance(value, str) else value
                for key, value in stage.set.items()
            },
        )
        for name, stage in pipeline.stages.items()
        if name not in others
    }


def terms(value: Any) -> Iterator[tuple[str, str]]:
    """The (stage, what) of each reference in a value."""
    if isinstance(value, str):
        for match in IN_BRACES.finditer(value):
            for term in match[1].split("+"):
                stage, _, what = term.strip().partition(".")
                yield stage, what


def _node(name: str, stage: Stage, stages: Mapping[str, Stage], pipeline: Pipeline) -> Node:
    parents: dict[str, tuple[str, ...]] = {}
    consulted: set[str] = set()
    for key, value in stage.set.items():
        for other, what in terms(value):
            where = pipeline.sources.where("stages", name, "set", key)
            if other not in stages:
                raise UsageError(
                    f"{where}: there is no stage {other!r}.{did_you_mean(other, stages)} Stages: {', '.join(stages)}."
                )
            outputs = OUTPUTS[stages[other].command]
            if what in outputs:
                parents[other] = tuple(dict.fromkeys((*parents.get(other, ()), what)))
            elif what.split(".")[0] in SECTIONS:
                consulted.add(other)
            else:
                raise UsageError(
                    f"{where}: {other} leaves no {what!r}.{did_you_mean(what, outputs)} A {stages[other].command} "
                    f"stage has {', '.join((*outputs, 'settings such as trainer.max_steps'))}."
                )
    return Node(name, stage, parents, frozenset(consulted))


def command_of(node: Node, run_folder: Path, folder_of: Callable[[str], Path], configs: Configs) -> list[str]:
    """What follows `python -m prism_pl` for a stage.

    Args:
        node: the stage.
        run_folder: the pipeline's.
        folder_of: name -> a stage's folder.
        configs: resolved configurations, at least of the stages that it consults.
    """
    folder, stage = folder_of(node.name), node.stage
    if stage.command == "report":
        return _report_command(stage, run_folder, folder)
    options = [("config", shown(Path(file))) for file in stage.config]
    for key, value in stage.set.items():
        options.append((key, on_command_line(_filled(node.name, key, value, folder_of, configs))))
    words = [word for key, value in options for word in (f"--{key}", value)]
    return [stage.command, *words, "--trainer.default_root_dir", str(folder)]


def _report_command(stage: Stage, run_folder: Path, folder: Path) -> list[str]:
    """The report's options are plain ones: a list is several words, and an empty one is left out."""
    words = []
    for key, value in stage.set.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *map(on_command_line, values)] if values else []
    return ["report", str(run_folder), *words, "--out", str(folder / OUTPUTS["report"]["report"])]


def _filled(name: str, key: str, value: Any, folder_of: Callable[[str], Path], configs: Configs) -> Any:
    """A setting with its references replaced; one that is nothing but a reference keeps the type of what it means."""
    if not isinstance(value, str):
        return value

    def meant(match: re.Match[str]) -> Any:
        found = [_term(term.strip(), name, key, folder_of, configs) for term in match[1].split("+")]
        if len(found) == 1:
            return found[0]
        if not all(isinstance(number, int | float) for number in found):
            raise UsageError(f"stages.{name}.set.{key}: {match[0]} adds up {found}; only numbers can be added.")
        return sum(found)

    whole = IN_BRACES.fullmatch(value)
    return meant(whole) if whole else IN_BRACES.sub(lambda match: str(meant(match)), value)


def _term(term: str, name: str, key: str, folder_of: Callable[[str], Path], configs: Configs) -> Any:
    other, _, what = term.partition(".")
    for outputs in OUTPUTS.values():
        if what in outputs:
            return str(folder_of(other) / outputs[what])
    found: Any = configs[other]
    for part in what.split("."):
        # As on the command line, init_args need not be said.
        if isinstance(found, dict) and part not in found and isinstance(found.get("init_args"), dict):
            found = found["init_args"]
        if not isinstance(found, dict) or part not in found:
            known = list(found) if isinstance(found, dict) else []
            raise UsageError(
                f"stages.{name}.set.{key}: {other} has no setting {what}.{did_you_mean(part, known)} All of them: "
                f"python -m prism_pl COMMAND --config FILE --print_config"
            )
        found = found[part]
    return found
