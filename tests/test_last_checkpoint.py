"""What a run goes on from: broken, lost and full places, Ctrl+C, and what a start says and notes down."""

import contextlib
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from prism_pl import checkpoint_files
from prism_pl.__main__ import main
from prism_pl.checkpoint_files import LastCheckpoints
from prism_pl.cli import PrismCLI
from prism_pl.optim import lr_scheduler, rate_jumps
from prism_pl.pipeline.plan import checkpoint_in
from prism_pl.run_folder import held, say_finished
from tests.test_cli import DUMMY, last_step

FIT = ["fit", "--config", "dummy.yaml"]
STEPS = "--trainer.max_steps"
RUN = Path("runs/dummy")
LAST, PREVIOUS = RUN / "checkpoints/last.ckpt", RUN / "checkpoints/previous.ckpt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with dummy.yaml in it."""
    (tmp_path / "dummy.yaml").write_text(DUMMY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRISM_TRACEBACK", "")
    yield tmp_path
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored after a Ctrl+C


def message(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def step(file: Path) -> int:
    return torch.load(file, weights_only=True)["global_step"]


# What is noted down and said


def test_starts_and_the_last_step_are_noted_down_and_two_checkpoints_kept(folder, caplog):
    assert main(FIT) == 0
    assert main([*FIT, STEPS, "4"]) == 0
    assert "Going on from runs/dummy/checkpoints/last.ckpt at step 2 (--fresh starts anew)" in caplog.text
    assert "Begins at step 2 of 4." in caplog.text
    starts = [json.loads(line) for line in (RUN / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["checkpoint"], start["max_steps"]) for start in starts] == [
        (0, None, 2),
        (2, str(LAST), 4),
    ]
    assert json.loads((RUN / "progress.json").read_text()) == {
        "step": 4,
        "checkpoint": "checkpoints/last.ckpt",
        "finished": True,
    }
    assert (step(PREVIOUS), step(LAST)) == (3, 4)
    assert sorted(path.name for path in LAST.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_finished_run_says_so_and_what_comes_next_before_anything_is_loaded(folder, caplog, monkeypatch):
    assert main(FIT) == 0
    assert "runs/dummy is finished, at step 2." in caplog.text
    before = (RUN / "starts.jsonl").read_bytes()

    def loaded(self):
        raise AssertionError("loaded")

    monkeypatch.setattr(PrismCLI, "instantiate_classes", loaded)
    caplog.clear()
    assert main(FIT) == 0
    assert "runs/dummy was finished already, at step 2. More steps: --trainer.max_steps" in caplog.text
    assert "Next: tensorboard --logdir runs/dummy" in caplog.text
    assert (RUN / "starts.jsonl").read_bytes() == before
    # More steps, and a fit that was killed before its callbacks had exported, are gone on with.
    assert main([*FIT, STEPS, "3"]) == 1
    progress = json.loads((RUN / "progress.json").read_text())
    (RUN / "progress.json").write_text(json.dumps(progress | {"finished": False}))
    assert main(FIT) == 1


def test_what_a_kill_left_behind_is_cleared_away(folder):
    assert main(FIT) == 0
    for name in ("best.ckpt.partial", "next.ckpt", "next.ckpt.partial"):
        (LAST.parent / name).write_text("half")
    assert main([*FIT, STEPS, "3"]) == 0
    assert sorted(path.name for path in LAST.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_learning_rate_that_jumps_with_another_length_is_said(folder, caplog):
    command = [*FIT, "--model.init_args.cosine", "true"]
    assert main([*command, STEPS, "4"]) == 0
    assert main([*command, STEPS, "4"]) == 0
    assert "jumps" not in caplog.text
    assert main([*command, STEPS, "8"]) == 0
    # Cosine from 0.1: 0 at the end of 4 steps, half of 0.1 after 4 steps of 8.
    assert "The learning rate jumps from 0 to 0.05 after the next step" in caplog.text


def test_the_same_length_and_a_constant_rate_do_not_jump():
    def scheduler(schedule, num_steps, state=None):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        made = lr_scheduler(optimizer, schedule, 2, num_steps)
        if state is None:
            for _ in range(5):
                optimizer.step()
                made.step()
        else:
            optimizer.load_state_dict(state[0])
            made.load_state_dict(state[1])
        return optimizer, made

    class Config:
        def __init__(self, scheduler):
            self.scheduler = scheduler

    for schedule, num_steps, jumps in (("cosine", 10, 0), ("cosine", 20, 1), ("linear", 8, 1), ("constant", 20, 0)):
        states = [part.state_dict() for part in scheduler(schedule, 10)]
        assert len(rate_jumps([Config(scheduler(schedule, num_steps, states)[1])])) == jumps, (schedule, num_steps)


# Broken and lost


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.999])
def test_a_cut_off_checkpoint_is_named_with_the_one_before_it(kept, folder, capsys):
    assert main(FIT) == 0
    whole = LAST.read_bytes()
    cut = whole[: kept if isinstance(kept, int) else int(len(whole) * kept)]
    LAST.write_bytes(cut)
    before = PREVIOUS.read_bytes()
    assert main(FIT) == 2
    said = message(capsys)
    assert said.startswith(f"error: {LAST} is cut off or no checkpoint. The one before it, {PREVIOUS} at step 1,")
    assert f"--ckpt_path {PREVIOUS}" in said
    assert (LAST.read_bytes(), PREVIOUS.read_bytes()) == (cut, before)

    assert main([*FIT, "--ckpt_path", str(PREVIOUS)]) == 0
    assert last_step(RUN) == 2
    assert step(PREVIOUS) == 1  # not the broken one
    starts = [json.loads(line)["step"] for line in (RUN / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 1]


def test_a_checkpoint_of_lightnings_deepspeed_strategy_is_named_as_one(folder, capsys):
    assert main(FIT) == 0
    LAST.unlink()
    (LAST / "checkpoint").mkdir(parents=True)
    assert main(FIT) == 2
    assert f"{LAST} was written by Lightning's DeepSpeedStrategy, as pickles, which are not read" in message(capsys)


def test_where_both_are_cut_off_a_new_start_is_the_way_out(folder, capsys):
    assert main(FIT) == 0
    LAST.write_bytes(b"PK\x03\x04")
    PREVIOUS.write_bytes(b"PK\x03\x04")
    assert main(FIT) == 2
    assert message(capsys).endswith(
        f"{LAST} is cut off or no checkpoint. Bring it back from a copy; --ckpt_path goes on from another one, "
        "--fresh starts anew."
    )


def test_a_deleted_checkpoint_leaves_the_one_before_and_without_both_the_run_is_not_begun_anew(folder, capsys, caplog):
    assert main(FIT) == 0
    LAST.unlink()
    assert main(FIT) == 0
    assert f"{LAST} is gone. Going on from {PREVIOUS} at step 1" in caplog.text
    assert last_step(RUN) == 2
    LAST.unlink()
    PREVIOUS.unlink()
    assert main(FIT) == 2
    said = message(capsys)
    assert f"{LAST} is gone, and so is the one before it; the run had reached step 2" in said
    assert "--fresh" in said


# Full and closed


class FullDisk:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room -= len(bytes(data))
        if self.room < 0:
            raise OSError(28, os.strerror(28))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 2000])
def test_a_full_disk_is_one_message_and_leaves_the_last_checkpoint(room, folder, capsys, monkeypatch):
    assert main([*FIT, STEPS, "3"]) == 0
    before = LAST.read_bytes()

    def full(path, mode="r"):
        file = Path(path).open(mode)  # noqa: SIM115
        return FullDisk(file, room) if Path(path).name == "next.ckpt.partial" else file

    monkeypatch.setattr(checkpoint_files, "open", full, raising=False)
    assert main([*FIT, STEPS, "5"]) == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    said = error.strip().splitlines()[-1]
    assert "next.ckpt could not be written (No space left on device): free space" in said
    assert f"{LAST} is intact, and the same command goes on from it" in said
    assert LAST.read_bytes() == before
    assert not list(RUN.rglob("*.partial"))
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main([*FIT, STEPS, "5"]) == 0
    assert last_step(RUN) == 5


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_loaded(folder, capsys):
    # As root every permission is there; a file in the way stops root too.
    assert main([*FIT, "--trainer.default_root_dir", "dummy.yaml/run", "--model.init_args.policy.path", "gone"]) == 2
    said = message(capsys)
    assert "the run folder dummy.yaml/run cannot be written to (Not a directory)" in said
    assert "--trainer.default_root_dir" in said


def test_a_kill_between_the_two_renames_leaves_the_new_checkpoint_to_go_on_from(folder, monkeypatch):
    assert main(FIT) == 0
    os.replace(LAST, PREVIOUS.with_name("next.ckpt"))  # as between them: no last.ckpt, the older one, the new one
    assert LastCheckpoints(RUN).to_go_on_from() == PREVIOUS.with_name("next.ckpt")
    assert main([*FIT, STEPS, "3"]) == 0
    starts = [json.loads(line) for line in (RUN / "starts.jsonl").read_text().splitlines()]
    assert (starts[1]["step"], starts[1]["checkpoint"]) == (2, str(LAST))
    assert (step(PREVIOUS), step(LAST)) == (2, 3)


@pytest.mark.parametrize("kinds", itertools.product(("file", "folder"), repeat=2), ids="-".join)
@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_kill_while_a_checkpoint_of_before_is_replaced_leaves_one_to_go_on_from(
    killed_after, kinds, tmp_path, monkeypatch
):
    files = LastCheckpoints(tmp_path)  # the run went on from elsewhere: `last` is not its own
    files.last.parent.mkdir()
    for path, kind in zip((files.last, files.next), kinds, strict=True):
        path.mkdir() if kind == "folder" else None
        (path / "rank-0" if kind == "folder" else path).write_text(path.stem)
    calls = itertools.count()

    class Killing:
        def replace(self, source, target):
            if next(calls) == killed_after:
                raise KeyboardInterrupt
            os.replace(source, target)

        def __getattr__(self, name):
            return getattr(os, name)

    monkeypatch.setattr(checkpoint_files, "os", Killing())
    with contextlib.suppress(KeyboardInterrupt):
        files.publish(7)
    left = LastCheckpoints(tmp_path).to_go_on_from()
    assert left is not None
    inside = left / "rank-0" if left.is_dir() else left
    assert inside.read_text() == ("last" if killed_after == 0 else "next")


def test_the_pipeline_and_a_run_agree_on_what_it_goes_on_from(tmp_path):
    possible = ("last.ckpt", "previous.ckpt", "next.ckpt", "passed-over.partial")
    for names in itertools.product(*(("", name) for name in possible)):
        run = tmp_path / ("-".join(names) or "none")
        (run / "checkpoints").mkdir(parents=True)
        for name in filter(None, names):
            (run / "checkpoints" / name).touch()
        assert checkpoint_in(run) == LastCheckpoints(run).to_go_on_from(), names


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(folder, capsys):
    assert main(FIT) == 0
    before = LAST.read_bytes()
    reader, writer = os.pipe()
    other = os.fork()  # a process that imported everything anew would hold the folder no better
    if other == 0:
        with held(RUN):
            os.write(writer, b"held")
            signal.pause()
    try:
        assert os.read(reader, 4) == b"held"
        assert main([*FIT, STEPS, "4"]) == 2
        assert f"{RUN} is in use: process {other} trains there." in message(capsys)
        assert LAST.read_bytes() == before
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    assert main([*FIT, STEPS, "4"]) == 0


# Ctrl+C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_with_a_checkpoint_of_the_step(number, folder, capfd):
    command = [*FIT, STEPS, "40", "--model.init_args.signals", str({3: int(number)})]
    assert main(command) == 130
    error = capfd.readouterr().err
    assert "Stopping at the end of this step, with a checkpoint. Ctrl+C again stops at once." in error
    # A quarter of 40 is 10: without the wish there would be no checkpoint yet.
    assert error.strip().splitlines()[-1] == f"Stopped. The same command goes on from {LAST} at step 4."
    assert last_step(RUN) == 4
    assert not (RUN / "export").exists()
    assert main(command) == 0
    assert last_step(RUN) == 40


def test_a_second_ctrl_c_stops_at_once(folder, capfd):
    command = [*FIT, STEPS, "40", "--model.init_args.signals", "{3: 2}", "--model.init_args.twice", "true"]
    assert main(command) == 130
    assert capfd.readouterr().err.strip().splitlines()[-1] == "Stopped before the first checkpoint was written."


def test_after_a_warm_start_comes_alignment_of_the_policy_that_it_was_made_for(tmp_path, caplog):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "discriminator.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("model: {init_args: {policy: {path: runs/sft/export}}}")
    with caplog.at_level("INFO"):
        say_finished(tmp_path, 12, already=False)
    assert "--config align.yaml --model.policy.path runs/sft/export --model.discriminator.path" in caplog.text


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("qwen3vl-4b/sft", "qwen3vl-4b/evaluate.yaml"),
        ("digits/rlvr_dapo", "evaluate.yaml"),  # there is none beside it
        ("rlvr", "evaluate.yaml"),
        ("", "evaluate.yaml"),
    ],
)
def test_what_comes_next_is_named_by_the_configurations_of_the_same_size(tmp_path, caplog, stage, config):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    with caplog.at_level("INFO"):
        say_finished(tmp_path, 12, already=False, beside=stage)
    assert f"Next: python -m prism_pl test --config {config} --model.policy.path {tmp_path}/export;" in caplog.text
