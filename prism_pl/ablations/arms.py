"""All arms with all seeds as one pipeline in which stages that come out the same stand once.

Nobody says what is shared: two stages are one where command, YAMLs and settings are equal and what they refer to is one
too. So arms that differ in the alignment share SFT and warm start, and one with another discriminator has a warm start
of its own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from prism_pl.ablations.schema import Ablations
from prism_pl.errors import UsageError, did_you_mean
from prism_pl.pipeline.graph import IN_BRACES, terms
from prism_pl.pipeline.schema import Pipeline, Stage


class Cell(NamedTuple):
    """A stage of an arm with a seed."""

    seed: int
    arm: str
    stage: str


@dataclass(frozen=True)
class Merged:
    """All arms and seeds as one pipeline.

    Attributes:
        pipeline: fits before evaluations, earlier stages before later ones, whatever the arm or seed: with several
            stages at once no long chain of fits is left for the end.
        name_of: cell -> name of its stage in the pipeline, `s<seed>-<arm>-<stage>` of the first cell that has it.
    """

    pipeline: Pipeline
    name_of: dict[Cell, str]

    def only(self, arms: Sequence[str], seeds: Sequence[int]) -> "Merged":
        """The part that these arms and seeds need. Names stay, so that a run of a part is a part of the whole run."""
        stages = self.pipeline.stages
        open_names = {name for cell, name in self.name_of.items() if cell.arm in arms and cell.seed in seeds}
        needed: set[str] = set()
        while open_names:
            needed |= open_names
            found = {stage for name in open_names for value in stages[name].set.values() for stage, _ in terms(value)}
            open_names = found - needed
        kept = {name: stage for name, stage in stages.items() if name in needed}
        name_of = {cell: name for cell, name in self.name_of.items() if name in needed}
        return Merged(replace(self.pipeline, stages=kept), name_of)


def merge(arms: Mapping[str, Pipeline], ablations: Ablations) -> Merged:
    """Put all arms together.

    Raises:
        UsageError: a reference to a stage or arm that is not there.
    """
    cells: dict[Cell, Stage] = {}
    for seed in ablations.seeds:
        for arm, pipeline in arms.items():
            for name, stage in pipeline.stages.items():
                seeded = dict.fromkeys(ablations.seeded.get(stage.command, ()), seed)
                cell = Cell(seed, arm, name)
                cells[cell] = _with_cells(replace(stage, set=stage.set | seeded), cell, arms)
    class_of = _classes(cells)
    first: dict[int, Cell] = {}
    for cell, number in class_of.items():
        first.setdefault(number, cell)
    name_of = {cell: "s{}-{}-{}".format(*first[number]) for cell, number in class_of.items()}
    by_text = {_text(cell): name for cell, name in name_of.items()}

    def place(cell: Cell) -> tuple[bool, int]:
        return cells[cell].command == "test", list(arms[cell.arm].stages).index(cell.stage)

    stages = {
        name_of[cell]: replace(cells[cell], set=_renamed(cells[cell], by_text.__getitem__))
        for cell in sorted(first.values(), key=place)
    }
    whole = next(iter(arms.values()))
    return Merged(Pipeline(whole.options, stages, whole.sources), name_of)


def _classes(cells: Mapping[Cell, Stage]) -> dict[Cell, int]:
    """Which cells come out the same: cells of one class have one number.

    All are taken for one to begin with, and told apart as long as anything tells them apart: their own content, or the
    classes of what they refer to. References may go in a circle (a filter measures as RLVR samples, and RLVR reads the
    filter's pass rates), so there is no first stage to begin with.
    """
    class_of, num_classes = dict.fromkeys(cells, 0), 1
    while True:
        numbers: dict[str, int] = {}
        found: dict[Cell, int] = {}
        by_text = {_text(cell): str(number) for cell, number in class_of.items()}
        for cell, stage in cells.items():
            key = json.dumps([stage.command, stage.config, _renamed(stage, by_text.__getitem__)], sort_keys=True)
            found[cell] = numbers.setdefault(key, len(numbers))
        if len(numbers) == num_classes:
            return found
        class_of, num_classes = found, len(numbers)


def _text(cell: Cell) -> str:
    """A cell as it stands in a reference meanwhile; a stage's name has no double hyphen in the YAML's own words."""
    return "{}--{}--{}".format(*cell)


def _with_cells(stage: Stage, cell: Cell, arms: Mapping[str, Pipeline]) -> Stage:
    """The stage with its references leading to cells of the same seed."""

    def renamed(term: str) -> str:
        name, _, what = term.partition(".")
        other, _, rest = what.partition(".")
        if name in arms[cell.arm].stages:
            return f"{_text(Cell(cell.seed, cell.arm, name))}.{what}"
        if name in arms and other in arms[name].stages:
            return f"{_text(Cell(cell.seed, name, other))}.{rest}"
        known = arms[name].stages if name in arms else [*arms[cell.arm].stages, *arms]
        wrong = other if name in arms else name
        where = arms[cell.arm].sources.where("stages", cell.stage, "set")
        raise UsageError(
            f"{where}: {{{term}}}: there is no stage {wrong!r} in the arm {name if name in arms else cell.arm!r}."
            f"{did_you_mean(wrong, known)} Name a stage of the arm, or ARM.STAGE.KEY of another one."
        )

    return replace(stage, set={key: _each_reference(value, renamed) for key, value in stage.set.items()})


def _renamed(stage: Stage, name_of: Callable[[str], str]) -> dict[str, object]:
    """The settings with the stage of each reference renamed."""

    def renamed(term: str) -> str:
        name, _, what = term.partition(".")
        return f"{name_of(name)}.{what}"

    return {key: _each_reference(value, renamed) for key, value in stage.set.items()}


def _each_reference(value: object, rename: Callable[[str], str]) -> object:
    """A setting with every `stage.what` of its references put through `rename`."""
    if not isinstance(value, str):
        return value
    return IN_BRACES.sub(
        lambda match: "{" + " + ".join(rename(term.strip()) for term in match[1].split("+")) + "}", value
    )
