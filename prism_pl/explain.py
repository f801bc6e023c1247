"""What jsonargparse says about a wrong configuration, reduced to the key, the nearest right one and the way out.

jsonargparse reports every alternative of a type that failed, with the whole value: a screen for one misspelled key. The
patterns below pick the line that matters; a message that none fits is passed on in full.
"""

import difflib
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from prism_pl.errors import UsageError, did_you_mean, yaml_fault

CLASS_PATH = re.compile(r"class_path '([\w.]+)'|class_path='([\w.]+)'")
INIT_ARGS = ".init_args."
PARSER_KEY = re.compile(r'(?:Parser|Config) key "([\w.]+)"')


def explain(message: str, keys: Iterable[str]) -> str:
    """The one sentence that a user needs of jsonargparse's message, and the way out.

    Args:
        message: what jsonargparse said.
        keys: the command's own keys, such as `trainer.max_steps`, to suggest from.
    """
    for pattern, sentence in EXPLANATIONS:
        if match := re.search(pattern, message):
            return sentence(match, message, list(keys))
    return message.strip()


def known_classes() -> dict[str, str]:
    """Name -> import path of every class defined in modules, datamodules and callbacks, so far as imported."""
    found = {}
    for module in [m for n, m in sys.modules.items() if n.split(".")[0] in ("modules", "datamodules", "callbacks")]:
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                found[name] = f"{value.__module__}.{name}"
    return found


def _where(message: str) -> str:
    """The dotted key the message is about: nested "Parser key" lines are joined the way a YAML nests them, the fields
    of a dataclass without `init_args`."""
    where, seen, link = "", set(), ""
    for match in re.finditer(f"{PARSER_KEY.pattern}|{CLASS_PATH.pattern}", message):
        key, *class_paths = match.groups()
        if key is None:
            link = _link(next(filter(None, class_paths)))
        elif key not in seen:
            where += link + key if where else key
            seen.add(key)
            link = INIT_ARGS
    return where


def _link(class_path: str) -> str:
    """What stands in a dotted key between a class and one of its arguments. jsonargparse writes a dataclass without
    `init_args` where all its bases are dataclasses too."""
    module, _, name = known_classes().get(class_path, class_path).rpartition(".")
    bases = getattr(getattr(sys.modules.get(module), name, None), "__mro__", (object, object))[:-1]
    return "." if all(map(is_dataclass, bases)) else INIT_ARGS


def _named_class(message: str) -> str:
    """The innermost class path that the message names, or ""."""
    named = CLASS_PATH.findall(message)
    # `Got value: Namespace(class_path=...)` of an inner callable comes last among the errors, `Given value` after it.
    errors_only = CLASS_PATH.findall(message.split("Given value type")[0])
    return next((a or b for a, b in reversed(errors_only or named)), "")


def _arguments(class_path: str) -> list[str]:
    """The dotted argument names of a class, dataclass fields included; none where the path leads to no class."""
    module, _, name = known_classes().get(class_path, class_path).rpartition(".")
    if module not in sys.modules:
        return []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(sys.modules[module], name), fail_untyped=False)
    return nested_keys(parser)


def _unknown_key(match: re.Match[str], message: str, keys: list[str]) -> str:
    key = match["key"].lstrip("-").split("=")[0]
    class_path = _named_class(message)
    if not class_path:
        if not match["key"].startswith("-") and "unrecognized" in match[0]:
            return (
                f"{key!r} belongs to no option: give --config FILE or --KEY VALUE (python -m prism_pl COMMAND --help)"
            )
        return f"There is no key {key}.{did_you_mean(key, keys)} All keys: python -m prism_pl COMMAND --help"
    if group := re.search(r"Group '([\w.]+)'", message):
        key = f"{group[1]}.{key}"
    where = f"{_where(message)}{_link(class_path)}{key}"
    name = class_path.rpartition(".")[2]
    arguments = _arguments(class_path)
    near = did_you_mean(key, arguments)
    listed = f" It takes: {', '.join(arguments)}." if arguments and not near else ""
    return f"{where}: {name} takes no {key}.{near}{listed}"


def _no_attribute(match: re.Match[str], message: str, keys: list[str]) -> str:
    module, name = match["module"], match["name"]
    if _named_class(message).startswith(f"{module}.{name}."):
        return _missing_module(f"{module}.{name}", message)
    members = vars(sys.modules[module]).items()
    here = {member: f"{module}.{member}" for member, value in members if inspect.isclass(value)}
    return f"{_where(message)}.class_path: {module} has no {name}.{_suggest_path(name, here, known_classes())}"


def _no_module(match: re.Match[str], message: str, keys: list[str]) -> str:
    class_path = _named_class(message)
    if class_path and not class_path.startswith(match["module"]):
        return f"{_where(message)}.class_path: {class_path} needs {match['module']}, which is not installed here."
    return _missing_module(match["module"], message)


def _missing_module(module: str, message: str) -> str:
    class_path = _named_class(message)
    name = class_path.rpartition(".")[2]
    classes = known_classes()
    parent = sys.modules.get(module.rpartition(".")[0])
    siblings = {}
    if parent is not None:
        names = [found.name for found in pkgutil.iter_modules(getattr(parent, "__path__", []))]
        siblings = {name: f"{parent.__name__}.{name}" for name in names}
    # A class of exactly this name, then a module of nearly that name, then a class of nearly this name.
    exact = {name: classes[name]} if name in classes else {}
    nearest = _suggest_path(name, exact) or _suggest_path(module.rpartition(".")[2], siblings)
    nearest = nearest or _suggest_path(name, classes)
    return f"{_where(message)}.class_path: there is no module {module} for {class_path}.{nearest}"


def _suggest_path(name: str, *places: dict[str, str]) -> str:
    """`did_you_mean` over the names of the first place that has a near one, given as the full import path."""
    for place in places:
        if near := difflib.get_close_matches(name, place, n=1, cutoff=0.6):
            return f" Did you mean {place[near[0]]}?"
    return ""


def _no_class(match: re.Match[str], message: str, keys: list[str]) -> str:
    name = match["name"]
    return (
        f"{_where(message)}: there is no class {name}.{did_you_mean(name, known_classes())} "
        "A class is named by its import path, such as modules.align.AdversarialAlignModule."
    )


def _required(match: re.Match[str], message: str, keys: list[str]) -> str:
    class_path = _named_class(message)
    if class_path:
        return f"{_where(message)}.init_args: {class_path} needs {match['names']}, which nothing sets."
    names = re.sub(r"\b(?:fit|validate|test|predict)\.", "", match["names"])
    return f"Nothing sets {names}. Name a configuration (--config align.yaml) or give the keys."


def _wrong_value(match: re.Match[str], message: str, keys: list[str]) -> str:
    expected = re.sub(r"<class '([\w.]+)'>", r"\1", match["expected"]).replace("typing.", "")
    choices = re.search(r"Literal\[(.*)\]", expected)
    options = re.findall(r"'([^']+)'", choices[1]) if choices else []
    value = match["value"].strip()
    if options:
        return f"{_where(message)}: {value} is not one of {', '.join(options)}.{did_you_mean(value, options)}"
    return f"{_where(message)}: {value!r} is no {expected}."


def _no_yaml(match: re.Match[str], message: str, keys: list[str]) -> str:
    return f"This is no YAML: {yaml_fault(match['told'])}."


Explanation = Callable[[re.Match[str], str, list[str]], str]
# In the order of how much they say: the innermost, most specific complaint first.
EXPLANATIONS: list[tuple[str, Explanation]] = [
    (r"(?s)Problems parsing config: (?P<told>.*, line \d+, column .*)", _no_yaml),
    (r"unrecognized arguments: (?P<key>\S+)", _unknown_key),
    (r"Option '(?P<key>[\w.]+)' is not accepted", _unknown_key),
    (r"does not accept option '(?P<key>[\w.]+)'", _unknown_key),
    (r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'", _no_attribute),
    (r"No module named '(?P<module>[\w.]+)'", _no_module),
    # A number or a tensor, as learning rates are: a class path stands for the tensor, which nobody means.
    (r"Expected a (?P<expected><class '\w+'>)\n.*Expected a dot import path string: (?P<value>\w+)", _wrong_value),
    (r"Expected a dot import path string: (?P<name>\w+)", _no_class),
    (r"arguments are required: (?P<names>[\w., ]+)", _required),
    (r"Expected a (?P<expected>[^\n]+?)\. Got value: (?P<value>[^\n]+?)(?:\. Got value: |\n|$)", _wrong_value),
]


def file_with_key(message: str, files: list[Path]) -> Path | None:
    """The last of the configuration files that holds the refused key, for a message that names no file."""
    key = re.search(r"does not accept option '([\w.]+)'", message)
    if key is None:
        return None
    # jsonargparse names the first unknown leaf; the misspelled part is any of the key's parts.
    parts = key[1].split(".")
    holding = [file for file in files if all(re.search(rf"\b{part}\b", file.read_text()) for part in parts)]
    return holding[-1] if holding else None


def explain_lightning(error: ValueError) -> UsageError | None:
    """What Lightning says against the trainer's options once it knows the data, in our words; None for all else."""
    if match := re.search(
        r"`val_check_interval` \((\d+)\) must be less than or equal to .*?batches \((\d+)\)", str(error)
    ):
        return UsageError(
            f"trainer.val_check_interval is {match[1]}, and an epoch has {match[2]} batches. Give --trainer."
            f"val_check_interval {match[2]} or less, more rows (data.num_train) or a smaller data.batch_size; or "
            "--trainer.limit_val_batches 0 for a run without validation."
        )
    return None


def own_error(error: BaseException) -> BaseException:
    """What the class itself raised, without the wrappings that jsonargparse puts around it."""
    while _raised_in(error).startswith("jsonargparse") and (below := error.__cause__ or error.__context__) is not None:
        error = below
    return error


def _raised_in(error: BaseException) -> str:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def nested_keys(parser: Any) -> list[str]:
    """The dotted keys of one command's parser."""
    return [a.dest for a in parser._actions if a.dest.rpartition(".")[2] != "help"]
