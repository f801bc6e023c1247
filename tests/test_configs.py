"""Every shipped YAML, run for two steps on a few rows: what it resolves to, what it writes, and what it logs."""

import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prism_pl.__main__ import main
from prism_pl.rollout import vllm_compat
from prism_pl.shipped import shipped_configs
from tests.conftest import missing
from tests.stubs import scalars

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml"))
# No stages of their own: tests/test_pipeline_processes.py and tests/test_ablations.py.
PIPELINES = ("pipeline.yaml", "ablations.yaml", "ablations/")
# What needs data or weights from elsewhere is parsed (tests/test_published_configs.py), the rest is run here.
ELSEWHERE = ("qwen3vl-", "sampling/", "benchmarks")
# Put over another one: tests/test_strategy_configs.py
OVERLAYS = ("strategy/",)
CONFIGS = [name for name in SHIPPED if not name.startswith((*PIPELINES, *ELSEWHERE, *OVERLAYS))]
OTHERS = {"evaluate.yaml": "test", "filter.yaml": "predict", "pairs.yaml": "predict"}
FIT = [name for name in CONFIGS if name not in OTHERS]

FEW = shlex.split(
    "--trainer.max_steps 2 --trainer.val_check_interval 1 --trainer.limit_val_batches 1 "
    "--trainer.num_sanity_val_steps 0 --data.num_train 64 --data.num_validation 4 --data.batch_size 4"
)
BRIEF = "--model.sampling.max_tokens 56"  # longer than nearly all of the SFT policy's responses
SMALLER = {
    "warmup": f"{BRIEF} --model.ceiling null",  # four held-out pairs reach the ceiling by luck
    "align": f"{BRIEF} --model.num_rollouts 2",
    "rlvr": f"{BRIEF} --model.num_rollouts 4",
    "digits/rlvr_dapo": f"{BRIEF} --model.num_rollouts 4 --model.num_prompts 1",
    "digits/rlvr_gspo": f"{BRIEF} --model.num_rollouts 8 --trainer.max_steps 8",  # four steps a batch
    "evaluate": f"{BRIEF} --data.num_test 4 --data.num_hard 4",
    "filter": f"{BRIEF} --data.num_train 4 --model.num_samples 2",
    "pairs": f"{BRIEF} --data.num_train 4",
}


class Optimiser(NamedTuple):
    """What an optimiser must come out as; `warmup` below 1 is a share of the run, else steps."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    schedule: str
    warmup: float
    name: str = "torch.optim.AdamW"


# In the order in which the module configures them.
OPTIMISERS = {
    "digits/pretrain": [Optimiser(1e-3, 0.01, (0.9, 0.98), "cosine", 0.05)],
    "sft": [Optimiser(1.5e-3, 0.01, (0.9, 0.98), "cosine", 0.1)],
    "warmup": [Optimiser(3e-4, 0.01, (0.9, 0.999), "cosine", 0.1)],
    "align": [
        Optimiser(1e-4, 0.01, (0.9, 0.999), "constant", 0),
        Optimiser(1e-4, 0.01, (0.9, 0.999), "constant", 0),
    ],
    "rlvr": [Optimiser(2e-4, 0.01, (0.9, 0.999), "cosine", 2)],
    "digits/rlvr_dapo": [Optimiser(1e-4, 0.1, (0.9, 0.999), "constant", 10)],
    "digits/rlvr_gspo": [Optimiser(1e-4, 0.1, (0.9, 0.999), "constant", 0.05)],
}


def each(stage: str, *names: str) -> set[str]:
    return {f"{stage}/{name}" for name in names}


EXPERTS = ("perception", "reasoning")
PROXIES = [f"{what}/{side}" for what in ("descriptive_items", "reasoning_steps") for side in ("policy", "supervision")]
EVALUATED = ("accuracy", "teacher_nll_caption", "embedding_energy", "probe_auc", "probe_auc_length_matched")
SFT_TAGS = each("sft", "loss", "val_loss")
RLVR_TAGS = (
    each("rlvr", "reward", "accuracy", "format", "entropy", "clip_fraction", "zero_std_groups", "response_length")
    | each("rlvr", "truncated", "val_accuracy")
    | each("proxies", "descriptive_items/policy", "reasoning_steps/policy")
    | each("time", "rollout", "policy", "sync")
    | {"completions"}
)
TAGS = {
    "digits/pretrain": SFT_TAGS,
    "sft": SFT_TAGS,
    "warmup": {"warmup/loss"} | each("warmup/pair_accuracy", *EXPERTS) | each("warmup/val_pair_accuracy", *EXPERTS),
    "align": each("align/reward_gap", *EXPERTS)
    | each("align/discriminator_accuracy", *EXPERTS)
    | each("align/score_std", *EXPERTS)
    | each("align/val_reward_gap", *EXPERTS)
    | each("align", "discriminator_loss", "policy_loss", "malformed", "response_length", "truncated", "entropy")
    | {"align/val_accuracy", "completions"}
    | each("proxies", *PROXIES, "descriptive_items/distance", "reasoning_steps/distance")
    | each("time", "rollout", "score", "discriminator", "policy", "sync"),
    "rlvr": RLVR_TAGS,
    "digits/rlvr_dapo": RLVR_TAGS | each("rlvr", "overlong", "refills", "shortfall"),
    "digits/rlvr_gspo": RLVR_TAGS,
    "filter": set(),  # it writes pass_rates.jsonl
    "pairs": set(),  # it writes pairs.jsonl
    "evaluate": each("evaluate", *(f"{split}/all/{what}" for split in ("test", "hard") for what in EVALUATED)),
}


class Run(NamedTuple):
    name: str  # of the YAML, without .yaml
    folder: Path
    config: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        return self.config["model"]["init_args"]


RUNS: dict[str, Run] = {}
# Where vLLM is installed; starting it takes longer than the two steps.
WITH_VLLM = {"align", "evaluate"}


def run_of(config: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a shipped YAML, made once for all tests."""
    name = config.removesuffix(".yaml")
    if name not in RUNS:
        folder = tmp_path_factory.mktemp("runs") / name
        command = ["fit", "--config", config, *FEW] if config in FIT else [OTHERS[config], "--config", config]
        small = shlex.split(SMALLER.get(name, ""))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("elsewhere"))
            if name not in WITH_VLLM:
                patch.setattr(vllm_compat, "import_vllm", partial(missing, "left out in this test"))
            assert main([*command, *small, "--trainer.default_root_dir", str(folder)]) == 0
            assert not list(Path.cwd().iterdir()), "a run wrote outside its own folder"
        RUNS[name] = Run(name, folder, yaml.safe_load((folder / "config.yaml").read_text()))
    return RUNS[name]


@pytest.fixture(params=CONFIGS)
def any_run(request, tmp_path_factory) -> Run:
    return run_of(request.param, tmp_path_factory)


@pytest.fixture(params=FIT)
def fit_run(request, tmp_path_factory) -> Run:
    return run_of(request.param, tmp_path_factory)


def event_tags(folder: Path) -> set[str]:
    """Scalar and image tags of the event files."""
    tags: set[str] = set()
    for file in folder.glob("events.out.tfevents*"):
        found = EventAccumulator(str(file)).Reload().Tags()
        tags |= {*found["scalars"], *found["images"]}
    return tags


def checkpoint_of(run: Run) -> dict[str, Any]:
    return torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_every_yaml_is_shipped_and_stands_in_the_tables():
    assert shipped_configs() == SHIPPED
    assert {name.removesuffix(".yaml") for name in FIT} == OPTIMISERS.keys()
    assert {name.removesuffix(".yaml") for name in CONFIGS} == TAGS.keys()


@pytest.mark.parametrize("config", CONFIGS)
def test_yaml_opens_with_what_it_does_hardware_launch_line_and_an_override_that_is_accepted(config, capsys):
    opening = re.match(r"(?:# [^\n]+\n)+", (ROOT / "configs" / config).read_text())
    assert opening
    lines = [line.removeprefix("# ") for line in opening[0].splitlines()]
    keys = [line.split(":")[0] for line in lines]
    launch = lines[keys.index("Launch")].split()
    assert keys.index("Hardware") in range(1, keys.index("Launch"))
    assert launch[1:4] == ["python", "-m", "prism_pl"]
    assert launch[launch.index("--config") + 1] == config
    overrides = [line.split(": ", 1)[1] for line in lines[keys.index("Launch") + 1 :] if ": --" in line]
    assert overrides
    for override in overrides:
        assert main([*launch[4:], *shlex.split(override), "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"]


def test_run_writes_config_events_checkpoint_and_export(fit_run):
    assert {path.name.split(".")[0] for path in fit_run.folder.iterdir()} >= {
        "config",
        "events",
        "checkpoints",
        "export",
    }
    assert checkpoint_of(fit_run)["global_step"] == fit_run.config["trainer"]["max_steps"]


def test_export_loads_alone_with_tokenizer_and_processor(fit_run):
    from transformers import AutoTokenizer

    from prism_pl.discriminator import DedicatedMoEDiscriminator
    from prism_pl.policy import PolicySpec, build_policy

    export = str(fit_run.folder / "export")
    trained = checkpoint_of(fit_run)["state_dict"]
    if fit_run.name == "warmup":
        loaded, prefix = DedicatedMoEDiscriminator(export).state_dict(), "discriminator."
    else:
        loaded, prefix = build_policy(PolicySpec(export)).state_dict(), "policy."
    assert {name for name in trained if name.startswith(prefix)} == {prefix + name for name in loaded}
    # bf16 keeps 8 bits of the mantissa.
    for name, weight in loaded.items():
        torch.testing.assert_close(weight, trained[prefix + name], rtol=2**-8, atol=0)
    assert AutoTokenizer.from_pretrained(export).chat_template
    files = {path.name for path in Path(export).iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".ckpt"))]


def test_optimiser_settings_are_the_ones_of_the_table(fit_run):
    """From the checkpoint, which holds what the optimisers really ran with; the class and schedule from the config."""
    states = checkpoint_of(fit_run)["optimizer_states"]
    wanted = OPTIMISERS[fit_run.name]
    named = [value for key, value in fit_run.settings.items() if key.endswith("optimizer")]
    assert sorted(entry["class_path"] for entry in named) == sorted(one.name for one in wanted)
    assert len(states) == len(wanted)
    for state, one in zip(states, wanted, strict=True):
        (group,) = state["param_groups"]
        assert group["initial_lr"] == one.lr
        assert group["weight_decay"] == one.weight_decay
        assert tuple(group["betas"]) == one.betas
        assert fit_run.settings["schedule"] == one.schedule
        assert fit_run.settings["warmup"] == one.warmup


def test_every_tag_of_the_stage_is_in_its_event_files(any_run):
    assert TAGS[any_run.name] - event_tags(any_run.folder) == set()


def test_evaluation_writes_its_json_and_one_record_a_row(tmp_path_factory):
    run = run_of("evaluate.yaml", tmp_path_factory)
    found = json.loads((run.folder / "evaluation.json").read_text())
    assert len(found["records"]) == 8
    assert {record["split"] for record in found["records"]} == {"test", "hard"}


def test_clip_range_of_the_gspo_config_acts(tmp_path_factory):
    run = run_of("digits/rlvr_gspo.yaml", tmp_path_factory)
    assert max(scalars(run.folder)["rlvr/clip_fraction"]) > 0


def test_alignment_exports_its_discriminator_beside_the_policy(tmp_path_factory):
    from prism_pl.discriminator import DedicatedMoEDiscriminator

    run = run_of("align.yaml", tmp_path_factory)
    assert DedicatedMoEDiscriminator(str(run.folder / "export-discriminator")).experts == EXPERTS
