"""The report's section on the health of the game, from event files whose numbers are known."""

import json
import math

from prism_pl.__main__ import main
from tests.run_data import ALIGN, write_stage
from tests.test_report import cells, section

PANEL = {
    "health/accuracy/perception/discriminator": [0.9, 0.8, 0.75, 0.7],
    "health/accuracy/perception/length": [0.5, 0.6, 0.7, 0.68],
    "health/accuracy/perception/surface": [0.5, 0.5, 0.5, 0.55],
    "health/explained/perception/length": [0.0, 0.1, 0.2, 0.25],
    "health/explained/perception/surface": [math.nan] * 4,
    "health/score_std/perception": [0.5, 0.4, 0.3, 0.25],
    "health/saturated_margins/perception": [0.0, 0.0, 0.0, 0.125],
    "align/router/entropy/mean": [1.3, 1.2, 1.1, 1.0],
    "align/router/mutual_information/mean": [0.0, 0.0, 0.0, 0.25],
    "align/governor/push": [0.0, -1.0, -1.0, 1.0],
    "align/governor/accuracy": [0.9, 0.8, 0.75, 0.7],
    "health/settled": [1.0, 0.0, 1.0, 1.0],
    "health/settled_at": [math.nan, math.nan, math.nan, 8.0],
}
FLAGS = {"health/style/perception/length": [0.0, 1.0, 1.0], "health/style/perception/surface": [0.0, 0.0, 0.0]}


def told(folder, scalars, choice=None) -> str:
    stage = write_stage(folder / "demo" / "align", ALIGN | scalars)
    if choice:
        (stage / "choice.json").write_text(json.dumps(choice))
    assert main(["report", str(folder / "demo")]) == 0
    return section((folder / "demo" / "report.md").read_text(), "## Is the game healthy?")


def test_the_shadows_stand_beside_the_discriminator_with_the_flags(tmp_path):
    validations = [{"step": 2, "proxies/val_drift": 0.1}, {"step": 4, "proxies/val_drift": 0.25}]
    found = told(tmp_path, PANEL | FLAGS, {"choice": "least_drift", "step": 2, "validations": validations})
    row = cells(found, "align")
    assert (row["pairs right, %"], row["length alone"], row["surface alone"]) == ("70.0", "68.0", "55.0")
    assert (row["scores explained by length, %"], row["by surface"]) == ("25", "n/a")
    assert (row["score std"], row["saturated pairs, %"], row["saturated scores, %"]) == ("0.250", "12.5", "")
    assert "FLAG: the expert perception may be rewarding style (length): 2 of 3 windows, first at batch 1." in found
    assert "(surface)" not in found
    assert "load entropy 1.00 nats, 0.250 nats about the segment" in found
    assert "held the discriminator back in 2 of 4 batches and pushed it in 1; last accuracy 0.700" in found
    assert "the gaps had settled at step 8 (batch 3)" in found
    assert "the policy of step 2, of the least drift on validation rows (0.100; the last had 0.250)" in found
    assert (tmp_path / "demo" / "report_files" / "health.png").exists()


def test_a_run_that_was_not_judged_and_one_that_was_not_flagged_say_so(tmp_path):
    assert "not judged for style" in told(tmp_path / "short", PANEL)
    unsettled = {"health/settled": [0.0] * 4, "health/settled_at": [math.nan] * 4}
    clean = {name: [0.0] * 4 for name in FLAGS} | unsettled
    found = told(tmp_path / "clean", PANEL | clean)
    assert "no expert was flagged" in found
    assert "FLAG" not in found
    assert "the gaps did not settle." in found


def test_calm_that_the_monitor_did_not_mark_is_not_reported_as_settled(tmp_path):
    found = told(tmp_path, PANEL | {"health/settled": [0.0, 1.0, 0.0, 1.0], "health/settled_at": [math.nan] * 4})
    assert "the gaps did not settle: flat and quiet in 2 of 4 batches, never in enough of them in a row." in found


def test_without_the_panel_it_is_left_out_with_the_reason(tmp_path):
    assert "Left out: no stage logged the panel (callbacks.DiscriminatorHealth does)" in told(tmp_path, {})
