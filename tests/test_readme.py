"""The README tells the truth: its examples run, its commands parse, and what it names exists."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from prism_pl.__main__ import main
from prism_pl.pipeline.graph import build_graph
from prism_pl.pipeline.schema import load_pipeline
from prism_pl.report.command import make_parser
from tests.told_commands import of_lightning, read_by, written_by

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = {
    "trainer": {"max_steps": 1, "val_check_interval": 1, "accelerator": "cpu"},
    "data": {"num_train": 2, "num_validation": 2, "batch_size": 2},
    "model": {"num_rollouts": 2, "sampling.max_tokens": 16},
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every `python -m prism_pl` line of the shell blocks, as one line each."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith("python -m prism_pl")]


@pytest.fixture
def swap(tmp_path, monkeypatch):
    """A current folder with the README's class and its YAML, importable as `python -m` makes it."""
    (tmp_path / "my_reward.py").write_text(blocks("python")[0])
    (tmp_path / "brief.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_reward", None)


def test_the_swapped_reward_trains_and_is_logged(swap, without_vllm):
    small = [f"--{group}.{key}={value}" for group, keys in SMALL.items() for key, value in keys.items()]
    assert main(["fit", "--config", "rlvr.yaml", "--config", "brief.yaml", *small]) == 0
    run = swap / "runs" / "rlvr+brief"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["reward"]["class_path"] == "my_reward.BriefReward"
    assert (run / "export" / "model.safetensors").exists()
    assert "rlvr/brief" in tags(run)


def tags(run: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return events.Tags()["scalars"]


def test_the_class_has_six_lines_and_the_yaml_four():
    python, text = blocks("python")[0], blocks("yaml")[0]
    assert len(python[python.index("class ") :].splitlines()) == 6
    assert len(text.splitlines()) == 4


def test_the_python_example_trains(swap):
    example = blocks("python")[1]
    assert len(example[example.index("seed_everything(1)") :].splitlines()) == 10
    shipped = yaml.safe_load((ROOT / "configs" / "rlvr.yaml").read_text())
    # As many steps, and as many rows to draw from, as the YAML beside it.
    max_steps, num_train = shipped["trainer"]["max_steps"], shipped["data"]["init_args"]["num_train"]
    smaller = {
        '"assets/sft"': repr(str(ROOT / "assets" / "sft")),
        f"max_steps={max_steps}": "max_steps=1, accelerator='cpu', enable_progress_bar=False, logger=False",
        f"num_train={num_train}": "num_train=2, num_validation=2",
        "batch_size=64)": "batch_size=2)",
        "reward=BriefReward()": "reward=BriefReward(), num_rollouts=2",
        "max_tokens=112": "max_tokens=16",
    }
    for whole, small in smaller.items():
        assert whole in example, f"the README's example no longer says {whole}"
        example = example.replace(whole, small)
    names: dict[str, object] = {}
    exec(example, names)
    assert type(names["module"].reward).__name__ == "BriefReward"
    assert (swap / "runs" / "brief" / "export" / "model.safetensors").exists()


def test_the_commands_of_stages_work_in_their_order(swap, capsys):
    stages = [command for command in commands() if of_lightning(command)]
    written = written_by(stages, capsys)
    for number, command in enumerate(stages):
        assert set(read_by(command)) <= set(written[:number]), command
    assert {"runs/evaluate-sft", "runs/evaluate-align", "runs/evaluate-rlvr"} <= set(written)


@pytest.mark.parametrize("command", [command for command in commands() if not of_lightning(command)])
def test_every_other_command_parses(command, swap, capsys):
    args = shlex.split(command)[3:]
    if args[0] == "report":
        assert make_parser().parse_args(args[1:]).runs
    else:
        assert main([*args, "--print_config"]) == 0, capsys.readouterr().err


def test_the_pipeline_example_is_laid_over_the_shipped_one(swap):
    (example,) = [block for block in blocks("yaml") if block.startswith("stages:")]
    (swap / "mine.yaml").write_text(example)
    graph = build_graph(load_pipeline(["pipeline.yaml", "mine.yaml"], {}))
    assert "evaluate-base" not in graph
    assert graph["rlvr"].stage.set["model.num_rollouts"] == 8
    assert graph["evaluate-rlvr-long"].parents == {"rlvr-long": ("export",)}


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", README)
    assert len(links) >= 4
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tree_names_what_exists():
    tree = blocks("text")[0]
    missing, folder = [], ""
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0]
        if not line.startswith(" "):
            folder = names
        for name in [] if names == folder else names.split(", "):
            missing += [] if list((ROOT / folder).glob(name)) else [folder + name]
        missing += [] if (ROOT / folder).is_dir() else [folder]
    assert missing == []


def test_the_tree_names_every_package_and_every_file_of_the_library():
    named = set(re.findall(r"[\w/]+(?:\.py|/)(?=[, ])", blocks("text")[0]))
    packages = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")} | {"configs/", "assets/", "scripts/"}
    inside = {f"{path.parent.name}/" for path in (ROOT / "prism_pl").glob("*/__init__.py")}
    files = {path.name for path in (ROOT / "prism_pl").glob("*.py")} - {"__init__.py"}
    assert sorted((packages | inside | files) - named) == []
