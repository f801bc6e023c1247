"""The whole method on two processes a stage, under DeepSpeed's ZeRO-2 and with vLLM: each stage for two steps, on CPUs
or on GPUs, and the shipped pipeline for all of its steps."""

import json
import math
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from prism_pl.report.events import read_curves

for library in ("deepspeed", "vllm"):  # the pipeline imports them; here that would take half as long as a stage
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed", allow_module_level=True)

ROOT = Path(__file__).parent.parent
TRAINED = ("sft", "warmup", "align", "rlvr")
# From a policy that answers in the format already, so that there are pairs to rank and rollouts to score.
SHORT = """
defaults:
  fit:
    set:
      trainer.max_steps: 2
      trainer.limit_val_batches: 0
      trainer.enable_model_summary: false
      data.num_train: 8
      data.num_validation: 2
      data.batch_size: 2
  predict: {config: filter.yaml}
  test: {config: evaluate.yaml}
stages:
  sft:
    command: fit
    config: [sft.yaml, strategy/zero2.yaml]
    set: {model.policy.path: ASSETS/sft, model.optimizer.init_args.lr: 1.0e-4}
  warmup:
    command: fit
    config: [warmup.yaml, strategy/zero2.yaml]
    set:
      model.policy.path: "{sft.export}"
      model.discriminator.path: "{sft.export}"
      model.rollout: prism_pl.rollout.VLLMEngine
  align:
    command: fit
    config: [align.yaml, strategy/zero2.yaml]
    set:
      model.policy.path: "{sft.export}"
      model.discriminator.path: "{warmup.export}"
      model.rollout: prism_pl.rollout.VLLMEngine
      model.num_rollouts: 2
  filter:
    command: predict
    set:
      model.policy.path: "{align.export}"
      model.engine: prism_pl.rollout.VLLMEngine
      model.num_samples: 2
      data.num_train: "{rlvr.data.num_train}"
  rlvr:
    command: fit
    config: [rlvr.yaml, strategy/zero2.yaml]
    set:
      model.policy.path: "{align.export}"
      model.rollout: prism_pl.rollout.VLLMEngine
      model.num_rollouts: 2
      data.pass_rates: "{filter.pass_rates}"
      data.keep: [0.0, 1.0]
  evaluate:
    command: test
    set:
      model.policy.path: "{rlvr.export}"
      model.engine: prism_pl.rollout.VLLMEngine
      model.drift: null
      data.num_test: 4
      data.num_hard: 4
  report: {command: report}
"""


def run(folder: Path, config: str, *over: str, timeout: float, accelerator: str = "cpu") -> dict:
    """The ledger's stages after the pipeline of this YAML, laid over shipped ones; all finished."""
    (folder / "ranks.yaml").write_text(config)
    files = [part for name in (*over, "ranks.yaml") for part in ("--config", name)]
    command = [sys.executable, "-m", "prism_pl", "pipeline", *files, "--run_folder", "run"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": accelerator, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    stages = json.loads((folder / "run/ledger.json").read_text())["stages"]
    assert {name: entry["status"] for name, entry in stages.items()} == dict.fromkeys(stages, "finished")
    return stages


@pytest.fixture
def timed(record_property):
    """Run a pipeline (`run`), and tell at the end of the tests what it took, and each of its stages."""

    def timed(*args, **options) -> dict:
        begun = time.monotonic()
        stages = run(*args, **options)
        took = ", ".join(f"{name} {entry['seconds']:.0f} s" for name, entry in stages.items())
        record_property("took", f"{time.monotonic() - begun:.0f} s in all: {took}")
        return stages

    return timed


def assert_trained_on_two(folder: Path, stages: dict, name: str, num_steps: int) -> None:
    assert stages[name]["results"]["step"] == num_steps
    manifest = json.loads((folder / f"run/{name}/checkpoints/last.ckpt/manifest.json").read_text())
    assert manifest["ranks"] == 2
    assert set(manifest["stages"].values()) == {2}


def test_every_stage_takes_two_steps_on_two_processes(tmp_path, timed):
    stages = timed(tmp_path, SHORT.replace("ASSETS", str(ROOT / "assets")), timeout=900)
    for name in TRAINED:
        assert_trained_on_two(tmp_path, stages, name, 2)
    metrics = {name: stages[name]["results"]["metrics"] for name in TRAINED}
    assert 0 < metrics["sft"]["sft/loss"] < 1  # of a policy that knows the demonstrations
    assert metrics["warmup"]["warmup/pairs"] > 0
    for player in ("policy", "discriminator"):
        assert metrics["align"][f"align/grad_norm/{player}"] > 0
    for name in ("align", "rlvr"):
        # vLLM against the trainer, after the step's weights were sent.
        assert metrics[name]["rollout/probe_difference"] < 1e-3
    assert math.isfinite(metrics["rlvr"]["rlvr/grad_norm"])
    assert stages["rlvr"]["results"]["kept"] == stages["filter"]["results"]["prompts"] == 8
    assert set(stages["evaluate"]["results"]["tables"]) == {"test", "hard"}
    assert "rlvr" in (tmp_path / "run/report/report.md").read_text()


two_gpus = pytest.mark.skipif("__import__('torch').cuda.device_count() < 2", reason="needs two GPUs")
EAGER = "{class_path: prism_pl.rollout.VLLMEngine, init_args: {enforce_eager: true}}"
# As above, in bf16, validated after each step, with groups that span both ranks and dynamic sampling.
ON_GPUS = (
    SHORT.replace("prism_pl.rollout.VLLMEngine", EAGER)
    .replace(
        "limit_val_batches: 0",
        """limit_val_batches: 1
      trainer.val_check_interval: 1
      trainer.accelerator: gpu
      trainer.precision: bf16-mixed""",
    )
    .replace("model.num_rollouts: 2", "model.num_rollouts: 2\n      model.ranks_per_group: 2")
    .replace("data.keep:", "model.dynamic_sampling: true\n      data.keep:")
    # Its pairs are told apart at the first validation, at which it would stop.
    .replace(
        'model.discriminator.path: "{sft.export}"',
        'model.discriminator.path: "{sft.export}"\n      model.ceiling: null',
    )
)


@pytest.mark.gpu
@two_gpus
def test_every_stage_takes_and_validates_two_steps_on_two_gpus(tmp_path, timed):
    stages = timed(tmp_path, ON_GPUS.replace("ASSETS", str(ROOT / "assets")), timeout=580, accelerator="cuda")
    metrics = {name: stages[name]["results"]["metrics"] for name in TRAINED}
    for name, prefix in zip(TRAINED, ("sft/val_loss", "warmup/val_", "align/val_", "rlvr/val_"), strict=True):
        assert_trained_on_two(tmp_path, stages, name, 2)
        assert any(metric.startswith(prefix) for metric in metrics[name])
        assert "sync_dist" not in (tmp_path / f"run/{name}/stage.log").read_text()  # nothing is logged of one rank
    for name in ("align", "rlvr"):
        assert metrics[name]["rollout/probe_difference"] < 0.1  # of bf16


# Lightning's own strategy, whose checkpoints are not read.
STOCK = """
defaults:
  fit:
    set:
      trainer.strategy: deepspeed_stage_2
      trainer.devices: 2
      trainer.accelerator: gpu
      trainer.precision: bf16-mixed
      trainer.max_steps: 2
      trainer.limit_val_batches: 1
      trainer.val_check_interval: 1
      trainer.enable_checkpointing: false
      trainer.callbacks: [{class_path: callbacks.Export}]
      data.num_train: 8
      data.num_validation: 2
      data.batch_size: 2
stages:
  sft: {command: fit, config: sft.yaml, set: {model.policy.path: ASSETS/sft}}
  warmup:
    command: fit
    config: warmup.yaml
    set:
      model.policy.path: "{sft.export}"
      model.discriminator.path: "{sft.export}"
      model.rollout: prism_pl.rollout.TransformersEngine
      model.ceiling: null
"""


@pytest.mark.gpu
@two_gpus
def test_sft_and_the_warm_start_train_under_lightnings_own_strategy_on_two_gpus(tmp_path, timed):
    timed(tmp_path, STOCK.replace("ASSETS", str(ROOT / "assets")), timeout=580, accelerator="cuda")
    losses = {name: read_curves(tmp_path / "run" / name)[f"{name}/loss"].values for name in ("sft", "warmup")}
    assert {name: len(values) for name, values in losses.items()} == {"sft": 2, "warmup": 2}
    assert max(losses["sft"]) < 1


# Half of the batch on each of two processes: as many steps on as many rows as on one.
HALVED = """
stages:
  sft: {config: [sft.yaml, strategy/zero2.yaml], set: {data.batch_size: 8}}
  warmup: {config: [warmup.yaml, strategy/zero2.yaml], set: {data.batch_size: 16}}
  align: {config: [align.yaml, strategy/zero2.yaml], set: {data.batch_size: 4}}
  rlvr: {config: [rlvr.yaml, strategy/zero2.yaml], set: {data.batch_size: 16}}
  sft-rlvr: {config: [rlvr.yaml, strategy/zero2.yaml]}
"""


@pytest.mark.slow
def test_the_shipped_pipeline_comes_out_right_on_two_processes(tmp_path, timed):
    # Its report fails it where the results are not what they should be.
    stages = timed(tmp_path, HALVED, "pipeline.yaml", timeout=7200)
    steps = {"sft": 300, "align": 15, "rlvr": 12, "sft-rlvr": 27}
    for name, num_steps in steps.items():
        assert_trained_on_two(tmp_path, stages, name, num_steps)
    assert_trained_on_two(tmp_path, stages, "warmup", stages["warmup"]["results"]["step"])
    assert stages["warmup"]["results"]["step"] in (6, 12)  # the ceiling may end it at its first validation
