"""Reports: their numbers are those that the runs wrote; what is missing is said; what is wrong is one message."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from prism_pl.__main__ import main
from prism_pl.report.events import read_curves
from prism_pl.report.runs import default_pairs, read_runs
from tests.run_data import response, write_evaluation, write_ledger, write_run, write_stage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", images=True)


@pytest.fixture(scope="module")
def report(run) -> str:
    """The report of the run, made once."""
    assert main(["report", str(run), "--num_resamples", "200"]) == 0
    return (run / "report.md").read_text()


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one as high."""
    level = heading.split()[0]
    return text.split(f"{heading}\n")[1].split(f"\n{level} ")[0]


def cells(text: str, row: str) -> dict[str, str]:
    """Column -> cell of the first table that has a row of this name."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    index = next(n for n, found in enumerate(rows) if found[0] == row)
    header = max(n for n in range(index) if set(rows[n + 1][0]) == {"-"})
    return dict(zip(rows[header], rows[index], strict=True))


# Numbers


def test_results_are_the_evaluations(report):
    found = section(report, "## Results: test")
    assert cells(found, "align")["accuracy"].startswith("50.0 [")  # 2 of 4
    assert cells(found, "rlvr")["accuracy"].startswith("75.0 [")
    assert cells(found, "sft")["items W1"] == "2.00 [2.00, 2.00]"  # 1 item, and the supervision has 3
    assert cells(found, "align")["caption precision"] == "50.0"
    assert "4 prompts of test" in found
    families = section(found, "### Question families")
    assert cells(families, "sum (2)")["align"].startswith("50.0")  # row 0 right, row 2 wrong
    assert cells(families, "all families (4)")["rlvr"].startswith("75.0")


def test_base_without_a_parsed_response_has_no_numbers_instead_of_nan(report):
    assert cells(report, "base")["items W1"] == "n/a"
    assert cells(section(report, "### Structure and length against the supervision"), "base")["tokens"].startswith(
        "2.0"
    )
    assert not re.search(r"\bnan\b", report)


def test_each_checkpoint_is_compared_with_the_one_it_was_trained_from(run, report):
    found = cells(section(report, "### Paired differences"), "accuracy")
    assert list(found) == ["difference", "sft - base", "align - sft", "rlvr - align"]
    assert found["sft - base"].startswith("+0.250 [")
    assert cells(section(report, "### Paired differences"), "descriptive_items/distance")["sft - base"] == "n/a"
    assert found["align - sft"].startswith("+0.250 [")  # 2/4 - 1/4
    distance = cells(section(report, "### Paired differences"), "descriptive_items/distance")
    assert distance["align - sft"] == "-2.000 [-2.000, -2.000] *"  # |3 - 3| - |1 - 3|
    (read,) = read_runs([run])
    assert default_pairs(read) == [("sft", "base"), ("align", "sft"), ("rlvr", "align")]


def test_reward_gap_is_the_event_files(report):
    row = next(line for line in section(report, "## Reward gap").splitlines() if line.startswith("| align"))
    # A quarter of four steps is one.
    assert row == "| align | perception | 0.800 | 0.200 | 0.900 | 0.350 |"


def test_what_acted_says_mean_peak_and_never(report):
    acted = section(report, "## What acted")
    assert cells(acted, "tokens whose ratio was clipped, share")["rlvr"] == "0.125 (at most 0.25)"
    assert cells(acted, "tokens under the dual clip, share")["rlvr"] == "0: never"
    assert cells(acted, "tokens under the dual clip, share")["align"] == ""
    assert cells(acted, "batches whose gradient was clipped, share")["align"] == "0.5 (above 1)"  # 2 and 3 of 4


def test_cost_adds_up_phases_and_tokens(report):
    cost = section(report, "## Cost")
    found = cells(cost, "align")
    assert (found["batches"], found["tokens"], found["rollout, s"]) == ("4", "600", "4.0")
    assert (found["all, s"], found["time from"]) == ("3.0", "events")  # four numbers, a second apart
    assert cells(cost, "rlvr")["policy, s"] == "1.0"
    assert cells(cost, "sft")["tokens"] == "n/a"


def test_tokens_and_times_are_of_all_batches_where_only_some_were_logged(tmp_path):
    write_stage(tmp_path / "demo" / "align", {"align/tokens": [100.0], "time/rollout": [2.0]}, first=9)
    assert main(["report", str(tmp_path / "demo")]) == 0
    found = cells((tmp_path / "demo" / "report.md").read_text(), "align")
    assert (found["batches"], found["tokens"], found["rollout, s"]) == ("10", "1,000", "20.0")


def test_of_repeated_steps_the_later_start_counts_whatever_the_files_times_are(tmp_path):
    stage = write_stage(tmp_path, {"align/tokens": [100.0]}, first=9)
    (first,) = tmp_path.glob("events*")
    write_stage(stage, {"align/tokens": [300.0, 500.0]}, first=9)
    os.utime(first)  # as a copy may leave it: the earlier start's file is the newest
    first.rename(tmp_path / "events.out.tfevents.9999999999.copied")
    assert read_curves(stage)["align/tokens"][:2] == ([9, 10], [300.0, 500.0])


def test_samples_follow_the_rule_and_have_their_images(run, report):
    samples = section(report, "## Samples")
    # sft is right on row 0 alone, align on 0 and 1, rlvr on 0 to 2; base is malformed everywhere and counts as neither.
    assert "of the 4 test prompts whose images were kept the first 2 by id of those 2" in samples
    assert re.findall(r"### (row-\d)", samples) == ["row-1", "row-2"]
    assert "base: **malformed (\\<caption\\> is missing)**" in samples
    assert "align, rlvr: **right**" in samples
    assert r"Sum of \*1\*?" in samples
    links = re.findall(r'(?:src="|\]\()(report_files/[^")]+)', report)
    assert "report_files/sample-row-1-0.png" in links
    assert len(links) == 8  # accuracy, structure, truth, gap, training, cost, and two samples
    for link in links:
        assert min(Image.open(run / link).size) >= 8


def test_figures_are_legible_on_any_page(run, report):
    """Opaque paper of their own, and ink on it."""
    image = Image.open(run / "report_files" / "accuracy-test.png").convert("RGBA")
    corner = image.getpixel((1, 1))
    assert isinstance(corner, tuple)
    assert corner[3] == 255
    assert min(corner[:3]) > 240
    darkest = min(sum(pixel[:3]) for _, pixel in image.getcolors(2**24) or [])  # pyright: ignore[reportIndexIssue, reportArgumentType, reportCallIssue]
    assert darkest < 200


def test_the_difficulty_filter_is_shown(run, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(run / "rlvr", folder / "rlvr")
    kept = {"pass_rates": "filter/pass_rates.jsonl", "keep": [0.2, 0.8], "ids": ["b"]}
    (folder / "rlvr" / "kept_ids.json").write_text(json.dumps(kept))
    (folder / "filter").mkdir()
    rates = {"a": 0.0, "b": 0.5, "c": 1.0, "d": 1.0}
    lines = [json.dumps({"id": id, "pass_rate": rate}) + "\n" for id, rate in rates.items()]
    (folder / "filter" / "pass_rates.jsonl").write_text("".join(lines))
    assert main(["report", str(folder)]) == 0
    found = section((folder / "report.md").read_text(), "## Difficulty filter")
    assert "| filter | 4 | 0.625 | 1 | 2 | 0 x 1, 0.5 x 1, 1 x 2 |" in found
    assert "| rlvr | 1 | [0.2, 0.8] | filter/pass_rates.jsonl |" in found


# Several runs


def test_two_runs_stand_side_by_side(run, tmp_path):
    other = write_run(tmp_path / "other", right=4)
    out = tmp_path / "both.md"
    assert main(["report", str(run), str(other), "--out", str(out), "--num_resamples", "100"]) == 0
    text = out.read_text()
    side = section(text, "### Runs side by side")
    row = next(line for line in side.splitlines() if line.startswith("| rlvr | accuracy"))
    _, _, first, second, difference = (cell.strip() for cell in row.strip("|").split("|"))
    assert first.startswith("75.0 [")
    assert second == "100.0 [100.0, 100.0]"
    assert difference.startswith("+0.250 [")
    assert cells(text, "other/rlvr")["accuracy"] == "100.0 [100.0, 100.0]"
    assert "demo/align - demo/sft" in text
    assert "| demo/align | perception |" in section(text, "## Reward gap")
    assert main(["report", str(run), str(other)]) == 2
    pair = ["--pairs", "other/rlvr:demo/rlvr", "--num_resamples", "100", "--num_samples", "0"]
    assert main(["report", str(run), str(other), "--out", str(out), *pair]) == 0
    assert list(cells(section(out.read_text(), "### Paired differences"), "accuracy")) == [
        "difference",
        "other/rlvr - demo/rlvr",
    ]


def test_single_evaluations_are_runs_too(run, tmp_path):
    folders = [str(run / "evaluate" / name) for name in ("align", "sft")]
    out = tmp_path / "table.md"
    assert main(["report", *folders, "--pairs", "align:sft", "--out", str(out)]) == 0
    assert cells(section(out.read_text(), "### Paired differences"), "accuracy")["align - sft"].startswith("+0.250")


# Requirements


def test_unmet_requirements_end_with_exit_code_1_and_the_sentence(run, capsys):
    base = ["report", str(run), "--num_resamples", "200", "--num_samples", "0"]
    assert main([*base, "--require", "align:sft:descriptive_items/distance:down", "align:sft:caption_exact:kept"]) == 0
    capsys.readouterr()
    assert main([*base, "--require", "sft:align:descriptive_items/distance:down", "align:sft:format:kept"]) == 1
    captured = capsys.readouterr()
    assert "written to" in captured.out
    wanted = "not met: sft:align:descriptive_items/distance:down: the difference is +2.000 [+2.000, +2.000]"
    assert captured.err.strip() == wanted


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--require", "align:sft:accuracy:rise"],
            "--require 'align:sft:accuracy:rise': give name:name:metric:up|down|kept",
        ),
        (["--require", "align:sft:acuracy:up"], "with a metric of accuracy, format"),
        (["--pairs", "align:sfd"], "names 'sfd', which is none of them; the evaluations are base, sft, align, rlvr"),
        (["--pairs", "align"], "--pairs 'align': give name:name"),
        (["--splits", "tests"], "--splits tests: the evaluations have test"),
        (["--num_sample", "x"], "argument --num_samples: invalid int value"),
    ],
)
def test_wrong_options_are_named(run, capsys, options, says):
    assert main(["report", str(run), *options]) == 2
    assert says in capsys.readouterr().err


# What is missing or broken


def test_missing_pieces_are_left_out_with_a_line(tmp_path, run):
    folder = tmp_path / "evaluated"
    shutil.copytree(run / "evaluate" / "sft", folder / "sft")
    shutil.rmtree(folder / "sft" / "images")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    for heading in ("Reward gap", "Training", "What acted", "Difficulty filter", "Cost"):
        assert section(text, f"## {heading}").strip().startswith("Left out: no ")
    assert "Left out: no two checkpoints" in text
    assert "The image images/row-0-0.png is gone." in text
    trained = tmp_path / "trained"
    write_stage(trained / "sft", {"sft/loss": [3.0, 1.0]})
    (trained / "sft" / "export").mkdir()
    assert main(["report", str(trained)]) == 0
    text = (trained / "report.md").read_text()
    assert "stages sft (sft); no checkpoint was evaluated." in text
    assert "Not evaluated: sft/export (`python -m prism_pl test" in text
    assert "Left out: no evaluation.json was found" in section(text, "## Results")
    assert cells(section(text, "## Cost"), "sft")["batches"] == "2"


def test_a_checkpoint_without_a_split_is_left_out_of_its_tables(tmp_path):
    write_evaluation(tmp_path / "demo" / "a", "a", [response()] * 2, "a")
    write_evaluation(tmp_path / "demo" / "b", "b", [response()] * 2, "b", split="hard")
    assert main(["report", str(tmp_path / "demo")]) == 0
    text = (tmp_path / "demo" / "report.md").read_text()
    assert "Without test prompts: b." in section(text, "## Results: test")
    assert "Without hard prompts: a." in section(text, "## Results: hard")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda folder: None,
            "demo: there is no such folder. Give that of a run, such as runs/demo. Beside it: other.",
        ),
        (
            lambda folder: (folder.parent / "demo2").mkdir(),
            "there is no such folder. Give that of a run, such as runs/demo. Did you mean demo2?",
        ),
        (lambda folder: folder.mkdir(), "this is no run. It holds no evaluation.json"),
        (lambda folder: folder.mkdir(), "Give the folder that holds the stages' folders. Beside it: other"),
        (lambda folder: folder.write_text("x"), "this is a file. Give the folder of a run"),
        (lambda folder: broken(folder / "evaluation.json", "{"), "evaluation.json is no evaluation"),
        (lambda folder: broken(folder / "ledger.json", "[]"), "ledger.json is no ledger"),
    ],
)
def test_what_is_no_run_is_one_message(tmp_path, capsys, make, says):
    (tmp_path / "other").mkdir()
    make(tmp_path / "demo")
    assert main(["report", str(tmp_path / "demo")]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error


def broken(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_the_ledger_gives_names_order_and_times(tmp_path):
    folder = write_run(tmp_path / "demo")
    (folder / "earlier").mkdir()
    shutil.copytree(folder / "align", folder / "earlier" / "align")
    shutil.move(folder / "rlvr", tmp_path / "forked")
    entry = {"kind": "fit", "status": "finished", "seconds": 50.0}
    stages = {
        "last": {**entry, "folder": "../forked"},
        "align": {**entry, "folder": "align", "seconds": 7.5, "status": "interrupted"},
        "gone": {**entry, "folder": "gone", "seconds": None, "status": "pending"},
    }
    write_ledger(folder, stages)
    (read,) = read_runs([folder])
    assert [stage.name for stage in read.stages] == ["last", "align", "sft"]
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert cells(section(text, "## Cost"), "last")["all, s"] == "50.0"
    assert cells(section(text, "## Cost"), "align")["time from"] == "ledger"
    assert "58 s in all" in text
    assert "align is interrupted" in text
    assert json.loads((folder / "ledger.json").read_text())["stages"] == stages


def test_help_is_fast_and_needs_no_torch(tmp_path):
    start = time.monotonic()
    light = "import sys, prism_pl.__main__ as m; m.main(['report', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert time.monotonic() - start < 5


def test_a_report_is_made_without_torch():
    light = "import sys, prism_pl.report.document; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], cwd=ROOT, capture_output=True, check=False).returncode == 0
