"""A run of two processes under ZeRO-2 in bf16 is gone on with at another stage and validated, by the command line: the
first process reads the checkpoint's networks for both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prism_pl.report.events import read_curves

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parent.parent
FIRST = """
model:
  init_args:
    policy: {path: ASSETS/sft}
    discriminator: {init_args: {path: ASSETS/discriminator}}
    rollout: {class_path: prism_pl.rollout.TransformersEngine}
    sampling: {max_tokens: 64}
    num_rollouts: 2
    schedule: cosine
    policy_optimizer: {init_args: {lr: 1.0e-3}}
    discriminator_optimizer: {init_args: {lr: 1.0e-3}}
    export_dtype: float32
data:
  init_args: {num_train: 16, num_validation: 4, batch_size: 2}
trainer:
  accelerator: ACCELERATOR
  devices: 2
  precision: bf16-mixed
  max_steps: 2
  val_check_interval: 2
  limit_val_batches: 1
  callbacks: [{class_path: callbacks.Export}]
"""
# The first run's schedule has come to a rate of 0: what is exported after one more step is what was read.
ON = "trainer: {max_steps: 3, limit_val_batches: 0}\n"


def start(folder: Path, run: str, command: str, *arguments: str, accelerator: str) -> Path:
    """The folder of a run of two processes that has ended well."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": {"gpu": "cuda"}.get(accelerator, accelerator)}
    line = [sys.executable, "-m", "prism_pl", command, "--trainer.default_root_dir", run, *arguments]
    ended = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (folder / f"{run}.log").write_text(ended.stdout + ended.stderr)
    return folder / run


def exported(run: Path) -> dict:
    """The weights of both players."""
    files = {name: run / name / "model.safetensors" for name in ("export", "export-discriminator")}
    return {f"{name}: {key}": weight for name, file in files.items() for key, weight in load_file(file).items()}


def validated(run: Path) -> dict[str, float]:
    """The last values of a run's validations."""
    events = next(run.rglob("events.out.tfevents*")).parent
    return {tag: curve.values[-1] for tag, curve in read_curves(events).items() if tag.startswith("align/val_")}


@pytest.mark.parametrize(
    "accelerator",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif("__import__('torch').cuda.device_count() < 2", reason="needs two GPUs"),
            ],
        ),
    ],
)
def test_networks_of_a_checkpoint_reach_both_processes(tmp_path, accelerator):
    first = FIRST.replace("ASSETS", str(ROOT / "assets")).replace("ACCELERATOR", accelerator)
    (tmp_path / "first.yaml").write_text(first)
    (tmp_path / "on.yaml").write_text(ON)
    common = ("--config", "align.yaml", "--config", "first.yaml")
    whole = start(tmp_path, "whole", "fit", *common, "--config", "strategy/zero2.yaml", accelerator=accelerator)
    last = ("--ckpt_path", str(whole / "checkpoints" / "last.ckpt"))

    other = (*common, "--config", "strategy/zero1.yaml", *last)
    on = start(tmp_path, "on", "fit", *other, "--config", "on.yaml", "--weights-only-resume", accelerator=accelerator)
    assert "Lost: the optimisers' states" in (tmp_path / "on.log").read_text()
    before, after = exported(whole), exported(on)
    assert before.keys() == after.keys()
    assert [name for name, weight in before.items() if not weight.equal(after[name])] == []

    validation = start(tmp_path, "validation", "validate", *other, accelerator=accelerator)
    assert validated(validation) == pytest.approx(validated(whole))
    assert validated(whole)
