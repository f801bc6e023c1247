"""What an export says about itself: `prism.json` for programs, and a model card, `README.md`, for people and the hub.

Both are made from what the run wrote (its `config.yaml`), what its parents' `prism.json` says, and an evaluation where
one is named. They hold no times and no paths of the machine beyond those that the configuration names, so that the same
run exports the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prism_pl.chat import SYSTEM_PROMPT
from prism_pl.evaluation_tables import ALL_FAMILIES
from prism_pl.fingerprint import versions
from prism_pl.report.evaluations import Evaluation
from prism_pl.report.tables import cell, markdown_table

PROVENANCE = "prism.json"
CARD = "README.md"
STAGES = {
    "SFTModule": "supervised fine-tuning",
    "DiscriminatorModule": "the discriminator's warm start",
    "AdversarialAlignModule": "adversarial on-policy alignment",
    "RLVRModule": "reinforcement learning with verifiable rewards",
}
SCORES = ("accuracy", "lenient_accuracy", "strict", "loose", "aAcc", "fAcc", "qAcc")


def provenance(config_file: Path, stage: str, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Where an export comes from.

    Args:
        config_file: of the run; one that is not there (a run from Python) leaves parents, data and settings unknown.
        stage: the module's class name.
        step: optimiser steps taken.
        metrics: the last validation's.
    """
    config = yaml.safe_load(config_file.read_text()) if config_file.exists() else {}
    model, data = config.get("model", {}).get("init_args", {}), config.get("data")
    parents = {}
    for role in ("policy", "discriminator"):
        spec = model.get(role) or {}
        path = spec.get("init_args", spec).get("path")
        if path is not None:
            parents[role] = {"path": path, **read_provenance(Path(path))}
    return {
        "stage": stage,
        "step": step,
        "parents": parents,
        "data": data,
        "settings": {"model": model, "trainer": {k: v for k, v in config.get("trainer", {}).items() if v is not None}},
        "validation": dict(sorted(metrics.items())),
        "versions": {name: version for name, version in versions().items() if name != "git"},
    }


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a parent's folder says of its own stage, step and parents; empty where it says nothing."""
    file = folder / PROVENANCE
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    return {key: found[key] for key in ("stage", "step", "parents")}


def write_card(folder: Path, told: Mapping[str, Any], evaluation: Evaluation | None = None) -> None:
    """Write both files into an export's folder."""
    (folder / PROVENANCE).write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    (folder / CARD).write_text(card(folder, told, evaluation))


def card(folder: Path, told: Mapping[str, Any], evaluation: Evaluation | None = None) -> str:
    """The model card of an export.

    Args:
        folder: of the export: what lies in it decides how it is said to be loaded.
        told: see `provenance`.
        evaluation: of this checkpoint, for its scores; None says that there are none.
    """
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["prism_pl", told["stage"]]}
    base = _origin(told)
    if base is not None:
        front["base_model"] = base
    if not (folder / "discriminator.json").exists():
        front["pipeline_tag"] = "image-text-to-text"
    lines = ["---", *yaml.safe_dump(front, sort_keys=False).splitlines(), "---", ""]
    lines += [f"# Made by {STAGES.get(told['stage'], told['stage'])}", ""]
    lines += [f"Exported by prism_pl after {told['step']} steps of `{told['stage']}`.", ""]
    lines += ["## Where it comes from", "", *_lineage(told), ""]
    lines += [
        "## Data",
        "",
        *_block(told["data"], "The run's configuration was not kept, so its data is not known."),
        "",
    ]
    lines += ["## Use", "", *_use(folder, base), ""]
    lines += ["## Scores", "", *_scores(told, evaluation), ""]
    lines += ["## Settings", "", *_block(told["settings"]["model"] and told["settings"], "Not known."), ""]
    lines += ["## Versions", ""]
    lines += [f"* {name} {version}" for name, version in told["versions"].items() if version is not None]
    return "\n".join(lines) + "\n"


def _origin(told: Mapping[str, Any]) -> str | None:
    """The hub id that the chain of parents begins with; None where it begins with a folder."""
    parent = told["parents"].get("policy") or told["parents"].get("discriminator")
    while parent and parent.get("parents"):
        parent = parent["parents"].get("policy") or parent["parents"].get("discriminator")
    path = parent["path"] if parent else None
    return path if path and not Path(path).is_absolute() and path.count("/") == 1 and not Path(path).exists() else None


def _lineage(told: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for role, parent in told["parents"].items():
        made = f", {parent['step']} steps of `{parent['stage']}`" if "stage" in parent else ""
        lines.append(f"{indent}* {role}: `{parent['path']}`{made}")
        lines += _lineage(parent, indent + "  ") if "parents" in parent else []
    return lines or [f"{indent}* not known: the run's configuration was not kept"]


def _use(folder: Path, base: str | None) -> list[str]:
    if (folder / "discriminator.json").exists():
        return ["A discriminator of prism_pl: name the folder as `--model.discriminator.path`."]
    system = "Its responses have three blocks, which this system prompt asks for:"
    prompt = [system, "", "```text", *SYSTEM_PROMPT.splitlines(), "```"]
    if (folder / "adapter_config.json").exists():
        whose = f"`{base}`" if base else "the policy above"
        loads = ["```python", "PeftModel.from_pretrained(policy, FOLDER)", "```"]
        return [f"Adapters (peft) for {whose}:", "", *loads, "", *prompt]
    code = [
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        "policy = AutoModelForImageTextToText.from_pretrained(FOLDER)",
        "processor = AutoProcessor.from_pretrained(FOLDER)",
        "```",
        "",
        "`vllm serve FOLDER`, and lmms-eval's `--model vllm --model_args model=FOLDER`, load it as it is.",
    ]
    return [*code, "", *prompt]


def _scores(told: Mapping[str, Any], evaluation: Evaluation | None) -> list[str]:
    lines = []
    if told["validation"]:
        rows = [[f"`{name}`", f"{value:.4g}"] for name, value in told["validation"].items()]
        lines += ["Of the last validation:", "", *markdown_table(["metric", "value"], rows), ""]
    if evaluation is None:
        return [*lines, "Not evaluated yet."]
    tables = {split: families[ALL_FAMILIES] for split, families in evaluation.tables.items()}
    columns = [score for score in SCORES if any(score in table for table in tables.values())]
    rows = [
        [split, str(table["accuracy"]["prompts"]), *(cell(table, score, 100, with_interval=True) for score in columns)]
        for split, table in tables.items()
    ]
    sampling = ", ".join(f"{key} {value}" for key, value in evaluation.settings["sampling"].items())
    lines += [
        "In percent, with 95% bootstrap intervals:",
        "",
        *markdown_table(["split", "prompts", *columns], rows),
        "",
    ]
    judged = evaluation.settings.get("judge")
    judge = f" Verdicts checked by {judged['model']}." if judged else " Scored by rules, without a judge."
    return [*lines, f"{evaluation.settings['num_samples']} responses a prompt; {sampling}.{judge}"]


def _block(value: Any, unknown: str) -> list[str]:
    if not value:
        return [unknown]
    return ["```yaml", *yaml.safe_dump(value, sort_keys=False, allow_unicode=True).splitlines(), "```"]
