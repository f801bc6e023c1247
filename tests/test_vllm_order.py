"""When VLLMEngine sends the policy's weights, and in which order with sleeping and waking: on a vLLM that only notes
what it is told, because a CPU's sleeps and wakes do nothing."""

from types import SimpleNamespace

import pytest
import torch

from prism_pl.lora import whole_parameters
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import Sampling, VLLMEngine
from prism_pl.rollout.copy_plan import unpacked
from tests.stubs import equal

RESETS = ["forget image features", "forget images", "forget keys and values"]


class Noting:
    """In the place of `vllm.LLM`. `calls` is what it was told, in order, `held` the weights that it was sent last."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held: dict[str, torch.Tensor] = {}
        self.llm_engine = SimpleNamespace(reset_encoder_cache=lambda: self.calls.append("forget image features"))

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep at level {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.extend(f"wake {tag}" for tag in tags)

    def collective_rpc(self, load, args) -> list[set[str]]:
        self.calls.append("load")
        self.held = {name: tensor.clone() for name, tensor in unpacked(*args)}
        return [set(self.held)]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("forget keys and values")
        return True

    def reset_mm_cache(self) -> None:
        self.calls.append("forget images")


@pytest.fixture
def policy(random_policy):
    return build_policy(PolicySpec(random_policy))


@pytest.fixture
def llm():
    return Noting()


@pytest.fixture
def engine(policy, llm, random_policy, monkeypatch):
    """Started, with nothing sent yet."""
    launched = SimpleNamespace(llm=llm, dtype=torch.float32, close=lambda: None)
    monkeypatch.setattr("prism_pl.rollout.vllm_engine.Launched", lambda *_: launched)
    engine = VLLMEngine()
    engine.start(policy, PolicySpec(random_policy).processor(), rank=0)
    monkeypatch.setattr("prism_pl.rollout.vllm_engine.ReadBack.check", lambda *_: None)  # there are no layers to read
    monkeypatch.setattr(engine, "_generate", lambda *_: llm.calls.append("generate") or [])
    return engine


def told(llm: Noting) -> list[str]:
    """What it was told since the last look. The order of the resets among themselves is free."""
    calls, llm.calls[:] = list(llm.calls), []
    after = calls.index("load") + 1 if "load" in calls else len(calls)
    resets = [call for call in calls[after:] if call in RESETS]
    return [*calls[:after], *(call for call in calls[after:] if call not in RESETS), *sorted(resets)]


def restore(policy) -> None:
    """Other weights in place, as a strategy loads a checkpoint's."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize("by", ["sync", "wake"])
def test_a_sleeper_has_room_for_the_weights_then_the_weights_then_room_for_the_cache(engine, llm, policy, by):
    engine.sleep()
    engine.sleep()  # asleep already
    assert told(llm) == ["sleep at level 2"]
    restore(policy)
    if by == "sync":
        engine.sync(policy.named_parameters())
    else:
        engine.wake()
    # Memory that wakes for the weights holds none: they are loaded into it, and nothing is computed before that.
    assert told(llm) == ["wake weights", "load", "wake kv_cache", *RESETS]
    assert equal(llm.held, dict(whole_parameters(policy)))
    engine.wake()
    engine.sync(policy.named_parameters())
    assert told(llm) == ["load", *RESETS]  # awake, it is only sent the weights


def test_an_engine_told_not_to_sleep_stays_awake(engine, llm, policy):
    engine.sleeps = False
    engine.sleep()
    engine.sync(policy.named_parameters())
    assert told(llm) == ["load", *RESETS]


def test_the_first_rollout_after_a_start_is_of_the_weights_that_were_restored_meanwhile(
    engine, llm, policy, random_policy
):
    sampling = Sampling(max_tokens=4)
    for _ in range(2):  # a start of its own for each fit
        restore(policy)
        engine.generate([], 1, sampling)
        assert llm.calls[0] == "load"
        assert llm.calls.pop() == "generate"
        assert told(llm) == ["load", *RESETS]
        assert equal(llm.held, dict(whole_parameters(policy)))
        engine.generate([], 1, sampling)
        assert told(llm) == ["generate"]
        engine.start(policy, PolicySpec(random_policy).processor(), rank=0)
