"""What an optimiser keeps lies elsewhere between its steps, and is stepped as if it did not."""

from types import SimpleNamespace

import pytest
import torch

from prism_pl.strategy.parking import Parking, pinned


def engine_of(optimizer, stage=0, **of_zero):
    return SimpleNamespace(
        basic_optimizer=optimizer,
        optimizer=SimpleNamespace(**of_zero),
        device="cpu",
        zero_optimization_stage=lambda: stage,
    )


def train(steps, parked):
    torch.manual_seed(0)
    network = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    parking = Parking(engine_of(optimizer))
    for _ in range(steps):
        network(torch.ones(2, 5)).square().sum().backward()
        if parked:
            parking.park()
            parking.fetch()
        optimizer.step()
        optimizer.zero_grad()
    return network, optimizer, parking


def test_parked_states_step_as_others_do_and_the_buffer_grows_with_them():
    (network, *_), (expected, *_) = train(3, parked=True), train(3, parked=False)
    assert torch.equal(network.weight, expected.weight)
    assert torch.equal(network.bias, expected.bias)


def storages(optimizer, *names):
    return {state[name].untyped_storage().data_ptr() for state in optimizer.state.values() for name in names}


def test_all_of_an_optimisers_state_is_in_one_buffer_of_its_size_and_comes_back_out():
    _, optimizer, parking = train(1, parked=False)
    before = {id(state): state["exp_avg"].clone() for state in optimizer.state.values()}
    parking.park()
    assert len(storages(optimizer, "exp_avg", "exp_avg_sq")) == 1
    assert len(storages(optimizer, "step")) == 2  # the counters stay where they are
    # 15 and 3 floats, twice, each from a multiple of 64 bytes on
    assert len(parking._buffer) == 4 * 64
    for state in optimizer.state.values():
        assert torch.equal(state["exp_avg"], before[id(state)])
    parking.fetch()
    assert len(storages(optimizer, "exp_avg", "exp_avg_sq")) == 4
    for state in optimizer.state.values():
        assert torch.equal(state["exp_avg"], before[id(state)])


def test_masters_are_parked_but_for_those_that_are_the_weights_themselves():
    own, shared = torch.ones(4), torch.ones(6)
    flat = {"fp32_partitioned_groups_flat": [own, shared], "fp16_partitioned_groups_flat": [own.bfloat16(), shared]}
    optimizer = torch.optim.SGD([torch.nn.Parameter(own)], lr=0.1)
    where = own.data_ptr(), shared.data_ptr()
    Parking(engine_of(optimizer, stage=3, **flat)).park()
    assert own.data_ptr() != where[0]
    assert shared.data_ptr() == where[1]


def test_at_stage_2_views_of_the_masters_are_let_go_and_made_anew():
    called = []
    master = torch.ones(4)
    engine = engine_of(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1),
        stage=2,
        single_partition_of_fp32_groups=[master],
        _clear_hp_buffer_references=lambda: called.append("let go"),
        _link_all_hp_params=lambda: called.append("made anew"),
    )
    parking = Parking(engine)
    parking.park()
    assert called == ["let go"]
    parking.fetch()
    assert called == ["let go", "made anew"]
    assert torch.equal(master, torch.ones(4))


def test_so_are_those_of_bf16_at_stage_1_which_has_an_optimiser_of_its_own():
    weight, master = torch.nn.Parameter(torch.ones(4).bfloat16()), torch.ones(4)
    weight._hp_mapping = master.view(2, 2)
    zero = {"fp32_groups_flat_partition": [master], "bf16_groups": [[weight]], "_hp_optimizer_states_linked": True}
    zero["_link_all_hp_params"] = lambda: setattr(weight, "_hp_mapping", "anew")
    engine = engine_of(torch.optim.SGD([weight], lr=0.1), stage=1, **zero)
    where, parking = master.data_ptr(), Parking(engine)
    parking.park()
    assert master.data_ptr() != where
    assert weight._hp_mapping is None
    parking.fetch()
    assert torch.equal(master, torch.ones(4))
    assert weight._hp_mapping == "anew"
    assert not engine.optimizer._hp_optimizer_states_linked


def test_cpu_memory_is_pinned_as_long_as_it_is_there_and_said_where_it_cannot_be(monkeypatch):
    registered, code = {}, 0

    def register(address, size, flags):
        registered[address] = size
        return code

    cuda = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=registered.pop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    buffer = pinned(100)
    assert registered == {buffer.data_ptr(): 100}
    del buffer
    assert registered == {}
    code = 1
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    with pytest.warns(UserWarning, match="3 GiB of CPU memory could not be pinned"):
        assert len(pinned(3 << 30)) == 3 << 30
