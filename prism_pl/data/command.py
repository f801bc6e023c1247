"""`python -m prism_pl data check|pairs|distill ...`: reads the command line and hands it on."""

import importlib

from prism_pl.errors import UsageError, did_you_mean

# Command -> (what it does, the function that runs it with what follows it).
COMMANDS = {
    "check": ("read a set end to end, without a model, and say what a run could not use", "prism_pl.data.check:run"),
    "pairs": ("warm-start pairs of demonstrations and a policy's rollouts", "prism_pl.data.pairs:run"),
    "distill": ("ask a teacher behind an OpenAI-compatible endpoint", "prism_pl.data.distill:run"),
}
USAGE = "usage: python -m prism_pl data COMMAND [--config FILE] [--KEY VALUE ...]\n\ncommands:\n"


def run(args: list[str]) -> None:
    """Run `["data", "check", ...]`. UsageError where there is no such command."""
    name = args[1] if len(args) > 1 else "--help"
    if name in ("-h", "--help"):
        print(USAGE + "\n".join(f"  {name:<18}  {what}" for name, (what, _) in COMMANDS.items()))
        return
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        raise UsageError(f"There is no command data {name!r}.{near} Commands: {', '.join(COMMANDS)}.")
    module, function = COMMANDS[name][1].split(":")
    getattr(importlib.import_module(module), function)(args[2:])
