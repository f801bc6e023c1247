"""The whole of configs/qwen3vl-4b/pipeline.yaml at its true size: random weights, made rows, two steps a stage.

Launch: python benchmarks/dry_run.py --folder /tmp/dry --devices 2
        export PYTHONPATH=$PWD VLLM_USE_FLASHINFER_SAMPLER=0
        python -m prism_pl pipeline --config qwen3vl-4b/pipeline.yaml --config /tmp/dry/dry.yaml > /tmp/dry/log 2>&1 &

Where a command may take minutes only, the last line is given again: it goes on. It needs 70 GB of disk, and at 4B on
two GPUs 110 GB of each, or with `--offload` 50 GB and 300 GB of CPU memory. `--size tiny` runs on any CPU in minutes.

What differs from a real run is in the overlay that this writes: where weights and rows lie, lengths and counts, no
checkpoints, engines whose rollouts are rehearsed (random weights write no block), and all pass rates kept. The
baseline (its filter, RLVR and evaluation), which repeats what the others do, is left out unless `--baseline` is given.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rehearsal import long_response  # noqa: E402

NUM_ROWS = 32
BASELINE = ("filter-sft", "sft-rlvr", "evaluate-sft-rlvr")
CALLBACKS = [{"class_path": f"callbacks.{name}"} for name in ("Progress", "Export")]
FIT = {
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 1,
    "trainer.check_val_every_n_epoch": None,
    "trainer.limit_val_batches": 1,
    "trainer.enable_checkpointing": False,
}
ROWS = {"data.num_validation": 2, "data.num_workers": 0}


def prepare(folder: Path, size: str, devices: int, offload: bool, baseline: bool) -> Path:
    """Write weights, rows and the overlay `dry.yaml`; returns the overlay's path.

    Args:
        size: `4b`, or `tiny` with engines that need no GPU.
        devices: GPUs a stage.
        offload: keep the optimisers in CPU memory.
        baseline: keep the stages of the baseline.
    """
    write_networks(folder, size)
    lines, side = (4, 32) if size == "tiny" else (32, 448)
    write_rows(folder / "data", lines, side)
    file = folder / "dry.yaml"
    file.write_text(yaml.safe_dump(overlay(folder.resolve(), size, devices, offload, baseline), sort_keys=False))
    return file


def write_networks(folder: Path, size: str) -> None:
    """The policy, and the policy that the discriminator grows from; those that are there are kept."""
    import torch

    from benchmarks.paper_scale import write_policy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, each in {"policy": size, "dense": "2b" if size == "4b" else size}.items():
        if not (folder / name).exists():
            write_policy(folder / name, each, device)


def write_rows(folder: Path, num_lines: int, side: int) -> None:
    """Demonstrations, pairs, prompts and a benchmark in their published schemas, over images of noise."""
    import datasets

    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for n in range(NUM_ROWS):
        Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"images/{n}.png")
    images = [f"images/{n}.png" for n in range(NUM_ROWS)]
    asked = [f"What is digit {n}?" for n in range(NUM_ROWS)]
    said = [long_response(n, num_lines, "6") for n in range(NUM_ROWS)]
    worse = [long_response(NUM_ROWS + n, num_lines) for n in range(NUM_ROWS)]
    user = [{"role": "user", "content": f"<image>\n{question}"} for question in asked]
    chats = [[turn, {"role": "assistant", "content": text}] for turn, text in zip(user, said, strict=True)]
    sharegpt = [{"messages": chat, "images": [image]} for chat, image in zip(chats, images, strict=True)]
    _write_lines(folder / "sft.jsonl", sharegpt)
    columns = ("prompt", "image", "teacher_response", "student_response")
    pairs = [dict(zip(columns, row, strict=True)) for row in zip(asked, images, said, worse, strict=True)]
    _write_lines(folder / "pairs.jsonl", pairs)
    prompts = [
        {
            "prompt": [turn],
            "images": [{"bytes": (folder / image).read_bytes(), "path": None}],
            "data_source": "noise",
            "reward_model": {"style": "rule", "ground_truth": "6", "equivalent_answers": None},
            "teacher_response": text,
        }
        for turn, image, text in zip(user, images, said, strict=True)
    ]
    datasets.Dataset.from_list(prompts).to_parquet(folder / "rl_training_data_5.9k.parquet")
    kind = {"question_type": "free_form", "answer_type": "integer", "choices": None, "precision": 0, "unit": None}
    asked_about = zip(range(4), asked, images, strict=False)
    questions = {
        str(n): {"pid": str(n), "question": q, "image": image, "answer": "6", "metadata": {"task": "noise"}, **kind}
        for n, q, image in asked_about
    }
    (folder / "mathvista.json").write_text(json.dumps(questions))


def overlay(folder: Path, size: str, devices: int, offload: bool, baseline: bool) -> dict[str, Any]:
    """What is laid over the shipped pipeline."""
    tiny, data = size == "tiny", folder / "data"
    hardware: dict[str, Any] = {"trainer.accelerator": "cpu" if tiny else "gpu"}
    one = {**hardware, "trainer.devices": 1}
    fit = {**FIT, **hardware, "trainer.devices": devices}
    if offload:
        fit["trainer.strategy.init_args.offload_optimizer"] = True
    engine = _engine("rollout", tiny)
    tester = _engine("engine", tiny)
    sampling = {"model.sampling.max_tokens": 24 if tiny else 256}
    prompts = {"data.train.path": str(data / "rl_training_data_5.9k.parquet"), **ROWS}
    sampled = {**fit, **prompts, **sampling, **engine, "model.num_rollouts": 4, "data.batch_size": 2}
    rlvr = {**sampled, "data.keep": [0, 1], "data.eval_batch_size": 2}
    benchmark = {"class_path": "prism_pl.benchmarks.MathVista", "init_args": {"path": str(data / "mathvista.json")}}
    policy = {"model.policy.path": str(folder / "policy")}
    stages: dict[str, Any] = {
        "evaluate-base": {"set": policy},
        "sft": {
            "set": {**fit, **ROWS, **policy, "data.train": [{"path": str(data / "sft.jsonl")}]}
            | {"trainer.callbacks": CALLBACKS}
        },
        "warmup": {
            "set": {**fit, **ROWS, "data.train.path": str(data / "pairs.jsonl")}
            | {"model.discriminator.init_args.path": str(folder / "dense")}
            | {"data.batch_size": 4, "data.eval_batch_size": 2}
        },
        "align": {"set": {**sampled, "model.ranks_per_group": 1, "data.eval_batch_size": 2}},
        "rlvr": {"set": rlvr},
    }
    if baseline:
        # Its steps are counted from those of the others, as in a real run.
        stages["sft-rlvr"] = {"set": {key: value for key, value in rlvr.items() if key != "trainer.max_steps"}}
    else:
        stages |= dict.fromkeys(BASELINE)
        stages["report"] = {"set": {"pairs": ["align:sft", "rlvr:align"]}}
    evaluation = {**one, **sampling, "data.benchmarks": [benchmark], "data.batch_size": 4, "model.num_resamples": 50}
    measured = {**one, **prompts, **sampling, "model.num_samples": 4, "data.eval_batch_size": NUM_ROWS}
    return {
        "run_folder": str(folder / "run"),
        "defaults": {
            "test": {"config": "qwen3vl-4b/evaluate.yaml", "set": {**evaluation, **tester}},
            "predict": {"config": "qwen3vl-4b/filter.yaml", "set": {**measured, **tester}},
        },
        "stages": stages,
    }


def _engine(argument: str, tiny: bool) -> dict[str, Any]:
    """A rehearsed engine as the module's argument of that name: for two steps a stage, one that compiles nothing."""
    if tiny:
        return {f"model.{argument}": "benchmarks.rehearsal.RehearsedTransformersEngine"}
    return {
        f"model.{argument}": "benchmarks.rehearsal.RehearsedEngine",
        f"model.{argument}.init_args.enforce_eager": True,
    }


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=["4b", "tiny"], default="4b")
    parser.add_argument("--devices", type=int, default=2, help="GPUs a stage")
    parser.add_argument("--offload", action="store_true", help="optimisers in CPU memory")
    parser.add_argument("--baseline", action="store_true", help="keep the baseline's stages")
    args = parser.parse_args()
    file = prepare(args.folder.resolve(), args.size, args.devices, args.offload, args.baseline)
    print(f"python -m prism_pl pipeline --config qwen3vl-4b/pipeline.yaml --config {file}")
