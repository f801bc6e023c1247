"""Shipped data and configuration files: where they lie, and what the paths inside a YAML mean. Light: no heavy imports.

A path or pattern (`data/*.parquet`) in a YAML is looked for beside the YAML, then in the current folder, then beside
the shipped `configs/` and `assets/`; the first that exists is written back as an absolute path, so `config.yaml` of a
run works from anywhere. A value that begins with `./` or `../` and exists nowhere becomes absolute too (beside the
YAML), so that the error names the place; any other (a hub id such as `Qwen/Qwen3-VL-4B-Instruct`) is left as it is.
Paths given on the command line are taken from the current folder, like those of any program. Which keys name paths:
`prism_pl.input_paths`.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from prism_pl.errors import UsageError, did_you_mean
from prism_pl.input_paths import absolute, is_input_key


def shipped_root() -> Path:
    """The folder that holds `configs/` and `assets/`: in a plain install inside prism_pl, otherwise the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "shipped_data"
    return installed if installed.is_dir() else package.parent


def shipped_configs() -> list[str]:
    """The shipped YAMLs by the names that `--config` takes, such as `align.yaml` and `digits/pretrain.yaml`."""
    folder = shipped_root() / "configs"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """The file that `--config NAME` means: from the current folder, else the shipped one of that name.

    Raises:
        UsageError: there is neither.
    """
    root = shipped_root()
    for candidate in (Path(name), root / "configs" / name, root / name):
        if candidate.is_file():
            return candidate.absolute()
    known = shipped_configs()
    here = [str(path) for path in Path(name).parent.glob("*.yaml")]
    near = did_you_mean(name, known + here)
    shipped = " All shipped ones: python -m prism_pl --help" if near else f" Shipped: {', '.join(known) or 'none'}."
    raise UsageError(
        f"--config {name}: no such file in {Path.cwd()}, and no shipped configuration of that name.{near}{shipped}"
    )


def stage_of(config: Path) -> str:
    """A run's default name: the path below the shipped `configs/`, or the stem. `configs/align.yaml` -> `align`."""
    folder = shipped_root() / "configs"
    return str(config.relative_to(folder).with_suffix("")) if config.is_relative_to(folder) else config.stem


def resolve_paths(text: str, folder: Path) -> str:
    """The YAML text with the paths below its path-like keys made absolute (the module's docstring has the rule).

    The text is edited at the values' places rather than parsed and written anew, so comments, line numbers and number
    formats stay. Text that is no YAML comes back as it is: the parser that reads it next has the better message.

    Args:
        text: content of a YAML file.
        folder: absolute path of the folder the YAML lies in.
    """
    try:
        tree = yaml.compose(text)
    except yaml.YAMLError:
        return text
    edits = {node.start_mark.index: node for node in _path_nodes(tree, "")}
    for start, node in sorted(edits.items(), reverse=True):
        resolved = resolve_path(node.value, folder)
        if resolved != node.value:
            quoted = "'" + resolved.replace("'", "''") + "'"
            text = text[:start] + quoted + text[node.end_mark.index :]
    return text


def _path_nodes(node: yaml.Node | None, key: str) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _path_nodes(value, f"{key}.{name.value}" if key else str(name.value))
    elif isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield from _path_nodes(item, f"{key}.{place}")
    elif isinstance(node, yaml.ScalarNode) and node.tag.endswith(":str") and node.value and is_input_key(key):
        yield node


def resolve_path(value: str, folder: Path) -> str:
    """A path-like value of a YAML that lies in `folder`, by the rule of the module's docstring."""
    if Path(value).is_absolute():
        return value
    for base in (folder, Path.cwd(), shipped_root()):
        if (found := absolute(value, base)) is not None:
            return found
    return str((folder / value).resolve()) if value.startswith(("./", "../")) else value
