"""Small finished runs: evaluations and event files with numbers that are known beforehand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from torch.utils.tensorboard.writer import SummaryWriter

from prism_pl.chat import render
from prism_pl.evaluation import PromptRecord, ResponseRecord, write_json
from prism_pl.evaluation_tables import make_tables


def response(
    correct: bool = True, items: int = 3, steps: int = 3, valid: bool = True, tokens: int = 10
) -> ResponseRecord:
    """A response as it was judged: half of its stated items are true."""
    text = render("- x\n" * items, "1. y\n" * steps, "7" if correct else "8")
    return ResponseRecord(
        text=text if valid else "7",
        valid=valid,
        malformed_reason="" if valid else "<caption> is missing",
        correct=correct and valid,
        lenient=correct,
        tokens=tokens,
        truncated=False,
        items=items if valid else None,
        steps=steps if valid else None,
        caption={"true": 1, "missed": 0, "invented": 1, "exact": 0} if valid else None,
        reasoning={"correct": 1, "stated": 2, "expected": 4} if valid else None,
    )


def write_evaluation(
    folder: Path, name: str, responses: Sequence[ResponseRecord], policy: str, split: str = "test", images: bool = False
) -> Path:
    """An `evaluation.json` of one response a prompt, two families in turn, and a supervision of 3 items and steps."""
    records = []
    for n, one in enumerate(responses):
        kept = []
        if images:
            (folder / "images").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / "images" / f"row-{n}-0.png")
            kept = [f"images/row-{n}-0.png"]
        record = PromptRecord(
            id=f"row-{n}",
            family=("sum", "count")[n % 2],
            split=split,
            question=f"Sum of *{n}*?",
            answers=["7"],
            policy=[one],
            supervision=response(tokens=20),
            images=kept,
        )
        records.append(record)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"name": name, "policy": policy, "rule_in_words": "bullets", "num_samples": 1}
    tables = make_tables(records, [1], num_resamples=50, seed=0)
    write_json(settings | {"tables": tables, "records": records}, folder / "evaluation.json")
    return folder


def write_stage(
    folder: Path,
    scalars: Mapping[str, Sequence[float]],
    start: str = "",
    first: int = 0,
    time: float = 1000.0,
    **model: Any,
) -> Path:
    """Event files with a value a step, a second apart from `time` on, and a configuration with the starting policy."""
    writer = SummaryWriter(str(folder))
    for tag, values in scalars.items():
        for step, value in enumerate(values, start=first):
            writer.add_scalar(tag, value, step, walltime=time + step)
    writer.close()
    config = {"model": {"init_args": {"policy": {"path": start}, **model}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_ledger(folder: Path, stages: Mapping[str, Mapping[str, Any]]) -> Path:
    """A pipeline's ledger with these entries."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ledger.json"
    file.write_text(json.dumps({"format": 1, "status": "finished", "stages": stages}))
    return file


ALIGN = {
    "align/reward_gap/perception": [0.8, 0.7, 0.5, 0.2],
    "align/val_reward_gap/perception": [0.9, 0.8, 0.7, 0.35],
    "align/response_length": [10.0, 11.0, 12.0, 13.0],
    "align/tokens": [100.0, 100.0, 200.0, 200.0],
    "align/grad_norm/policy": [0.5, 2.0, 3.0, 0.5],
    "time/rollout": [1.0, 1.0, 1.0, 1.0],
}
RLVR = {
    "rlvr/response_length": [10.0, 10.0],
    "rlvr/clip_fraction": [0.0, 0.25],
    "rlvr/dual_clip_fraction": [0.0, 0.0],
    "rlvr/val_accuracy": [0.5, 0.75],
    "time/rollout": [2.0, 2.0],
    "time/policy": [0.5, 0.5],
}


def write_run(folder: Path, right: int = 3, images: bool = False) -> Path:
    """A run of alignment and RLVR: of 4 test prompts sft answers 1 right, align 2, rlvr `right`; base is malformed."""
    base = [response(valid=False, tokens=2)] * 4
    write_evaluation(folder / "evaluate" / "base", "base", base, "assets/base")
    for name, num_right, items in (("sft", 1, 1), ("align", 2, 3), ("rlvr", right, 3)):
        responses = [response(n < num_right, items=items) for n in range(4)]
        write_evaluation(folder / "evaluate" / name, name, responses, f"{folder}/{name}/export", images=images)
    write_stage(folder / "sft", {"sft/loss": [3.0, 1.0]}, "assets/base", time=100)
    write_stage(folder / "align", ALIGN, f"{folder}/sft/export", time=1000, max_grad_norm=1.0)
    write_stage(folder / "rlvr", RLVR, f"{folder}/align/export", time=2000, max_grad_norm=1.0)
    return folder
