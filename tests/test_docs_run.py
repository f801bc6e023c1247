"""Every command of the documentation runs, in the order of its page, with flags behind it that make it small: those
of the tiny configurations in `make test`, those of 4B and 8B as rehearsals at tiny size in `make test-all`."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import yaml

from benchmarks.dry_run import prepare, write_rows
from prism_pl.__main__ import main
from prism_pl.chat import render
from prism_pl.model_card import provenance, write_card
from prism_pl.pipeline.schema import on_command_line
from tests.run_data import response, write_evaluation
from tests.told_commands import ROOT, VALUES, WRITTEN, blocks, commands, commands_of, write_parts

PIPELINES = [command for command in commands() if shlex.split(command)[3] == "pipeline"]
CHECKS = [command for command in commands() if " data check --config qwen3vl-4b/" in command]
PUBLISHED = [c for c in commands() if "--config qwen3vl-4b/" in c and c not in [*PIPELINES, *CHECKS]]
TINY = {page: [command for command in commands_of(page) if "--config qwen3vl" not in command] for page in WRITTEN}

FEW = "--data.num_train 8 --data.num_validation 2 --data.batch_size 2"
SHORT = "--model.sampling.max_tokens 8"
STEP = "--trainer.accelerator cpu --trainer.max_steps 1 --trainer.limit_val_batches 0"
BENCHMARK = '[{"class_path": "prism_pl.benchmarks.MathVista", "init_args": {"path": "data/mathvista.json"}}]'
# What a command says -> what is appended to it; the first that it says counts.
APPENDED = {
    "my_data.yaml": f"{STEP} {SHORT} --model.num_rollouts 2",
    "PairsDataModule": f"{STEP} --data.num_validation 0 --data.batch_size 2",
    "rlvr.yaml --data.pass_rates": f"{STEP} {FEW} {SHORT} --model.num_rollouts 2 --data.keep [0,1]",
    "fit --config sft.yaml": f"{STEP} {FEW}",
    "fit --config warmup.yaml": f"{STEP} {FEW} {SHORT}",
    "fit --config align.yaml": f"{STEP} {FEW} {SHORT} --model.num_rollouts 2",
    "fit --config rlvr.yaml": f"{STEP} {FEW} {SHORT} --model.num_rollouts 2",
    "predict": f"--trainer.accelerator cpu {SHORT} --data.num_train 8 --model.num_samples 2",
    "test --config evaluate.yaml": f"--trainer.accelerator cpu {SHORT} --data.num_test 4 --data.num_hard 4"
    " --model.num_resamples 50",
    "my_parts.Sums": f"--trainer.accelerator cpu {SHORT} --model.num_resamples 50",
    "test --config benchmarks.yaml": f"--trainer.accelerator cpu {SHORT} --data.limit 2 --model.num_resamples 50"
    f" --data.benchmarks '{BENCHMARK}'",
    "data check --config benchmarks.yaml": f"--data.limit 2 --data.benchmarks '{BENCHMARK}'",
    "data check": FEW,
    "data pairs": "--trainer.accelerator cpu --data.num_train 8",
    "data distill": "--data.num_train 4",
    "push": "",
    "report": "",
}
# Page -> commands of the README whose runs it reads.
MADE_BEFORE = {"export": ["python -m prism_pl test --config evaluate.yaml --model.policy.path runs/align/export"]}
# Page -> what its commands leave, beside what other pages read.
LEFT = {
    "data": ["runs/check/check.md", "runs/pairs/pairs.jsonl", "runs/distill/demonstrations.jsonl"],
    "evaluate": ["runs/check-benchmarks/check.md", "runs/evaluate-sft/evaluation.json", "runs/qwen3vl-4b/report.md"],
    "export": ["runs/sft+adapters/export-adapters/adapter_model.safetensors", "uploaded.md"],
    "your-parts": ["runs/benchmarks-sft/evaluation.json"],
    "your-data": ["runs/evaluate-rlvr+my_data/evaluation.json"],
}


def appended(command: str) -> list[str]:
    """The flags that make a command of the tiny configurations small. Fails where APPENDED has none."""
    return shlex.split(next(flags for words, flags in APPENDED.items() if words in command))


class Model(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint: a judge where it is shown a candidate, else a teacher."""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        said = "right" if "Candidate" in asked else render("- red 2 at top\n- blue 4 at left", "1. 2 + 4 = 6", "6")
        body = json.dumps({"choices": [{"message": {"content": said}}], "usage": None}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Hub:
    """Takes what HfApi is told."""

    def create_repo(self, repo: str, **_: object) -> None:
        assert repo == "my-name/aligned"

    def upload_folder(self, folder_path: str, **_: object) -> None:
        Path("uploaded.md").write_text((Path(folder_path) / "README.md").read_text())


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command with further flags, in a folder with what pages write and get from elsewhere."""
    import huggingface_hub

    write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()

    def run(command: str, flags: list[str]) -> None:
        here = command.replace("127.0.0.1:8000", f"127.0.0.1:{server.server_port}")
        with mock.patch.dict(os.environ):  # what a command sets there ends with its process
            code = main([*shlex.split(here)[3:], *flags])
        assert code == 0, f"{command}: {capsys.readouterr().err}"

    yield run
    server.shutdown()
    server.server_close()
    sys.modules.pop("my_parts", None)


def lay_out(page: str) -> None:
    """What other pages' commands, or the hub, have for a page, into the current folder."""
    write_rows(Path("data"), 4, 32)
    shutil.copytree(ROOT / "assets" / "sft", "Qwen/Qwen3-VL-4B-Instruct")
    for run in {"sft", "align"} - {page}:
        export = shutil.copytree(ROOT / "assets" / "sft", Path("runs", run, "export"))
        write_card(export, provenance(Path("unknown.yaml"), "AdversarialAlignModule", 1, {}))
    for run in ("sft", "align", "rlvr"):
        folder = Path("runs", "qwen3vl-4b", f"evaluate-{run}")
        write_evaluation(folder, run, [response(True)] * 4, f"runs/{run}/export")


@pytest.mark.parametrize("page", [page for page in TINY if TINY[page]], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, run, without_vllm):
    lay_out(page.stem)
    for command in MADE_BEFORE.get(page.stem, []) + TINY[page]:
        run(command, appended(command))
    for file in ("runs/sft/export/config.json", "runs/align/export/config.json", *LEFT.get(page.stem, [])):
        assert Path(file).stat().st_size > 0, file


@pytest.mark.parametrize("command", CHECKS)
def test_rows_are_kept_back_from_sft_as_the_page_says(command, run, tmp_path):
    lay_out("README")
    prompts = tmp_path / "prism-vlm" / "rl_dataset"  # a folder of the name that the hub's set has
    prompts.mkdir(parents=True)
    shutil.copy("data/rl_training_data_5.9k.parquet", prompts)
    Path("kept-back.yaml").write_text(blocks(VALUES, "yaml")[0])
    run(command, ["--data.train", "data/sft.jsonl", "--data.num_validation", "0", "--data.num_workers", "0"])
    kept_back = [json.loads(line) for line in Path("runs/check-sft/excluded.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in kept_back} == {"overlap with kept-back"}
    assert len(kept_back) == len(Path("data/sft.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_the_commands_of_4b_run_at_tiny_size(run, tmp_path):
    """In one folder, so that each finds what the page's earlier ones wrote."""
    overlay = yaml.safe_load(prepare(tmp_path, "tiny", devices=1, offload=False, baseline=False).read_text())
    rows = tmp_path / "data" / "rl_training_data_5.9k.parquet"
    shutil.copy(rows, rows.with_name("rl_training_data_filtered_2k.parquet"))
    reproduced = commands_of(ROOT / "docs" / "reproduce.md")
    for command in PUBLISHED:
        verb, name = re.findall(r"prism_pl (\w+) --config qwen3vl-4b/(\w+)", command)[0]
        settings = overlay["stages"][name]["set"] if verb == "fit" else overlay["defaults"][verb]["set"]
        if name in ("align", "filter", "rlvr"):
            settings = settings | {"data.train.path": str(rows.parent)}  # a downloaded folder, as the page has it
        if "--model.policy.path" not in command:
            settings = settings | {"model.policy.path": "policy"}
        if "dapo" in command:
            settings = settings | {"model.num_prompts": 1, "model.overlong_buffer": 8}
        flags = [word for key, value in settings.items() for word in (f"--{key}", on_command_line(value))]
        run(command, flags + ["--fresh"] * (verb == "fit" and command not in reproduced))


@pytest.mark.slow
@pytest.mark.parametrize("command", PIPELINES)
def test_the_pipelines_run_at_tiny_size(command, tmp_path):
    """In a process of its own: stages are forked, and a fork of one whose threads have computed may wait forever."""
    size = re.findall(r"qwen3vl-\w+", command)[0]
    file = prepare(tmp_path / "dry", "tiny", devices=1, offload=False, baseline=True)
    file.write_text(file.read_text().replace("qwen3vl-4b", size))
    line = [sys.executable, "-m", "prism_pl", *shlex.split(command)[3:], "--config", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(line, cwd=tmp_path, env=environment, check=True, timeout=1200)
    stages = json.loads((tmp_path / "dry" / "run" / "ledger.json").read_text())["stages"]
    assert len(stages) == 13
    assert {stage["status"] for stage in stages.values()} == {"finished"}
    scores = json.loads((tmp_path / "dry" / "run" / "evaluate-rlvr" / "evaluation.json").read_text())
    assert scores["name"] == "rlvr"


def test_no_command_of_the_pages_is_left_out():
    tiny = [command for page in TINY for command in TINY[page]]
    assert len(CHECKS) == 1
    assert {*tiny, *PUBLISHED, *PIPELINES, *CHECKS} == set(commands())
    assert [command for command in tiny if not any(words in command for words in APPENDED)] == []
