"""Batches of like length and pass rates on rows from files, under a real Trainer: exact resume, ranks, other data."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from datamodules import DemonstrationsDataModule, PromptsDataModule
from prism_pl.data.check import write
from prism_pl.data.facts import Facts
from prism_pl.data.overlap import Split
from tests.file_data import opened, prompt, sharegpt, write_images, write_lines, write_parquet
from tests.test_digits_datamodule import Recorder, trainer

NUM_ROWS = 60


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """60 rows of 10 to 99 tokens, as a check would have measured them; row 7 is one to leave out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    write_images(tmp_path, 1)
    write_lines(tmp_path / "rows.jsonl", [sharegpt(0) for _ in range(NUM_ROWS)])
    (tmp_path / "check").mkdir()
    check(tmp_path / "check", left_out=[7])
    return tmp_path


def check(folder, left_out, longer=0):
    facts = [Facts(f"rows-{n}", prompt_tokens=int(length) + longer) for n, length in enumerate(lengths())]
    for row in left_out:
        facts[row].unusable = "no response"
    write(folder, {"train": Split("train", facts)}, opened(DemonstrationsDataModule("rows.jsonl")))


def lengths():
    return np.random.default_rng(0).integers(10, 100, NUM_ROWS)


BATCHES = {"tokens": {"batch_tokens": 400, "batch_size": 16}, "length": {"group_by_length": True, "batch_size": 8}}


def data(kind, **options):
    return DemonstrationsDataModule("rows.jsonl", check_folder="check", **BATCHES[kind], **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BATCHES)
def test_a_resumed_run_goes_on_with_the_batches_of_the_uninterrupted_one(kind, folder):
    num_batches = len(opened(data(kind)).train_dataloader())
    assert 4 <= num_batches <= 12
    whole, steps = Recorder(), 2 * num_batches + 1
    trainer(folder / "run", max_steps=steps).fit(whole, data(kind))
    size = lengths()
    for batch in whole.trained:
        rows = [int(row.removeprefix("rows-")) for row in batch]
        if kind == "tokens":
            assert len(rows) * size[rows].max() <= 400
        else:
            assert len(rows) == 8
    epochs = [whole.trained[:num_batches], whole.trained[num_batches : 2 * num_batches]]
    for epoch in epochs:
        seen = [row for batch in epoch for row in batch]
        assert len(seen) == len(set(seen)) == (59 if kind == "tokens" else 56)
        assert "rows-7" not in seen
    assert epochs[0] != epochs[1]
    for step, workers in ((2, 0), (num_batches, 0), (num_batches + 2, 1)):
        resumed = Recorder()
        run = trainer(folder / "again", max_steps=steps, save_every=100)
        run.fit(resumed, data(kind, num_workers=workers), ckpt_path=str(folder / "run" / f"step={step}.ckpt"))
        assert resumed.trained == whole.trained[step:], step


def test_ranks_share_the_batches_out_and_have_as_many(folder):
    module = opened(data("tokens"))
    of_rank = []
    for rank in range(2):
        module.trainer = SimpleNamespace(
            world_size=2,
            global_rank=rank,
            is_global_zero=rank == 0,
            lightning_module=SimpleNamespace(collator=list, hparams={}),
        )
        of_rank.append([[row.id for row in batch] for batch in module.train_dataloader()])
    assert len(of_rank[0]) == len(of_rank[1]) >= 4
    first, second = ({row for batch in batches for row in batch} for batches in of_rank)
    assert not first & second


def test_rows_that_fill_no_batch_are_counted_and_too_few_of_them_refused_by_their_number(folder, caplog):
    caplog.set_level("INFO")
    loader = opened(data("length")).train_dataloader()
    assert sum(len(batch) for batch in loader) == 56
    said = "3 of 59 training rows fill no batch of 8 and are left out of every epoch; batch_tokens takes them in"
    assert caplog.text.count(said) == 1
    opened(data("tokens")).train_dataloader()
    opened(DemonstrationsDataModule("rows.jsonl", check_folder="check", group_by_length=True, batch_size=59))
    assert caplog.text.count("fill no batch") == 1
    few = {"check_folder": "check", "group_by_length": True, "batch_size": 60}
    with pytest.raises(ValueError, match=r"batch_size is 60, and there are only 59 training rows: give a smaller"):
        opened(DemonstrationsDataModule("rows.jsonl", **few)).train_dataloader()


@pytest.mark.parametrize("options", [{"group_by_length": True, "batch_size": 30}, {"batch_tokens": 8000}])
def test_fewer_batches_than_processes_are_refused_by_their_number(options, folder):
    module = opened(DemonstrationsDataModule("rows.jsonl", check_folder="check", **options))
    module.trainer.world_size = 4
    said = r"rows of like length make too few batches, [12] for 4 processes: give a smaller batch_size or batch_tokens"
    with pytest.raises(ValueError, match=said):
        module.train_dataloader()


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_files_that_were_changed_meanwhile_is_refused(folder):
    options = {"batch_size": 8}
    trainer(folder / "run", max_steps=2).fit(Recorder(), DemonstrationsDataModule("rows.jsonl", **options))
    write_lines(folder / "rows.jsonl", [sharegpt(0, images=[])] + [sharegpt(0)] * (NUM_ROWS - 1))
    with pytest.raises(ValueError, match="do not hold the rows that this run began with"):
        trainer(folder / "again", max_steps=4).fit(
            Recorder(),
            DemonstrationsDataModule("rows.jsonl", **options),
            ckpt_path=str(folder / "run" / "step=2.ckpt"),
        )


def test_a_check_that_was_made_anew_meanwhile_is_refused(folder):
    def in_order():
        return DemonstrationsDataModule("rows.jsonl", check_folder="check")

    state, plain = opened(data("tokens")).state_dict(), opened(in_order()).state_dict()
    opened(data("tokens")).load_state_dict(state)
    check(folder / "check", left_out=[8])  # as many rows, not the same ones
    for kept, module in ((state, data("tokens")), (plain, in_order())):
        with pytest.raises(ValueError, match=r"began with 59 rows, and data.check_folder check now leaves 59, not the"):
            opened(module).load_state_dict(kept)
    check(folder / "check", left_out=[7, 8])
    with pytest.raises(ValueError, match=r"check now leaves 58, not the same ones .* start anew with --fresh"):
        opened(data("tokens")).load_state_dict(state)
    check(folder / "check", left_out=[7], longer=1)
    opened(in_order()).load_state_dict(plain)  # lengths make no batches there
    with pytest.raises(ValueError, match="batches of the same lengths"):
        opened(data("tokens")).load_state_dict(state)
    with pytest.raises(ValueError, match="and this data now leaves 60"):
        opened(DemonstrationsDataModule("rows.jsonl")).load_state_dict(plain)


def test_lengths_are_asked_for():
    for options in ({"group_by_length": True}, {"batch_tokens": 400}):
        with pytest.raises(ValueError, match=r"need the rows' lengths: measure them .*data check"):
            DemonstrationsDataModule("rows.jsonl", **options)


def test_pass_rates_fit_the_rows_they_were_measured_on_alone(folder):
    write_parquet(folder / "rows.parquet", [prompt(number) for number in range(4)])
    rates = {"rows-0": 0.0, "rows-1": 0.5, "rows-2": 1.0, "rows-3": 0.25}
    measured = opened(PromptsDataModule("rows.parquet"))
    lines = [{"recipe": {"data": measured.row_recipe()}}]
    lines += [{"id": id, "pass_rate": rate} for id, rate in rates.items()]
    write_lines(folder / "pass_rates.jsonl", lines)

    kept = opened(PromptsDataModule("rows.parquet", pass_rates="pass_rates.jsonl", batch_size=1), folder=folder / "run")
    assert {row.id for batch in kept.train_dataloader() for row in batch} == {"rows-1", "rows-3"}
    assert json.loads((folder / "run" / "kept_ids.json").read_text())["ids"] == ["rows-1", "rows-3"]
    with pytest.raises(ValueError, match=r"measured on other data.*system_prompt: .* -> Look\."):
        opened(PromptsDataModule("rows.parquet", pass_rates="pass_rates.jsonl", system_prompt="Look."))
    with pytest.raises(ValueError, match=r"measured on other data.*keep_system: .absent. -> True"):
        opened(PromptsDataModule("rows.parquet", pass_rates="pass_rates.jsonl", keep_system=True))
    write_parquet(folder / "rows.parquet", [prompt(number) for number in (3, 2, 1, 0)])
    with pytest.raises(ValueError, match=r"measured on other data.*rows: "):
        opened(PromptsDataModule("rows.parquet", pass_rates="pass_rates.jsonl"))
