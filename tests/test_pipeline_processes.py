"""The pipeline with real processes: forks, logs, Ctrl+C, kills, and a tiny run from SFT to the report's tables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from prism_pl.__main__ import main
from prism_pl.pipeline.graph import build_graph
from prism_pl.pipeline.schema import load_pipeline

ROOT = Path(__file__).parent.parent
STAGES = ("align.yaml", "rlvr.yaml")
DUMMY = """
trainer:
  {max_steps: 200, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, logger: false,
   log_every_n_steps: 1}
model:
  class_path: tests.dummy_system.DummyModule
  init_args:
    policy: {path: ./weights}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1e-1}}
data: {class_path: tests.dummy_system.DummyData, init_args: {length: 64}}
"""
PIPELINE = """
run_folder: run
stages:
  first: {command: fit, config: dummy.yaml, set: {trainer.max_steps: 2, trainer.logger: true}}
  long: {command: fit, config: dummy.yaml, set: {model.pause: 0.02}}
  alone: {command: fit, config: dummy.yaml, set: {trainer.max_steps: 2}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRISM_TRACEBACK", "")
    (tmp_path / "dummy.yaml").write_text(DUMMY)
    (tmp_path / "weights").mkdir()
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


def started(*options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "prism_pl", "pipeline", "--config", "pipeline.yaml", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def stages() -> dict:
    return json.loads(Path("run/ledger.json").read_text())["stages"]


def wait_for(file: Path, process: "subprocess.Popen[str]") -> None:
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_ctrl_c_ends_the_stage_in_order_and_the_same_command_resumes_it(folder, capsys):
    process = started()
    wait_for(folder / "run/long/checkpoints/last.ckpt", process)
    # Meanwhile a second one is refused, at once.
    assert main(["pipeline", "--config", "pipeline.yaml"]) == 2
    assert f"run is in use: a pipeline runs there (process {process.pid})" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().endswith("The same command goes on: python -m prism_pl pipeline --config pipeline.yaml")
    assert "[first] finished" in said
    assert {name: entry["status"] for name, entry in stages().items()} == {
        "first": "finished",
        "long": "interrupted",
        "alone": "pending",
    }
    assert stages()["first"]["results"]["step"] == 2
    assert "dummy/loss" in stages()["first"]["results"]["metrics"]
    step = torch.load("run/long/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 200

    process = started()
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"[long], from step {step} $ python -m prism_pl fit --config dummy.yaml" in said
    assert stages()["long"]["resumed_from_step"] == step
    assert [attempt["status"] for attempt in stages()["long"]["attempts"]] == ["interrupted", "finished"]
    log = Path("run/long/stage.log").read_text()
    assert "Going on from run/long/checkpoints/last.ckpt" in log
    assert "\x1b" not in log


def test_help_answers_in_five_seconds_without_importing_torch(tmp_path):
    light = "import sys, prism_pl.__main__ as m; m.main(['pipeline', '--help']); sys.exit('torch' in sys.modules)"
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", light], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "--from STAGE" in result.stdout
    assert time.monotonic() - start < 5


def test_the_shipped_pipeline_is_whole(tmp_path, monkeypatch, capsys):
    """Every stage's command line is read by the real parsers, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    pipeline = load_pipeline(["pipeline.yaml"], {})
    graph = build_graph(pipeline)
    assert graph["sft-rlvr"].parents == {"sft": ("export",), "filter-sft": ("pass_rates",)}
    trained = {name for name, node in graph.items() if node.stage.command == "fit"} - {"warmup"}
    evaluated = {parent for node in graph.values() if node.stage.command == "test" for parent in node.parents}
    assert evaluated == trained
    assert graph.below({"rlvr"}) == {"evaluate-rlvr", "report"}

    assert main(["pipeline", "--config", "pipeline.yaml", "--dry-run"]) == 0
    steps = {}
    for line in capsys.readouterr().out.splitlines():
        if "--config" in line and "/rlvr.yaml" in line:
            words = line.split()
            steps[words[-1]] = words[words.index("--trainer.max_steps") + 1] if "--trainer.max_steps" in words else None
    alone = [yaml.safe_load((ROOT / "configs" / name).read_text())["trainer"]["max_steps"] for name in STAGES]
    assert steps == {"runs/pipeline/rlvr": None, "runs/pipeline/sft-rlvr": str(sum(alone))}
    assert list(tmp_path.iterdir()) == []

    # Pass rates are found by the rows' ids alone: whoever measures and whoever trains has to make the same rows.
    options = ["--rlvr.data.max_digits", "2", "--rlvr.data.num_train", "96"]
    assert main(["pipeline", "--config", "pipeline.yaml", "--dry-run", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "/filter.yaml" in line or "/rlvr.yaml" in line]
    assert len(lines) == 4
    assert all("--data.max_digits 2" in line and "--data.num_train 96" in line for line in lines)


@pytest.mark.slow
def test_a_killed_pipeline_leaves_no_stage_behind_and_goes_on_side_by_side(folder):
    Path("pipeline.yaml").write_text(PIPELINE + "parallel: 2\n")
    process = started()
    wait_for(folder / "run/long/checkpoints/last.ckpt", process)
    process.kill()
    process.communicate()
    assert stages()["long"]["status"] == "running"
    time.sleep(0.5)
    modified = os.stat("run/long/checkpoints/last.ckpt").st_mtime_ns
    time.sleep(1)
    assert os.stat("run/long/checkpoints/last.ckpt").st_mtime_ns == modified, "the stage lives on"
    process = started()
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "killed before; goes on from run/long/checkpoints/last.ckpt" in said
    assert {entry["status"] for entry in stages().values()} == {"finished"}


TINY = """
run_folder: run
defaults:
  test:
    config: evaluate.yaml
    set: {data.num_test: 8, data.num_hard: 4, model.sampling.max_tokens: 24}
stages:
  evaluate-base: {command: test, set: {model.name: base}}
  sft:
    command: fit
    config: sft.yaml
    set:
      trainer.max_steps: 2
      trainer.val_check_interval: 1
      data.num_train: 8
      data.num_validation: 4
      data.batch_size: 4
  warmup:
    command: fit
    config: warmup.yaml
    set:
      model.policy.path: "{sft.export}"
      model.sampling.max_tokens: 24
      trainer.max_steps: 1
      trainer.val_check_interval: 1
      data.num_train: 8
      data.num_validation: 4
      data.batch_size: 4
  align:
    command: fit
    config: align.yaml
    set:
      model.policy.path: "{sft.export}"
      model.discriminator.path: "{warmup.export}"
      model.num_rollouts: 2
      model.sampling.max_tokens: 24
      trainer.max_steps: 1
      trainer.val_check_interval: 1
      data.num_train: 8
      data.num_validation: 4
      data.batch_size: 4
  filter:
    command: predict
    config: filter.yaml
    set:
      model.policy.path: "{align.export}"
      model.num_samples: 2
      model.sampling.max_tokens: 24
      data.num_train: 8
  rlvr:
    command: fit
    config: rlvr.yaml
    set:
      model.policy.path: "{align.export}"
      data.pass_rates: "{filter.pass_rates}"
      data.keep: [0.0, 1.0]
      model.sampling.max_tokens: 24
      trainer.max_steps: "{sft.trainer.max_steps + sft.trainer.val_check_interval}"
      trainer.val_check_interval: 1
      data.num_train: 8
      data.num_validation: 4
      data.batch_size: 4
  evaluate-rlvr: {command: test, set: {model.name: rlvr, model.policy.path: "{rlvr.export}"}}
  report: {command: report}
"""


@pytest.mark.slow
def test_a_tiny_pipeline_from_the_base_policy_to_the_report(folder):
    Path("pipeline.yaml").write_text(TINY)
    process = started()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    rlvr = stages()["rlvr"]
    assert rlvr["results"]["step"] == 3
    assert "rlvr/val_accuracy" in rlvr["results"]["metrics"]
    assert rlvr["results"]["kept"] == stages()["filter"]["results"]["kept"] == 8
    assert rlvr["parents"] == {
        "align": {"export": stages()["align"]["outputs"]["export"]},
        "filter": {"pass_rates": stages()["filter"]["outputs"]["pass_rates"]},
    }
    assert "align/val_accuracy" in stages()["align"]["results"]["metrics"]
    assert "# " in Path("run/report/report.md").read_text()
    assert set(stages()["evaluate-rlvr"]["results"]["tables"]) == {"test", "hard"}
    assert yaml.safe_load(Path("run/rlvr/config.yaml").read_text())["trainer"]["max_steps"] == 3
    process = started()
    said, _ = process.communicate(timeout=120)
    assert "run was finished already: 8 stages" in said
    process = started("--rlvr.model.optimizer.init_args.lr", "1e-5")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "rlvr: model.init_args.optimizer.init_args.lr: 0.0002 -> 1e-05" in errors
