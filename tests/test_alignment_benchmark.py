"""The benchmark of alignment at full size: its commands, its clock and its table."""

import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks import alignment
from benchmarks.paper_scale import write_blank
from tests.test_strategy_configs import built_by

SETTINGS = {
    "steps": 4, "prompts": 4, "rollouts": 16, "tokens": 512, "lines": 32, "side": 448, "micro_batch_tokens": 16384,
    "precision": "bf16-mixed", "gpu_memory": 0.15, "hide": True, "timeout": 400,
}  # fmt: skip


@pytest.mark.parametrize("case", alignment.CASES)
def test_the_cases_that_run_by_default_are_commands_that_can_be_read(case, monkeypatch, tmp_path):
    pytest.importorskip("deepspeed")
    pytest.importorskip("vllm")
    write_blank(tmp_path / "policy", "tiny")
    line, environment = alignment.command(tmp_path, case, Namespace(**SETTINGS))
    num = int(case.split(":")[1])
    assert environment["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, range(num)))
    assert line[1:3] == ["-m", "prism_pl"]
    built = built_by(monkeypatch, *line[3:])
    assert built.trainer.num_devices == num
    assert built.trainer.strategy.park_optimizer_states is (alignment.PARKED in case)
    for make in (built.model.policy_optimizer, built.model.discriminator_optimizer):
        (group,) = make([torch.nn.Parameter(torch.ones(1))]).param_groups
        assert group["fused"] is True


def ended(pid):
    """Whether a process is gone, or nothing is left of it but its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_case_that_hangs_is_ended_with_all_of_its_processes(tmp_path):
    pid, log = tmp_path / "pid", tmp_path / "log"
    line = ["bash", "-c", f"sleep 60 & echo $! > {pid}; echo started; wait"]
    begun = time.monotonic()
    assert alignment.run_for(1.0, line, dict(os.environ), log) is None
    assert time.monotonic() - begun < 30
    assert log.read_text() == "started\n"
    for _ in range(100):
        if ended(int(pid.read_text())):
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process that the case had started lives on")
    assert alignment.run_for(30.0, [sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), log) == 3


def write_case(folder, case, step, **settings):
    run = alignment.run_folder(folder, case)
    run.mkdir(parents=True)
    told = {"case": case, "settings": settings, "card": "A Card", "versions": {"torch": "2.12", "vllm": None}}
    (run / "settings.json").write_text(json.dumps(told))
    with SummaryWriter(str(run / "events")) as writer:
        for i in range(4):
            at = 1000.0 + i * step
            writer.add_scalar("align/tokens", 600.0, i, walltime=at)
            for phase in alignment.PHASES:  # which are not all of a step; the first one warms up
                writer.add_scalar(f"time/{phase}", 99.0 if i == 0 else 0.5, i, walltime=at)
                writer.add_scalar(f"memory/{phase}", 7.0, i, walltime=at)
                writer.add_scalar(f"memory_used/{phase}", 8.0, i, walltime=at)


def test_the_table_has_the_wall_clock_between_steps_and_the_scaling_of_equal_settings(tmp_path):
    parked = alignment.PARKED
    write_case(tmp_path, f"zero2:1:{parked}", 10.0, prompts=4, timeout=290)
    write_case(tmp_path, f"zero2:2:{parked}", 12.5, prompts=4, timeout=430)
    write_case(tmp_path, "zero2:2", 5.0, prompts=4)
    write_case(tmp_path, "zero3:1", 5.0, prompts=2)
    write_case(tmp_path, "zero3:2", 5.0, prompts=4)
    lines = alignment.table(tmp_path).splitlines()
    cell = "0.50 (7.0 / 8.0)"
    # 600 tokens a step on two GPUs: 600 / 12.5 / 2
    assert f"| zero2:2:{parked} | both optimisers | 12.50 | 24 | " + " | ".join([cell] * 5) + " |" in lines
    assert "| zero2:2 | nothing | 5.00 | 60 | " + " | ".join([cell] * 5) + " |" in lines
    # 2 x 10 / 12.5; parked and unparked, or with other settings, are no pair
    assert [line for line in lines if " over " in line] == [f"* zero2:2:{parked} over zero2:1:{parked}: 1.60 x"]
    assert lines[-1] == "* A Card; torch 2.12"
