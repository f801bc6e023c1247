"""The ablations' YAML. Light: no heavy imports.

    arms:                                       # pipelines; the first is whole, the others are laid over it
      - ablations/full.yaml
      - ablations/dense.yaml
    seeds: [1, 2, 3]
    seeded: {fit: [seed_everything, data.seed]} # command -> settings that a seed is put into
    scales: {gpu: [ablations/gpu.yaml]}         # --scale gpu lays these over the first arm, below every other
    tables: {evaluate-rlvr: After RLVR}         # evaluation -> heading, in the order of the tables

An arm is called by its file's name. `parallel` and `keep_going` are the first arm's. In an arm's settings
`{full.align.trainer.max_steps}` is a setting of another arm's stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_pl.errors import UsageError, did_you_mean
from prism_pl.pipeline.schema import (
    STAGE_NAME,
    Pipeline,
    Sources,
    checked,
    find_beside,
    load_pipeline,
    read_yaml,
    shown,
)


@dataclass
class Ablations:
    """What is compared.

    Args:
        arms: pipelines; the first is whole and what the others are compared with, the others are laid over it.
        seeds: every arm runs with each.
        seeded: command -> settings of its stages that a seed is put into.
        scales: name -> pipelines laid over the first arm, below every other; other sizes of all arms.
        tables: evaluation stage -> heading, in the order of the tables.
    """

    arms: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1])
    seeded: dict[str, list[str]] = field(default_factory=lambda: {"fit": ["seed_everything"]})
    scales: dict[str, list[str]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)


def load_ablations(file: Path) -> Ablations:
    """Read and check the YAML; the arms' files are found and named in full.

    Raises:
        UsageError: the file, a key or a value is wrong, or a file of an arm is not there.
    """
    sources = Sources()
    sources.trees.append((file, read_yaml(file, "ablations", "arms")))
    ablations = checked(Ablations, sources.merged(), sources, ())
    for key, wanted in (("arms", "the pipeline that the others are laid over"), ("seeds", "a number")):
        if not getattr(ablations, key):
            raise UsageError(f"{sources.where(key)} is empty; give at least one, {wanted}.")
    ablations.arms = [str(find_beside(name, file.parent)) for name in ablations.arms]
    ablations.scales = {
        scale: [str(find_beside(name, file.parent)) for name in names] for scale, names in ablations.scales.items()
    }
    names = [arm_name(name) for name in ablations.arms]
    for name in names:
        if names.count(name) > 1 or not STAGE_NAME.fullmatch(name):
            raise UsageError(
                f"{sources.where('arms')}: an arm is called by its file's name, and {name!r} "
                f"{'stands twice' if names.count(name) > 1 else 'has other characters than letters, digits, - and _'}."
            )
    return ablations


def arm_name(file: str) -> str:
    """`configs/ablations/dense.yaml` -> `dense`."""
    return Path(file).stem


def load_arms(
    ablations: Ablations, scale: str | None, settings: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Pipeline]:
    """Every arm's pipeline.

    Args:
        ablations: as read by `load_ablations`.
        scale: a key of `scales`; None keeps the sizes of the first arm.
        settings: stage -> settings of that stage in every arm that has it; from the command line.
        options: of the pipeline, such as parallel; from the command line.

    Raises:
        UsageError: an unknown scale, a wrong file, or a setting of a stage that no arm has.
    """
    if scale is not None and scale not in ablations.scales:
        near = did_you_mean(scale, ablations.scales)
        raise UsageError(f"--scale {scale}: there is no such scale.{near} Scales: {', '.join(ablations.scales)}.")
    first, *others = ablations.arms
    below = [first, *(ablations.scales[scale] if scale is not None else ())]
    arms: dict[str, Pipeline] = {}
    for file in (None, *others):
        files = [*below, *([file] if file else [])]
        stages = load_pipeline(files, {}).stages
        ours = {name: {"set": dict(keys)} for name, keys in settings.items() if name in stages}
        arms[arm_name(file or first)] = load_pipeline(files, dict(options) | ({"stages": ours} if ours else {}))
        _refuse_reports(arms[arm_name(file or first)], files[-1])
    known = list(dict.fromkeys(name for arm in arms.values() for name in arm.stages))
    for name in settings:
        if name not in known:
            near = did_you_mean(name, known)
            raise UsageError(f"--{name}.KEY: no arm has a stage {name!r}.{near} Stages: {', '.join(known)}.")
    return arms


def _refuse_reports(arm: Pipeline, file: str) -> None:
    for name, stage in arm.stages.items():
        if stage.command == "report":
            raise UsageError(
                f"{shown(Path(file))}: stages.{name}: a report reads all stages of a run, of whatever arm. Leave it "
                "out: the command writes its own tables."
            )


def chosen(option: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """The words of an option in the order of what is known; all of them where none is given."""
    for word in wanted:
        if word not in known:
            near = did_you_mean(word, known)
            raise UsageError(f"--{option} {word}: there is no such one.{near} Known: {', '.join(known)}.")
    return [word for word in known if word in wanted or not wanted]
