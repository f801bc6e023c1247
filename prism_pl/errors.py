"""Errors for users: one clear message, last on the screen, and an exit code.

Light: imports nothing but the standard library.
"""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pickle import UnpicklingError

EXIT_RUN = 1
EXIT_USAGE = 2
EXIT_STOPPED = 130


class UsageError(ValueError):
    """The command line or a configuration asks for something that does not exist or cannot be."""


class EngineStopped(RuntimeError):
    """The rollout engine cannot go on; the message says why."""


class PipelineFailed(RuntimeError):
    """A stage of a pipeline failed; the message says which, and what to do."""


class Stopped(Exception):
    """The user pressed Ctrl+C; the message says how to go on."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of the known words as a sentence, `" Did you mean align.yaml?"`, or "" when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def yaml_fault(told: str) -> str:
    """One sentence of what a YAML parser says over several lines, and what is asked for."""
    lines = re.findall(r", line (\d+), column", told)
    problems = re.findall(r"([^\n]+)\n\s+in \"[^\"\n]*\", line", told)
    if not lines or not problems:
        return " ".join(told.split())
    where = f"line {lines[0]}" if lines[0] == lines[-1] else f"lines {lines[0]} to {lines[-1]}"
    return (
        f"{where}: {problems[-1].strip()}. Write KEY: VALUE on each line, and begin those of one level in one column, "
        "behind spaces"
    )


def wants_traceback() -> bool:
    """Whether PRISM_TRACEBACK (or --debug, which sets it) asks for Python's own traceback."""
    return os.environ.get("PRISM_TRACEBACK", "") not in ("", "0")


def report(error: BaseException) -> int:
    """Print the error as the last thing on the screen and return the exit code.

    Errors that tell the user something (ValueError, a missing file, a refused checkpoint, an engine that stopped) are
    one message. Any other is a defect of the program, whose traceback is needed.
    """
    sys.stdout.flush()
    if isinstance(error, Stopped | KeyboardInterrupt):
        print(f"\n{error}" if str(error) else "\nStopped.", file=sys.stderr)
        return EXIT_STOPPED
    expected = isinstance(
        error, ValueError | OSError | UnpicklingError | ArithmeticError | EngineStopped | PipelineFailed
    ) or _is_misconfiguration(error)
    if wants_traceback() or not expected:
        traceback.print_exception(error)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_RUN
    message = _of_the_worker(str(error).strip()) or type(error).__name__
    if isinstance(error, UnpicklingError):
        reason = message.splitlines()[0]
        message = f"A checkpoint was refused: only tensors and plain values are read, never a pickle. {reason}"
    hint = "" if isinstance(error, UsageError | PipelineFailed) else " (--debug shows where)"
    print(f"\nerror: {message}{hint}", file=sys.stderr)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_RUN


def _of_the_worker(message: str) -> str:
    """What an error in a data loader's worker said: torch raises it anew with the worker's traceback as its message."""
    match = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback", message)
    return message if match is None else message.rpartition(f"\n{match.group(1)}: ")[2]


def _is_misconfiguration(error: BaseException) -> bool:
    """Lightning's MisconfigurationException, by name: importing Lightning here would take seconds."""
    return type(error).__name__ == "MisconfigurationException"
