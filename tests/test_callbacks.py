"""Callbacks on a scripted stage with two optimisers; tags are read back from the event files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import callbacks
from callbacks import Completions, Export, Progress, RewardGap, StructuralProxies
from prism_pl.chat import render
from prism_pl.completion_picture import Completion, draw_completions
from tests.conftest import DEMONSTRATION, make_examples
from tests.stubs import SaveAfter

ONE = render("- red 3", "1. 3 = 3", "3")
THREE = render("- red 3\n- blue 4\n- a 5", "1. 3\n2. 4\n3. 7", "10")


def step_outputs():
    """Two prompts with two rollouts each; the last rollout is malformed, and its scores must not be read."""
    nan = float("nan")
    return {
        "examples": make_examples(2),
        "num_rollouts": 2,
        "rollouts": [ONE, THREE, THREE, "no format"],
        "demonstrations": [DEMONSTRATION, DEMONSTRATION],
        "valid": torch.tensor([[True, True], [True, False]]),
        "scores": {
            "perception": torch.tensor([[1.0, 2.0], [4.0, nan]]),
            "reasoning": torch.tensor([[0.0, 0.0], [0.0, 0.0]]),
        },
        "demonstration_scores": {"perception": torch.tensor([3.0, 4.0]), "reasoning": torch.tensor([1.0, -1.0])},
        "rewards": torch.tensor([[0.5, 0.5], [0.5, -1.0]]),
    }


class Stage(LightningModule):
    """Steps two optimisers a batch, as alignment does; its weight counts the batches it has seen."""

    def __init__(self, outputs=None, val_losses=(3.0, 2.0, 5.0)):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.outputs = step_outputs() if outputs is None else outputs
        self.val_losses = list(val_losses)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.step()
        with torch.no_grad():
            self.weight += 1
        self.log("align/tokens", 100.0)
        return self.outputs

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.val_losses[self.trainer.current_epoch])
        return self.outputs

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.0) for _ in range(2)]

    def export(self, folder: Path):
        folder.mkdir(exist_ok=True)
        (folder / "weight.json").write_text(json.dumps(self.weight.item()))


def fit(folder, callbacks, stage=None, num_steps=3, ckpt_path=None, **options):
    options = {"limit_val_batches": 0, "max_epochs": 1, "enable_progress_bar": False, **options}
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=callbacks,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **options,
    )
    stage = stage or Stage()
    trainer.fit(stage, DataLoader(range(num_steps)), DataLoader(range(2)), ckpt_path=ckpt_path)
    return trainer


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "histograms": 0})
    events.Reload()
    return events


def scalars(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_gap_accuracy_and_spread_by_hand(tmp_path):
    fit(tmp_path, [RewardGap()])
    events = read(tmp_path)
    # Gaps 3 - 1, 3 - 2 and 4 - 4; the malformed rollout's score is NaN and not read.
    expected = {
        "align/reward_gap/perception": 1.0,
        "align/discriminator_accuracy/perception": 2.5 / 3,  # two wins and a tie
        "align/score_std/perception": math.sqrt(0.5),  # of 1 and 2; a single valid rollout has no spread
        "align/reward_gap/reasoning": 1 / 3,  # 1, 1, -1
        "align/discriminator_accuracy/reasoning": 2 / 3,
        "align/score_std/reasoning": 0.0,
    }
    for tag, value in expected.items():
        # One point a batch, although two optimisers step in each.
        assert scalars(events, tag) == [(step, pytest.approx(value)) for step in range(3)], tag


def test_a_nan_score_and_no_valid_rollout_are_logged_as_nan(tmp_path):
    outputs = step_outputs()
    outputs["scores"]["perception"][0, 0] = float("nan")
    fit(tmp_path / "nan", [RewardGap()], Stage(outputs))
    events = read(tmp_path / "nan")
    assert math.isnan(scalars(events, "align/reward_gap/perception")[0][1])
    assert scalars(events, "align/reward_gap/reasoning")[0][1] == pytest.approx(1 / 3)
    outputs = step_outputs() | {"valid": torch.zeros(2, 2, dtype=torch.bool), "rollouts": ["bad"] * 4}
    fit(tmp_path / "malformed", [RewardGap(), StructuralProxies()], Stage(outputs))
    events = read(tmp_path / "malformed")
    for tag in ("align/reward_gap/reasoning", "align/discriminator_accuracy/reasoning", "align/score_std/reasoning"):
        assert math.isnan(scalars(events, tag)[0][1]), tag
    assert math.isnan(scalars(events, "proxies/reasoning_steps/policy")[0][1])
    assert scalars(events, "proxies/reasoning_steps/supervision")[0][1] == 3


def test_the_validation_gap_is_over_the_whole_validation_set(tmp_path):
    class Changing(Stage):
        def validation_step(self, batch, batch_idx):
            outputs = step_outputs()
            # Gaps 2, 1, 0 in the first batch and, one more score point each, 1, 0, -1 in the second.
            outputs["scores"]["perception"] += batch_idx
            return outputs

    fit(tmp_path, [RewardGap()], Changing(), limit_val_batches=1.0)
    events = read(tmp_path)
    assert [value for _, value in scalars(events, "align/val_reward_gap/perception")] == [pytest.approx(0.5)]
    assert len(scalars(events, "align/reward_gap/perception")) == 3


def test_proxies_by_hand_and_their_rule_in_words(tmp_path):
    fit(tmp_path, [StructuralProxies(every_n_steps=2)])
    events = read(tmp_path)
    # Valid rollouts have 1, 3, 3 items and as many steps; the demonstration has 2 items and 3 steps.
    expected = {
        "proxies/descriptive_items/policy": 7 / 3,
        "proxies/descriptive_items/supervision": 2.0,
        "proxies/descriptive_items/distance": 1.0,
        "proxies/reasoning_steps/policy": 7 / 3,
        "proxies/reasoning_steps/supervision": 3.0,
        "proxies/reasoning_steps/distance": 2 / 3,
    }
    for tag, value in expected.items():
        assert scalars(events, tag) == [(step, pytest.approx(value)) for step in (0, 2)], tag
    rule = events.Tensors("proxies/rule/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "bullets or numbered lines, else sentences" in rule


def test_proxies_are_taken_over_a_window_of_steps(tmp_path):
    class Changing(Stage):
        def training_step(self, batch, batch_idx):
            return {"rollouts": [ONE, THREE, THREE][batch_idx : batch_idx + 1]}

    fit(tmp_path, [StructuralProxies(window=2)], Changing())
    events = read(tmp_path)
    assert [v for _, v in scalars(events, "proxies/descriptive_items/policy")] == [1, 2, 3]  # 1; (1 + 3) / 2; 3
    assert "proxies/descriptive_items/distance" not in events.Tags()["scalars"]


def test_the_window_of_proxies_goes_on_in_a_resumed_run(tmp_path):
    whole, resumed = StructuralProxies(window=2), StructuralProxies(window=2)
    whole.window.extend([([ONE], [THREE]), ([THREE], [])])
    resumed.load_state_dict(whole.state_dict())
    assert resumed.window == whole.window
    assert resumed.window.maxlen == 2


def test_a_step_that_gives_too_little_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.RewardGap needs demonstration_scores, valid"):
        fit(tmp_path, [RewardGap()], Stage({"scores": {}}))
    with pytest.raises(ValueError, match=r"callbacks\.StructuralProxies needs rollouts"):
        fit(tmp_path, [StructuralProxies()], Stage(torch.zeros(())))


def test_completions_are_a_picture_and_text(tmp_path):
    fit(tmp_path, [Completions(every_n_steps=2, num_rows=5)])
    events = read(tmp_path)
    pictures = events.Images("completions")
    assert [picture.step for picture in pictures] == [0, 2]
    assert pictures[0].width > 1200
    assert pictures[0].height > 600  # two rows, each at least as high as its image
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("completions/text_summary")]
    assert "What is the sum of all digits?" in texts[0]
    assert "perception: +1.00, demonstration +3.00, gap +2.00" in texts[0]
    assert "reward: +0.50" in texts[0]
    assert "    <caption>" in texts[0]


def test_completions_say_right_wrong_and_malformed(tmp_path):
    outputs = step_outputs() | {"accuracy": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
    del outputs["scores"], outputs["demonstrations"]
    outputs["rollouts"][2] = "no format"
    fit(tmp_path, [Completions()], Stage(outputs), num_steps=1)
    text = read(tmp_path).Tensors("completions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "Response, right, valid" in text
    assert "Response, wrong, malformed (<caption> is missing)" in text
    assert "Demonstration" not in text


def test_a_malformed_response_has_no_reward_to_show_and_a_scored_one_does(tmp_path):
    outputs = step_outputs() | {"rewards": torch.tensor([[0.5, 0.5], [float("nan"), 0.5]])}
    outputs["rollouts"][2] = "no format"
    fit(tmp_path / "align", [Completions()], Stage(outputs), num_steps=1)
    text = read(tmp_path / "align").Tensors("completions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "reward: +0.50" in text
    assert "reward: malformed" in text
    assert "nan" not in text
    outputs["rewards"][1, 0] = -0.25  # RLVR rewards malformed responses too
    fit(tmp_path / "rlvr", [Completions()], Stage(outputs), num_steps=1)
    text = read(tmp_path / "rlvr").Tensors("completions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "reward: -0.25" in text


def test_a_picture_holds_long_words_many_lines_and_several_images():
    image = make_examples(1)[0].images[0]
    long = Completion([image] * 3, "q " * 400, ["1"] * 9, "x" * 5000 + "\nline" * 100, None, "valid", None, [])
    picture = np.asarray(draw_completions([long]))
    assert picture.shape[0] < 2000
    assert (picture[:, -18:] == 255)[3:].all()  # nothing is written into the right margin


def test_export_at_the_end_and_at_each_best(tmp_path):
    best = {"monitor": "val_loss", "filename": "best"}
    later = SaveAfter(7, tmp_path / "later.ckpt")
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, **best)
    fit(tmp_path, [Export(), later, checkpoint], limit_val_batches=1.0, max_epochs=3)
    # Validation losses 3, 2, 5 after 3, 6 and 9 batches: the best weights are those after 6.
    exported = tmp_path / "export-best" / "weight.json"
    assert json.loads((tmp_path / "export" / "weight.json").read_text()) == 9
    assert json.loads(exported.read_text()) == 6
    # last.ckpt was saved when the best was found and not yet exported; later.ckpt has later weights than the best.
    for name, expected in (("checkpoints/last.ckpt", 6), ("later.ckpt", None)):
        exported.unlink()
        stage = Stage(val_losses=(3, 2, 5, 4))
        checkpoint = ModelCheckpoint(tmp_path / "checkpoints", **best)
        fit(tmp_path, [Export(), checkpoint], stage, limit_val_batches=1.0, max_epochs=4, ckpt_path=tmp_path / name)
        assert json.loads((tmp_path / "export" / "weight.json").read_text()) == 12
        assert exported.exists() == (expected is not None)
        if expected is not None:
            assert json.loads(exported.read_text()) == expected


def test_without_a_monitored_checkpoint_there_is_no_best_export(tmp_path):
    fit(tmp_path, [Export(), ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1)])
    assert (tmp_path / "export" / "weight.json").exists()
    assert not (tmp_path / "export-best").exists()


def test_progress_shows_step_gap_accuracy_and_tokens_a_second(tmp_path, monkeypatch):
    seen = []

    class Watched(Progress):
        def get_metrics(self, trainer, pl_module):
            seen.append(super().get_metrics(trainer, pl_module))
            return seen[-1]

    class Accurate(Stage):
        def training_step(self, batch, batch_idx):
            self.log("align/accuracy", 0.25)
            self.log("align/policy_loss", 1.5, prog_bar=True)
            return super().training_step(batch, batch_idx)

    bar, module = Watched(), Accurate()
    trainer = fit(tmp_path, [bar, RewardGap()], module, enable_progress_bar=True)
    last = seen[-1]
    assert last["step"] == "6"  # optimiser steps: two in each of three batches
    assert last["gap"] == pytest.approx((1 + 1 / 3) / 2)
    assert last["accuracy"] == 0.25
    assert float(last["tokens/s"].replace(",", "")) > 0
    assert last["align/policy_loss"] == 1.5
    # 100 tokens in 2 s, and those are of all ranks already.
    monkeypatch.setattr(type(trainer), "world_size", 4)
    bar._seconds = 2.0
    assert bar.get_metrics(trainer, module)["tokens/s"] == "50"


def test_progress_takes_the_validations_accuracy_where_there_is_no_other_and_once(tmp_path):
    class Validated(Stage):
        def training_step(self, batch, batch_idx):
            self.log("align/val_accuracy", 0.75, prog_bar=True)
            return super().training_step(batch, batch_idx)

    bar, module = Progress(), Validated()
    shown = bar.get_metrics(fit(tmp_path, [bar], module, enable_progress_bar=True), module)
    assert shown["accuracy"] == 0.75
    assert "align/val_accuracy" not in shown


class OneStep(Stage):
    """Steps one optimiser."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def optimizers(self, *args):
        return [super().optimizers(*args)]


def test_progress_counts_on_after_a_resume(tmp_path):
    """Of 30 batches 9 steps take 9, whether the run is one or was begun again after the fourth."""

    class Told(Progress):
        def __init__(self) -> None:
            super().__init__()
            self.told = []

        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            task = self.progress.tasks[-1]
            self.told.append((task.description.split("]")[-1].strip(), task.completed, task.total))

    options = {"max_epochs": -1, "max_steps": 9, "num_steps": 30, "enable_progress_bar": True}
    whole, resumed = Told(), Told()
    fit(tmp_path / "whole", [whole, SaveAfter(3, tmp_path / "c.ckpt")], OneStep(), **options)
    fit(tmp_path / "resumed", [resumed], OneStep(), ckpt_path=tmp_path / "c.ckpt", **options)
    assert whole.told[0] == ("Epoch 0", 1, 9)
    assert whole.told[-1] == ("Epoch 0", 9, 9)
    assert resumed.told == whole.told[4:]


def test_progress_ends_at_the_end_in_an_epoch_that_the_steps_cut_short(tmp_path):
    class Told(Progress):
        told = ()

        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            self.told = [(task.completed, task.total) for task in self.progress.tasks]

    bar = Told()
    fit(tmp_path, [bar], OneStep(), num_steps=4, max_epochs=-1, max_steps=6, enable_progress_bar=True)
    assert bar.told[-1] == (2, 2)


def test_every_callback_goes_by_its_short_name():
    for name in ("Completions", "ConvergenceMonitor", "DiscriminatorHealth", "Export", "Progress", "RewardGap"):
        assert name in callbacks.__all__
    with pytest.raises(ValueError, match="Did you mean 'sentences'"):
        StructuralProxies(rule="sentenses")
    with pytest.raises(ValueError, match="every_n_steps=0"):
        Completions(every_n_steps=0)
