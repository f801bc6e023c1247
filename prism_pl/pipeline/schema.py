"""The pipeline's YAML. Light: no heavy imports.

    run_folder: runs/demo                     # optional; default runs/<name of the first YAML>
    parallel: 1                               # stages at once
    shared_filter: false                      # true: the first predict stage's pass rates serve all
    keep_going: false                         # true: after a failure, what does not depend on it still runs
    defaults:                                 # what the stages of one command have in common
      test: {config: evaluate.yaml, set: {model.num_samples: 4}}
    stages:
      sft: {command: fit, config: sft.yaml}
      warmup:
        command: fit
        config: warmup.yaml                   # or a list: the later one wins
        set:                                  # what one would type as --KEY VALUE
          model.policy.path: "{sft.export}"   # makes sft a parent
          trainer.max_steps: "{sft.trainer.max_steps + align.trainer.max_steps}"    # settings of other stages

Several files are laid over each other, mappings key by key; `stages: {warmup: null}` drops a stage. On the command
line `--warmup.trainer.max_steps 5` is a key of the stage's `set`. Paths in `set` and `config` are looked for as in any
other YAML (`prism_pl.shipped`).
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from prism_pl.errors import UsageError, did_you_mean, yaml_fault
from prism_pl.input_paths import is_input_key
from prism_pl.shipped import find_config, resolve_path

Command = Literal["fit", "validate", "test", "predict", "report"]
COMMANDS = ("fit", "validate", "test", "predict", "report")
STAGE_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
# A reference without the quotes that YAML wants around it: {sft.export} is a mapping with one empty key.
REFERENCE = re.compile(r"\s*[\w-]+\.[\w.-]+(\s*\+\s*[\w-]+\.[\w.-]+)*\s*")
TAKEN_NAMES = ("earlier",)
COMMAND_LINE = Path("the command line")


@dataclass
class StageDefaults:
    """What the stages of one command have in common.

    Args:
        config: YAML of the command; several are laid over each other.
        set: settings over it, as `--KEY VALUE` on the command line.
    """

    config: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stage:
    """One stage.

    Args:
        command: what is run, `python -m prism_pl COMMAND`.
        config: YAML of the command; several are laid over each other.
        set: settings over it, as `--KEY VALUE` on the command line; references to other stages in braces.
    """

    command: Command
    config: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class Options:
    """The pipeline but for its stages.

    Args:
        run_folder: where everything is written; None is `runs/<name of the first YAML>`.
        parallel: stages at once; the cores are shared among them.
        shared_filter: every reader of pass rates reads those of the first `predict` stage; the others are left out.
        keep_going: after a failure, run what does not depend on the stage that failed.
    """

    run_folder: str | None = None
    parallel: int = 1
    shared_filter: bool = False
    keep_going: bool = False


@dataclass
class Pipeline:
    """A checked pipeline: options, stages with their defaults filled in, and where each key came from."""

    options: Options
    stages: dict[str, Stage]
    sources: "Sources"


class Sources:
    """The YAML files as they were read, to name the one that a message is about."""

    def __init__(self) -> None:
        self.trees: list[tuple[Path, dict[str, Any]]] = []

    def where(self, *keys: str) -> str:
        """`FILE: stages.warmup.set`: the last file that has the key, or the longest part of it."""
        for length in range(len(keys), -1, -1):
            for file, tree in reversed(self.trees):
                if _has(tree, keys[:length]):
                    return f"{shown(file)}: {'.'.join(keys)}"
        return ".".join(keys)

    def merged(self) -> dict[str, Any]:
        """All files laid over each other."""
        merged: dict[str, Any] = {}
        for _, tree in self.trees:
            merged = _merge(merged, tree)
        return merged


def load_pipeline(files: Sequence[str], overrides: Mapping[str, Any]) -> Pipeline:
    """Read and check the YAML files.

    Args:
        files: as `--config` takes them, the later one over the earlier.
        overrides: further keys, as a YAML tree; from the command line.

    Raises:
        UsageError: a file, a key or a value is wrong; the message names it and the way out.
    """
    sources = Sources()
    for name in files:
        file = find_config(name)
        sources.trees.append((file, _resolved(read_yaml(file, "pipeline", "stages"), file.parent)))
    known = list(_mapping(sources.merged().get("stages"), sources, "stages"))
    for name in overrides.get("stages", {}):
        if name not in known:
            near = did_you_mean(name, known)
            raise UsageError(f"--{name}.KEY: there is no stage {name!r}.{near} Stages: {', '.join(known)}.")
    sources.trees.append((COMMAND_LINE, _resolved(dict(overrides), Path.cwd())))
    merged = sources.merged()
    defaults, stages = (_mapping(merged.pop(key, None), sources, key) for key in ("defaults", "stages"))
    for command in defaults:
        if command not in COMMANDS:
            near = did_you_mean(command, COMMANDS)
            raise UsageError(
                f"{sources.where('defaults', command)}: no such command.{near} Commands: {', '.join(COMMANDS)}."
            )
    options = checked(Options, merged, sources, (), known=[*Options.__dataclass_fields__, "stages", "defaults"])
    if options.parallel < 1:
        raise UsageError(f"{sources.where('parallel')} is {options.parallel}; give at least 1.")
    common = {name: checked(StageDefaults, tree, sources, ("defaults", name)) for name, tree in defaults.items()}
    made = {name: _stage(name, tree, common, sources) for name, tree in stages.items() if tree is not None}
    if not made:
        raise UsageError(f"{sources.where('stages')}: there is no stage. Start from the shipped pipeline.yaml.")
    return Pipeline(options, made, sources)


def read_yaml(file: Path, what: str, key: str) -> dict[str, Any]:
    """A YAML's content; UsageError where it is no YAML, or no mapping and so no `what`, which needs `key`."""
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"{shown(file)} is no YAML: {yaml_fault(str(error))}.") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{shown(file)} holds no {what}: it needs the key {key}. See the shipped {what}.yaml.")
    return tree


def _stage(name: str, tree: Any, defaults: Mapping[str, StageDefaults], sources: Sources) -> Stage:
    where = sources.where("stages", name)
    if not STAGE_NAME.fullmatch(name) or name in TAKEN_NAMES:
        raise UsageError(f"{where}: a stage's name is its folder's too. Use letters, digits, - and _, not {name!r}.")
    stage = checked(Stage, tree, sources, ("stages", name))
    common = defaults.get(stage.command, StageDefaults())
    stage = Stage(stage.command, stage.config or common.config, common.set | stage.set)
    if not stage.config and stage.command != "report":
        raise UsageError(f"{where}: {stage.command} needs a config, here or in defaults.{stage.command}.")
    if "trainer.default_root_dir" in stage.set:
        raise UsageError(f"{where}.set: trainer.default_root_dir is the pipeline's to choose. Set run_folder instead.")
    return stage


def checked(cls: Any, tree: Any, sources: Sources, keys: tuple[str, ...], known: Sequence[str] = ()) -> Any:
    """An instance of a dataclass from a YAML tree; what jsonargparse says against it becomes one sentence."""
    from jsonargparse import ArgumentParser

    from prism_pl.explain import explain, nested_keys

    tree = _mapping(tree, sources, *keys)
    known = known or list(cls.__dataclass_fields__)
    for key in tree:
        if key not in known:
            near = did_you_mean(str(key), known)
            raise UsageError(f"{sources.where(*keys, str(key))}: there is no such key.{near} Keys: {', '.join(known)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    try:
        parsed = parser.parse_object(deepcopy(tree))  # it changes what it is given
    except Exception as error:  # jsonargparse raises argparse's and its own
        said = explain(str(error), nested_keys(parser)).replace("Name a configuration (--config align.yaml) or g", "G")
        raise UsageError(f"{sources.where(*keys)}{': ' if keys else ''}{said}") from None
    # The settings as YAML read them: jsonargparse reads strings among values of any type once more.
    return cls(**(vars(parsed) | ({"set": tree["set"]} if "set" in tree else {})))


def _mapping(tree: Any, sources: Sources, *keys: str) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{sources.where(*keys)} is {tree!r}; it has to be a mapping, KEY: VALUE.")
    return tree


def _resolved(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tree with its `config` and path-like settings made absolute, and references as strings."""
    tree = dict(tree)
    for group in ("stages", "defaults"):
        if isinstance(tree.get(group), dict):
            tree[group] = {name: _resolved_stage(stage, folder) for name, stage in tree[group].items()}
    return tree


def _resolved_stage(stage: Any, folder: Path) -> Any:
    if not isinstance(stage, dict):
        return stage
    stage = dict(stage)
    if stage.get("config") is not None:
        names = stage["config"] if isinstance(stage["config"], list) else [stage["config"]]
        stage["config"] = [str(find_beside(str(name), folder)) for name in names]
    if isinstance(stage.get("set"), dict):
        stage["set"] = {str(key): _resolved_setting(str(key), value, folder) for key, value in stage["set"].items()}
    return stage


def find_beside(name: str, folder: Path) -> Path:
    """The file that a YAML in `folder` names: beside it, else as `--config` finds it."""
    beside = Path(os.path.normpath(folder.absolute() / name))
    return beside if beside.is_file() else find_config(name)


def _resolved_setting(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, dict) and len(value) == 1 and next(iter(value.values())) is None:
        (text,) = value
        value = "{" + text + "}" if isinstance(text, str) and REFERENCE.fullmatch(text) else value
    return _with_paths(key, value, folder)


def _with_paths(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {name: _with_paths(f"{key}.{name}", item, folder) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_paths(f"{key}.{place}", item, folder) for place, item in enumerate(value)]
    if isinstance(value, str) and value and is_input_key(key) and "{" not in value:
        return resolve_path(value, folder)
    return value


def _merge(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merge(old.get(key), value) for key, value in new.items()}
    return new


def _has(tree: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def shown(path: Path) -> str:
    """A path as one would type it here: relative where it lies below the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def on_command_line(value: Any) -> str:
    """A setting's value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value)
