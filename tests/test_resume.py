"""A run that is killed and started again is the uninterrupted one, to the last bit, at every stage.

Each run is a process of its own and the kill a SIGKILL (`tests.killing`). Compared are all of the last checkpoint
(networks, optimisers, schedules, generators, the loader's and the loops' places, dynamic sampling's buffer, the best
checkpoint), the exported networks, and every logged value.
"""

import random
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import killing
from tests.killing import Runner, contents, differences, first_logged_step, killed_at, logged, saved, starts

# Five batches an epoch, a validation after every second and fourth, a checkpoint after a quarter of the run: it falls
# into the middle of an epoch, on a validation, and beside one.
SMALL = """fit --config STAGE.yaml --config kill.yaml --trainer.default_root_dir run --trainer.max_steps 8
--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false
--trainer.val_check_interval 2 --trainer.num_sanity_val_steps 1
--data.num_train 10 --data.num_validation 2 --data.batch_size 2"""
SHORT = "--model.rollout tests.killing.ShortEngine"
TRANSFORMERS = "--model.rollout prism_pl.rollout.TransformersEngine"
VLLM = "--model.rollout prism_pl.rollout.VLLMEngine"
TWO = "--model.num_rollouts 2"
GOVERNED = "--model.governor prism_pl.governor.Governor --model.governor.by rate --model.governor.window 2"
DAPO = "--model.num_rollouts 2 --model.num_prompts 2"  # of a batch's two groups half have variance: the buffer waits
# name: (config, options, monitored value)
STAGES = {
    "sft": ("sft", "", "sft/val_loss"),
    "warmup": ("warmup", f"{SHORT} --model.ceiling null", "warmup/val_pair_accuracy/perception"),
    "align": ("align", f"{SHORT} {TWO} {GOVERNED}", "align/val_accuracy"),
    "rlvr": ("rlvr", f"{SHORT} {TWO} --model.updates_per_batch 2 --trainer.max_steps 16", "rlvr/val_accuracy"),
    "dapo": ("digits/rlvr_dapo", f"{SHORT} {DAPO}", "rlvr/val_accuracy"),
}
ENGINES = {
    "align-transformers": ("align", f"{TRANSFORMERS} {TWO}", "align/val_accuracy"),
    "rlvr-transformers": ("rlvr", f"{TRANSFORMERS}", "rlvr/val_accuracy"),
    "warmup-vllm": ("warmup", f"{VLLM} --model.ceiling null", "warmup/val_pair_accuracy/perception"),
    "align-vllm": ("align", f"{VLLM} {TWO}", "align/val_accuracy"),
    "rlvr-vllm": ("rlvr", VLLM, "rlvr/val_accuracy"),
}
MOMENTS: list[dict[str, Any]] = [
    {"batch": 0, "moment": "step"},  # before the first checkpoint
    {"batch": 4, "moment": "end"},  # between two, in mid-epoch
    {"batch": 3, "moment": "writing"},
    {"batch": 3, "moment": "renaming"},
    {"batch": 3, "moment": "published"},
    {"batch": 3, "moment": "validation"},
    {"batch": 4, "moment": "end", "by": "SIGINT"},
    {"batch": 3, "moment": "validation", "by": "SIGINT"},
    {"batch": 4, "moment": "start", "by": "SIGTERM"},
]
WAITING: list[dict[str, Any]] = [
    {"batch": 2, "moment": "end", "waiting": True},
    {"batch": 2, "moment": "end", "waiting": True, "by": "SIGINT"},
]


def drawn_moments(stage: str, num: int) -> list[dict[str, Any]]:
    """Some more, drawn by lot, the same ones every time."""
    draw = random.Random(stage)
    batches, moments = range(8), ("start", "step", "end", "validation", "writing", "renaming", "published")
    return [{"batch": draw.choice(batches[:6]), "moment": draw.choice(moments)} for _ in range(num)]


def command(stage: str, kill: dict[str, Any], folder: Path) -> list[str]:
    """The command of a small run; its last configuration file, with the callbacks, is written into `folder`."""
    config, options, monitor = (STAGES | ENGINES)[stage]
    best = {"monitor": monitor, "mode": "max", "filename": "best", "enable_version_counter": False}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best},
        {"class_path": "callbacks.Export"},
        {"class_path": "tests.killing.Kill", "init_args": kill},
    ]
    if config not in ("sft", "warmup"):
        callbacks.append({"class_path": "callbacks.StructuralProxies"})
    if config == "align":
        callbacks[1]["init_args"] = {"choice": "least_drift"}
        callbacks.append({"class_path": "callbacks.DiscriminatorHealth", "init_args": {"window": 3}})
        callbacks.append({"class_path": "callbacks.ConvergenceMonitor", "init_args": {"window": 3}})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kill.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return shlex.split(SMALL.replace("STAGE", config)) + shlex.split(options)


class Runs:
    """Runs of this file, and the uninterrupted one of each stage, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runner = folder, Runner()

    def whole(self, stage: str) -> Path:
        folder = self.folder / stage
        if not folder.exists():
            assert self.runner(command(stage, {"batch": 10**6}, folder), folder) == 0, screen(folder)
        return folder

    def killed(self, stage: str, kill: dict[str, Any], folder: Path) -> Path:
        """Start a run that is killed, check that it was, start it again, and check where it began."""
        again = command(stage, kill, folder)
        by_wish = kill.get("by", "SIGKILL") != "SIGKILL"
        assert self.runner(again, folder) == (130 if by_wish else -signal.SIGKILL), screen(folder)
        last, batches, at = *saved(folder), killed_at(folder)
        interval = 4 if stage == "rlvr" else 2
        assert at - last <= (0 if by_wish else interval)
        if by_wish:
            assert f"goes on from run/checkpoints/last.ckpt at step {last}" in screen(folder)
        assert self.runner(again, folder) == 0, screen(folder)
        # Where it began, as three things tell: its own note, its screen, and the first step that it logged.
        assert [start["step"] for start in starts(folder)] == [0, last]
        said = re.search(rf"Going on from run/checkpoints/(last|next)\.ckpt at step {last} \(--fresh", screen(folder))
        assert bool(said) == (batches > 0)
        assert first_logged_step(folder) == batches
        return folder


def screen(folder: Path) -> str:
    """What a run's starts said."""
    return (folder / "screen.txt").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("whole"))
    yield made
    made.runner.close()


def assert_same(one: Path, other: Path) -> None:
    whole = contents(one)
    assert any(key.startswith("export/") for key in whole)
    assert any("generators" in key for key in whole)
    assert any("optimizer_states/0/state" in key for key in whole)
    assert differences(whole, contents(other)) == []
    assert logged(one) == logged(other)


# Two here, the others in the slow matrix.


def test_killed_while_a_checkpoint_is_written_alignment_ends_as_if_it_had_not_been(runs, tmp_path):
    folder = runs.killed("align", {"batch": 5, "moment": "writing"}, tmp_path)
    assert [start["step"] for start in starts(folder)] == [0, 4]
    assert not list(folder.rglob("*.partial"))
    assert_same(runs.whole("align"), folder)


def test_killed_with_groups_in_the_buffer_dynamic_sampling_ends_as_if_it_had_not_been(runs, tmp_path):
    folder = runs.killed("dapo", {"batch": 9, "moment": "end", "waiting": True}, tmp_path)
    assert starts(folder)[1]["step"] > 0
    assert_same(runs.whole("dapo"), folder)


@pytest.mark.slow
@pytest.mark.parametrize("kill", MOMENTS, ids=lambda kill: "-".join(map(str, kill.values())))
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_every_stage_ends_as_if_it_had_not_been(stage, kill, runs, tmp_path):
    assert_same(runs.whole(stage), runs.killed(stage, kill, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_moments_drawn_by_lot(stage, runs, tmp_path):
    for i, kill in enumerate(drawn_moments(stage, 3)):
        assert_same(runs.whole(stage), runs.killed(stage, kill, tmp_path / str(i)))


@pytest.mark.slow
@pytest.mark.parametrize("kill", WAITING, ids=["killed", "interrupted"])
def test_killed_while_the_buffer_waits(kill, runs, tmp_path):
    assert_same(runs.whole("dapo"), runs.killed("dapo", kill, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ENGINES)
def test_with_each_engine_a_killed_run_ends_as_if_it_had_not_been(stage, runs, tmp_path):
    if stage.endswith("vllm"):
        pytest.importorskip("vllm")
    for i, kill in enumerate(MOMENTS[1:3]):
        assert_same(runs.whole(stage), runs.killed(stage, kill, tmp_path / str(i)))


@pytest.mark.slow
@pytest.mark.parametrize("validation", [2, 5], ids=["without", "with"])
@pytest.mark.parametrize("second", [9, 11])
def test_stopped_at_the_end_of_an_epoch_and_killed_in_the_next(second, validation, runs, tmp_path):
    # An epoch has five batches; a validation after every fifth falls on its end.
    options = ["--trainer.max_steps", "16", "--trainer.val_check_interval", str(validation)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert runs.runner([*command("sft", {"batch": 10**6}, whole), *options], whole) == 0, screen(whole)
    stopped = [*command("sft", {"batch": 4, "by": "SIGINT"}, cut), *options]
    assert runs.runner(stopped, cut) == 130, screen(cut)
    (cut / "run" / killing.KILLED).unlink()
    killed = [*command("sft", {"batch": second}, cut), *options]
    assert runs.runner(killed, cut) == -signal.SIGKILL, screen(cut)
    assert runs.runner(killed, cut) == 0, screen(cut)
    # A quarter of the run is 4 steps.
    assert [start["step"] for start in starts(cut)] == [0, 5, 9]
    assert_same(whole, cut)


@pytest.mark.slow
def test_more_steps_go_on_as_if_they_had_been_asked_for_at_once(runs, tmp_path):
    constant = ["--model.schedule", "constant", "--model.warmup", "0"]
    longer = [*command("sft", {"batch": 10**6}, tmp_path / "at once"), *constant, "--trainer.max_steps", "12"]
    assert runs.runner(longer, tmp_path / "at once") == 0
    first = [*command("sft", {"batch": 10**6}, tmp_path / "in two"), *constant]
    assert runs.runner(first, tmp_path / "in two") == 0
    assert runs.runner(longer, tmp_path / "in two") == 0
    assert [start["step"] for start in starts(tmp_path / "in two")] == [0, 8]
    assert_same(tmp_path / "at once", tmp_path / "in two")


@pytest.mark.slow
def test_killed_from_outside_again_and_again_at_random_times(runs, tmp_path):
    draw = random.Random(0)
    again = command("sft", {"batch": 10**6}, tmp_path)
    for _ in range(4):
        process = killing.start(again, tmp_path)
        begun = tmp_path / "run" / "starts.jsonl"
        before = begun.stat().st_size if begun.exists() else 0
        while process.poll() is None and (begun.stat().st_size if begun.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killing.start(again, tmp_path).wait() == 0, screen(tmp_path)
    assert_same(runs.whole("sft"), tmp_path)
