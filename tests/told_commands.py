"""The commands that a page tells, one after the other, each up to where it would begin to work."""

import re
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from prism_pl.__main__ import main
from prism_pl.cli import PrismCLI, completed
from prism_pl.run_folder import refuse_other_settings, write_config

LEFT_BY_A_RUN = re.compile(r"\b(runs/\S+)/(?:export[\w-]*|pass_rates\.jsonl)(?=\s|$)")


def of_lightning(command: str) -> bool:
    """Whether it is a run of one stage."""
    return shlex.split(command)[3] in ("fit", "validate", "test", "predict")


def read_by(command: str) -> list[str]:
    """The folders of earlier runs that a command reads, as `runs/align`."""
    return LEFT_BY_A_RUN.findall(command)


def written_by(commands: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The folders of the runs, in order, in the current folder. Fails where a command does not parse, or meets the
    folder of an earlier one of other settings."""
    written = []

    def begin(cli: Any) -> None:
        config = cli.config[cli.subcommand]
        folder = Path(config.trainer.default_root_dir)
        parser = cli._parser(cli.subcommand)
        text = parser.dump(config, skip_none=False)
        refuse_other_settings(folder, yaml.safe_load(text), partial(completed, parser))
        write_config(folder / "config.yaml", text)
        written.append(str(folder))
        raise SystemExit

    for command in commands:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PRISM_RUN_FOLDER", "")
            patch.setattr(PrismCLI, "instantiate_classes", begin)
            capsys.readouterr()
            assert main(shlex.split(command)[3:]) == 0, f"{command}: {capsys.readouterr().err}"
    return written
