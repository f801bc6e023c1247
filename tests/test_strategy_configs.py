"""The shipped overlays of strategies, put over another configuration as the command line does it."""

from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy

from prism_pl import cli
from prism_pl.__main__ import main
from prism_pl.shipped import shipped_configs
from prism_pl.strategy import MultiEngineDeepSpeedStrategy

OVERLAYS = sorted(name for name in shipped_configs() if name.startswith("strategy/"))
STAGES = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False), "zero3_offload": (3, True)}


class Built(Exception):
    """Ends a command once its trainer is there."""


def built_by(monkeypatch, *command: str):
    """What `python -m prism_pl COMMAND` builds, trainer and model, and does not run."""
    built = []

    def stop(self, subcommand):
        built.append(self)
        raise Built

    monkeypatch.setattr(cli.PrismCLI, "_run_subcommand", stop)
    with pytest.raises(Built):
        cli.run(list(command))
    return built[0]


def trainer_of(config: str, monkeypatch, *more: str):
    """The trainer of `fit --config CONFIG --config OVERLAY`, which is not run."""
    return built_by(monkeypatch, "fit", "--config", config, *more).trainer


def test_every_overlay_is_named_here():
    assert [Path(name).stem for name in OVERLAYS] == sorted(["auto", "ddp", *STAGES])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_gives_its_strategy_and_keeps_the_rest_and_the_folder(overlay, monkeypatch, tmp_path):
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    trainer = trainer_of("align.yaml", monkeypatch, "--config", overlay)
    assert trainer.default_root_dir == "runs/align"
    assert trainer.max_steps == 15
    strategy, name = trainer.strategy, Path(overlay).stem
    if name in STAGES:
        assert isinstance(strategy, MultiEngineDeepSpeedStrategy)
        assert (strategy.common.stage, strategy.common.offload_optimizer) == STAGES[name]
        assert strategy.options_of("policy").precision == "32"
    elif name == "ddp":
        assert isinstance(strategy, DDPStrategy)
        assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    assert trainer.num_devices == (1 if name == "auto" else 2)


def test_each_network_has_options_of_its_own_from_the_command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.strategy.init_args.engines", "{policy: {stage: 3}, discriminator: {precision: '32'}}"]
    more = ["--config", "strategy/zero2.yaml", "--trainer.precision", "bf16-mixed", *options]
    strategy = trainer_of("align.yaml", monkeypatch, *more).strategy
    assert strategy.options_of("policy").stage == 3
    assert strategy.options_of("policy").precision == "bf16"
    assert strategy.options_of("discriminator").stage == 2
    assert strategy.options_of("discriminator").precision == "32"


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_two_players_and_many_updates_under_lightnings_own_strategy_are_one_line(stage, monkeypatch, tmp_path, capsys):
    """Before anything is loaded, so that it says the same where there is no GPU."""
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", f"{stage}.yaml", "--trainer.strategy", "deepspeed_stage_2"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        "error: trainer.strategy is Lightning's DeepSpeedStrategy, with one engine for one optimiser"
    )
    assert "Use prism_pl.strategy.MultiEngineDeepSpeedStrategy (--config strategy/zero2.yaml)" in line
    assert not (tmp_path / "runs" / stage).exists()
