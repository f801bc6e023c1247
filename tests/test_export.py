"""An export as others meet it: files, model card, adapters by themselves, and the way to the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prism_pl.__main__ import main
from prism_pl.lora import LoraSpec, save_adapters, whole_parameters
from prism_pl.model_card import card, provenance, write_card
from prism_pl.policy import PolicySpec, build_policy, save_processor
from prism_pl.push import exported_files, new_card, run
from tests.run_data import response, write_evaluation
from tests.test_lora import train_adapters

ROOT = Path(__file__).parent.parent
FEW = (
    "--trainer.max_steps 1 --trainer.limit_val_batches 0 --data.num_train 8 --data.num_validation 4 --data.batch_size 4"
)


@pytest.fixture(scope="module")
def run_folder(random_policy, tmp_path_factory) -> Path:
    """SFT with adapters for a step, through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    command = ["fit", "--config", "sft.yaml", *FEW.split(), "--trainer.default_root_dir", str(folder)]
    command += ["--model.policy.path", random_policy, "--model.policy.lora.rank", "2", "--model.freeze", "[]"]
    overlay = folder.parent / "adapters.yaml"
    overlay.write_text("trainer: {callbacks+: [{class_path: callbacks.ExportAdapters}]}\n")
    assert main([*command, "--config", str(overlay)]) == 0
    return folder


def test_an_export_has_what_transformers_and_vllm_read(run_folder):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    export = run_folder / "export"
    assert {file.name for file in export.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "README.md",
        "prism.json",
    }
    assert AutoConfig.from_pretrained(export).model_type == "qwen3_vl"
    assert type(AutoModelForImageTextToText.from_pretrained(export)).__name__ == "Qwen3VLForConditionalGeneration"
    assert AutoProcessor.from_pretrained(export).chat_template


def test_the_card_names_stage_parent_data_settings_and_versions(run_folder, random_policy):
    text = (run_folder / "export" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "tags": ["prism_pl", "SFTModule"],
        "pipeline_tag": "image-text-to-text",
    }
    for part in (
        "Made by supervised fine-tuning",
        "1 steps of `SFTModule`",
        f"* policy: `{random_policy}`",
        "class_path: datamodules",
        "num_train: 8",
        "rank: 2",
        "Not evaluated yet.",
        f"* torch {torch.__version__}",
        "vllm serve FOLDER",
        "<caption>",
    ):
        assert part in text, part


def test_a_chain_of_parents_is_told_to_its_hub_id(run_folder, tmp_path):
    told = json.loads((run_folder / "export" / "prism.json").read_text())
    told["parents"]["policy"] = {"path": "Qwen/Qwen3-VL-4B-Instruct"}
    parent = tmp_path / "sft"
    parent.mkdir()
    write_card(parent, told)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"init_args": {"policy": {"path": str(parent)}}}, "trainer": {}}))
    child = provenance(config, "AdversarialAlignModule", 500, {"align/val_accuracy": 0.5})
    text = card(parent, child)
    assert "base_model: Qwen/Qwen3-VL-4B-Instruct" in text
    assert f"* policy: `{parent}`, 1 steps of `SFTModule`\n  * policy: `Qwen/Qwen3-VL-4B-Instruct`" in text
    assert "| `align/val_accuracy` | 0.5 |" in text
    # Without a configuration, as from Python, the card says so.
    unknown = card(parent, provenance(tmp_path / "none.yaml", "SFTModule", 1, {}))
    assert "not known: the run's configuration was not kept" in unknown


def test_adapters_by_themselves_give_the_merged_policy(random_policy, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(1)
    policy = build_policy(PolicySpec(random_policy, lora=LoraSpec(rank=2, alpha=4)))
    train_adapters(policy)
    save_adapters(policy, random_policy, tmp_path / "adapters")
    base = AutoModelForImageTextToText.from_pretrained(random_policy, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapters")).merge_and_unload()
    expected = dict(whole_parameters(policy))
    found = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], msg=name)


def test_a_run_writes_adapters_where_it_is_told_to(run_folder, tmp_path, capsys):
    adapters = run_folder / "export-adapters"
    assert {file.name for file in adapters.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert "PeftModel.from_pretrained" in (adapters / "README.md").read_text()
    overlay = tmp_path / "adapters.yaml"
    overlay.write_text("trainer: {callbacks+: [{class_path: callbacks.ExportAdapters}]}\n")
    command = ["fit", "--config", "sft.yaml", "--config", str(overlay), *FEW.split()]
    assert main([*command, "--trainer.default_root_dir", str(tmp_path / "run")]) == 1
    assert "ExportAdapters: the policy has no adapters: set model.init_args.policy.lora" in capsys.readouterr().err


def test_processor_files_of_a_hub_id_are_copied_whole(random_policy, tmp_path, monkeypatch):
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, patterns=allow_patterns)
        return random_policy

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    processor = PolicySpec(random_policy).processor()
    processor.source = "Qwen/Qwen3-VL-4B-Instruct"
    save_processor(processor, tmp_path)
    assert asked["repo"] == "Qwen/Qwen3-VL-4B-Instruct"
    assert "*.json" in asked["patterns"]
    assert {file.name for file in tmp_path.iterdir()} >= {"video_preprocessor_config.json", "tokenizer.json"}
    assert not (tmp_path / "config.json").exists()


class Hub:
    """Takes what HfApi is told."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self) -> None:
        Hub.calls = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        Hub.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def create_branch(self, repo_id: str, **options: Any) -> None:
        Hub.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> None:
        Hub.calls.append(("upload_folder", options))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return Hub


@pytest.fixture
def export(run_folder, tmp_path) -> Path:
    return shutil.copytree(run_folder / "export", tmp_path / "export")


def test_push_uploads_the_folder(hub, export, capsys):
    assert main(["push", str(export), "me/aligned", "--private", "--revision", "step-500", "--message", "aligned"]) == 0
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "me/aligned", "private": True, "exist_ok": True}
    told = hub.calls[2][1]
    assert (told["repo_id"], told["folder_path"], told["revision"]) == ("me/aligned", str(export), "step-500")
    assert told["commit_message"] == "aligned"
    assert "Uploaded to https://huggingface.co/me/aligned" in capsys.readouterr().out


def test_a_dry_run_says_what_and_uploads_nothing(hub, export, capsys):
    run(["push", str(export), "me/aligned", "--dry-run"])
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert "README.md" in shown
    assert "Dry run: nothing was uploaded." in shown
    assert hub.calls == []


def test_without_a_token_one_message_says_how_to_get_one(hub, export, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(export), "me/aligned"]) == 2
    assert "there is no Hugging Face token: run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    assert hub.calls == []


def test_scores_go_into_the_card(hub, export, tmp_path, capsys):
    told = {"sampling": {"temperature": 0.0, "top_p": 1.0}}
    folder = write_evaluation(tmp_path / "evaluation", "sft", [response(True), response(False)], str(export))
    content = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({**content, **told}))
    text = new_card(export, folder)
    assert "| test | 2 | 50.0 [0.0, 100.0] |" in text
    assert "Scored by rules, without a judge." in text
    assert main(["push", str(export), "me/aligned", "--evaluation", str(folder)]) == 0
    assert (export / "README.md").read_text() == text
    other = write_evaluation(tmp_path / "other", "sft", [response(True)], "runs/other/export")
    assert main(["push", str(export), "me/aligned", "--evaluation", str(other)]) == 1
    assert "is of runs/other/export, not of" in capsys.readouterr().err


def test_what_is_no_export_is_refused(export, run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder: name an export"):
        exported_files(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"holds no config\.json: name the export/ folder of a run, not the run itself"
    ):
        exported_files(run_folder / "checkpoints")
    torch.save({}, export / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt is a pickle.*take it out"):
        exported_files(export)
    (export / "optimizer.pt").unlink()
    (export / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no safetensors"):
        exported_files(export)
    with pytest.raises(ValueError, match="REPO is 'aligned': give name/repository"):
        run(["push", str(run_folder / "export"), "aligned", "--dry-run"])
