"""The report's section on drift: numbers of the evaluations, their differences, and what is missing or does not fit."""

import json
from pathlib import Path

import pytest
from PIL import Image

from prism_pl.__main__ import main
from tests.run_data import write_run
from tests.test_report import cells, section


def plant(folder: Path, auc: float, nats: float, embedder: str = "assets/base") -> None:
    """What the drift meter adds to an evaluation: one AUC, and `nats` for each of the two tokens of every caption."""
    file = folder / "evaluation.json"
    content = json.loads(file.read_text())
    content["drift"] = {"embedder": {"path": embedder}, "num_prompts": 256}
    entry = {"mean": auc, "low": auc - 0.1, "high": auc + 0.1, "prompts": 4, "responses": 4}
    table = content["tables"]["test"]["all"]
    table["probe_auc"] = entry
    table["probe_auc_length_matched"] = entry | {"mean": None, "low": None, "high": None}
    table["teacher_nll_caption"] = entry | {"mean": nats, "low": nats, "high": nats}
    for record in content["records"]:
        record["supervision"]["nll"] = {"caption": [2 * nats, 2]}
    file.write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path) -> Path:
    folder = write_run(tmp_path / "demo")
    for name, auc, nats in (("base", 1.0, 3.0), ("sft", 0.9, 2.0), ("align", 0.6, 1.0), ("rlvr", 0.7, 1.0)):
        plant(folder / "evaluate" / name, auc, nats)
    return folder


def report(run: Path) -> str:
    assert main(["report", str(run), "--num_resamples", "100", "--num_samples", "0"]) == 0
    return (run / "report.md").read_text()


def test_the_table_and_the_figure_are_of_the_evaluations(run):
    greedy = run / "evaluate" / "align" / "evaluation.json"
    greedy.write_text(json.dumps(json.loads(greedy.read_text()) | {"sampling": {"temperature": 0.0}}))
    found = section(report(run), "### Drift from the supervision")
    row = cells(found, "align")
    assert row["AUC"] == "0.60 [0.50, 0.70]"
    assert row["AUC, same length"] == "n/a"
    assert row["NLL caption"] == "1.00 [1.00, 1.00]"
    assert row["items W1"] == "0.00 [0.00, 0.00]"
    assert "energy" not in row  # no evaluation has it
    assert "by `assets/base`" in found
    assert "on at most 256 prompts" in found
    assert "Those of AUC are narrower than that" in found
    assert "Decoded at temperature 0 (align): a checkpoint's most likely response beside samples" in found
    assert "drift-test.png" in found
    assert min(Image.open(run / "report_files" / "drift-test.png").size) > 100


def test_likelihoods_are_compared_prompt_by_prompt(run):
    found = cells(section(report(run), "### Paired differences"), "teacher_nll_caption")
    assert found["sft - base"] == "-1.000 [-1.000, -1.000] *"
    assert found["rlvr - align"] == "+0.000 [+0.000, +0.000]"


def test_without_the_meter_the_section_says_so(tmp_path):
    found = section(report(write_run(tmp_path / "demo")), "### Drift from the supervision")
    assert found.strip() == "Left out: the drift meter was off (`drift` of the evaluation's YAML)."


def test_distances_by_different_embedders_are_not_shown_side_by_side(run, capsys):
    plant(run / "evaluate" / "rlvr", 0.7, 1.0, embedder="assets/sft")
    assert main(["report", str(run)]) == 1
    said = capsys.readouterr().err
    assert "embed responses by different networks (assets/base, assets/sft)" in said
    assert "evaluate all with one --model.drift.embedder.path" in said
