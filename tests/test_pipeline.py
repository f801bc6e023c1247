"""The pipeline's ledger and what a second start makes of it, with stages that take no time."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from prism_pl.__main__ import main
from prism_pl.errors import PipelineFailed, Stopped, UsageError
from prism_pl.ledger import locked
from prism_pl.pipeline import jobs
from prism_pl.pipeline.command import run
from tests.fake_stages import FakeRunner, ledger, start, statuses, write_pipeline

ALL = ["base", "sft", "align", "filter", "rlvr", "filter-sft", "baseline", "evaluate-rlvr", "evaluate-baseline"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A current folder with a pipeline in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRISM_TRACEBACK", "")
    write_pipeline(tmp_path)
    return tmp_path


def edit(file: str, old: str, new: str) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


def contents(folder: str = "run") -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


# A whole run


def test_stages_run_in_order_and_the_ledger_says_what_from_what(capsys):
    runner = start()
    assert runner.started == [*ALL, "report"]
    assert "run is finished: 10 stages. Report: run/report/report.md" in capsys.readouterr().out
    written = ledger()
    assert written["status"] == "finished"
    rlvr = written["stages"]["rlvr"]
    assert rlvr["command"] == (
        "python -m prism_pl fit --config rlvr.yaml --model.policy.path run/align/export "
        "--data.pass_rates run/filter/pass_rates.jsonl --trainer.default_root_dir run/rlvr"
    )
    assert rlvr["config"]["model"]["policy"]["path"] == "{align}/export"
    assert rlvr["parents"] == {
        "align": {"export": written["stages"]["align"]["outputs"]["export"]},
        "filter": {"pass_rates": written["stages"]["filter"]["outputs"]["pass_rates"]},
    }
    sft = written["stages"]["sft"]
    assert sft["inputs"]["model.policy.path"]["path"].endswith("weights")
    assert sft["attempts"][0]["exit_code"] == 0
    assert re.fullmatch("[0-9a-f]{64}", sft["config_sha256"] and sft["data_sha256"])
    assert sft["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert written["stages"]["filter"]["results"] == {
        "prompts": 4,
        "mean_pass_rate": 0.5625,
        "keep": [0.2, 0.8],
        "kept": 2,
        "none_right": 1,
        "all_right": 1,
    }
    tables = written["stages"]["evaluate-rlvr"]["results"]["tables"]
    assert tables == {"test": {"accuracy": {"mean": 0.5, "low": 0.4, "high": None}}}


def test_the_baseline_takes_the_steps_of_both_stages_and_its_own_filter():
    start("--align.trainer.max_steps", "25")
    baseline = ledger()["stages"]["baseline"]
    assert baseline["config"]["trainer"]["max_steps"] == 25 + 40
    assert baseline["config"]["data"]["pass_rates"] == "{filter-sft}/pass_rates.jsonl"


def test_what_a_filter_keeps_is_counted_by_the_bounds_of_the_stage_that_trains_on_it():
    start("--rlvr.data.keep", "[0, 0.5]")
    filters = [ledger()["stages"][name]["results"] for name in ("filter", "filter-sft")]
    assert [(found["keep"], found["kept"]) for found in filters] == [([0, 0.5], 2), ([0.2, 0.8], 2)]
    start("--rlvr.data.keep", "[0.5, 0.5]", "--fresh")
    assert ledger("run-2")["stages"]["filter"]["results"]["kept"] == 1


def test_a_shared_filter_serves_both_and_the_other_is_left_out():
    runner = start("--shared_filter", "true")
    assert "filter-sft" not in runner.started
    assert {ledger()["stages"][name]["config"]["data"]["pass_rates"] for name in ("rlvr", "baseline")} == {
        "{filter}/pass_rates.jsonl"
    }


def test_a_second_file_changes_and_drops_stages():
    Path("mine.yaml").write_text(
        "stages: {baseline: null, filter-sft: null, evaluate-baseline: null, sft: {set: {model.lr: 3}}}"
    )
    runner = start("--config", "mine.yaml")
    assert runner.started == ["base", "sft", "align", "filter", "rlvr", "evaluate-rlvr", "report"]
    assert ledger()["stages"]["sft"]["config"]["model"]["lr"] == 3


def test_lists_are_words_of_the_report_and_an_empty_one_is_left_out():
    edit("pipeline.yaml", "{command: report}", "{command: report, set: {pairs: ['a:b', 'c:d'], require: [], seed: 1}}")
    start()
    said = ledger()["stages"]["report"]["command"]
    assert said == "python -m prism_pl report run --pairs a:b c:d --seed 1 --out run/report/report.md"


def test_parallel_stages_wait_for_their_parents():
    order: list[list[str]] = []

    def end_one() -> None:
        running = [name for name, job in zip(runner.started, runner.jobs, strict=True) if job.code is None]
        order.append(running)
        runner.jobs[runner.started.index(running[0])].code = 0

    runner = FakeRunner(dict.fromkeys([*ALL, "report"]), end_one)
    start("--parallel", "2", runner=runner)
    assert max(map(len, order)) == 2
    assert all(not {"sft", "align"} <= set(running) for running in order)
    assert set(statuses().values()) == {"finished"}


# A second start


def test_finished_stages_are_skipped_with_the_reason(capsys):
    start()
    before = contents()
    capsys.readouterr()
    assert start().started == []
    said = capsys.readouterr().out
    assert re.search(r"skip +rlvr +finished \S+ in \d+ s; nothing changed since", said)
    assert "run was finished already: 10 stages" in said
    assert contents() == before


def test_a_changed_value_stops_with_the_difference():
    start()
    edit("rlvr.yaml", "lr: 0.1", "lr: 0.2")
    with pytest.raises(UsageError, match=r"rlvr: model.lr: 0.1 -> 0.2") as error:
        start()
    assert "--update runs rlvr, evaluate-rlvr, report anew" in str(error.value)
    assert "--from rlvr" in str(error.value)
    assert set(statuses().values()) == {"finished"}


def test_update_reruns_the_changed_stage_and_what_depends_on_it_and_deletes_nothing(capsys):
    start()
    old = contents("run/rlvr")
    edit("rlvr.yaml", "lr: 0.1", "lr: 0.2")
    assert start("--update").started == ["rlvr", "evaluate-rlvr", "report"]
    assert ledger()["stages"]["rlvr"]["config"]["model"]["lr"] == 0.2
    assert [content for content in contents("run/earlier/rlvr").values()] == [*old.values()]
    earlier = {entry["name"]: entry for entry in ledger()["earlier"]}
    assert earlier.keys() == {"rlvr", "evaluate-rlvr", "report"}
    assert (earlier["rlvr"]["folder"], earlier["rlvr"]["config"]["model"]["lr"]) == ("earlier/rlvr", 0.1)
    assert start("--update").started == []
    edit("rlvr.yaml", "lr: 0.2", "lr: 0.3")
    start("--update")
    assert Path("run/earlier/rlvr-2").is_dir()


def test_a_setting_that_others_take_over_changes_them_too():
    start()
    edit("rlvr.yaml", "max_steps: 40", "max_steps: 50")
    rerun = start("--update").started
    assert set(rerun) == {"rlvr", "baseline", "evaluate-rlvr", "evaluate-baseline", "report"}


@pytest.mark.parametrize("change", ["altered", "added", "gone"])
def test_a_parent_altered_on_disk_is_noticed(change):
    start()
    export = Path("run/align/export")
    if change == "gone":
        export.rename("elsewhere")
    else:
        (export / ("model.safetensors" if change == "altered" else "further.json")).write_text("other")
    with pytest.raises(UsageError, match=f"align: run/align/export {'is gone' if change == 'gone' else 'was altered'}"):
        start()
    assert start("--update").started == ["align", "filter", "rlvr", "evaluate-rlvr", "report"]


def test_a_parent_altered_while_the_pipeline_runs_is_noticed():
    def alter() -> None:
        if runner.started[-1] == "filter":
            Path("run/align/export/model.safetensors").write_text("other")

    runner = FakeRunner(on_poll=alter)
    with pytest.raises(PipelineFailed, match="run/align/export is not what align left, so rlvr was not started"):
        start(runner=runner)


def test_the_policy_from_outside_altered_is_noticed():
    start()
    Path("weights/model.safetensors").write_text("another base")
    with pytest.raises(UsageError, match=r"sft: .*weights \(model.policy.path\) has other contents"):
        start()


def test_a_checkpoint_from_outside_altered_is_noticed():
    Path("other.ckpt").write_text("some")
    start("--sft.ckpt_path", "other.ckpt")
    Path("other.ckpt").write_text("others")
    with pytest.raises(UsageError, match=r"sft: .*other\.ckpt \(ckpt_path\) has other contents"):
        start("--sft.ckpt_path", "other.ckpt")


def test_an_input_that_is_not_there_stops_before_the_first_stage_and_is_named(capsys):
    with pytest.raises(UsageError, match=r"rlvr: data\.pass_rates: there is no \S+rates\.jsonl\. Nothing was started"):
        start("--rlvr.data.pass_rates", "./rates.jsonl")
    with pytest.raises(UsageError, match=r"align: model\.policy\.path: there is no \S+/gone"):
        start("--align.model.policy.path", "./gone")
    assert not Path("run/ledger.json").exists()
    start("--dry-run", "--rlvr.data.pass_rates", "./rates.jsonl")
    assert "It would stop: rlvr: data.pass_rates: there is no" in capsys.readouterr().out
    # A hub id looks like a relative path: only its command can tell.
    assert start("--align.model.policy.path", "Qwen/Qwen3-VL-4B-Instruct").started == [*ALL, "report"]


def test_an_input_that_is_gone_is_named_and_stops_only_what_would_read_it(capsys):
    start()
    Path("weights").rename("elsewhere")
    assert start().started == []
    assert re.search(
        r"skip +sft +finished .*weights \(model\.policy\.path\), which it read, is gone", capsys.readouterr().out
    )
    with pytest.raises(UsageError, match=r"sft: model\.policy\.path: there is no \S*weights"):
        start("--sft.model.lr", "0.3", "--update")
    assert set(statuses().values()) == {"finished"}


def test_other_versions_than_a_stage_ran_on_are_said(capsys):
    start()
    assert "warning" not in capsys.readouterr().out
    content = ledger()
    for name in ("sft", "align"):
        content["stages"][name]["versions"]["torch"] = "1.0"
    Path("run/ledger.json").write_text(json.dumps(content))
    assert start().started == []
    here = content["stages"]["rlvr"]["versions"]["torch"]
    assert f"other versions than are here now: torch: 1.0 -> {here} (sft, align)\n" in capsys.readouterr().out


def test_an_option_that_the_code_has_gained_is_said_and_stops_only_with_another_value(capsys):
    start()
    assert start(runner=FakeRunner(model={"new": {"size": 1}})).started == []
    names = ", ".join(ALL)
    assert (
        f"other versions than are here now: model.new: (absent) -> {{'size': 1}} ({names})\n" in capsys.readouterr().out
    )
    with pytest.raises(UsageError, match=r"align: model\.new: \(absent\) -> 2\. Put it back"):
        start("--align.model.new", "2", runner=FakeRunner(model={"new": 1}))
    # Nobody's default: a user's own key.
    with pytest.raises(UsageError, match=r"align: model\.own: \(absent\) -> 1\. Put it back"):
        start("--align.model.own", "1", runner=FakeRunner(model={"new": 1}))


def test_an_option_that_the_code_has_lost_is_said_and_a_users_own_key_that_is_gone_stops(capsys):
    start("--align.model.own", "1", runner=FakeRunner(model={"old": 1}))
    capsys.readouterr()
    assert start("--align.model.own", "1", runner=FakeRunner(lost="old")).started == []
    assert "model.old: 1 -> (absent) (base, sft" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"stages that were made otherwise\. align: model\.own: 1 -> \(absent\)\. Put"):
        start(runner=FakeRunner(lost="old"))


ROWS = '{"question": "1 + 1?", "answers": ["2"]}\n'
NAMED = {
    "string": "rows.jsonl",
    "list": "[more.jsonl, rows.jsonl]",
    "mapping": "{path: rows.jsonl}",
    "mappings": "[{path: rows.jsonl}, {path: more.jsonl}]",
    "pattern": "'r*.jsonl'",
    "pattern in a mapping": "{path: './r*.jsonl'}",
}


@pytest.mark.parametrize("how", NAMED)
def test_rows_that_were_edited_are_noticed_however_the_yaml_names_them(how):
    for name in ("rows.jsonl", "more.jsonl"):
        Path(name).write_text(ROWS)
    edit("sft.yaml", "data: {}", f"data: {{init_args: {{train: {NAMED[how]}}}}}")
    start()
    sha = ledger()["stages"]["sft"]["data_sha256"]
    assert start().started == []
    Path("rows.jsonl").write_text(ROWS.replace("2", "3"))
    with pytest.raises(UsageError, match=r"sft: \S*(rows|r\*)\.jsonl \(data\.init_args\.train\S*\) has other contents"):
        start()
    assert start("--update").started[0] == "sft"
    assert ledger()["stages"]["sft"]["data_sha256"] != sha
    Path("rows.jsonl").unlink()
    assert start().started == []
    with pytest.raises(UsageError, match=r"sft: data\.init_args\.train\S*: there is no \S*(rows|r\*)\.jsonl"):
        start("--sft.model.lr", "0.3", "--update")


@pytest.mark.parametrize(
    "value", ["gone.jsonl", "[rows.jsonl, gone.jsonl]", "{path: gone.jsonl}", "./gone", "'g*.jsonl'"]
)
def test_rows_that_are_not_there_stop_before_the_first_stage(value):
    Path("rows.jsonl").write_text(ROWS)
    edit("sft.yaml", "data: {}", f"data: {{train: {value}}}")
    with pytest.raises(UsageError, match=r"sft: data\.train\S*: there is no \S*g(one|\*)\S*\. Nothing was started"):
        start()
    edit("sft.yaml", value, "prism-vlm/rl_dataset")
    assert start().started == [*ALL, "report"]


def test_rows_that_a_pipeline_names_are_those_beside_it(tmp_path, monkeypatch):
    Path("rows.jsonl").write_text(ROWS)
    edit("pipeline.yaml", "sft.yaml, set: {", "sft.yaml, set: {data.train: [rows.jsonl, 'r*.jsonl', owner/name], ")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run(["pipeline", "--config", "../pipeline.yaml", "--run_folder", "run"], FakeRunner())
    found = ledger()["stages"]["sft"]["config"]["data"]["train"]
    assert found == [str(tmp_path / "rows.jsonl"), str(tmp_path / "r*.jsonl"), "owner/name"]


def test_a_moved_run_folder_is_still_finished():
    start()
    Path("run").rename("moved")
    assert start("--run_folder", "moved").started == []


def test_dropped_stages_stay_and_the_report_is_made_again():
    start()
    Path("mine.yaml").write_text("stages: {evaluate-baseline: null}")
    assert start("--config", "mine.yaml").started == ["report"]
    assert "evaluate-baseline" in ledger()["dropped"]
    assert Path("run/evaluate-baseline/evaluation.json").exists()
    assert start().started == ["report"]
    assert ledger()["dropped"] == {}


def test_a_dry_run_changes_nothing(capsys):
    assert start("--dry-run").started == []
    assert not Path("run").exists()
    start()
    before = contents()
    edit("rlvr.yaml", "lr: 0.1", "lr: 0.2")
    capsys.readouterr()
    assert start("--dry-run").started == []
    assert (
        "It would stop: run holds stages that were made otherwise. rlvr: model.lr: 0.1 -> 0.2"
        in capsys.readouterr().out
    )
    assert start("--dry-run", "--update").started == []
    said = capsys.readouterr().out
    assert "python -m prism_pl fit --config rlvr.yaml" in said
    assert "--config sft.yaml" not in said
    assert contents() == before


# Stages that break


def save_checkpoint(name: str, step: int) -> None:
    Path(f"run/{name}/checkpoints").mkdir()
    torch.save({"global_step": step}, f"run/{name}/checkpoints/last.ckpt")


def test_a_failed_stage_is_named_with_its_log_and_tried_again():
    with pytest.raises(PipelineFailed) as error:
        start(runner=FakeRunner({"align": 1}))
    assert "Stage align failed with exit code 1; its log is run/align/stage.log." in str(error.value)
    assert "It said: the loss is not finite" in str(error.value)
    assert ledger()["status"] == "failed"
    assert (statuses()["align"], statuses()["filter"]) == ("failed", "pending")
    assert ledger()["stages"]["align"]["exit_code"] == 1
    # Nothing is lost where there is no checkpoint: what was wrong may be mended without --update.
    edit("align.yaml", "lr: 0.1", "lr: 0.05")
    assert start().started == ["align", *ALL[3:], "report"]


def test_what_an_earlier_attempt_said_is_not_told_of_this_one():
    with pytest.raises(PipelineFailed, match="It said: the loss is not finite"):
        start(runner=FakeRunner({"align": 1}))

    class Silent(FakeRunner):
        def start(self, args, log, on_screen):
            before = log.read_text()
            job = super().start(args, log, on_screen)
            log.write_text(before)
            return job

    with pytest.raises(PipelineFailed, match="ended by SIGKILL") as error:
        start(runner=Silent({"align": -9}))
    assert "It said" not in str(error.value)


def test_a_fit_by_hand_in_a_stages_folder_is_not_gone_on_with_unasked():
    Path("run/align").mkdir(parents=True)
    save_checkpoint("align", 7)
    with pytest.raises(UsageError, match="align: run/align holds a run that the ledger knows nothing of"):
        start()
    assert start("--update").started == [*ALL, "report"]
    assert Path("run/earlier/align/checkpoints/last.ckpt").exists()
    assert ledger()["stages"]["align"]["resumed_from_step"] is None


def test_a_stage_that_was_killed_goes_on_from_its_checkpoint(capsys):
    with pytest.raises(PipelineFailed, match=r"ended by SIGKILL \(often: out of memory\)"):
        start(runner=FakeRunner({"align": -9}))
    save_checkpoint("align", 20)
    start()
    assert "goes on from run/align/checkpoints/last.ckpt" in capsys.readouterr().out
    align = ledger()["stages"]["align"]
    assert [attempt["status"] for attempt in align["attempts"]] == ["failed", "finished"]
    assert align["resumed_from_step"] == 20


def test_a_killed_pipeline_goes_on(folder):
    pid = os.fork()
    if pid == 0:
        try:
            start(runner=FakeRunner({"rlvr": None}, on_poll=lambda: kill_at("rlvr")))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert statuses()["rlvr"] == "running"
    assert start().started == [*ALL[4:], "report"]
    assert set(statuses().values()) == {"finished"}
    killed, finished = ledger()["stages"]["rlvr"]["attempts"]
    assert (killed["status"], finished["status"]) == ("interrupted", "finished")
    assert killed["seconds"] >= 0
    assert killed["ended"] >= killed["started"]


def kill_at(name: str) -> None:
    if Path("run", name).exists():
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_interrupted_stage_resumes(capsys):
    def press() -> None:
        if runner.started[-1] == "align":
            os.kill(os.getpid(), signal.SIGINT)

    runner = FakeRunner({"align": None}, press)
    with pytest.raises(Stopped, match=r"Stopped in align. The same command goes on: python -m prism_pl pipeline"):
        start(runner=runner)
    assert (ledger()["status"], statuses()["align"], statuses()["filter"]) == ("interrupted", "interrupted", "pending")
    save_checkpoint("align", 12)
    edit("align.yaml", "lr: 0.1", "lr: 0.2")
    with pytest.raises(UsageError, match=r"align: model.lr: 0.1 -> 0.2"):
        start()
    edit("align.yaml", "lr: 0.2", "lr: 0.1")
    assert start().started == ["align", *ALL[3:], "report"]
    assert ledger()["stages"]["align"]["resumed_from_step"] == 12


def test_a_stage_that_leaves_nothing_to_start_from_is_named():
    edit("pipeline.yaml", "{sft.export}", "{sft.export_best}")
    with pytest.raises(
        PipelineFailed, match=r"starts from run/sft/export-best, which sft did not write. Add callbacks"
    ):
        start()


def test_a_lost_checkpoint_is_not_begun_anew_unasked():
    with pytest.raises(PipelineFailed):
        start(runner=FakeRunner({"align": 1}))
    Path("run/align/progress.json").write_text('{"step": 20}')
    with pytest.raises(UsageError, match=r"align: run/align/checkpoints/last\.ckpt, to go on from, is gone"):
        start()
    assert start("--update").started == ["align", *ALL[3:], "report"]
    assert Path("run/earlier/align/progress.json").exists()


def test_the_step_is_the_one_that_the_stage_itself_noted():
    with pytest.raises(PipelineFailed):
        start(runner=FakeRunner({"align": 1}))
    save_checkpoint("align", 20)
    line = {"time": "9999-01-01T00:00:00+00:00", "step": 10, "checkpoint": "checkpoints/previous.ckpt"}
    Path("run/align/starts.jsonl").write_text(json.dumps(line) + "\n")
    start()
    assert ledger()["stages"]["align"]["resumed_from_step"] == 10


def test_a_second_pipeline_in_one_folder_is_refused():
    with locked(Path("run")), pytest.raises(UsageError, match=rf"run is in use: .*process {os.getpid()}"):
        start()
    start()


# Forks


def test_from_a_stage_runs_it_and_what_depends_on_it_in_a_new_folder(capsys):
    start()
    before = contents()
    runner = start("--from", "rlvr", "--to", "fork", "--rlvr.model.lr", "0.3")
    assert runner.started == ["rlvr", "evaluate-rlvr", "report"]
    assert contents() == before
    forked = ledger("fork")
    assert forked["forked_from"] == {"folder": "../run", "stage": "rlvr"}
    assert forked["stages"]["align"]["folder"] == "../run/align"
    assert forked["stages"]["rlvr"]["folder"] == "rlvr"
    assert forked["stages"]["rlvr"]["parents"] == ledger()["stages"]["rlvr"]["parents"]
    assert "--model.policy.path run/align/export" in forked["stages"]["rlvr"]["command"]
    # It is a pipeline like any other: finished, and its parents are still looked after.
    assert forked["command"].endswith("--rlvr.model.lr 0.3 --run_folder fork")
    assert start("--run_folder", "fork", "--rlvr.model.lr", "0.3").started == []
    Path("run/align/export/model.safetensors").write_text("other")
    with pytest.raises(UsageError, match="align: run/align/export was altered"):
        start("--run_folder", "fork", "--rlvr.model.lr", "0.3")
    runner = start("--run_folder", "fork", "--rlvr.model.lr", "0.3", "--update")
    assert runner.started == ["align", "filter", "rlvr", "evaluate-rlvr", "report"]
    assert Path("fork/align/export").exists()
    assert "fork/align/export" in ledger("fork")["stages"]["rlvr"]["command"]
    assert Path("run/align/export").exists()


def test_a_fork_keeps_what_it_took_when_the_original_runs_it_anew():
    start()
    fork = ["--run_folder", "fork", "--rlvr.model.lr", "0.3"]
    start("--from", "rlvr", "--to", "fork", *fork[2:])
    read = ledger("fork")["stages"]["rlvr"]["parents"]
    edit("align.yaml", "lr: 0.1", "lr: 0.2")
    start("--update")
    edit("align.yaml", "lr: 0.2", "lr: 0.1")
    assert start(*fork).started == []
    taken = ledger("fork")["stages"]["align"]
    assert taken["folder"] == "../run/earlier/align"
    assert taken["outputs"]["export"] == read["align"]["export"]
    # What runs in the fork reads what the fork took, not what the original has now.
    assert start(*fork, "--evaluate-rlvr.model.lr", "7", "--update").started == ["evaluate-rlvr", "report"]
    assert start(*fork[:2], "--rlvr.model.lr", "0.4", "--update").started == ["rlvr", "evaluate-rlvr", "report"]
    assert "--model.policy.path run/earlier/align/export" in ledger("fork")["stages"]["rlvr"]["command"]
    assert ledger("fork")["stages"]["rlvr"]["parents"] == read


def test_from_takes_the_next_free_folder():
    start()
    start("--from", "report")
    assert ledger("run-2")["stages"]["report"]["folder"] == "report"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from", "rlrv"], "Did you mean rlvr?"),
        (["--from", "rlvr", "--run_folder", "none"], "none holds no pipeline to fork"),
        (["--from", "rlvr"], "it depends on align, filter, which run has not finished"),
        (["--from", "align", "--to", "run"], "--to run exists"),
        (["--to", "fork"], "--to names the new folder of --from"),
        (["--from", "align", "--update"], "--update does not go with it"),
    ],
)
def test_a_fork_that_cannot_be_is_one_message(options, said):
    with pytest.raises(PipelineFailed):
        start(runner=FakeRunner({"align": 1}))
    with pytest.raises(UsageError, match=re.escape(said)):
        start(*options)


def test_fresh_runs_everything_beside():
    start()
    assert start("--fresh").started == [*ALL, "report"]
    assert ledger("run-2")["command"].endswith("--run_folder run-2")


@pytest.mark.parametrize(("given", "threads"), [(None, "2"), ("5", "5")])
def test_processes_side_by_side_share_the_cores(monkeypatch, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(jobs, "can_fork", lambda: False)
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 8)
    environments = []
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda *args, env, **options: environments.append(env))
    jobs.ProcessRunner(parallel=4).start(["fit"], Path("run/stage.log"), on_screen=False)
    assert environments[0]["OMP_NUM_THREADS"] == threads
    assert jobs.ProcessRunner().threads is None  # alone a stage has them all


@pytest.mark.skipif(sys.platform != "linux", reason="stages are forked on Linux only")
@pytest.mark.parametrize("given", [None, "5"])
def test_forks_side_by_side_share_the_cores(monkeypatch, given):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)  # torch has read it when it was imported
    had = torch.get_num_threads()
    monkeypatch.setattr(jobs, "can_fork", lambda: True)
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 4 * (had + 1))
    monkeypatch.setattr("prism_pl.__main__.main", lambda args: print(torch.get_num_threads()))
    log = Path("run/stage.log")
    job = jobs.ProcessRunner(parallel=4).start(["fit"], log, on_screen=False)
    while (code := job.poll()) is None:
        time.sleep(0.01)
    assert code == 0
    assert log.read_text() == f"{had + 1 if given is None else had}\n"


def test_the_engine_is_imported_once_and_only_for_stages_that_name_one(monkeypatch):
    imported = []
    monkeypatch.setattr(jobs, "can_fork", lambda: True)
    monkeypatch.setattr("prism_pl.rollout.vllm_compat.import_vllm", lambda: imported.append("vllm"))
    monkeypatch.setattr(jobs.gc, "freeze", lambda: None)
    monkeypatch.setattr(jobs.atexit, "register", lambda function: None)
    runner = jobs.ProcessRunner()
    runner.prepare({"model": {"class_path": "modules.SFTModule"}})
    assert imported == []
    for name in ("AutoEngine", "VLLMEngine"):
        runner.prepare({"model": {"engine": {"class_path": f"prism_pl.rollout.{name}"}}})
    assert imported == ["vllm"]


def test_each_stage_is_prepared_for_before_it_starts(monkeypatch):
    seen = []
    monkeypatch.setattr(FakeRunner, "prepare", lambda self, config: seen.append(len(self.started)))
    assert len(start().started) == len(seen)
    assert seen == list(range(len(seen)))


def test_what_does_not_depend_on_a_failure_still_runs_if_asked_to():
    edit("pipeline.yaml", "stages:", "keep_going: true\nstages:")
    runner = FakeRunner({"filter": 1})
    with pytest.raises(PipelineFailed, match="Stage filter failed with exit code 1"):
        start(runner=runner)
    lost = {"rlvr", "evaluate-rlvr", "report"}
    assert set(runner.started) == {*ALL, "report"} - lost
    assert {name for name, status in statuses().items() if status == "pending"} == lost
    assert set(start().started) == {"filter", *lost}


# Wrong YAML


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "{sft.export}",
            "{stf.export}",
            "pipeline.yaml: stages.align.set.model.policy.path: there is no stage 'stf'. Did you",
        ),
        ("{sft.export}", "{sft.exprt}", "sft leaves no 'exprt'. Did you mean export?"),
        (
            "rlvr.trainer.max_steps",
            "rlvr.trainer.max_stepz",
            "rlvr has no setting trainer.max_stepz. Did you mean max_steps?",
        ),
        (
            "base: {command",
            "base: {comand",
            "pipeline.yaml: stages.base.comand: there is no such key. Did you mean command?",
        ),
        (
            "command: predict",
            "command: predct",
            "stages.filter: command: predct is not one of fit, validate, test, predict",
        ),
        ("stages:", "paralel: 2\nstages:", "pipeline.yaml: paralel: there is no such key. Did you mean parallel?"),
        ("sft.yaml", "stf.yaml", "stf.yaml: no such file"),
        (
            "sft.yaml, set: {model.policy.path: weights",
            "sft.yaml, set: {model.policy.path: '{rlvr.export}'",
            "stages: the references go in a circle, sft <- rlvr <- align <- sft. Cut it.",
        ),
        ("config: sft.yaml,", "", "stages.sft: fit needs a config, here or in defaults.fit"),
        ("base:", "base/x:", "a stage's name is its folder's too"),
        ("stages:", "stages: [", "pipeline.yaml is no YAML"),
        ("stages:", "stagse:", "stagse: there is no such key. Did you mean stages?"),
        ("model.lr: 0.5", "trainer.default_root_dir: x", "trainer.default_root_dir is the pipeline's to choose"),
        (
            "model.lr: 0.5",
            "model.wrong: x",
            "pipeline.yaml: stages.baseline: python -m prism_pl fit --config rlvr.yaml",
        ),
    ],
)
def test_a_wrong_pipeline_is_one_message_before_anything_runs(old, new, said):
    edit("pipeline.yaml", old, new)
    with pytest.raises(UsageError, match=re.escape(said)):
        start()
    assert not Path("run/ledger.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--paralel", "2"], "Did you mean --parallel?"),
        (["--parallel", "0"], "parallel is 0; give at least 1"),
        (["--parallel", "two"], "parallel: 'two' is no int"),
        (["--sftt.trainer.max_steps", "2"], "there is no stage 'sftt'. Did you mean sft?"),
        (["--sft.trainer.max_steps"], "--sft.trainer.max_steps needs a value"),
        (["--sft.trainer.max_steps", "--update"], "--sft.trainer.max_steps needs a value, and --update is an option"),
    ],
)
def test_a_wrong_command_line_is_one_message(options, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        start(*options)


def test_a_reference_without_quotes_is_understood():
    edit("pipeline.yaml", '"{sft.export}"', "{sft.export}")
    assert start().started == [*ALL, "report"]


@pytest.mark.parametrize("content", ['{"format": 1, ', "[]", "{}", '{"format": 1}', '{"format": 1, "stages": []}'])
def test_a_broken_ledger_is_named(content):
    start()
    Path("run/ledger.json").write_text(content)
    with pytest.raises(UsageError, match=r"run/ledger\.json is no whole ledger"):
        start()


def test_print_config_is_a_pipeline_that_runs_the_same(capsys):
    assert main(["pipeline", "--config", "pipeline.yaml", "--sft.model.lr", "7", "--print_config"]) == 0
    Path("pipeline.yaml").write_text(capsys.readouterr().out)
    start()
    assert ledger()["stages"]["sft"]["config"]["model"]["lr"] == 7
