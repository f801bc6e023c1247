"""The copies of vLLM's weight loaders, made again without them: after loaders of our own, and after vLLM's."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prism_pl.lora import whole_parameters
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import VLLMEngine, vllm_compat
from prism_pl.rollout.contract import StreamDigest, check_received
from prism_pl.rollout.copy_plan import CopyPlan
from prism_pl.rollout.vllm_sync import WeightSender, packed
from scripts.blank_policy import ROOT

PARTS = ("q", "k", "v")
NAMES = {"embed", "qkv", "norm"}


class Model(nn.Module):
    """Keeps q, k and v in one parameter, and the embeddings with two rows of padding, as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(6, 3), requires_grad=False)
        self.qkv = nn.Parameter(torch.zeros(6, 3), requires_grad=False)
        self.norm = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.num_loaded = 0

    def load_weights(self, stream):
        loaded = set()
        for name, tensor in stream:
            self.num_loaded += 1
            loaded.add(self.load(name, tensor))
        return loaded

    def load(self, name, tensor) -> str:
        if name in PARTS:
            self.qkv.data.narrow(0, 2 * PARTS.index(name), 2).copy_(tensor)
            return "qkv"
        parameter = self.get_parameter(name)
        parameter[: len(tensor)].data.copy_(tensor)
        return name


class Doubling(Model):
    """Computes with one of the weights."""

    def load(self, name, tensor) -> str:
        return super().load(name, 2 * tensor if name == "norm" else tensor)


class Adding(Model):
    """Alters a parameter after the copy."""

    def load(self, name, tensor) -> str:
        loaded = super().load(name, tensor)
        if name == "norm":
            self.norm.data.add_(tensor)
        return loaded


class Filling(Model):
    """Keeps rows of padding at zero, which a sleep would lose."""

    def load(self, name, tensor) -> str:
        loaded = super().load(name, tensor)
        if name == "embed":
            self.embed.data[len(tensor) :].fill_(0)
        return loaded


class FillingMany(Model):
    """The same by one call."""

    def load(self, name, tensor) -> str:
        loaded = super().load(name, tensor)
        torch._foreach_zero_([self.embed.data[4:]])
        return loaded


class Elsewhere(Model):
    """Has a buffer for one of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(5))

    def load(self, name, tensor) -> str:
        if name != "norm":
            return super().load(name, tensor)
        self.kept.copy_(tensor)
        return name


class Sharing(Model):
    """Has two parameters in one storage, of which a copy tells only one."""

    def __init__(self) -> None:
        super().__init__()
        self.also = nn.Parameter(self.norm.data, requires_grad=False)

    def load_weights(self, stream):
        return super().load_weights(stream) | {"also"}


class Keeping(Model):
    """Keeps what it has found in a weight."""

    def load(self, name, tensor) -> str:
        self.largest = tensor.max()
        return super().load(name, tensor)


class Skipping(Model):
    """Takes a part of a weight, as a rank of several does."""

    def load(self, name, tensor) -> str:
        if name != "norm":
            return super().load(name, tensor)
        self.norm.data[:2].copy_(tensor[:2])
        return name


def weights():
    named = {"embed": torch.randn(4, 3), "norm": torch.randn(5)} | {part: torch.randn(2, 3) for part in PARTS}
    return list(named.items())


def send(plan, model, named, max_bytes=48):
    """Two or three tensors a bucket."""
    sent, received = StreamDigest(), StreamDigest()
    loaded = plan.load(model, packed(named, torch.float32, max_bytes, sent), received)
    check_received(sent, received)
    return loaded


def check_holds(model, named) -> None:
    values = dict(named)
    assert torch.equal(model.embed, torch.cat([values["embed"], torch.zeros(2, 3)]))
    assert torch.equal(model.qkv, torch.cat([values[part] for part in PARTS]))
    assert torch.equal(model.norm, values["norm"])


@pytest.mark.parametrize("max_bytes", [4, 48, 1 << 20])
def test_from_the_second_sync_on_values_are_copied_without_the_loaders(max_bytes):
    model, plan = Model(), CopyPlan()
    for _ in range(3):
        named = weights()
        assert send(plan, model, named, max_bytes) == NAMES
        check_holds(model, named)
    assert model.num_loaded == 5


def test_values_go_to_where_the_parameters_are_now():
    model, plan = Model(), CopyPlan()
    send(plan, model, weights())
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)
    gc.collect()
    for _ in range(2):
        named = weights()
        send(plan, model, named)
        check_holds(model, named)
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter)
    assert model.num_loaded == 5


class Transposing(Model):
    """Keeps its embeddings the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(3, 6), requires_grad=False)

    def load(self, name, tensor) -> str:
        if name != "embed":
            return super().load(name, tensor)
        self.embed.data[:, :4].copy_(tensor.T)
        return name


def test_views_of_any_layout_are_copied_as_they_were():
    model, plan = Transposing(), CopyPlan()
    for _ in range(2):
        named = weights()
        assert send(plan, model, named) == NAMES
        assert torch.equal(model.embed[:, :4], dict(named)["embed"].T)
    assert model.num_loaded == 5


def test_what_was_loaded_is_what_was_copied_this_time():
    model, plan = Model(), CopyPlan()
    send(plan, model, weights())
    assert send(plan, model, [weight for weight in weights() if weight[0] in ("embed", "norm")]) == {"embed", "norm"}


@pytest.mark.parametrize(("on_cpu", "num_loaded"), [(False, 5), (True, 10)])
def test_the_sender_asks_the_loaders_once_on_a_gpu_and_always_on_a_cpu(monkeypatch, on_cpu, num_loaded):
    model = Model()
    policy = SimpleNamespace(named_parameters=weights, config=SimpleNamespace(tie_word_embeddings=False))
    sender = WeightSender(policy)
    worker = SimpleNamespace(get_model=lambda: model)
    llm = SimpleNamespace(collective_rpc=lambda load, args: [load(worker, *args)])
    monkeypatch.setattr(vllm_compat, "load_weights", lambda worker, stream, on_cpu: model.load_weights(stream))
    for _ in range(2):
        named = weights()
        sender.send(llm, named, on_cpu)
        check_holds(model, named)
    assert model.num_loaded == num_loaded


@pytest.mark.parametrize("kind", [Doubling, Adding, Filling, FillingMany, Elsewhere, Sharing, Keeping, Skipping])
def test_loaders_that_do_more_than_copy_are_always_asked(kind):
    model, plan = kind(), CopyPlan()
    for _ in range(3):
        named = weights()
        with torch.no_grad():
            model.embed.fill_(7)
            model.embed[4:].zero_()
        assert send(plan, model, named) >= NAMES
    assert model.num_loaded == 15
    doubled = [(name, 2 * tensor if name == "norm" else tensor) for name, tensor in named]
    if kind in (Doubling, Adding):
        check_holds(model, doubled)


def test_a_fill_of_no_rows_is_nothing():
    model, plan = Filling(), CopyPlan()
    model.embed = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    for _ in range(2):
        assert send(plan, model, weights()) == NAMES
    assert model.num_loaded == 5


def test_buckets_of_another_order_go_through_the_loaders():
    model, plan = Model(), CopyPlan()
    send(plan, model, weights())
    named = weights()
    assert send(plan, model, named[:2] + named[:1:-1], max_bytes=40) == NAMES
    check_holds(model, named)
    assert 5 < model.num_loaded < 10  # the bucket of the embeddings was as before


def test_it_is_what_vllms_own_loaders_do(monkeypatch):
    """While the engine starts its parameters are not packed yet, as on a GPU."""
    pytest.importorskip("vllm")
    spec = PolicySpec(str(ROOT / "assets" / "sft"))
    torch.manual_seed(0)
    policy = build_policy(spec)
    fill, told = WeightSender.fill, []

    def fill_by_both(sender, policy, model) -> None:
        fill(sender, policy, model)
        theirs = {name: parameter.clone() for name, parameter in model.named_parameters()}
        plan, asked = CopyPlan(), []

        def ask(stream):
            asked.append(1)
            return type(model).load_weights(model, stream)

        monkeypatch.setattr(model, "load_weights", ask)
        with torch.no_grad():
            for _ in range(2):
                for parameter in model.parameters():
                    parameter.zero_()
                buckets = packed(whole_parameters(policy), torch.float32, 1 << 20, StreamDigest())
                assert plan.load(model, buckets, StreamDigest()) == sender.held
                told.append([name for name, each in model.named_parameters() if not torch.equal(each, theirs[name])])
        told.append(len(asked))
        monkeypatch.undo()

    monkeypatch.setattr(WeightSender, "fill", fill_by_both)
    engine = VLLMEngine()
    engine.start(policy, spec.processor(), rank=0)
    engine.close()
    assert told == [[], [], 1]
