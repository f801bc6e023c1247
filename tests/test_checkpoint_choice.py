"""Which checkpoint is exported: the last, or that of the validation with the least drift."""

import json
import math

import pytest

from callbacks import Export, StructuralProxies
from prism_pl.chat import render
from prism_pl.checkpoint_choice import Choice
from prism_pl.metrics import StructureDrift
from tests.stubs import SaveAfter
from tests.test_callbacks import Stage, fit, read, scalars


def response(items: int) -> str:
    return render("- x\n" * items, "1. x", "3")


def test_drift_by_hand():
    drift = StructureDrift(segment="caption")
    drift.update(policy=[response(2), response(4)], supervision=[response(4), response(6)])
    assert drift.compute()["drift"].item() == pytest.approx(2 / 5)  # two items apart, of five
    # A malformed response has no items: sorted 0, 2, 4 against 4, 4, 6 lie 4, 2, 2 apart, of 14 / 3.
    drift.update(policy=["malformed"], supervision=[response(4)])
    assert drift.compute()["drift"].item() == pytest.approx((8 / 3) / (14 / 3))
    assert math.isnan(StructureDrift().compute()["drift"].item())


def test_the_earliest_of_the_least_is_chosen_and_nan_never():
    choice = Choice()
    assert choice.step is None
    drifts = [(2, math.nan), (4, 0.5), (6, 0.3), (8, 0.3), (10, 0.4)]
    assert [choice.add(*drift) for drift in drifts] == [False, True, True, False, False]
    assert choice.step == 6
    # A resumed run validates the steps behind its checkpoint again.
    again = Choice(choice.validations)
    assert again.add(8, 0.3) is False
    assert again.add(8, 0.2) is True
    assert [step for step, _ in again.validations] == [2, 4, 6, 8]


class Drifting(Stage):
    """A stage whose held-out captions have so many items at each validation; the supervision has four."""

    def __init__(self, items):
        super().__init__()
        self.items = items

    def validation_step(self, batch, batch_idx):
        return {"rollouts": [response(self.items[self.trainer.current_epoch])], "demonstrations": [response(4)]}


def run(folder, items, choice="least_drift", more=(), **options):
    stage = Drifting(items)
    fit(folder, [StructuralProxies(), Export(choice), *more], stage, max_epochs=len(items), **options)


def weight(folder, name):
    return json.loads((folder / name / "weight.json").read_text())


def test_export_holds_the_policy_of_least_drift_and_says_which(tmp_path):
    run(tmp_path, [1, 3, 8], limit_val_batches=1.0)
    assert weight(tmp_path, "export") == 6  # after the second epoch of three batches
    assert weight(tmp_path, "export-last") == 9
    told = json.loads((tmp_path / "choice.json").read_text())
    # The stage steps two optimisers a batch.
    assert (told["choice"], told["step"]) == ("least_drift", 12)
    # (3/4 + 0) / 2, (1/4 + 0) / 2, (4/4 + 0) / 2: captions and reasoning weigh alike.
    assert [v["proxies/val_drift"] for v in told["validations"]] == pytest.approx([0.375, 0.125, 0.5])
    events = read(tmp_path)
    assert [v for _, v in scalars(events, "proxies/val_drift")] == pytest.approx([0.375, 0.125, 0.5])
    assert [v for _, v in scalars(events, "proxies/descriptive_items/val_drift")] == pytest.approx([0.75, 0.25, 1.0])


def test_the_last_is_the_default(tmp_path):
    run(tmp_path, [1, 3, 8], "last", limit_val_batches=1.0)
    assert weight(tmp_path, "export") == 9
    assert not (tmp_path / "export-last").exists()
    assert not (tmp_path / "choice.json").exists()


def test_a_resumed_run_remembers_what_was_chosen(tmp_path):
    saving = SaveAfter(7, tmp_path / "third.ckpt")
    run(tmp_path / "whole", [1, 3, 8], more=[saving], limit_val_batches=1.0)
    run(tmp_path / "resumed", [1, 3, 8], limit_val_batches=1.0, ckpt_path=tmp_path / "third.ckpt")
    told = [json.loads((tmp_path / name / "choice.json").read_text()) for name in ("whole", "resumed")]
    assert told[0] == told[1]
    assert not (tmp_path / "resumed" / "export").exists()  # it lies in the folder where it was exported


def test_without_a_drift_to_choose_by_it_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"needs proxies/val_drift: add callbacks\.StructuralProxies"):
        fit(tmp_path / "a", [Export("least_drift")], Drifting([1]), limit_val_batches=1.0)
    with pytest.raises(ValueError, match=r"nothing to choose from.*trainer\.val_check_interval"):
        run(tmp_path / "b", [1])
    assert weight(tmp_path / "b", "export-last") == 3
