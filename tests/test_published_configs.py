"""Configurations that need data or weights from elsewhere: each parses as it stands, with its overlays, and holds the
published numbers. No data is read."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from prism_pl.__main__ import main
from prism_pl.pipeline.graph import build_graph
from prism_pl.pipeline.schema import load_pipeline
from scripts.memory import laid_over, needs, said

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
SIZES = ("4b", "8b")
STAGES = ("sft", "warmup", "align", "filter", "rlvr-grpo", "rlvr-dapo", "rlvr-gspo", "evaluate")
OVERLAID = ("sft", "warmup", "align", "rlvr")
OVERLAYS = tuple(f"{stage}-{gpus}" for stage in OVERLAID for gpus in ("1gpu", "2gpus"))
NAMES = ["benchmarks", "sampling/greedy", "sampling/paper"] + [
    f"qwen3vl-{size}/{name}" for size in SIZES for name in (*STAGES, *OVERLAYS)
]


def opening(name: str) -> list[str]:
    """The comment lines that a YAML opens with."""
    found = re.match(r"(?:# [^\n]+\n)+", (CONFIGS / f"{name}.yaml").read_text())
    assert found
    return [line.removeprefix("# ") for line in found[0].splitlines()]


def launch(name: str) -> list[str]:
    """The arguments of a YAML's launch line."""
    line = next(line for line in opening(name) if line.startswith("Launch: python -m prism_pl "))
    return shlex.split(line)[4:]


def parse(args: list[str], capsys) -> None:
    code = main([*args, "--print_config"])
    assert code == 0, capsys.readouterr().err


def settings(*names: str) -> dict[str, Any]:
    """A YAML with others laid over it."""
    config: dict[str, Any] = {}
    for name in names:
        config = laid_over(config, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    return config


def the_rest_is_slow(names: list[str]) -> list[Any]:
    """The larger size has the smaller one's keys: its files are parsed in the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if "8b" in name else name for name in names]


@pytest.mark.parametrize("name", the_rest_is_slow(NAMES))
def test_launch_line_and_every_override_parse(name, capsys):
    args = launch(name)
    assert f"{name}.yaml" in args
    lines = [line.split(": ", 1)[1] for line in opening(name) if ": --" in line and not line.startswith("Launch")]
    assert lines
    overrides = [shlex.split(one) for line in lines for one in line.split(" or ")]
    # Those that name YAMLs are laid over one by one, the others all at once.
    plain = [override for override in overrides if "--config" not in override]
    parse([*args, *(arg for override in plain for arg in override)], capsys)
    for override in overrides:
        if override not in plain and "8b" not in name:
            parse([*(args[:1] if "rlvr-dapo.yaml" in str(override) else args), *override], capsys)


def test_every_file_is_tested():
    there = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("qwen3vl-*/*.yaml")}
    assert there == {name for name in NAMES if name.startswith("qwen3vl")} | {f"qwen3vl-{s}/pipeline" for s in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_pipeline_resolves_and_the_baseline_takes_as_many_steps(size):
    graph = build_graph(load_pipeline([f"qwen3vl-{size}/pipeline.yaml"], {}))
    assert [name for name in graph if name.startswith("evaluate")] == [
        "evaluate-base",
        "evaluate-sft",
        "evaluate-align",
        "evaluate-rlvr",
        "evaluate-sft-rlvr",
    ]
    assert graph["sft-rlvr"].stage.set["trainer.max_steps"] == "{align.trainer.max_steps + rlvr.trainer.max_steps}"


def test_the_page_goes_stage_by_stage_as_the_pipeline_does():
    """RLVR from the page reads what the filter before it wrote, of the rows that it was measured on."""
    page = (ROOT / "docs" / "reproduce.md").read_text()
    line = next(line for line in page.splitlines() if "rlvr-grpo.yaml" in line)
    set_ = yaml.safe_load((CONFIGS / "qwen3vl-4b" / "pipeline.yaml").read_text())["stages"]["rlvr"]["set"]
    assert {f"--{key}" for key in set_} == set(re.findall(r"--(?!config)\S+", line))
    assert f"--data.train.only {set_['data.train.only']}" in line
    assert "--data.pass_rates runs/qwen3vl-4b/filter/pass_rates.jsonl" in line


def files(name: str) -> list[str]:
    """The files that a YAML's header speaks of: itself, and for an overlay what it is laid over."""
    stage = name.split("/")[1]
    if stage not in OVERLAYS:
        return [str(CONFIGS / f"{name}.yaml")]
    base = stage.rpartition("-")[0]
    below = "rlvr-grpo" if base == "rlvr" else base
    return [str(CONFIGS / name.split("/")[0] / f"{below}.yaml"), str(CONFIGS / f"{name}.yaml")]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("qwen3vl")])
def test_headers_say_the_memory_that_the_formula_gives(name):
    assert f"Hardware: {said(files(name))} (scripts/memory.py)." in opening(name)


def test_memory_formula_by_hand():
    """4B alignment on two GPUs: ZeRO-2 with both optimisers offloaded."""
    config = files("qwen3vl-4b/align-2gpus")
    # Weights 2 x (4.44 + 5.31) = 19.5 GB; generating takes 0.25 x 80 = 20 GB more, training 28.2:
    # 2 x 36 x 2560 x 16384 = 3.0, logits 12 x 2048 x 151936 = 3.7, 2 for the rest, gradients 4 x 9.75 / 2 = 19.5.
    # CPU, a process: pinned 4 x 2.22 = 8.9 and 4 x 2.655 = 10.6 are 17.2 each, twice; 2 x 2.22 = 4.4 and 5.3 are 8.6
    # each; moments 8 x (2.22 + 2.655) = 39; AdamW's temporaries 8 x 2.655 = 21.2. In all 4 x 17.2 + 2 x 8.6 + 60.2.
    assert said(config) == "2 GPUs with 48 GB each, 292 GB of CPU memory"


def test_a_frozen_policy_is_held_where_something_samples_from_it():
    """The warm start on one GPU: 2 x 5.31, gradients 4 x 5.31, activations 1.9 + 3.7 + 2; an engine adds 2 x 4.44."""
    config = settings("qwen3vl-4b/warmup", "qwen3vl-4b/warmup-1gpu")
    assert needs(config, "Qwen3-VL-4B").gpu == pytest.approx(39.5, abs=0.1)
    config["model"]["init_args"]["rollout"] = {"init_args": {"gpu_memory": 0.3}}
    assert needs(config, "Qwen3-VL-4B").gpu == pytest.approx(39.5 + 8.9, abs=0.1)


def test_published_hyperparameters():
    """The README's table and the scripts of the release, prism.md sections 3 to 6."""
    for size in SIZES:
        sft = settings(f"qwen3vl-{size}/sft")
        model = sft["model"]["init_args"]
        assert model["optimizer"]["init_args"]["lr"] == 1e-5
        assert (model["schedule"], model["warmup"], sft["trainer"]["max_epochs"]) == ("cosine", 0.1, 1)
        warmup = settings(f"qwen3vl-{size}/warmup")
        judge = warmup["model"]["init_args"]["discriminator"]["init_args"]
        assert (judge["num_experts"], judge["top_k"], judge["noise_std"], judge["balance_weight"]) == (4, 2, 0.01, 0.01)
        assert warmup["data"]["init_args"]["batch_size"] * warmup["trainer"]["devices"] == 128
        align = settings(f"qwen3vl-{size}/align")
        model = align["model"]["init_args"]
        prompts = align["data"]["init_args"]["batch_size"] * align["trainer"]["devices"] // model["ranks_per_group"]
        assert (prompts, model["num_rollouts"], align["trainer"]["max_steps"]) == (4, 16, 500)
        assert model["sampling"]["max_tokens"] == 6144
        assert (model["score_l2"], model["score_clip"], model["malformed_penalty"]) == (0.001, 10.0, 1.5)
        for side in ("policy_optimizer", "discriminator_optimizer"):
            assert model[side]["init_args"]["lr"] == 1e-6
            assert model[side]["init_args"]["weight_decay"] == 0.01


def test_sft_writes_few_checkpoints():
    """1.37M rows / 16 are 85,700 steps, and a checkpoint of 4B has 2 x 4.44 + 12 x 4.02 = 57 GB."""
    for size in SIZES:
        callbacks = settings(f"qwen3vl-{size}/sft")["trainer"]["callbacks"]
        (kept,) = [one["init_args"] for one in callbacks if one["class_path"].endswith("LastCheckpoint")]
        assert 85_700 / kept["every_n_steps"] < 100


def test_every_question_of_mmmu_fits_into_the_engine():
    """A row has image_1 to image_7."""
    for name in ("benchmarks", *(f"qwen3vl-{size}/evaluate" for size in SIZES)):
        assert settings(name)["model"]["init_args"]["engine"]["init_args"]["max_images"] == 7


def test_seven_pictures_of_any_size_and_their_question_fit_beside_a_response():
    """A visual token of Qwen3-VL is 32 x 32 pixels: 7 x 3136 + 2000 <= 32768 - 8192."""
    for size in SIZES:
        model = settings(f"qwen3vl-{size}/evaluate")["model"]["init_args"]
        engine = model["engine"]["init_args"]
        pictures = engine["max_images"] * model["policy"]["max_pixels"] // 32**2
        assert pictures + 2000 <= engine["max_model_len"] - model["sampling"]["max_tokens"]


@pytest.mark.parametrize(("name", "decay", "warmup", "prompts"), [
    ("grpo", 0.01, 0.0, 32),
    ("dapo", 0.1, 10, 96),
    ("gspo", 0.1, 0.05, 32),
])  # fmt: skip
def test_published_hyperparameters_of_rlvr(name, decay, warmup, prompts):
    for size in SIZES:
        config = settings(f"qwen3vl-{size}/rlvr-{name}")
        model, devices = config["model"]["init_args"], config["trainer"]["devices"]
        assert config["data"]["init_args"]["batch_size"] * devices == prompts
        assert (model["num_rollouts"], model["sampling"]["max_tokens"], config["trainer"]["max_steps"]) == (
            16,
            8192,
            1500,
        )
        assert model["optimizer"]["init_args"]["lr"] == 1e-6
        assert (model["optimizer"]["init_args"]["weight_decay"], model["warmup"]) == (decay, warmup)
        if name == "dapo":
            assert (model["num_prompts"] * devices, model["max_refills"], model["overlong_buffer"]) == (32, 9, 4096)


@pytest.mark.parametrize("stage", OVERLAID)
def test_overlays_keep_the_batch_and_everything_but_where_it_runs(stage):
    """Fewer GPUs take the same prompts a step; adapters alone have another rate."""
    base = "rlvr-grpo" if stage == "rlvr" else stage
    for size in SIZES:
        whole = settings(f"qwen3vl-{size}/{base}")
        for gpus in ("1gpu", "2gpus"):
            over = settings(f"qwen3vl-{size}/{base}", f"qwen3vl-{size}/{stage}-{gpus}")
            assert _batch(over) == _batch(whole)
            changed = set(_differences(whole["model"]["init_args"], over["model"]["init_args"]))
            allowed = {"policy.lora", "ranks_per_group", "rollout.init_args.gpu_memory"}
            if "policy.lora" in changed:
                allowed |= {"optimizer.init_args.lr", "policy_optimizer.init_args.lr"}
            assert changed <= allowed


def test_the_sizes_differ_in_weights_and_memory_alone():
    for name in (*STAGES, *OVERLAYS, "pipeline"):
        texts = [(CONFIGS / f"qwen3vl-{size}" / f"{name}.yaml").read_text() for size in SIZES]
        small, large = (yaml.safe_load(text) for text in texts)
        for key in _differences(small, large):
            assert key.endswith(("path", "gpu_memory", "strategy.init_args.stage", "config")) or "policy.path" in key, (
                key
            )


def _batch(config: dict[str, Any]) -> int:
    groups = config["model"]["init_args"].get("ranks_per_group", 1)
    return config["data"]["init_args"]["batch_size"] * config["trainer"]["devices"] // groups


def _differences(one: Any, other: Any, key: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        names = dict.fromkeys([*one, *other])
        return [d for n in names for d in _differences(one.get(n), other.get(n), f"{key}.{n}".lstrip("."))]
    return [] if one == other else [key]


def table_rows() -> list[list[str]]:
    """The rows of the README's table of values."""
    lines = (CONFIGS / "qwen3vl-4b" / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] in STAGES]


def test_the_table_of_values_says_what_the_files_hold():
    rows = table_rows()
    assert len(rows) > 50
    assert {row[0] for row in rows} == set(STAGES)
    for file, key, value, source in rows:
        assert source.startswith(("published: ", "ours: ")), key
        for size in SIZES:
            found: Any = settings(f"qwen3vl-{size}/{file}")
            for part in key.split("."):
                # As on the command line, the first init_args need not be said.
                found = found[part] if part in found else found["init_args"][part]
            assert found == yaml.safe_load(value), f"{size}: {file}: {key}"
