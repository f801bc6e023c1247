"""Adapters in training, whole weights everywhere else."""

from pathlib import Path

import pytest
import torch

from prism_pl.logprobs import token_logps
from prism_pl.lora import LoraSpec, whole_parameters
from prism_pl.policy import PolicySpec, build_policy, save_policy
from tests.conftest import make_examples

LORA = LoraSpec(rank=2, alpha=4)


@pytest.fixture
def policy(random_policy):
    torch.manual_seed(1)
    return build_policy(PolicySpec(random_policy, lora=LORA))


@pytest.fixture
def batch(policy, random_policy):
    processor = PolicySpec(random_policy).processor()
    examples = make_examples(2)
    return processor.sequences(
        [processor.prompt(each) for each in examples], [processor.response_ids(e.response) for e in examples], [0, 1]
    )


def train_adapters(policy) -> None:
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def test_adapters_alone_are_trained_and_begin_as_no_change(policy, batch, random_policy):
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name and "language_model" in name for name in trained)
    plain = build_policy(PolicySpec(random_policy))
    assert torch.equal(token_logps(policy, batch).logps_BT, token_logps(plain, batch).logps_BT)


@torch.no_grad()
def test_whole_parameters_are_the_policy_with_its_adapters(policy, batch, random_policy):
    train_adapters(policy)
    plain = build_policy(PolicySpec(random_policy))
    merged = dict(whole_parameters(policy))
    assert merged.keys() == dict(plain.named_parameters()).keys()
    layer = policy.model.language_model.layers[0].mlp.up_proj
    by_hand = layer.base_layer.weight + 4 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(merged["model.language_model.layers.0.mlp.up_proj.weight"], by_hand)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(token_logps(plain, batch).logps_BT, token_logps(policy, batch).logps_BT)


@torch.no_grad()
def test_an_export_is_a_whole_policy(policy, batch, random_policy, tmp_path):
    train_adapters(policy)
    save_policy(policy, PolicySpec(random_policy).processor(), Path(tmp_path / "export"))
    loaded = build_policy(PolicySpec(str(tmp_path / "export")))
    torch.testing.assert_close(token_logps(loaded, batch).logps_BT, token_logps(policy, batch).logps_BT)


def test_what_cannot_be_is_named(random_policy):
    with pytest.raises(ValueError, match=r"policy\.lora\.targets 'no_such_layer' matches no layer"):
        build_policy(PolicySpec(random_policy, lora=LoraSpec(targets="no_such_layer")))
    for options, message in (({"rank": 0}, r"policy\.lora\.rank is 0"), ({"alpha": 0}, r"policy\.lora\.alpha is 0")):
        with pytest.raises(ValueError, match=message):
            LoraSpec(**options)
    for shared in ("lm_head", r".*embed_tokens"):
        with pytest.raises(ValueError, match="embeddings and head may share their weights"):
            build_policy(PolicySpec(random_policy, lora=LoraSpec(targets=shared)))


def test_frozen_layers_get_frozen_adapters(random_policy):
    policy = build_policy(PolicySpec(random_policy, lora=LORA), ["model.language_model.layers.0.*"])
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(".layers.0." in name for name in trained)


@torch.no_grad()
def test_merged_weights_are_float32_under_autocast(policy):
    train_adapters(policy)
    plain = dict(whole_parameters(policy))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(tensor, plain[name]) for name, tensor in whole_parameters(policy))


def test_a_run_with_adapters_syncs_merged_weights(random_policy, tmp_path, without_vllm):
    """Through the command line, with the contract's probe after each sync."""
    from safetensors.torch import load_file

    from prism_pl.__main__ import main

    command = [
        *("fit", "--config", "rlvr.yaml", "--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "2"),
        *("--trainer.limit_val_batches", "0", "--data.batch_size", "2"),
        *("--data.num_train", "16", "--model.num_rollouts", "4", "--model.sampling.max_tokens", "48"),
        *("--model.policy.lora.rank", "2", "--model.freeze", "[]"),
    ]
    assert main(command) == 0
    export = load_file(tmp_path / "export" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in export)
