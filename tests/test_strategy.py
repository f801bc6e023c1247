"""What the modules need of a strategy: one player trains at a time, and small steps reach the weights."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from modules.align import AdversarialAlignModule
from modules.rlvr import RLVRModule
from modules.sft import SFTModule
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.strategy import check_one_device, check_trainer, training_only
from tests.conftest import make_examples
from tests.stubs import Rows, fit, weights


class TwoPlayers(LightningModule):
    def __init__(self):
        super().__init__()
        self.policy = torch.nn.Linear(2, 2)
        self.discriminator = torch.nn.Linear(2, 1)


def test_training_only_gives_gradients_to_one_network_and_restores_the_flags():
    module = TwoPlayers()
    module.policy.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    with training_only(module, "policy"):
        module.discriminator(module.policy(torch.ones(1, 2))).sum().backward()
    assert module.policy.weight.grad is not None
    assert module.policy.bias.grad is None
    assert module.discriminator.weight.grad is None
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before


@pytest.mark.parametrize(
    ("option", "named"), [({"precision": "bf16-true"}, "bf16-mixed"), ({"accumulate_grad_batches": 2}, "micro_batch")]
)
def test_trainer_options_that_would_train_wrongly_are_refused(option, named):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **option)
    with pytest.raises(ValueError, match=named):
        check_trainer(trainer)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "16-mixed"])
def test_every_other_half_precision_is_refused_for_bf16_mixed(precision):
    # A stand-in: on the CPU Lightning takes another precision for the float16 ones by itself.
    trainer: Any = SimpleNamespace(precision=precision, accumulate_grad_batches=1)
    with pytest.raises(ValueError, match=f"trainer.precision is '{precision}'.* Use 'bf16-mixed'"):
        check_trainer(trainer)
    for fine in ("bf16-mixed", "32-true"):
        check_trainer(SimpleNamespace(precision=fine, accumulate_grad_batches=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_stages_with_their_own_backward_passes_refuse_several_processes(stage, monkeypatch):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    check_one_device(trainer)
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"make 2 processes.*Set trainer\.devices to 1"):
        check_one_device(trainer)
    kind = {"align": AdversarialAlignModule, "rlvr": RLVRModule}[stage]
    # Refused at the very start: only the trainer is looked at.
    with pytest.raises(ValueError, match="make 2 processes"):
        kind.on_fit_start(SimpleNamespace(trainer=trainer))  # type: ignore[arg-type]


def test_an_adamw_step_at_1e_6_is_below_the_gap_of_bf16_weights_and_not_of_float32_ones(random_policy):
    changed = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = build_policy(PolicySpec(random_policy)).to(dtype)
        matrices = [p for p in policy.parameters() if p.ndim > 1]
        optimizer = torch.optim.AdamW(matrices, lr=1e-6)
        before = [p.detach().clone() for p in matrices]
        for p in matrices:
            p.grad = torch.randn_like(p)
        optimizer.step()
        moved = sum(int((p != b).sum()) for p, b in zip(matrices, before, strict=True))
        changed[dtype] = moved / sum(p.numel() for p in matrices)
    assert changed[torch.float32] > 0.9
    assert changed[torch.bfloat16] < 0.1


def test_sft_in_bf16_mixed_moves_nearly_every_master_weight_in_one_step(random_policy, tmp_path):
    # weight_decay 0: only the gradient moves a weight, and Adam's first step is lr whatever the gradient's size.
    optimizer = partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.0, eps=1e-30)
    module = SFTModule(PolicySpec(random_policy), optimizer, schedule="constant", warmup=0.0)
    module.configure_model()
    before = weights(module.policy)
    fit(module, Rows(make_examples(2)), tmp_path, precision="bf16-mixed")
    trained = {name: p for name, p in module.policy.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    moved = sum(int((p != before[name]).sum()) for name, p in trained.items())
    assert moved > 0.9 * sum(p.numel() for p in trained.values())
