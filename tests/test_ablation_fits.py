"""The shipped arms of the ablations: each one's own fits start as they are configured, and take their steps."""

import shlex
from functools import cache, partial
from pathlib import Path

import pytest
import yaml

from prism_pl.__main__ import main
from prism_pl.ablations.arms import Merged, merge
from prism_pl.ablations.schema import load_ablations, load_arms
from prism_pl.pipeline.graph import build_graph, command_of
from prism_pl.rollout import vllm_compat
from tests.conftest import missing

ROOT = Path(__file__).parent.parent
FILE = ROOT / "configs" / "ablations.yaml"
ARMS = [Path(arm).stem for arm in yaml.safe_load(FILE.read_text())["arms"]]
# Rows, batches and what fits into an epoch stay the arm's own.
FEW = "--trainer.max_steps 2 --trainer.limit_val_batches 1 --trainer.num_sanity_val_steps 0"
SMALLER = {
    "sft": FEW,
    "warmup": f"{FEW} --model.sampling.max_tokens 56 --model.ceiling null",
    "align": f"{FEW} --model.sampling.max_tokens 56 --model.num_rollouts 2",
    "rlvr": f"{FEW} --model.sampling.max_tokens 56 --model.num_rollouts 2",
}


def shipped_arms(scale: str | None = None) -> Merged:
    ablations = load_ablations(FILE)
    return merge(load_arms(ablations, scale, {}, {}), ablations)


@pytest.mark.parametrize("scale", [None, "gpu"])
def test_every_arms_validation_comes_within_an_epoch(scale):
    """What Lightning refuses at the start of a fit: a validation every so many batches that no epoch has."""
    read = cache(lambda file: yaml.safe_load(Path(file).read_text()))
    checked = []
    for name, stage in shipped_arms(scale).pipeline.stages.items():
        if stage.command != "fit":
            continue
        config = read(stage.config[-1])
        settings = {f"data.{key}": value for key, value in config["data"]["init_args"].items()}
        settings |= {f"trainer.{key}": value for key, value in config["trainer"].items()} | stage.set
        every = settings.get("trainer.val_check_interval")
        if every is not None and settings.get("trainer.check_val_every_n_epoch", 1) is not None:
            assert every <= settings["data.num_train"] // settings["data.batch_size"], name
            checked.append(name)
    assert any(name.endswith("-full-sft") for name in checked)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_an_arms_own_fits_take_two_steps(arm, tmp_path, monkeypatch):
    """Each from the shipped policies, not from what two steps made of one; a discriminator from the arm's warm start,
    whose kind it has to be."""
    monkeypatch.setattr(vllm_compat, "import_vllm", partial(missing, "left out in this test"))
    monkeypatch.chdir(tmp_path)
    stages = shipped_arms().only([arm], [1]).pipeline
    graph = build_graph(stages)
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        stand_in = tmp_path / "stand-ins" / name
        if name not in made and not stand_in.exists():
            stand_in.mkdir(parents=True)
            (stand_in / "export").symlink_to(ROOT / "assets" / ("discriminator" if "-warmup" in name else "sft"))
        return made.get(name, stand_in)

    configs = {name: {"trainer": {"max_steps": 1}} for name in graph}  # what `no-alignment` adds up
    for name, node in graph.items():
        stage = name.removeprefix(f"s1-{arm}-")
        if node.stage.command != "fit" or stage == name:
            continue
        made[name] = tmp_path / name
        args = command_of(node, tmp_path, folder_of, configs)
        assert main([*args, *shlex.split(SMALLER[stage])]) == 0, name
        assert (tmp_path / name / "export" / "model.safetensors").exists()
        if stage != "warmup":
            del made[name]
