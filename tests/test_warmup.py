"""The warm start: what it pairs, what it trains, when it stops."""

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from modules.warmup import DiscriminatorModule
from prism_pl.batch import Example
from prism_pl.chat import render
from prism_pl.discriminator import DedicatedMoEDiscriminator
from prism_pl.policy import PolicySpec
from prism_pl.processor import Processor
from prism_pl.rollout.engine import GroupDone, Rollout, Sampling
from prism_pl.rollout.transformers_engine import TransformersEngine
from tests.conftest import DEMONSTRATION, make_examples

ROLLOUT = render("- green 9", "1. it is 9", "9")
MALFORMED = "<caption>no end"


class ScriptedEngine:
    """Gives the same texts in turn, and keeps count."""

    def __init__(self, texts: Sequence[str] = (ROLLOUT,)) -> None:
        self.texts = list(texts)
        self.num_drawn = 0
        self.started = False

    def start(self, policy: Any, processor: Processor, *, rank: int) -> None:
        self.policy = policy
        self.started = True
        self.num_drawn = 0

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        assert self.started
        drawn = range(self.num_drawn, self.num_drawn + len(examples) * num_samples)
        self.num_drawn = drawn.stop
        return [Rollout([], [], [], self.texts[i % len(self.texts)], "stop") for i in drawn]

    def dtype(self) -> torch.dtype:
        return torch.float32

    def sync(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_drawn = state["num_drawn"]


class Record(Callback):
    """What the module logged, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Rows(L.LightningDataModule):
    def __init__(self, train: list[Example], held_out: list[Example]) -> None:
        super().__init__()
        self.train, self.held_out = train, held_out

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=4, collate_fn=self.trainer.lightning_module.collator)

    def val_dataloader(self):
        return DataLoader(self.held_out, batch_size=4, collate_fn=self.trainer.lightning_module.collator)


def make_module(path: str, engine: ScriptedEngine, lr: float = 1e-3, **options) -> DiscriminatorModule:
    return DiscriminatorModule(
        policy=PolicySpec(path),
        discriminator=partial(DedicatedMoEDiscriminator, path=path, init_heads=True, max_segment_tokens=200),
        rollout=engine,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        sampling=Sampling(max_tokens=8),
        schedule="constant",
        warmup=0,
        **options,
    )


def fit(module: DiscriminatorModule, rows: Rows, folder, ckpt=None, **options) -> tuple[L.Trainer, Record]:
    record = Record()
    settings = {"max_steps": 6, "val_check_interval": 2, "check_val_every_n_epoch": None} | options
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
        **settings,
    )
    trainer.fit(module, rows, ckpt_path=ckpt, weights_only=True)
    return trainer, record


def test_separable_texts_are_told_apart_and_the_ceiling_stops(random_policy, tmp_path, caplog):
    module = make_module(random_policy, ScriptedEngine(), ceiling=0.9)
    module.configure_model()
    policy = {name: w.clone() for name, w in module.policy.state_dict().items()}
    discriminator = {name: w.clone() for name, w in module.discriminator.state_dict().items()}
    with caplog.at_level("INFO"):
        trainer, record = fit(module, Rows(make_examples(16), make_examples(4)), tmp_path, max_steps=40)
    assert trainer.global_step < 40
    assert "held-out pair accuracy" in caplog.text
    assert "ceiling 0.9" in caplog.text
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert all(metrics[f"warmup/val_pair_accuracy/{expert}"] > 0.9 for expert in ("perception", "reasoning"))
    # Scores near 0 on both sides at first: two experts' losses of log 2 each.
    assert record.steps[0]["warmup/loss"] == pytest.approx(2 * math.log(2), abs=0.3)
    assert record.steps[-1]["warmup/loss"] < record.steps[0]["warmup/loss"]
    assert all(torch.equal(w, policy[name]) for name, w in module.policy.state_dict().items())
    moved = [not torch.equal(w, discriminator[name]) for name, w in module.discriminator.state_dict().items()]
    assert sum(moved) > 0.9 * len(moved)
    assert not any(p.requires_grad for p in module.policy.parameters())


def test_without_a_ceiling_it_runs_to_the_end(random_policy, tmp_path):
    module = make_module(random_policy, ScriptedEngine(), lr=1e-2, ceiling=None)
    trainer, _ = fit(module, Rows(make_examples(4), make_examples(2)), tmp_path)
    assert trainer.global_step == 6
    assert float(trainer.callback_metrics["warmup/val_pair_accuracy/perception"]) == 1.0


def test_malformed_rollouts_are_counted_and_make_no_pair(random_policy, tmp_path):
    module = make_module(random_policy, ScriptedEngine([ROLLOUT, MALFORMED, MALFORMED, MALFORMED]), ceiling=None)
    _, record = fit(module, Rows(make_examples(4), make_examples(1)), tmp_path, max_steps=1, limit_val_batches=0)
    assert record.steps[0]["warmup/malformed"] == 0.75
    assert record.steps[0]["warmup/pairs"] == 1


def test_a_batch_without_any_pair_trains_nothing_and_goes_on(random_policy, tmp_path):
    module = make_module(random_policy, ScriptedEngine([MALFORMED]), ceiling=0.9, score_l2=0.1, score_clip=10.0)
    module.configure_model()
    before = {name: w.clone() for name, w in module.discriminator.named_parameters()}
    module.optimizer = partial(torch.optim.SGD, lr=1.0)
    with pytest.warns(UserWarning, match="holds no pair and the discriminator learns nothing"):
        trainer, record = fit(module, Rows(make_examples(4), make_examples(2)), tmp_path, max_steps=2)
    assert trainer.global_step == 2
    assert record.steps[0]["warmup/loss"] == 0.0
    assert record.steps[0]["warmup/malformed"] == 1.0
    assert math.isnan(record.steps[0]["warmup/pair_accuracy/perception"])
    assert all(torch.equal(w, before[name]) for name, w in module.discriminator.named_parameters())


def test_the_loss_is_the_mean_over_pairs_of_both_experts(random_policy):
    module = make_module(random_policy, ScriptedEngine([ROLLOUT, MALFORMED]), label_smoothing=0.1, score_l2=0.5)
    module.configure_model()
    module.discriminator.dropout.p = 0.0
    module.rollout.start(None, None, rank=0)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    batch = module.collator(make_examples(4))
    loss = module.training_step(batch, 0)
    with torch.no_grad():
        chosen, rolled = module(batch, [[ROLLOUT], [MALFORMED], [ROLLOUT], [MALFORMED]], training=False)
    expected = torch.tensor(0.0)
    for expert in ("perception", "reasoning"):
        plus, minus = chosen.by_expert[expert][[0, 2]], rolled.by_expert[expert][[0, 2]]
        # -(0.9 log s(m) + 0.1 log s(-m)) over the two valid pairs, and 0.5 x the mean of four mean squares:
        # demonstrations over all four rows, rollouts over the valid two.
        m = plus - minus
        expected += (0.9 * torch.log1p((-m).exp()) + 0.1 * torch.log1p(m.exp())).sum() / 2
        expected += 0.5 * (chosen.by_expert[expert].square().sum() / 4 + minus.square().sum() / 2) / 4
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0)
    assert float(logged["warmup/pair_accuracy/reasoning"]) in (0.0, 0.5, 1.0)


def test_a_rejected_response_in_the_row_is_used_instead_of_a_rollout(random_policy):
    engine = ScriptedEngine([ROLLOUT, DEMONSTRATION])
    module = make_module(random_policy, engine, num_rollouts=2)
    engine.started = True
    one, two = make_examples(2)
    assert module._rejected([replace(one, rejected="its own"), two], module.sampling) == [
        ["its own"],
        [ROLLOUT, DEMONSTRATION],
    ]
    assert engine.num_drawn == 2


def test_identical_text_gives_half_accuracy(random_policy, tmp_path):
    module = make_module(random_policy, ScriptedEngine([DEMONSTRATION]), ceiling=None)
    trainer, record = fit(module, Rows(make_examples(4), make_examples(2)), tmp_path, max_steps=2)
    assert float(trainer.callback_metrics["warmup/val_pair_accuracy/perception"]) == 0.5
    # Twice log 2, whatever dropout does: one text, one score.
    assert record.steps[1]["warmup/loss"] == pytest.approx(2 * math.log(2), abs=1e-6)


def test_held_out_rollouts_are_drawn_once(random_policy, tmp_path):
    engine = ScriptedEngine()
    module = make_module(random_policy, engine, ceiling=None)
    fit(module, Rows(make_examples(4), make_examples(2)), tmp_path, max_steps=4, num_sanity_val_steps=0)
    # 4 steps x 4 rows, and the 2 held-out rows once in 2 validations.
    assert engine.num_drawn == 4 * 4 + 2


def test_a_policy_that_was_made_anew_meanwhile_is_not_gone_on_with(random_policy, tmp_path, monkeypatch):
    shutil.copytree(random_policy, tmp_path / "export")
    shutil.copytree(random_policy, tmp_path / "same")
    rows = Rows(make_examples(4), make_examples(2))
    trainer, _ = fit(make_module(str(tmp_path / "export"), ScriptedEngine()), rows, tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    def go_on(name):
        again = make_module(str(tmp_path / name), ScriptedEngine())
        again.configure_model()
        again.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))

    for name in ("export", "same"):
        go_on(name)
    weights = tmp_path / "export" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"policy\.path: \S*export holds other files .* frozen policy .*--fresh"):
        go_on("export")


def test_a_checkpoint_leaves_the_policy_out_and_goes_on(random_policy, tmp_path):
    rows = Rows(make_examples(4), make_examples(2))
    module = make_module(random_policy, ScriptedEngine(), ceiling=None)
    trainer, _ = fit(module, rows, tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"discriminator"}
    assert {"num_rollouts", "ceiling"} <= set(saved["hyper_parameters"])
    resumed = make_module(random_policy, ScriptedEngine(), ceiling=None)
    again = L.Trainer(
        max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    again.fit(resumed, rows, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert again.global_step == 2
    assert resumed.rollout.num_drawn == module.rollout.num_drawn > 0
    for name, weight in resumed.discriminator.state_dict().items():
        assert torch.equal(weight, module.discriminator.state_dict()[name])


def test_export_loads_alone(random_policy, tmp_path):
    module = make_module(random_policy, ScriptedEngine(), export_dtype="float32")
    module.configure_model()
    module.export(tmp_path / "export")
    loaded = DedicatedMoEDiscriminator(str(tmp_path / "export"))
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, module.discriminator.state_dict()[name])


def test_bad_input_stops_with_the_row_or_the_option(random_policy):
    module = make_module(random_policy, ScriptedEngine())
    module.configure_model()
    broken = [replace(make_examples(1)[0], response=MALFORMED)]
    with pytest.raises(ValueError, match=r"'row-0'.*malformed \(</caption> is missing\)"):
        module(module.collator(broken), [[ROLLOUT]], training=False)
    with pytest.raises(ValueError, match=r"ceiling is 0\.3"):
        make_module(random_policy, ScriptedEngine(), ceiling=0.3)
    with pytest.raises(ValueError, match="num_rollouts is 0"):
        make_module(random_policy, ScriptedEngine(), num_rollouts=0)
    with torch.no_grad():
        module.discriminator.heads["perception"].weight.fill_(math.nan)
    module.rollout.start(None, None, rank=0)
    module.log = lambda *_, **__: None
    with pytest.raises(ValueError, match=r"warmup/loss is not finite .* row-0"):
        module.training_step(module.collator(make_examples(2)), 0)


def test_a_demonstration_over_the_cap_stops_with_the_row(random_policy):
    module = make_module(random_policy, ScriptedEngine())
    module.configure_model()
    rows = make_examples(2)
    rows[1] = replace(rows[1], response=render("- red 3\n" * 200, "1. 3 + 7 = 10", "10"))
    with pytest.raises(ValueError, match=r"row 'row-1': a segment of the demonstration .* max_segment_tokens=200"):
        module(module.collator(rows), [[ROLLOUT], [ROLLOUT]], training=False)


def test_held_out_rollouts_are_the_same_after_a_resume_and_take_no_training_draws(random_policy, tmp_path):
    rows = Rows(make_examples(8), make_examples(6))
    file = tmp_path / "step.ckpt"

    def run(ckpt=None, **options):
        torch.manual_seed(0)
        module = make_module(random_policy, TransformersEngine(), ceiling=None)  # type: ignore[arg-type]
        trainer, _ = fit(module, rows, tmp_path, ckpt=ckpt, **options)
        return module, trainer

    module, trainer = run(max_steps=2, val_check_interval=1)
    trainer.save_checkpoint(file)
    assert len(module._held_out) == 6
    assert module.rollout.state_dict()["num_draws"] == 2
    # Other draws in between: no sanity check, and a validation after two steps and not one.
    resumed, _ = run(file, max_steps=4, val_check_interval=2, num_sanity_val_steps=0)
    assert resumed._held_out == module._held_out
    assert resumed.rollout.state_dict()["num_draws"] == 4


def test_a_gradient_that_is_not_finite_stops_before_the_step_and_names_the_rows(random_policy, tmp_path):
    module = make_module(random_policy, ScriptedEngine())
    module.configure_model()
    before = {name: w.clone() for name, w in module.discriminator.named_parameters()}
    module.discriminator.heads["reasoning"].weight.register_hook(lambda grad: grad + math.inf)
    with pytest.raises(ValueError, match=r"the discriminator's gradient norm is not finite \(inf\) .* row-0, row-1"):
        fit(module, Rows(make_examples(2), make_examples(2)), tmp_path, gradient_clip_val=1.0)
    assert all(torch.equal(w, before[name]) for name, w in module.discriminator.named_parameters())
