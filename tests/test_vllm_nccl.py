"""The trainer's end of a transfer by NCCL, everything but NCCL itself: both of vLLM's forms, and what must not hang."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import VLLMServerEngine, vllm_compat, vllm_nccl, vllm_server_sync
from prism_pl.rollout.contract import StreamDigest
from prism_pl.rollout.vllm_server_client import Server
from prism_pl.rollout.vllm_server_sync import NCCLTransfer, PathTransfer
from tests.conftest import missing
from tests.fake_vllm import FakeVLLM

SHAPES = {"a": (3,), "b": (2, 5)}
ADDRESS = "10.0.0.1:29500"


class Calls:
    """A server that is not there: notes what is posted, and what a test puts in its place happens.

    Attributes:
        posted: path and body of each call, in order; `done` is what came to its end.
        answers: by path, called in the place of the server's answer.
    """

    url = "http://127.0.0.1:1"

    def __init__(self, **answers):
        self.posted, self.answers = [], {f"/{name}": answer for name, answer in answers.items()}

    def get(self, path):
        return {"world_size": 4}

    def rpc(self, method, *args):
        return [{"loaded": [], "received": []}]

    def post(self, path, body=None, *, retry=True):
        assert not retry
        self.posted.append((path, body))
        self.answers.get(path, lambda: None)()

    @property
    def paths(self):
        return [path for path, _ in self.posted]


def named():
    return [(name, torch.randn(shape)) for name, shape in SHAPES.items()]


def send(transfer, stream=None):
    return transfer.send(named() if stream is None else stream, "run-1", StreamDigest())


def opened(server):
    return NCCLTransfer(server, SHAPES, torch.bfloat16, ADDRESS)


@pytest.fixture
def older(monkeypatch):
    """vLLM 0.24's engine, played: each half waits until the other has come. `halves` is where they meet."""
    halves = threading.Barrier(2, timeout=5)

    class Engine:
        told, sent, groups = [], [], []

        @staticmethod
        def trainer_init(info):
            Engine.told.append(info)
            halves.wait()
            Engine.groups.append(SimpleNamespace(destroy=lambda: Engine.told.append("destroyed")))
            return Engine.groups[-1]

        @staticmethod
        def trainer_send_weights(iterator, args):
            assert iter(iterator) is iterator
            halves.wait()
            Engine.sent.append((list(iterator), args))

    name = "vllm.distributed.weight_transfer.nccl_engine"
    module = ModuleType(name)
    module.NCCLWeightTransferEngine = Engine
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_compat, "import_vllm", lambda: SimpleNamespace(__version__="0.24.0"))
    return SimpleNamespace(engine=Engine, halves=halves)


def test_the_older_form_meets_the_server_and_sends_beside_it(older):
    server = Calls(init_weight_transfer_engine=older.halves.wait, update_weights=older.halves.wait)
    transfer = opened(server)
    group = {"master_address": "10.0.0.1", "master_port": 29500, "world_size": 5}
    assert older.engine.told == [group]
    assert server.posted == [("/init_weight_transfer_engine", {"init_info": group | {"rank_offset": 1}})]

    server.posted.clear()
    weights, taken = named(), []
    send(transfer, (taken.append(name) or (name, tensor) for name, tensor in weights))
    told = {"names": ["a", "b"], "dtype_names": ["bfloat16"] * 2, "shapes": [[3], [2, 5]], "packed": True}
    assert server.posted == [
        ("/start_weight_update", {}),
        ("/update_weights", {"update_info": told}),
        ("/finish_weight_update", None),
    ]
    ((sent, args),) = older.engine.sent
    assert args == {"group": older.engine.groups[0], "packed": True}
    assert taken == ["a", "b"]  # once each
    for (name, tensor), (expected, whole) in zip(sent, weights, strict=True):
        assert name == expected
        assert torch.equal(tensor, whole.bfloat16())
        assert not tensor.requires_grad

    for _ in range(2):
        transfer.close()
    assert older.engine.told[1:] == ["destroyed"]


def test_the_server_is_not_told_that_all_has_come_before_it_has(older):
    """The trainer's half ends long before the server's."""
    server, last = Calls(init_weight_transfer_engine=older.halves.wait), []
    transfer = opened(server)

    def slowly():
        older.halves.wait()
        time.sleep(0.2)
        last.append(server.paths[-1])

    server.answers["/update_weights"] = slowly
    send(transfer)
    assert last == ["/update_weights"]
    assert server.paths[-1] == "/finish_weight_update"


def refuse():
    raise ConnectionError("the rollout server gave no answer: it is gone")


def test_a_server_that_is_lost_at_the_start_is_an_error_at_once(older):
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer: it is gone"):
        opened(Calls(init_weight_transfer_engine=refuse))
    assert time.monotonic() - begun < 1
    older.halves.abort()


@pytest.mark.parametrize("call", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_a_server_that_is_lost_in_a_broadcast_is_an_error_at_once_and_ever_after(monkeypatch, call):
    never, said = threading.Event(), []

    def open_nccl(client, source, address, port, world_size):
        def send_weights():
            client.start_weight_update()
            vllm_nccl.in_thread(lambda: client.update_weights({}))
            if call == "update_weights":
                never.wait()
            client.finish_weight_update()

        return SimpleNamespace(send_weights=send_weights, shutdown=lambda: said.append("shut"))

    monkeypatch.setattr(vllm_nccl, "open_nccl", open_nccl)
    transfer = opened(Calls(**{call: refuse}))
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer: it is gone"):
        send(transfer)
    assert time.monotonic() - begun < 1
    assert said == ["shut"]  # which ends what waits on the GPU
    with pytest.raises(
        ConnectionError, match=r"NCCL to .* broke off before \(ConnectionError: .* is gone\): start the"
    ):
        send(transfer)
    transfer.close()
    assert said == ["shut"]
    never.set()


@pytest.mark.parametrize("leave", ["raises", "blocks"])
def test_a_group_that_cannot_be_left_hides_no_reason(monkeypatch, leave):
    never = threading.Event()

    def shutdown():
        if leave == "blocks":
            never.wait()
        raise RuntimeError("NCCL error")

    def open_nccl(client, *_):
        return SimpleNamespace(send_weights=lambda: client.update_weights({}), shutdown=shutdown)

    monkeypatch.setattr(vllm_nccl, "open_nccl", open_nccl)
    monkeypatch.setattr(vllm_server_sync, "SECONDS_TO_LEAVE", 0.1)
    with pytest.raises(ConnectionError, match="no answer: it is gone"):
        send(opened(Calls(update_weights=refuse)))
    never.set()


def test_a_group_that_opens_after_the_server_was_given_up_is_left(monkeypatch):
    late, said = threading.Event(), []

    def open_nccl(client, *_):
        vllm_nccl.in_thread(lambda: client.init_weight_transfer_engine({}))
        late.wait()
        return SimpleNamespace(shutdown=lambda: said.append("shut"))

    monkeypatch.setattr(vllm_nccl, "open_nccl", open_nccl)
    with pytest.raises(ConnectionError, match="no answer: it is gone"):
        opened(Calls(init_weight_transfer_engine=refuse))
    assert said == []
    late.set()
    end = time.monotonic() + 5
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    assert said == ["shut"]


def test_after_a_failure_the_server_is_told_nothing_more():
    server = Calls(start_weight_update=refuse)
    control = vllm_server_sync._Control(server)
    for call in (control.start_weight_update, lambda: control.update_weights({}), control.finish_weight_update):
        with pytest.raises(ConnectionError):
            call()
    assert server.paths == ["/start_weight_update"]


def test_the_sources_own_error_comes_out_and_nothing_waits_for_the_server(monkeypatch):
    """vLLM's own executor joins its threads at the end of the process."""
    never, executor, calls = threading.Event(), ThreadPoolExecutor(1), []

    def open_nccl(client, source, address, port, world_size):
        def send_weights():
            calls.append(executor.submit(client.update_weights, {}))
            list(source)

        return SimpleNamespace(send_weights=send_weights, shutdown=lambda: None)

    monkeypatch.setattr(vllm_nccl, "open_nccl", open_nccl)
    transfer = opened(Calls(update_weights=never.wait))
    try:
        with pytest.raises(ValueError, match=r"a sync sends 'b' where 'a' is due"):
            send(transfer, reversed(named()))
        assert calls[0].exception(timeout=1) is not None
    finally:
        never.set()
    with pytest.raises(ConnectionError, match=r"broke off before \(ValueError: rollout contract: a sync sends 'b'"):
        send(transfer)


def test_a_thread_works_without_gradients_on_its_callers_gpu_between_two_waits_for_it(monkeypatch):
    seen = []

    @contextmanager
    def device(index):
        seen.append(f"on {index}")
        yield

    def open_nccl(*args):
        seen.append((torch.is_grad_enabled(), threading.current_thread().daemon))
        return SimpleNamespace(shutdown=lambda: None)

    monkeypatch.setattr(vllm_nccl, "open_nccl", open_nccl)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: seen.append(f"wait for {index}"))
    opened(Calls())
    assert seen == ["wait for 3", "on 3", (False, True), "wait for 3"]


@pytest.fixture
def newer(monkeypatch):
    """The installed vLLM's form, with NCCL's own calls played; `sent` is what was broadcast."""
    pytest.importorskip("vllm")
    vllm_compat.import_vllm()
    from vllm.distributed.weight_transfer import nccl_engine

    if not hasattr(nccl_engine, "NCCLTrainerInitInfo"):
        pytest.skip("this vLLM has the older form")
    told = SimpleNamespace(engine=nccl_engine, sent=[], destroyed=0)

    def destroy():
        told.destroyed += 1

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: SimpleNamespace(destroy=destroy))

    def broadcast(iterator, **options):
        told.sent += list(iterator)

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    return told


def test_the_newer_form_makes_the_same_calls(newer):
    server = Calls()
    transfer = opened(server)
    assert server.posted[0][1]["init_info"].items() >= {"rank_offset": 1, "world_size": 5, "packed": True}.items()
    weights = named()
    send(transfer, weights)
    assert server.paths[1:] == ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert server.posted[2][1]["update_info"]["dtype_names"] == ["bfloat16"] * 2
    assert all(
        torch.equal(tensor, whole.bfloat16()) for (_, tensor), (_, whole) in zip(newer.sent, weights, strict=True)
    )
    transfer.close()
    assert newer.destroyed == 1


def test_the_newer_form_fails_and_does_not_hang(newer, monkeypatch):
    never = threading.Event()
    transfer = opened(server := Calls())
    server.answers["/update_weights"] = refuse
    monkeypatch.setattr(newer.engine, "packed_nccl_broadcast_producer", lambda **options: never.wait())
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer: it is gone"):
        send(transfer)
    assert time.monotonic() - begun < 1
    assert newer.destroyed == 1
    never.set()


def test_a_vllm_without_either_form_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(vllm_compat, "import_vllm", lambda: SimpleNamespace(__version__="0.28.0"))
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.nccl_engine", None)
    with pytest.raises(ValueError, match=r"no trainer's end .* the same vllm, 0\.24 or 0\.32, on both sides, or set"):
        vllm_nccl.open_nccl(None, None, "127.0.0.1", 1, 2)


@pytest.fixture(scope="module")
def policy_and_processor(random_policy):
    spec = PolicySpec(random_policy)
    return build_policy(spec), spec.processor()


@pytest.fixture
def fake(policy_and_processor):
    policy, processor = policy_and_processor
    fake = FakeVLLM(processor, policy.config)
    yield fake
    fake.close()


def test_every_call_has_the_body_that_vllm_reads(older, fake):
    """0.24 refuses an empty body where it reads JSON."""
    older.halves = threading.Barrier(1)
    older.engine.trainer_init = staticmethod(lambda info: SimpleNamespace(destroy=lambda: None))
    older.engine.trainer_send_weights = staticmethod(lambda iterator, args: list(iterator))
    transfer = opened(Server(fake.url, 0, 5.0))
    send(transfer)
    calls = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert fake.called == ["/get_world_size", "/init_weight_transfer_engine", "prism_watch", *calls, "prism_finish"]
    with pytest.raises(ValueError, match="refused /start_weight_update with 400: Invalid JSON"):
        Server(fake.url, 0, 5.0).post("/start_weight_update")
    transfer.close()


@pytest.fixture
def between_gpus(fake, policy_and_processor, monkeypatch):
    """An engine, of some kind, that has met a server on a GPU and takes itself for one of a policy on a GPU."""
    monkeypatch.setattr(vllm_nccl, "open_nccl", lambda *args: SimpleNamespace(shutdown=lambda: None))
    monkeypatch.setattr(vllm_compat, "import_vllm", lambda: SimpleNamespace(__version__="0.24.1+cu129"))

    def meet(kind, version):
        engine = VLLMServerEngine(fake.url, transfer=kind)
        engine.start(*policy_and_processor, rank=0) if kind != "nccl" else setattr(engine, "weights", None)
        engine.policy, engine.server = policy_and_processor[0], Server(fake.url, 0, 5.0)
        engine.workers = [replace(fake.facts, device="cuda", transfer="nccl", version=version)]
        engine.on_cpu = False
        return engine

    return meet


@pytest.mark.parametrize("kind", ["auto", "nccl"])
def test_by_nccl_both_sides_have_the_same_vllm(between_gpus, kind):
    assert isinstance(between_gpus(kind, "0.24.0")._transfer(), NCCLTransfer)
    with pytest.raises(
        ValueError, match=r"is vLLM 0\.32\.0 and the trainer's is 0\.24\.1\+cu129: .* set .* transfer: path"
    ):
        between_gpus(kind, "0.32.0")._transfer()
    assert isinstance(between_gpus("path", "0.32.0")._transfer(), PathTransfer)


def test_without_a_vllm_on_the_trainers_side_auto_takes_a_folder(between_gpus, monkeypatch, caplog):
    monkeypatch.setattr(vllm_nccl, "is_installed", lambda: False)
    monkeypatch.setattr(vllm_compat, "import_vllm", lambda: missing("No module named 'vllm'"))
    assert isinstance(between_gpus("auto", "0.24.0")._transfer(), PathTransfer)
    assert "no vllm is installed here: weights go by a folder" in caplog.text
    with pytest.raises(ValueError, match=r"no trainer's end .* \(No module named 'vllm'\): install the same vllm"):
        between_gpus("nccl", "0.24.0")._transfer()
