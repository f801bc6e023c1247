"""The command line: front door, configuration files, errors, and a run's folder, on a system of one weight."""

import glob
import os
import pickle
import subprocess
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from prism_pl.__main__ import main
from prism_pl.folders import checkpoint_name
from prism_pl.pipeline.resolve import Resolver
from prism_pl.requested import requested
from prism_pl.run_folder import default_folder, fresh_folder, write_config
from prism_pl.shipped import find_config, resolve_paths, shipped_root, stage_of

ROOT = Path(__file__).parent.parent
DUMMY = """
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, log_every_n_steps: 1}
model:
  class_path: tests.dummy_system.DummyModule
  init_args:
    policy: {path: ./weights}  # beside this file
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1e-1}}
data: {class_path: tests.dummy_system.DummyData}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with dummy.yaml in it."""
    (tmp_path / "dummy.yaml").write_text(DUMMY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRISM_TRACEBACK", "")
    monkeypatch.setenv("PRISM_RUN_FOLDER", "")
    return tmp_path


def last_step(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def python_m_prism_pl(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "prism_pl", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


# The front door


def test_lightnings_commands_are_offered_and_predict_needs_a_predict_step(folder, capsys):
    assert main(["predict", "--config", "dummy.yaml"]) == 2
    assert "DummyModule has no predict_step" in capsys.readouterr().err
    from prism_pl.__main__ import COMMANDS
    from prism_pl.cli import PrismCLI

    assert PrismCLI.subcommands().keys() == {name for name in COMMANDS if COMMANDS[name][1] == "prism_pl.cli:run"}


def test_help_answers_in_five_seconds_without_importing_torch(tmp_path):
    start = time.monotonic()
    result = python_m_prism_pl("--help", cwd=tmp_path)
    assert time.monotonic() - start < 5
    assert result.returncode == 0
    assert "fit" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120
    assert "  sampling/greedy.yaml, sampling/paper.yaml\n" in result.stdout
    light = "import sys, prism_pl.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_module_of_the_users_in_the_current_folder_is_found_by_class_path(folder, monkeypatch):
    (folder / "my_align.py").write_text("from tests.dummy_system import DummyModule\nclass MyAlign(DummyModule): ...\n")
    monkeypatch.syspath_prepend("")  # as `python -m` does; a process of its own would import Lightning anew
    assert main(["fit", "--config", "dummy.yaml", "--model.class_path", "my_align.MyAlign"]) == 0
    assert yaml.safe_load((folder / "runs/dummy/config.yaml").read_text())["model"]["class_path"] == "my_align.MyAlign"


def test_file_that_hides_our_package_is_named(folder):
    (folder / "modules.py").write_text("")
    result = python_m_prism_pl("fit", "--config", "dummy.yaml", cwd=folder)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: `import modules` finds {folder / 'modules.py'} instead of {ROOT / 'modules'}")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fitt"], "Did you mean fit?"),
        ([], "A command is missing"),
        (["--config", "dummy.yaml", "fit"], "The command comes first"),
        (["test", "--fresh"], "--fresh belongs to fit"),
        (["fit"], "Nothing sets data, model. Name a configuration (--config align.yaml)"),
        (["fit", "--config", "algn.yaml"], "Did you mean align.yaml? All shipped ones: python -m prism_pl --help"),
    ],
)
def test_wrong_command_is_one_message(args, said, capsys):
    assert main(args) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "flags"), [("fit", "--fresh, --weights-only-resume, --debug"), ("test", "--debug")]
)
def test_a_commands_help_names_what_is_no_key(command, flags, capsys):
    assert main([command, "--help"]) == 0
    assert f"Also: {flags} (python -m prism_pl --help says what for)." in " ".join(capsys.readouterr().out.split())


# Errors in a configuration


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.max_step", "3"], "no key trainer.max_step. Did you mean trainer.max_steps?"),
        (["--trainer.max_stepz", "3"], "no key trainer.max_stepz. Did you mean trainer.max_steps?"),
        (["--trainr.max_steps", "3"], "Did you mean trainer.max_steps?"),
        (["--model.init_args.alpa", "1"], "model.init_args.alpa: DummyModule takes no alpa. Did you mean alpha?"),
        (["--model.init_args.zz", "1"], "DummyModule takes no zz. It takes: "),
        (["dummy.yaml"], "'dummy.yaml' belongs to no option: give --config FILE or --KEY VALUE"),
        (["--model.init_args.policy.pth", "x"], "takes no policy.pth. Did you mean policy.path?"),
        (["--model.init_args.alpha", "x"], "model.init_args.alpha: 'x' is no float."),
        (["--model.init_args.advantage", "papr"], "not one of paper, released. Did you mean paper?"),
        (["--model.init_args.optimizer.lrr", "1"], "Did you mean lr?"),
        (["--model.class_path", "tests.dummy_system.DummyModul"], "Did you mean tests.dummy_system.DummyModule?"),
        (["--model", "tests.dumy_system.DummyModule"], "Did you mean tests.dummy_system?"),
        (["--model", "DumyModule"], "model: there is no class DumyModule."),
        (["--data.class_path", "tests.dummy_system.DummyDat"], "Did you mean tests.dummy_system.DummyData?"),
        (["--trainer.max_steps", "x"], "trainer.max_steps: 'x' is no int."),
        (["--config", "dumy.yaml"], "Did you mean dummy.yaml?"),
        (["--ckpt_path", "dummy.yml"], "--ckpt_path dummy.yml: there is no such checkpoint. Did you mean dummy.yaml?"),
    ],
)
def test_wrong_option_names_the_key_and_the_nearest(options, said, folder, capsys):
    assert main(["fit", "--config", "dummy.yaml", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("max_steps", "max_stepz", "Did you mean trainer.max_steps?"),
        ("trainer:", "trainr:", "Did you mean trainer"),
        ("{path:", "{pth:", "model.init_args.policy.pth: DummyModule takes no policy.pth. Did you mean policy.path?"),
        ("optim.SGD", "optim.SGDD", "torch.optim has no SGDD. Did you mean torch.optim.SGD?"),
        ("lr:", "lrr:", "model.init_args.optimizer.init_args.lrr: SGD takes no lrr. Did you mean lr?"),
        ("{path: ./weights}", "{}", "tests.dummy_system.DummyModule needs policy.path, which nothing sets"),
        ("max_steps: 2,", "max_steps: 2", "wrong.yaml: This is no YAML: line"),
        ("trainer:", "trainer", "wrong.yaml: This is no YAML: line"),
    ],
)
def test_wrong_yaml_names_the_file_the_key_and_the_nearest(right, wrong, said, folder, capsys):
    assert right in DUMMY
    (folder / "wrong.yaml").write_text(DUMMY.replace(right, wrong))
    assert main(["fit", "--config", "wrong.yaml"]) == 2
    error = capsys.readouterr().err
    error = error[error.rindex("error: ") :]
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert "wrong.yaml" in error or "needs policy.path" in error
    assert len(error) < 700


def test_short_class_names_are_suggested_from_our_packages(folder, capsys, monkeypatch):
    import modules
    from tests.dummy_system import DummyModule

    ours = type("PlantedModule", (DummyModule,), {"__module__": "modules"})
    monkeypatch.setattr(modules, "PlantedModule", ours, raising=False)
    assert main(["fit", "--config", "dummy.yaml", "--model", "PlantdModule"]) == 2
    assert "Did you mean PlantedModule?" in capsys.readouterr().err
    assert main(["fit", "--config", "dummy.yaml", "--model.class_path", "modules.aling.PlantedModule"]) == 2
    assert "Did you mean modules.PlantedModule?" in capsys.readouterr().err


def test_error_of_a_module_is_the_modules_own_message(folder, capsys):
    assert main(["fit", "--config", "dummy.yaml", "--model.init_args.policy.path", "gone"]) == 1
    assert capsys.readouterr().err.strip().startswith("error: policy.path is 'gone', which is no model.")


def test_value_error_of_a_module_is_one_message_without_traceback(folder, capsys):
    assert main(["fit", "--config", "dummy.yaml", "--model.init_args.alpha", "-1"]) == 1
    captured = capsys.readouterr().err
    assert captured.strip().splitlines()[-1].startswith("error: alpha is -1.0; it must not be negative.")
    assert "Traceback" not in captured
    assert main(["fit", "--config", "dummy.yaml", "--model.init_args.alpha", "-1", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


# Configuration files


def test_print_config_is_complete_and_runs_again(folder, capsys):
    assert main(["fit", "--config", "dummy.yaml", "--print_config"]) == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["seed_everything"] == 42
    assert config["model"]["init_args"]["alpha"] == 0.5
    assert config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.0
    assert config["weights_only"] is True
    assert "gradient_clip_val" in config["trainer"]


def test_config_is_found_here_first_and_among_the_shipped_ones_second(folder, monkeypatch):
    shipped = folder / "house"
    (shipped / "configs" / "big").mkdir(parents=True)
    for name in ("align.yaml", "big/align.yaml"):
        (shipped / "configs" / name).write_text("{}")
    monkeypatch.setattr("prism_pl.shipped.shipped_root", lambda: shipped)
    assert find_config("align.yaml") == shipped / "configs/align.yaml"
    assert find_config("configs/align.yaml") == shipped / "configs/align.yaml"
    assert stage_of(find_config("big/align.yaml")) == "big/align"
    (folder / "align.yaml").write_text("{}")
    assert find_config("align.yaml") == folder / "align.yaml"
    assert stage_of(find_config("align.yaml")) == "align"


def test_paths_in_a_yaml_are_taken_beside_it_then_here_then_from_the_shipped_data(folder, monkeypatch):
    (folder / "configs").mkdir()
    for name in ("beside/weights", "here/weights", "configs/weights"):
        (folder / name).mkdir(parents=True)
    monkeypatch.chdir(folder / "here")
    text = (
        "a: {path: weights}  # why\nb: {path: ../none}\nc: {path: org/model}\n"
        "lr: 1e-3\nname: weights\nclass_path: weights"
    )

    def resolved(beside: str) -> list[str]:
        lines = resolve_paths(text, folder / beside).splitlines()
        assert lines[0].endswith("# why")
        assert lines[2:] == ["c: {path: org/model}", "lr: 1e-3", "name: weights", "class_path: weights"]
        return [yaml.safe_load(line.split(": ", 1)[1])["path"] for line in lines[:2]]

    assert resolved("beside") == [str(folder / "beside/weights"), str(folder / "none")]
    assert resolved("configs/..")[0] == str(folder / "here/weights")
    monkeypatch.setattr("prism_pl.shipped.shipped_root", lambda: folder / "configs")
    monkeypatch.chdir(folder)
    assert resolved("here/..")[0] == str(folder / "configs/weights")


def test_rows_named_by_a_bare_string_or_a_pattern_are_taken_beside_the_yaml(folder, monkeypatch):
    beside = folder / "be[s]ide"
    beside.mkdir()
    for name in ("rows.jsonl", "more-1.jsonl"):
        (beside / name).write_text("{}")
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    text = """
data: {class_path: x.Y, init_args: {
  train: rows.jsonl, validation: [rows.jsonl, 'more-*.jsonl', owner/name], test: {path: none-*.jsonl}, columns: {}}}
train: rows.jsonl
"""
    found = yaml.safe_load(resolve_paths(text, beside))
    assert found.pop("train") == "rows.jsonl"
    rows, more = str(beside / "rows.jsonl"), str(folder / "be[[]s]ide/more-*.jsonl")
    assert found["data"]["init_args"] == {
        "train": rows,
        "validation": [rows, more, "owner/name"],
        "test": {"path": "none-*.jsonl"},
        "columns": {},
    }
    assert glob.glob(more) == [str(beside / "more-1.jsonl")]


def test_callbacks_plus_appends(folder):
    (folder / "more.yaml").write_text(
        "trainer:\n  callbacks+:\n"
        "  - {class_path: prism_pl.last_checkpoint.LastCheckpoint, init_args: {every_n_steps: 1}}\n"
    )
    summary = ["--trainer.callbacks+", "RichModelSummary"]
    assert main(["fit", "--config", "dummy.yaml", *summary, "--config", "more.yaml"]) == 0
    config = yaml.safe_load((folder / "runs/dummy+more/config.yaml").read_text())
    assert [entry["class_path"].rpartition(".")[2] for entry in config["trainer"]["callbacks"]] == [
        "RichModelSummary",
        "LastCheckpoint",
    ]


def test_another_optimiser_inherits_nothing(folder):
    adamw = ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.lr", "0.5"]
    sgd = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", "0.5"]
    assert main(["fit", "--config", "dummy.yaml", *adamw, *sgd]) == 0
    config = yaml.safe_load((folder / "runs/dummy/config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.0


# A run's folder


def test_a_run_lies_in_its_folder_and_the_same_command_goes_on(folder, caplog):
    command = ["fit", "--config", "dummy.yaml"]
    assert main(command) == 0
    run = folder / "runs" / "dummy"
    assert {path.name.split(".")[0] for path in run.iterdir()} >= {"config", "events", "checkpoints"}
    assert [path.name for path in folder.iterdir() if path.name != "dummy.yaml"] == ["runs"]
    assert last_step(run) == 2
    first = (run / "config.yaml").read_text()
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["layer.weight"]

    assert main(command) == 0
    assert "runs/dummy was finished already, at step 2" in caplog.text
    assert not (run / "config-1.yaml").exists()

    assert main([*command, "--trainer.max_steps", "3"]) == 0
    assert "Going on from runs/dummy/checkpoints/last.ckpt" in caplog.text
    assert "trainer.max_steps: 2 -> 3" in caplog.text
    assert last_step(run) == 3
    # d(w x + b)/dw = x = 1, so one SGD step at lr 0.1 lowers the weight by 0.1: one step was added to two, not three.
    added = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["layer.weight"] - weights
    torch.testing.assert_close(added, torch.tensor([[-0.1]]))
    assert (run / "config-1.yaml").read_text() == first


def test_other_settings_in_the_same_folder_are_refused_and_fresh_starts_beside(folder, capsys):
    command = ["fit", "--config", "dummy.yaml", "--model.init_args.alpha", "0.25"]
    assert main(["fit", "--config", "dummy.yaml"]) == 0
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.init_args.alpha: 0.5 -> 0.25" in error
    assert "--fresh" in error
    assert main([*command, "--fresh"]) == 0
    assert last_step(folder / "runs/dummy-2") == 2
    assert yaml.safe_load((folder / "runs/dummy-2/config.yaml").read_text())["model"]["init_args"]["alpha"] == 0.25
    assert yaml.safe_load((folder / "runs/dummy/config.yaml").read_text())["model"]["init_args"]["alpha"] == 0.5


def test_the_same_path_spelled_another_way_is_no_other_setting(folder, caplog, capsys):
    for name in ("policy", "other"):
        (folder / name).mkdir()
    command = ["fit", "--config", "dummy.yaml", "--model.policy.path"]
    assert main([*command, "policy"]) == 0
    assert main([*command, str(folder / "policy")]) == 0
    assert "was finished already" in caplog.text
    assert main([*command, str(folder / "other")]) == 2
    assert f"model.init_args.policy.path: policy -> {folder / 'other'}." in capsys.readouterr().err


def test_options_of_another_version_of_the_code_are_no_other_settings(folder, caplog, capsys):
    command = ["fit", "--config", "dummy.yaml", "--model.signals", "{7: 2}"]
    assert main(command) == 0
    file = folder / "runs/dummy/config.yaml"
    earlier = yaml.safe_load(file.read_text())
    model = earlier["model"]["init_args"]
    del model["alpha"], earlier["trainer"]["min_epochs"]
    model["old"] = 3
    file.write_text(yaml.safe_dump(earlier))
    assert main(command) == 0
    assert "was finished already" in caplog.text
    assert main([*command, "--model.alpha", "0.25"]) == 2
    assert "other settings: model.init_args.alpha: (absent) -> 0.25. Start" in capsys.readouterr().err
    model["signals"] = {}
    file.write_text(yaml.safe_dump(earlier))
    assert main(command) == 2
    assert "other settings: model.init_args.signals.7: (absent) -> 2. Start" in capsys.readouterr().err


def test_of_a_shipped_configuration_only_what_was_asked_for_is_a_change():
    resolve = Resolver()
    new = resolve(["fit", "--config", "align.yaml", "--trainer.profiler", "lightning.pytorch.profilers.SimpleProfiler"])
    export = next(n for n, one in enumerate(new["trainer"]["callbacks"]) if one["class_path"] == "callbacks.Export")
    health = next(n for n, one in enumerate(new["trainer"]["callbacks"]) if one["class_path"].endswith("Health"))
    new["trainer"]["callbacks"][health]["init_args"]["window"] = 5
    old = deepcopy(new)
    del old["trainer"]["callbacks"][export]["init_args"], old["trainer"]["callbacks"][health]["init_args"]["window"]
    del old["model"]["init_args"]["credit"], old["model"]["init_args"]["sampling"]["top_k"], old["trainer"]["profiler"]
    old["trainer"]["reload"] = old["model"]["init_args"]["policy"]["dtype"] = "auto"
    old["model"]["init_args"]["policy_optimizer"]["class_path"] = "torch.optim.SGD"
    asked, others = requested(old, new, partial(resolve.complete, "fit"))
    assert {one.key for one in asked} == {
        "trainer.profiler",
        f"trainer.callbacks.{health}.init_args.window",
        "model.init_args.policy_optimizer.class_path",
    }
    assert {one.key for one in others} == {
        "trainer.reload",
        f"trainer.callbacks.{export}.init_args",
        "model.init_args.credit",
        "model.init_args.policy.dtype",
        "model.init_args.sampling.top_k",
    }


def test_yaml_wins_over_the_hyperparameters_in_a_checkpoint(folder):
    assert main(["fit", "--config", "dummy.yaml", "--model.init_args.alpha", "0.25"]) == 0
    checkpoint = ["--ckpt_path", "runs/dummy/checkpoints/last.ckpt", "--trainer.default_root_dir", "runs/evaluate"]
    assert main(["test", "--config", "dummy.yaml", *checkpoint]) == 0
    assert yaml.safe_load((folder / "runs/evaluate/config.yaml").read_text())["model"]["init_args"]["alpha"] == 0.5


def test_evaluation_in_a_training_folder_keeps_its_config(folder):
    assert main(["fit", "--config", "dummy.yaml"]) == 0
    before = (folder / "runs/dummy/config.yaml").read_text()
    assert main(["test", "--config", "dummy.yaml", "--model.init_args.alpha", "1"]) == 0
    assert (folder / "runs/dummy/config.yaml").read_text() == before
    assert (folder / "runs/dummy/config-test.yaml").exists()


def test_failed_run_leaves_the_last_checkpoint(folder, capsys):
    (folder / "more.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "  - {class_path: prism_pl.last_checkpoint.LastCheckpoint, init_args: {every_n_steps: 2}}\n"
    )
    command = ["fit", "--config", "dummy.yaml", "--config", "more.yaml", "--trainer.max_steps", "9"]
    assert main([*command, "--model.init_args.fail_at", "3"]) == 1
    assert "error: The loss is not finite at step 3" in capsys.readouterr().err.strip().splitlines()[-1]
    assert last_step(folder / "runs/dummy+more") == 2


def test_ctrl_c_says_how_to_go_on(folder, capsys):
    command = ["fit", "--config", "dummy.yaml", "--model.init_args.interrupt_at"]
    assert main([*command, "0"]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "Stopped before the first checkpoint was written."
    assert main([*command, "1", "--fresh"]) == 130  # a short run is saved four times: one of two steps, each time
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "Stopped. The same command goes on from runs/dummy-2/checkpoints/last.ckpt at step 1."


class Planted:
    def __reduce__(self):
        return (open, ("opened", "w"))


def test_planted_pickle_is_refused_and_not_run(folder, capsys):
    torch.save({"state_dict": Planted()}, folder / "planted.ckpt", pickle_module=pickle)
    assert main(["fit", "--config", "dummy.yaml", "--ckpt_path", "planted.ckpt"]) == 1
    assert "never a pickle" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (folder / "opened").exists()


def test_earlier_configs_keep_their_text(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("a", "b", "b", "c"):
        write_config(path, text)
    assert [path.read_text(), *(path.with_stem(f"config-{n}").read_text() for n in (1, 2))] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("runs/align/export", "align"),
        ("/a/runs/rlvr-2/export-best/", "rlvr-2-best"),
        ("assets/sft", "sft"),
        ("Qwen/Qwen3-VL-4B-Instruct", "Qwen3-VL-4B-Instruct"),
        ("runs/exported", "exported"),
    ],
)
def test_a_policy_is_called_by_its_run_and_so_is_its_evaluations_folder(policy, name):
    assert checkpoint_name(policy) == name
    assert default_folder("test", ["evaluate"], name) == Path(f"runs/evaluate-{name}")


def test_a_default_folder_is_named_after_the_configs():
    assert default_folder("fit", ["strategy/zero2", "qwen3vl-4b/sft", "qwen3vl-4b/sft-2gpus"]) == Path(
        "runs/qwen3vl-4b/sft+sft-2gpus"
    )
    assert default_folder("fit", []) == Path("runs/fit")
    assert default_folder("test", ["benchmarks", "sampling/paper"], "a/b") == Path("runs/benchmarks+paper-a-b")


def test_ranks_agree_on_a_fresh_folder(folder, monkeypatch):
    (folder / "runs/x").mkdir(parents=True)
    (folder / "runs/x/config.yaml").touch()
    assert fresh_folder(Path("runs/x")) == Path("runs/x-2")
    (folder / "runs/x-2").mkdir()
    (folder / "runs/x-2/config.yaml").touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fresh_folder(Path("runs/x")) == Path("runs/x-2")
    monkeypatch.delenv("PRISM_RUN_FOLDER")
    with pytest.raises(ValueError, match="--fresh cannot choose"):
        fresh_folder(Path("runs/x"))


@pytest.mark.parametrize(
    ("tasks", "job", "refused"), [("2", "prism", True), ("1", "prism", False), ("2", "interactive", False)]
)
def test_a_fresh_folder_is_not_chosen_by_each_task_of_slurm(folder, monkeypatch, tasks, job, refused):
    # As srun sets them. In an interactive job Lightning starts the processes itself.
    for name, value in {"SLURM_PROCID": "1", "SLURM_NTASKS": tasks, "SLURM_JOB_NAME": job}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("PRISM_RUN_FOLDER", raising=False)
    if refused:
        with pytest.raises(ValueError, match="--fresh cannot choose"):
            fresh_folder(Path("runs/x"))
    else:
        assert fresh_folder(Path("runs/x")) == Path("runs/x")


def test_shipped_root_holds_the_checkout():
    assert shipped_root() == ROOT
