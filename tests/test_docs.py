"""The documentation tells the truth: its commands parse, those that need nothing from elsewhere run, its links lead
somewhere, and its classes work."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from prism_pl.__main__ import main
from prism_pl.pipeline.graph import build_graph
from prism_pl.pipeline.schema import load_pipeline
from prism_pl.push import make_parser as push_parser
from prism_pl.report.command import make_parser as report_parser
from tests.told_commands import of_lightning, read_by, written_by

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [page for page in PAGES if "results/demo" not in str(page) and "results/ablations" not in str(page)]
ROWS = [{"id": str(n), "problem_text": f"What is {n} + 1?", "final": str(n + 1)} for n in range(8)]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> list[str]:
    """The commands of a page, as one line each."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m prism_pl")]


def commands() -> list[str]:
    """Every command of the pages; of equal ones the first."""
    return list(dict.fromkeys(command for page in WRITTEN for command in commands_of(page)))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with what the pages' commands name: their classes, their YAMLs and a few rows."""
    import json

    (tmp_path / "my_parts.py").write_text(blocks(ROOT / "docs" / "your-parts.md", "python")[0])
    (tmp_path / "my_data.yaml").write_text(blocks(ROOT / "docs" / "your-data.md", "yaml")[0])
    (tmp_path / "adapters.yaml").write_text(blocks(ROOT / "docs" / "export.md", "yaml")[0])
    (tmp_path / "my_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_parts", None)


def test_the_commands_of_stages_work_in_the_order_of_their_page(here, capsys, monkeypatch):
    """And what they read of a run is what some page's command writes."""
    written, read = set(), set()
    for page in WRITTEN:
        folder = here / page.stem
        folder.mkdir()
        monkeypatch.chdir(folder)
        for file in here.glob("my_*"):
            (folder / file.name).write_text(file.read_text())
        (folder / "adapters.yaml").write_text((here / "adapters.yaml").read_text())
        stages = [c for c in commands_of(page) if of_lightning(c) and "qwen3vl-8b" not in c]
        written |= set(written_by(stages, capsys))
        read |= {run for command in commands_of(page) for run in read_by(command)}
    assert "runs/rlvr+my_data" in read
    assert read <= written


@pytest.mark.parametrize("command", [c for c in commands() if not of_lightning(c)])
def test_every_other_command_parses(command, here, capsys):
    args = shlex.split(command)[3:]
    if args[0] == "report":
        assert report_parser().parse_args(args[1:]).runs
    elif args[0] == "push":
        assert push_parser().parse_args(args[1:]).repo
    elif args[0] == "pipeline":
        assert build_graph(load_pipeline([args[2]], {}))
    else:
        assert main([*args, "--print_config"]) == 0, capsys.readouterr().err


FEW = shlex.split("--data.num_train 8 --data.num_validation 2 --data.batch_size 2 --trainer.limit_val_batches 0")


@pytest.mark.parametrize(
    "words",
    ["my_parts.FewStepsReward", "my_parts.NarrowClip", "my_data.yaml", "my_parts.MyDiscriminator", "adapters.yaml"],
)
def test_the_examples_run(words, here, without_vllm):
    """One step of each command with a part of the pages' own."""
    command = next(c for c in commands() if words in c)
    few = FEW if "my_data" not in words else ["--trainer.limit_val_batches", "0"]
    sampled = [] if "sft.yaml" in command else ["--model.sampling.max_tokens", "8", "--model.num_rollouts", "2"]
    assert main([*shlex.split(command)[3:], *few, *sampled, "--trainer.default_root_dir", str(here / "run")]) == 0
    assert (here / "run" / "export" / "model.safetensors").exists()
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert words.removesuffix(".yaml").split(".")[-1] in str(config) or words.endswith(".yaml")


def test_every_link_leads_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            broken += [] if (page.parent / link).exists() else [f"{page.name}: {link}"]
    assert broken == []
