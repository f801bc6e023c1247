"""What vLLM holds after a sync, in bf16, where rounding hides small steps from the log-probabilities."""

import math
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import Sampling, VLLMEngine, read_back
from prism_pl.rollout.vllm_compat import model_of
from scripts.blank_policy import ROOT
from tests.conftest import make_examples

pytest.importorskip("vllm")

GREEDY = Sampling(temperature=0.0, max_tokens=4)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def started(request):
    """One engine of each dtype for all tests of this file."""
    spec = PolicySpec(str(ROOT / "assets" / "sft"))
    policy, engine = build_policy(spec), VLLMEngine(dtype=request.param)
    engine.start(policy, spec.processor(), rank=0)
    engine.generate(make_examples(1), 1, GREEDY)
    yield engine, policy
    engine.close()


@pytest.fixture
def policy(started):
    return started[1]


@pytest.fixture
def engine(started):
    engine, policy = started
    engine.sync(policy.named_parameters())
    return engine


@torch.no_grad()
def step(policy, lr, part="") -> None:
    """What a first step of Adam does: every value moves by the learning rate."""
    for name, parameter in policy.named_parameters():
        if part in name:
            parameter.add_(lr * torch.randn_like(parameter).sign())


def sync_in_all_turns(engine, policy) -> None:
    for _ in range(math.ceil(len(engine.read_back.others) / read_back.MOST_UNITS)):
        engine.sync(policy.named_parameters())


def held(engine):
    (model,) = engine._llm.collective_rpc(model_of)
    return model


@pytest.mark.parametrize("lr", [2e-4, 1e-5, 1e-6])
def test_a_sync_that_sends_nothing_stops_at_the_first_step(engine, policy, monkeypatch, lr):
    monkeypatch.setattr(engine.sender, "send", lambda *_: None)
    engine.sync(policy.named_parameters())  # nothing has changed yet
    step(policy, lr)
    with pytest.raises(ValueError, match=r"rollout contract: after a sync the engine's '.*embed_tokens.* not arrive"):
        engine.sync(policy.named_parameters())


def test_a_head_that_stays_packed_as_it_was_is_found(engine, policy):
    head = held(engine).language_model.lm_head
    step(policy, 1e-5, "embed_tokens")
    with (
        patch.object(head.quant_method, "process_weights_after_loading", lambda layer: None),
        pytest.raises(ValueError, match=r"the engine's 'language_model.lm_head.weight' is not .* packed or kept"),
    ):
        engine.sync(policy.named_parameters())


@pytest.mark.parametrize(
    ("part", "stale"),
    [
        ("layers.2.self_attn.k_proj", "layers.2.self_attn.qkv_proj"),
        ("layers.1.mlp.up_proj", "layers.1.mlp.gate_up_proj"),
        ("layers.0.mlp.down_proj", "layers.0.mlp.down_proj"),
        ("blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.weight"),
        ("blocks.0.norm1.bias", "blocks.0.norm1.bias"),
        ("patch_embed.proj.weight", "patch_embed.proj.weight"),
    ],
)
def test_any_parameter_that_is_left_old_is_found_in_its_turn(engine, policy, monkeypatch, part, stale):
    """A packed, a fused and a plain one, and each by its name."""
    monkeypatch.setattr(engine.sender, "send", lambda *_: None)
    step(policy, 1e-3, part)
    with pytest.raises(ValueError, match=rf"the engine's '\S*{stale}\S*' is not the trainer's"):
        sync_in_all_turns(engine, policy)


def test_every_parameter_of_the_engine_has_its_turn(engine, policy, monkeypatch):
    seen, compare = [], read_back._compare

    def note(pairs, dtype):
        seen.extend(name for name, _, _ in pairs)
        compare(pairs, dtype)

    monkeypatch.setattr(read_back, "_compare", note)
    sync_in_all_turns(engine, policy)
    assert set(seen) == {name for name, _ in held(engine).named_parameters()} | {"language_model.lm_head.weight"}


def test_all_columns_have_their_turn():
    """In every regular subset of turns, as parameters of a large network are compared."""
    unit = read_back.Unit("", ("",), 2565)
    for every in (1, 2, 3, 20):
        columns = {column for turn in range(0, 2000 * every, every) for column in unit.columns(turn)}
        assert columns == set(range(2565))


def test_weights_that_are_not_numbers_are_left_to_the_check_that_names_the_rows():
    ours = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    read_back._compare([("a", ours, torch.tensor([[1.0, 5.0], [float("nan"), 3.0]]))], torch.float32)
    with pytest.raises(ValueError, match=r"'a' is not the trainer's: 1 of 4"):
        read_back._compare([("a", ours, torch.tensor([[1.0, 5.0], [float("nan"), 4.0]]))], torch.float32)


def test_a_vllm_whose_layers_are_others_is_said_once_and_ends_no_run(policy):
    asked = []
    other = SimpleNamespace(collective_rpc=lambda ask: asked.append(ask) or [torch.nn.Linear(1, 1)])
    check = read_back.ReadBack({"model.norm.weight": (8,)}, tied=True)
    with pytest.warns(UserWarning, match=r"weights cannot be read back after a sync \(.*hf_to_vllm_mapper"):
        check.check(other, policy, on_cpu=True)
    check.check(other, policy, on_cpu=True)
    assert len(asked) == 1


def test_an_engine_without_embeddings_of_a_known_name_is_no_defect(policy):
    model = torch.nn.Linear(1, 1)
    model.hf_to_vllm_mapper, model.packed_modules_mapping = SimpleNamespace(_map_name=lambda name: name), {}
    other = SimpleNamespace(collective_rpc=lambda ask: [model])
    with pytest.warns(UserWarning, match="cannot be read back after a sync .*no embeddings among"):
        read_back.ReadBack({"weight": (1, 1)}, tied=False).check(other, policy, on_cpu=True)
