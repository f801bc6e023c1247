"""`python -m prism_pl COMMAND ...`: the light front door.

Help and a misspelled command are answered before anything heavy is imported; every error leaves through
`prism_pl.errors.report`.
"""

import importlib
import os
import sys
import textwrap

from prism_pl import __version__
from prism_pl.errors import UsageError, did_you_mean, report
from prism_pl.importing import no_collections
from prism_pl.origin import check_origin
from prism_pl.shipped import shipped_configs

# Command -> (what it does, the function that runs it with the command and what follows it).
COMMANDS = {
    "fit": ("train a stage", "prism_pl.cli:run"),
    "validate": ("one pass over the validation split", "prism_pl.cli:run"),
    "test": ("evaluate on the test splits", "prism_pl.cli:run"),
    "predict": ("measure pass rates of the training prompts", "prism_pl.cli:run"),
    "report": ("tables and figures of finished runs", "prism_pl.report.command:run"),
    "data": ("check, pairs, distill: look at data, and make it", "prism_pl.data.command:run"),
    "pipeline": ("all stages, with a ledger of them", "prism_pl.pipeline.command:run"),
    "push": ("upload an export to the Hugging Face hub", "prism_pl.push:run"),
    "ablations": ("variants of the pipeline over seeds, and their tables", "prism_pl.ablations.command:run"),
}

HELP = """usage: python -m prism_pl COMMAND [--config FILE] [--KEY VALUE ...]

{about}

commands:
{commands}

options:
  --config FILE       a YAML; may be given again, the later one wins. A bare name finds the shipped file of that name
                      when there is none in the current folder
  --KEY VALUE         any key of the YAML, such as --trainer.max_steps 10
  --print_config      print the complete configuration and stop
  --fresh             fit: start anew beside an earlier run, in the next free folder (runs/align-2), instead of going on
  --weights-only-resume
                      fit: take only networks and position from the checkpoint, where another strategy or number of
                      processes cannot go on with the rest of it
  --debug             show Python's traceback with an error (or PRISM_TRACEBACK=1)
  COMMAND --help      every key of a command; --model.help CLASS: those of a class

shipped configurations:
{configs}

A run writes to --trainer.default_root_dir (default runs/NAME_OF_THE_CONFIG); the same command goes on from its last
checkpoint.

example:
  python -m prism_pl fit --config align.yaml --trainer.max_steps 20
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows `python -m prism_pl`; None takes it from the command line.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for a wrong command line or configuration, 130 for Ctrl+C.
    """
    # Before torch is imported. Threads that spin while they wait make a run several times slower beside any other
    # program, and gain nothing on a machine of their own.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in args:
        args.remove("--debug")
        os.environ["PRISM_TRACEBACK"] = "1"  # in the environment, so that the processes of other ranks have it too
    try:
        _dispatch(args)
    except SystemExit as stop:  # --help and --print_config of a command
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        return report(error)
    return 0


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        if not args:
            raise UsageError(f"A command is missing: one of {', '.join(COMMANDS)}.")
        return
    if args[0] == "--version":
        print(__version__)
        return
    if args[0] not in COMMANDS:
        if args[0].startswith("-"):
            raise UsageError(f"The command comes first: python -m prism_pl fit {args[0]} ...")
        raise UsageError(
            f"There is no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)} Commands: {', '.join(COMMANDS)}."
        )
    check_origin()
    module, function = COMMANDS[args[0]][1].split(":")
    with no_collections():
        imported = importlib.import_module(module)
    getattr(imported, function)(args)


def _help() -> str:
    import prism_pl

    commands = "\n".join(f"  {name:<18}  {what}" for name, (what, _) in COMMANDS.items())
    return HELP.format(about=prism_pl.__doc__, commands=commands, configs=_by_folder(shipped_configs()))


def _by_folder(configs: list[str]) -> str:
    """A paragraph a folder."""
    folders: dict[str, list[str]] = {}
    for config in configs:
        folder, slash, _ = config.rpartition("/")
        folders.setdefault(folder + slash, []).append(config)
    text = [textwrap.wrap(", ".join(folders[folder]), 116, break_on_hyphens=False) for folder in sorted(folders)]
    return "\n".join(f"  {line}" for lines in text for line in lines)


if __name__ == "__main__":
    sys.exit(main())
