"""The pages, the commands that they tell, and what these begin with: each up to where it would begin to work."""

import json
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

ROOT = Path(__file__).parent.parent
VALUES = ROOT / "configs" / "qwen3vl-4b" / "README.md"
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), VALUES]
WRITTEN = [page for page in PAGES if "results/demo" not in str(page) and "results/ablations" not in str(page)]
ROWS = [{"id": str(n), "problem_text": f"What is {n} + 1?", "final": str(n + 1)} for n in range(8)]
LEFT_BY_A_RUN = re.compile(r"\b(runs/\S+)/(?:export[\w-]*|pass_rates\.jsonl)(?=\s|$)")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> list[str]:
    """The commands of a page, as one line each."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m prism_pl")]


def commands() -> list[str]:
    """Every command of the pages; of equal ones the first."""
    return list(dict.fromkeys(command for page in WRITTEN for command in commands_of(page)))


def write_parts(folder: Path) -> None:
    """What the pages tell a reader to write, classes and YAMLs, and a few rows."""
    (folder / "my_parts.py").write_text("\n\n".join(blocks(ROOT / "docs" / "your-parts.md", "python")))
    (folder / "my_data.yaml").write_text(blocks(ROOT / "docs" / "your-data.md", "yaml")[0])
    (folder / "adapters.yaml").write_text(blocks(ROOT / "docs" / "export.md", "yaml")[0])
    (folder / "my_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


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
