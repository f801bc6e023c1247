"""The digits datamodule under a real Trainer: batches, order, resume, bad options."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.digits import DigitsDataModule


class Recorder(L.LightningModule):
    """Keeps the ids of the rows that it was given; its collator keeps the Examples as they are."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained, self.validated, self.tested = [], [], []
        self.collator = list

    def training_step(self, batch, batch_idx):
        self.trained.append([row.id for row in batch])
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch

    def test_step(self, batch, batch_idx):
        self.tested += batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, max_steps=9, save_every=1):
    save = ModelCheckpoint(folder, every_n_train_steps=save_every, save_top_k=-1, filename="{step}")
    return L.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[save],
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def data(**options):
    return DigitsDataModule(rows="sft", num_train=16, batch_size=4, num_validation=8, num_test=8, num_hard=8, **options)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_with_the_batches_of_the_uninterrupted_one(tmp_path):
    whole = Recorder()
    trainer(tmp_path).fit(whole, data())
    # 16 rows in batches of 4 are epochs of 4 steps: each holds every row once, in another order.
    first, second = whole.trained[:4], whole.trained[4:8]
    for epoch in (first, second):
        assert {row for batch in epoch for row in batch} == {f"digits-sft-0-{i}" for i in range(16)}
    assert first != second
    # In the middle of the first epoch, at its end, in the middle of the second.
    for step in (2, 4, 7):
        resumed = Recorder()
        trainer(tmp_path, save_every=100).fit(resumed, data(), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert resumed.trained == whole.trained[step:], step


@pytest.mark.filterwarnings("ignore")
def test_validation_and_test_rows_tell_their_split_and_family(tmp_path):
    module, run = Recorder(), trainer(tmp_path)
    run.limit_val_batches = 1.0
    run.validate(module, data(), verbose=False)
    run.test(module, data(), verbose=False)
    assert [row.meta["split"] for row in module.validated] == ["validation"] * 8
    assert [row.meta["split"] for row in module.tested] == ["test"] * 8 + ["hard"] * 8
    assert len({row.meta["family"] for row in module.tested}) == 8
    assert all(row.images and row.response and row.answers for row in module.validated + module.tested)


def test_the_base_policy_is_validated_on_brief_responses():
    brief = DigitsDataModule(rows="pretrain").validation_rows[0]
    assert "<" not in brief.response
    assert "<" in DigitsDataModule(rows="align").validation_rows[0].response


def test_the_system_prompt_reaches_every_row():
    one = data(system_prompt="Look.")
    assert {one.train_rows[i].system for i in range(16)} == {"Look."}


@pytest.mark.filterwarnings("ignore")
def test_more_rows_a_batch_than_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size is 32, but each of 1 processes has only 16 training rows"):
        trainer(tmp_path).fit(Recorder(), DigitsDataModule(num_train=16, batch_size=32))


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="num_test is 0"):
        DigitsDataModule(num_test=0)
