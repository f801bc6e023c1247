"""Bad input, end to end: one clear message, last on the screen, with the thing's name and the way out; nothing lost.

Misspelled keys, classes and commands on a dummy system are in test_cli.py; here are the shipped stages.
"""

import csv
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from datamodules.digits_rows import make_example
from prism_pl.__main__ import main

ASSETS = Path(__file__).parent.parent / "assets"
QUICK = "--trainer.max_steps 2 --trainer.limit_val_batches 0 --trainer.enable_progress_bar false"
DIGITS = "--data.num_train 64 --data.num_validation 4 --data.batch_size 2"
NO_CALLBACKS = "--trainer.callbacks null"
TABLE = "--data tests.table_data.TableData --data.file table.csv --trainer.val_check_interval null"
COMMANDS = {stage: f"fit --config {stage}.yaml {QUICK} {DIGITS} {NO_CALLBACKS}" for stage in ("sft", "warmup")}
COMMANDS |= {
    stage: f"fit --config {stage}.yaml {QUICK} {DIGITS} {NO_CALLBACKS} --model.num_rollouts 2"
    for stage in ("align", "rlvr")
}
COMMANDS["evaluate"] = "test --config evaluate.yaml --data.num_test 4 --data.num_hard 4"
STAGES = list(COMMANDS)


pytestmark = pytest.mark.usefixtures("without_vllm")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRISM_TRACEBACK", "")
    return tmp_path


def refused(capsys, stage: str, options: str, codes: tuple[int, ...] = (1, 2)) -> str:
    """Run a stage that must fail; returns its message, which is one and the last thing on the screen."""
    capsys.readouterr()
    assert main([*shlex.split(COMMANDS[stage]), *shlex.split(options)]) in codes
    screen = capsys.readouterr().err
    assert "Traceback" not in screen
    assert screen.count("error: ") == 1
    message = screen[screen.index("error: ") :].strip()
    assert len(message.splitlines()) == 1
    return message


class Planted:
    """A pickle that writes a file when it is read."""

    def __reduce__(self):
        return (open, ("opened", "w"))


def model_copy(folder: Path, kind: str = "sft") -> Path:
    shutil.copytree(ASSETS / kind, folder / kind)
    return folder / kind


def write_table(folder: Path, columns: tuple[str, ...]) -> None:
    """Four rows of digits as table.csv with the given columns, and their images."""
    rows = [make_example("align", i, seed=0) for i in range(4)]
    with (folder / "table.csv").open("w") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        for i, row in enumerate(rows):
            row.images[0].save(folder / f"{i}.png")  # type: ignore[union-attr]
            cells = {"image": f"{i}.png", "question": row.question, "response": row.response, "answer": row.answers[0]}
            writer.writerow(cells)


# The policy and the discriminator


@pytest.mark.parametrize("stage", STAGES)
def test_missing_policy_is_named_with_what_to_give_and_leaves_no_folder(stage, folder, capsys):
    message = refused(capsys, stage, "--model.policy.path runs/sft/export/gone", codes=(2,))
    assert not list(folder.glob("runs/*"))
    assert (
        "policy.path 'runs/sft/export/gone' is no folder: name a folder in Hugging Face format or a hub id" in message
    )


def test_missing_discriminator_is_named_with_what_to_give(folder, capsys):
    message = refused(capsys, "align", "--model.discriminator.init_args.path ./gone")
    assert "discriminator.path './gone' is no folder: name a folder" in message


def test_policy_that_is_no_vision_language_model_is_named_by_its_kind(folder, capsys):
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    message = refused(capsys, "rlvr", "--model.policy.path .")
    assert "policy.path '.' is a 'qwen3' model, not a vision-language model" in message


def test_discriminator_as_policy_is_named_with_where_it_belongs(folder, capsys):
    message = refused(capsys, "align", f"--model.policy.path {ASSETS / 'discriminator'}", codes=(2,))
    assert "assets/discriminator' is a discriminator: name the export/ folder of a policy's run" in message


def test_policy_as_discriminator_is_refused_since_its_heads_would_be_random(folder, capsys):
    message = refused(capsys, "align", f"--model.discriminator.init_args.path {ASSETS / 'sft'}")
    assert "is no warm-started discriminator" in message
    assert "run warmup.yaml" in message


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.safetensors", None, "holds no weights"),
        ("model.safetensors", "no weights at all", "sft/model.safetensors is no whole safetensors file"),
        ("config.json", '{"model_type', "sft/config.json is no JSON"),
        ("config.json", None, "holds no config.json: name the export/ folder of a run"),
        ("chat_template.jinja", None, "'sft' has no tokenizer with a chat template: copy tokenizer.json"),
    ],
)
def test_broken_policy_folder_names_the_file(file, content, said, folder, capsys):
    path = model_copy(folder) / file
    path.unlink() if content is None else path.write_text(content)
    assert said in refused(capsys, "sft", "--model.policy.path sft")


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    ("stage", "kind", "key"),
    [("sft", "sft", "model.policy.path"), ("align", "discriminator", "model.discriminator.init_args.path")],
)
def test_planted_pickle_as_weights_is_refused_and_not_run(stage, kind, key, name, folder, capsys):
    (model_copy(folder, kind) / "model.safetensors").unlink()
    torch.save({"weight": Planted()}, folder / kind / name, pickle_module=pickle)
    message = refused(capsys, stage, f"--{key} {kind}")
    assert "only pickled weights (pytorch_model.bin)" in message or "is no whole safetensors file" in message
    assert not (folder / "opened").exists()


def test_planted_resume_checkpoint_is_refused_and_not_run_and_stays(folder, capsys):
    write_table(folder, ("image", "question", "response"))
    command = f"{TABLE} --trainer.default_root_dir run"
    assert main([*shlex.split(COMMANDS["sft"].replace(DIGITS, "")), *shlex.split(command)]) == 0
    last = folder / "run" / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": Planted()}, last, pickle_module=pickle)
    planted = last.read_bytes()
    capsys.readouterr()
    assert main([*shlex.split(COMMANDS["sft"].replace(DIGITS, "")), *shlex.split(command)]) == 1
    assert "never a pickle" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (folder / "opened").exists()
    assert last.read_bytes() == planted


# Rows


@pytest.mark.parametrize(
    ("stage", "columns", "said"),
    [
        ("sft", ("image", "question", "answer"), "row 'table.csv:2' has no response: SFT needs a demonstration"),
        ("warmup", ("image", "question", "answer"), "row 'table.csv:2' has no response: this stage compares rollouts"),
        ("align", ("image", "question", "answer"), "row 'table.csv:2' has no response: this stage compares rollouts"),
        (
            "rlvr",
            ("image", "question", "response"),
            "row 'table.csv:2' has no answers: this stage rewards right answer",
        ),
    ],
)
def test_missing_column_names_the_row_and_what_the_stage_needs(stage, columns, said, folder, capsys, monkeypatch):
    write_table(folder, columns)
    monkeypatch.setitem(COMMANDS, stage, COMMANDS[stage].replace(DIGITS, TABLE))
    assert said in refused(capsys, stage, "")


@pytest.mark.parametrize(
    ("content", "said"), [(None, "0.png' does not exist"), ("no picture", "0.png' cannot be read (cannot identify")]
)
def test_missing_or_broken_image_names_the_row_and_the_file(content, said, folder, capsys, monkeypatch):
    write_table(folder, ("image", "question", "response"))
    path = folder / "0.png"
    path.unlink() if content is None else path.write_text(content)
    monkeypatch.setitem(COMMANDS, "sft", COMMANDS["sft"].replace(DIGITS, TABLE))
    message = refused(capsys, "sft", "")
    assert "row 'table.csv:2': the image " in message
    assert said in message


@pytest.mark.parametrize("stage", ["sft", "warmup", "align"])
def test_rows_without_demonstrations_are_named(stage, folder, capsys):
    assert "has no response" in refused(capsys, stage, "--data.rows rlvr")


def test_a_validation_that_no_epoch_reaches_names_the_option_and_the_ways_out(folder, capsys):
    said = refused(capsys, "sft", "--trainer.val_check_interval 33 --trainer.limit_val_batches 1", codes=(2,))
    assert "trainer.val_check_interval is 33, and an epoch has 32 batches. Give --trainer.val_check_interval 32" in said


def test_malformed_demonstration_is_named_with_what_is_wrong(folder, capsys, monkeypatch):
    write_table(folder, ("image", "question", "response"))
    text = (folder / "table.csv").read_text()
    (folder / "table.csv").write_text(text.replace("</think>", "", 1))
    monkeypatch.setitem(COMMANDS, "align", COMMANDS["align"].replace(DIGITS, TABLE))
    message = refused(capsys, "align", "")
    assert "row 'table.csv:2': the demonstration is malformed (</think> is missing)" in message


# Options


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        ("align", "alpha 2", "alpha is 2.0: the weight of the perception expert, give 0 to 1"),
        ("align", "advantage papper", "papper is not one of paper, released. Did you mean paper?"),
        ("align", "sampling.top_p 0.5", "sampling.top_p is 0.5"),
        ("rlvr", "sampling.top_k 5", "set top_k: 0"),
        ("rlvr", "sampling.temperature 0", "temperature: 1.0"),
        ("align", "kl.coefficient 0.1 --model.kl.kind k1", "Put k1 in the reward, or use 'k2' in the loss"),
        ("align", "score_l2 -1", "score_l2: -1.0 must not be negative"),
        ("align", "score_clip 0", "score_clip: 0.0 must be a positive number"),
        ("align", "label_smoothing 0.7", "label_smoothing: 0.7 must lie in [0, 0.5)"),
        ("align", "discriminator_every 0", "discriminator_every is 0: give at least 1"),
        ("align", "aplha 0.5", "AdversarialAlignModule takes no aplha. Did you mean alpha?"),
        ("align", "rollout prism_pl.rollout.TransformerEngine", "Did you mean prism_pl.rollout.TransformersEngine?"),
        ("rlvr", "num_rollouts 1", "num_rollouts is 1"),
        ("rlvr", "max_grad_norm 0", "max_grad_norm is 0.0: give a positive norm, or null"),
        ("rlvr", "num_minibatches 9", "num_minibatches is 9, but only 2 prompts"),
        ("rlvr", "num_prompts 3", "set dynamic_sampling: true"),
        ("rlvr", "overlong_buffer 500", "overlong_buffer is 500"),
        ("rlvr", "scale groupp", "Did you mean group?"),
        ("rlvr", "kl.place lss", "error: model.init_args.kl.place: lss is not one of reward, loss."),
        ("sft", "policy.lora.rank x", "error: model.init_args.policy.lora.rank: 'x' is no int."),
        (
            "sft",
            "policy.lora '{rnk: 3}'",
            "error: model.init_args.policy.lora.rnk: LoraSpec takes no rnk. Did",
        ),
        ("align", "discriminator.init_args.dropout x", "model.init_args.discriminator.init_args.dropout: 'x' is no f"),
        ("rlvr", "policy_loss.aggregation token_men", "Did you mean token_mean?"),
        ("rlvr", "policy_loss.clip_low x", "error: model.init_args.policy_loss.init_args.clip_low: 'x' is no float."),
        ("rlvr", "policy_loss prism_pl.policy_loss.DrGRPO", "constant_length: None"),
        ("rlvr", "policy_loss.clip_low 2", "clip_low: 2.0 must lie in [0, 1]"),
        ("warmup", "ceiling 0.4", "ceiling is 0.4"),
        ("sft", "freeze ['modle.visual.*']", "freeze pattern 'modle.visual.*' matches no parameter; names look like"),
        ("sft", "schedule cosin", "Did you mean cosine?"),
        ("sft", "warmup -1", "warmup is -1.0"),
        ("sft", "max_length 20", "raise model.init_args.max_length"),
        ("sft", "micro_batch_tokens 0", "micro_batch_tokens is 0: give at least 1"),
        ("sft", "chunk_tokens 0", "chunk_tokens is 0: give at least 1"),
        (
            "sft",
            "optimizer.lr -1",
            "model.optimizer: Invalid learning rate: -1.0. Set it there, as in --model.optimizer.lr",
        ),
        ("align", "policy_optimizer.lr -1", "error: model.policy_optimizer: Invalid learning rate"),
        ("sft", "freeze [model.*]", "model.optimizer: every weight is frozen, so nothing is trained"),
        ("sft", "optimizer.lr abc", "model.init_args.optimizer.init_args.lr: 'abc' is no float."),
        ("sft", "optimizer torch.optim.AdamWW", "Did you mean torch.optim.AdamW?"),
        ("evaluate", "num_samples 3", "give 1 sample or a temperature"),
        ("evaluate", "pass_k [5]", "pass_k is [5]: each k must lie in 1 ... num_samples=1"),
    ],
)
def test_option_value_that_is_not_allowed_names_the_option_and_the_way_out(stage, options, said, folder, capsys):
    assert said in refused(capsys, stage, f"--model.{options}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model SFTModul", "Did you mean SFTModule?"),
        ("--data datamodules.DigitDataModule", "Did you mean datamodules.DigitsDataModule?"),
        ("--data.rows sftt", "Did you mean sft?"),
        ("--data.families ['summ']", "give at least one of sum, difference"),
        ("--trainer.callbacks callbacks.Exprt", "Did you mean callbacks.Export?"),
        ("--trainer.callbacks callbacks.RewardGap", "take the callback out of trainer.callbacks"),
        ("--trainer.precision bf16-true", "Set bf16-mixed"),
        ("--trainer.accumulate_grad_batches 2", "set model.init_args.micro_batch_tokens"),
    ],
)
def test_wrong_class_data_or_trainer_option_names_the_way_out(options, said, folder, capsys):
    assert said in refused(capsys, "sft", options)


# Numbers that are not finite


@pytest.mark.parametrize(
    ("stage", "key", "said"),
    [
        ("sft", "optimizer", "sft/loss is not finite"),
        ("warmup", "optimizer", "warmup/loss is not finite"),
        ("align", "policy_optimizer", "the policy's next-token distribution is not finite"),
        ("align", "discriminator_optimizer", "an advantage is not finite"),
        ("rlvr", "optimizer", "the policy's next-token distribution is not finite"),
    ],
)
def test_learning_rate_that_explodes_stops_before_the_next_step(stage, key, said, folder, capsys):
    message = refused(capsys, stage, f"--model.{key}.lr 1e30")
    assert said in message
    assert f"on the batch of rows digits-{stage}-0-" in message
    assert "lower the learning rate" in message


@pytest.mark.parametrize("stage", STAGES)
def test_weight_that_is_nan_stops_before_the_first_step(stage, folder, capsys):
    path = model_copy(folder) / "model.safetensors"
    weights = load_file(path)
    weights["model.language_model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    assert "is not finite (nan) on the batch of rows digits-" in refused(capsys, stage, "--model.policy.path sft")
    assert not list(folder.rglob("last.ckpt"))


# What is already written


def contents(run: Path) -> dict[str, bytes]:
    files = [*(run / "export").iterdir(), run / "checkpoints" / "last.ckpt", *run.glob("events*")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_failed_rerun_leaves_checkpoint_export_and_events(folder, capsys, monkeypatch):
    write_table(folder, ("image", "question", "response"))
    command = COMMANDS["sft"].replace(DIGITS, TABLE).replace(NO_CALLBACKS, "--trainer.callbacks callbacks.Export")
    monkeypatch.setitem(COMMANDS, "sft", f"{command} --trainer.default_root_dir run")
    assert main(shlex.split(COMMANDS["sft"])) == 0
    before = contents(folder / "run")

    (folder / "3.png").unlink()
    assert "3.png' does not exist" in refused(capsys, "sft", "--trainer.max_steps 4")
    assert "--fresh" in refused(capsys, "sft", "--model.optimizer.lr 1e30")
    assert "policy.path" in refused(capsys, "sft", "--model.policy.path ./gone")
    after = contents(folder / "run")
    assert {name: after[name] for name in before} == before
