"""What the modules need of a strategy: one player trains at a time, and small steps reach the weights."""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from modules.sft import SFTModule
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.strategy import (
    EngineOptions,
    MultiEngineDeepSpeedStrategy,
    check_strategy,
    check_trainer,
    checks,
    prepare_stock,
    training_only,
)
from prism_pl.strategy.checks import check_equal_batches
from prism_pl.strategy.engine_config import check_names, engine_config, merged
from prism_pl.strategy.engines import import_deepspeed, networks_of, optimizer_of_each
from tests.conftest import make_examples
from tests.stubs import RIGHT, Rows, fit, make_rlvr, weights


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


def test_strategies_that_cannot_run_several_backward_passes_are_refused_with_one_that_can(random_policy):
    for fine in (SingleDeviceStrategy(), DDPStrategy(find_unused_parameters=True), MultiEngineDeepSpeedStrategy()):
        check_strategy(fine)
    with pytest.raises(ValueError, match=r"DDPStrategy.*Use --config strategy/ddp\.yaml"):
        check_strategy(DDPStrategy())
    stock: Any = object.__new__(DeepSpeedStrategy)
    with pytest.raises(ValueError, match=r"Lightning's DeepSpeedStrategy, with one engine for one optimiser.*zero2"):
        check_strategy(stock)
    # Before the networks are built.
    module = make_rlvr(random_policy, [RIGHT])
    module.trainer = Trainer(accelerator="cpu", devices=1, strategy="ddp", logger=False, enable_checkpointing=False)
    module.trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(ValueError, match="runs backward passes of its own"):
        module.configure_model()
    assert module.policy is None


def test_lightnings_own_strategy_is_refused_where_it_cannot_train(random_policy, monkeypatch):
    def prepared(module, **changes):
        strategy: Any = object.__new__(DeepSpeedStrategy)
        strategy.config = {"zero_optimization": {"stage": 2} | changes}
        strategy._precision_plugin = None
        trainer: Any = SimpleNamespace(strategy=strategy, accelerator=CPUAccelerator(), callbacks=[])
        prepare_stock(trainer, module)
        return trainer

    with pytest.raises(ValueError, match=r"runs backward passes of its own.*zero2\.yaml"):
        prepared(make_rlvr(random_policy, [RIGHT]))
    with pytest.raises(ValueError, match=r"runs on GPUs alone\. Use --config strategy/zero2\.yaml"):
        prepared(TwoPlayers())
    monkeypatch.setattr(checks, "CUDAAccelerator", CPUAccelerator)
    with pytest.raises(ValueError, match=r"at stage 3: .* Use --config strategy/zero3\.yaml"):
        prepared(TwoPlayers(), stage=3)
    assert len(prepared(TwoPlayers()).callbacks) == 1


def test_options_of_an_engine_go_over_those_of_all_key_by_key():
    common = EngineOptions(2, False, False, "32", {"zero_optimization": {"reduce_bucket_size": 5}, "dump_state": True})
    one = EngineOptions(stage=3, config={"zero_optimization": {"sub_group_size": 7}}).over(common)
    assert (one.stage, one.precision) == (3, "32")
    config = engine_config("policy", one, on_gpu=False)
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["sub_group_size"]) == (3, 5, 7)
    assert config["dump_state"]
    assert config["bf16"]["enabled"] is False
    assert merged({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": 4}, "stage is 4, give 0, 1, 2 or 3"),
        ({"stage": 0, "precision": "bf16"}, r"bf16 at stage 0 takes a step of its own .* Set stage 1, or .*ddp\.yaml"),
        ({"stage": 2, "offload_params": True}, "offload_params at stage 2: only stage 3 shards weights"),
        ({"stage": 0, "offload_optimizer": True}, "offload_optimizer at stage 0: set stage 1"),
        ({"config": {"gradient_accumulation_steps": 4}}, r"gradient_accumulation_steps: set .*micro_batch_tokens"),
        ({"config": {"train_batch_size": 4}}, "train_batch_size: set the data's batch_size"),
        ({"config": {"gradient_clipping": 1.0}}, "gradient_clipping: set max_grad_norm"),
        ({"config": {"fp16": {"enabled": True}}}, r"fp16: .* bf16-mixed"),
        ({"config": {"zero_optimization": {"stage": 3}}}, "set stage beside config"),
        (
            {"stage": 3, "config": {"zero_optimization": {"zero_quantized_weights": True}}},
            "ZeRO-3 with zero_quantized_weights is not supported",
        ),
    ],
)
def test_options_that_would_train_wrongly_are_one_line(options, said):
    complete = EngineOptions(**options).over(EngineOptions(2, False, False, "32", {}))
    with pytest.raises(ValueError, match=f"the engine of policy: .*{said}"):
        engine_config("policy", complete, on_gpu=False)


def test_an_engine_of_an_unknown_network_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"names 'polcy', and the module's networks are policy, discriminator.*policy"):
        check_names({"polcy": EngineOptions()}, ["policy", "discriminator"])


def test_each_optimiser_belongs_to_the_one_network_of_its_parameters():
    module = TwoPlayers()
    networks = networks_of(module)
    assert list(networks) == ["policy", "discriminator"]
    policy, discriminator = (torch.optim.SGD(n.parameters(), lr=1.0) for n in networks.values())
    assert optimizer_of_each([discriminator, policy], networks) == {"policy": policy, "discriminator": discriminator}
    with pytest.raises(ValueError, match="discriminator and policy: give each network one of its own"):
        optimizer_of_each([torch.optim.SGD(module.parameters(), lr=1.0)], networks)
    with pytest.raises(ValueError, match="discriminator wants gradients and has no optimiser"):
        optimizer_of_each([policy], networks)
    with pytest.raises(ValueError, match="policy has two optimisers"):
        optimizer_of_each([policy, torch.optim.SGD(module.policy.parameters(), lr=1.0)], networks)
    module.discriminator.weight = module.policy.weight
    with pytest.raises(ValueError, match="policy and discriminator share a parameter"):
        networks_of(module)


def test_deepspeed_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"deepspeed is not installed: pip install 'prism_pl\[deepspeed\]'"):
        import_deepspeed(torch.device("cpu"))


def test_ranks_with_batches_of_different_sizes_are_one_line(monkeypatch):
    device = torch.device("cpu")
    check_equal_batches([1, 2], device)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    # Another rank has 3 rows: the largest of (2, 3), and of (-2, -3).
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda size, op: size.copy_(torch.tensor([3, -2])))
    with pytest.raises(ValueError, match="batches of 2 to 3 rows in one step"):
        check_equal_batches([1, 2], device)


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
