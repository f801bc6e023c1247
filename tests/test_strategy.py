"""What the modules need of a strategy: one player trains at a time, and small steps reach the weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from prism_pl.policy import PolicySpec, build_policy
from prism_pl.strategy import check_trainer, training_only


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


def test_one_small_step_changes_nearly_every_master_weight_and_would_change_few_in_bf16(random_policy):
    changed = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = build_policy(PolicySpec(random_policy)).to(dtype)
        weights = [p for p in policy.parameters() if p.ndim > 1]
        optimizer = torch.optim.AdamW(weights, lr=1e-6)
        before = [p.detach().clone() for p in weights]
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.step()
        moved = sum(int((p != b).sum()) for p, b in zip(weights, before, strict=True))
        changed[dtype] = moved / sum(p.numel() for p in weights)
    assert changed[torch.float32] > 0.9
    assert changed[torch.bfloat16] < 0.1
