"""Weights on their way to a vLLM server: files, the worker's side, the order of a transfer by NCCL, and two ranks."""

import multiprocessing
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import start_processes

from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import Sampling, VLLMServerEngine, vllm_nccl
from prism_pl.rollout.bucket import Bucket
from prism_pl.rollout.contract import StreamDigest
from prism_pl.rollout.vllm_server_client import Server, ServerError
from prism_pl.rollout.vllm_server_facts import ServerFacts
from prism_pl.rollout.vllm_server_files import read_buckets, write_buckets
from prism_pl.rollout.vllm_server_sync import NCCLTransfer, PathTransfer, ServerWeights, _own_address
from prism_pl.rollout.vllm_server_worker import ServerWorker
from tests.conftest import make_examples
from tests.fake_vllm import FakeVLLM

SHAPES = {"a": (3,), "b": (2, 5), "c": (1, 1, 7)}


class Model(nn.Module):
    """Takes weights over by name, as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def load_weights(self, stream):
        loaded = set()
        for name, tensor in stream:
            self.get_parameter(name).data.copy_(tensor)
            loaded.add(name)
        return loaded


class Worker(ServerWorker):
    def __init__(self, model) -> None:
        self.device, self.model = torch.device("cuda"), model  # a GPU's model takes weights as they come

    def get_model(self):
        return self.model


class Direct(Server):
    """A server whose worker lives in this process."""

    def __init__(self, worker) -> None:
        super().__init__("http://127.0.0.1:1", 0, 1.0)
        self.worker, self.posted = worker, []

    def rpc(self, method, *args, retry=True):
        self.posted.append(method)
        answer = getattr(self.worker, method)(*args)
        if "error" in answer:
            raise ServerError(answer["error"])
        return [answer]

    def get(self, path):
        assert path == "/get_world_size"
        return {"world_size": 4}

    def post(self, path, body=None, *, retry=True):
        assert not retry
        self.posted.append(path)


@pytest.fixture
def named():
    return [(name, torch.randn(shape)) for name, shape in SHAPES.items()]


def policy_with(named):
    return SimpleNamespace(named_parameters=lambda: iter(named), config=SimpleNamespace(tie_word_embeddings=True))


def facts() -> ServerFacts:
    return ServerFacts("0.32.0", "cuda", "bfloat16", 99, "", "", False, False, "nccl", {}, {}, list(SHAPES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_come_out_of_their_files_as_they_went_in(dtype, tmp_path):
    named = [(str(i), torch.randn(shape)) for i, shape in enumerate([(3,), (2, 5), (), (1, 1, 7)])]
    written = [Bucket.pack(part, dtype) for part in (named[:3], named[3:])]
    write_buckets(iter(written), tmp_path / "weights")
    read = [(bucket.head(), int(bucket.bits())) for bucket in read_buckets(tmp_path / "weights")]
    assert read == [(bucket.head(), int(bucket.bits())) for bucket in written]
    with pytest.raises(FileNotFoundError, match="no weights in"):
        list(read_buckets(tmp_path / "nothing"))


def test_weights_arrive_by_files(named, tmp_path):
    worker = Worker(Model())
    transfer = PathTransfer(Direct(worker), str(tmp_path), torch.bfloat16, max_bytes=16)
    ServerWeights(policy_with(named), [facts()], transfer).send(named, "run-1")
    for name, tensor in named:
        assert torch.equal(worker.model.get_parameter(name).data, tensor.bfloat16().float())
    assert worker.prism_version() == {"version": "run-1"}


def test_a_load_from_files_is_not_watched_by_a_transfer_that_broke_off(named, tmp_path):
    worker = Worker(Model())
    worker.prism_watch()
    write_buckets([Bucket.pack(named, torch.float32)], tmp_path / "weights")
    assert worker.prism_load(str(tmp_path / "weights"), "run-1")["loaded"] == sorted(SHAPES)
    assert "load_weights" not in vars(worker.model)


def test_what_stops_a_load_is_said_and_leaves_no_version(named, tmp_path):
    worker = Worker(Model())
    worker._prism_version = "run-1"
    assert worker.prism_load(str(tmp_path / "nothing"), "run-2")["error"].startswith("FileNotFoundError: no weights in")
    assert worker.prism_version() == {"version": None}
    write_buckets([Bucket.pack([("a", torch.zeros(9))], torch.float32)], tmp_path / "wrong")
    assert "size of tensor" in worker.prism_load(str(tmp_path / "wrong"), "run-2")["error"]
    transfer = PathTransfer(Direct(worker), str(tmp_path), torch.float32)
    worker.prism_load = lambda folder, version: ServerWorker.prism_load(worker, folder + "x", version)
    with pytest.raises(ValueError, match=r"FileNotFoundError.*set the engine's `folder` to one that both machines see"):
        transfer.send(named, "run-3", StreamDigest())


def test_a_transfer_by_nccl_is_watched_at_both_ends(named, monkeypatch):
    """Everything but NCCL itself: vLLM's end is played by one that hands the tensors over."""
    worker = Worker(Model())
    opened, spoilt = [], []

    def open_nccl(client, source, address, port, world_size):
        opened.append((address, port, world_size))

        def send():
            client.start_weight_update()
            client.update_weights(None)
            parts = list(source)
            assert [(n, t.dtype, tuple(t.shape)) for n, t in parts] == [
                (n, dtype, shape) for n, (dtype, shape) in source.shapes().items()
            ]
            worker.model.load_weights(parts[:2])
            worker.model.load_weights([(name, tensor + len(spoilt)) for name, tensor in parts[2:]])
            client.finish_weight_update()

        return SimpleNamespace(send_weights=send, shutdown=lambda: opened.append("shut"))

    monkeypatch.setattr(vllm_nccl, "open_nccl", open_nccl)
    server = Direct(worker)

    def opened_anew():
        transfer = NCCLTransfer(server, SHAPES, torch.bfloat16, "10.0.0.1:29500")
        return ServerWeights(policy_with(named), [facts()], transfer)

    weights = opened_anew()
    weights.send(iter(named), "run-1")
    assert opened == [("10.0.0.1", 29500, 5)]
    calls = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert server.posted == ["prism_watch", *calls, "prism_finish"]
    assert worker.prism_version() == {"version": "run-1"}
    for name, tensor in named:
        assert torch.equal(worker.model.get_parameter(name).data, tensor.bfloat16().float())
    assert "load_weights" not in vars(worker.model)
    answer = worker.prism_finish("run-1")  # asked again, the answer being lost on its way
    assert answer["loaded"] == sorted(SHAPES)
    assert len(answer["received"]) == len(SHAPES)

    spoilt.append("c")
    with pytest.raises(ValueError, match="sync from 'c' to 'c' reached the engine with other values"):
        weights.send(named, "run-2")
    weights.transfer.close()
    assert opened[-1] == "shut"
    assert worker.prism_finish("run-3") == {"error": "prism_finish without prism_watch"}

    with pytest.raises(ValueError, match=r"a sync sends 'c' where 'a' is due: send the policy's parameters in their"):
        opened_anew().send(reversed(named), "run-2")
    with pytest.raises(ValueError, match=r"a sync must send every parameter of the policy; 1 are missing: c"):
        opened_anew().send(named[:2], "run-2")


@pytest.mark.parametrize("by", ["files", "nccl"])
def test_merged_weights_exist_for_a_bucket_at_a_time(by, tmp_path, monkeypatch):
    """Each tensor is made when it is asked for, as `whole_parameters` merges an adapter's."""
    shapes = {str(i): (4,) for i in range(40)}
    made: list[weakref.ref] = []
    most = 0

    def merged():
        nonlocal most
        for name, shape in shapes.items():
            tensor = torch.zeros(shape)
            made.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in made))
            yield name, tensor
            del tensor

    def open_nccl(client, source, *address):
        return SimpleNamespace(send_weights=lambda: [None for _ in source])

    monkeypatch.setattr(vllm_nccl, "open_nccl", open_nccl)
    worker = SimpleNamespace(
        prism_load=lambda folder, version: {"loaded": [], "received": received(Path(folder))},
        prism_watch=dict,
        prism_finish=lambda version: {"loaded": [], "received": by_nccl.source.sent.entries()},
    )
    by_files = PathTransfer(Direct(worker), str(tmp_path), torch.float32, max_bytes=32)  # two tensors a bucket
    by_nccl = NCCLTransfer(Direct(worker), shapes, torch.float32, "10.0.0.1:29500")
    policy = SimpleNamespace(
        named_parameters=lambda: ((name, torch.zeros(shape)) for name, shape in shapes.items()),
        config=SimpleNamespace(tie_word_embeddings=True),
    )
    transfer = by_files if by == "files" else by_nccl
    ServerWeights(policy, [replace(facts(), parameters=[])], transfer).send(merged(), "run-1")
    assert len(made) == 40
    assert most <= (5 if by == "files" else 2)  # a bucket is let go of when the next one is there


def received(folder: Path):
    digest = StreamDigest()
    for bucket in read_buckets(folder):
        digest.add(bucket)
    return digest.entries()


def test_nccl_without_a_gpu_build_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm.distributed.weight_transfer", None)
    with pytest.raises(ValueError, match=r"no trainer's end of weight transfer by NCCL .* set the engine's transfer"):
        vllm_nccl.open_nccl(None, None, "127.0.0.1", 1, 2)


def test_the_address_for_nccl_is_the_one_that_reaches_the_server(policy_and_processor):
    policy, processor = policy_and_processor
    fake = FakeVLLM(processor, policy.config)
    host, port = _own_address(fake.url, None)
    assert host == "127.0.0.1"
    assert port > 0
    assert _own_address(fake.url, "host:29500") == ("host", 29500)
    fake.close()


@pytest.fixture(scope="module")
def policy_and_processor(random_policy):
    spec = PolicySpec(random_policy)
    return build_policy(spec), spec.processor()


def work(rank: int, folder: str, url: str, path: str) -> None:
    """One of two ranks at one server; writes down what it drew."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = PolicySpec(path)
    policy, processor = build_policy(spec), spec.processor()
    engine = VLLMServerEngine(url, retries=1)
    engine.start(policy, processor, rank=rank)
    (example,) = make_examples(1)
    example.images.clear()
    told = {"drawn": [r.response_ids for r in engine.generate([example], 2, Sampling(max_tokens=60))]}
    engine.probe.example = None  # the fake has no log-probabilities to probe
    engine.sync(policy.named_parameters())
    told["version"] = engine.version
    try:
        engine.sync(list(policy.named_parameters())[1:] if rank == 0 else policy.named_parameters())
    except (ValueError, RuntimeError) as error:
        told["stopped"] = f"{type(error).__name__}: {error}"
    torch.save(told, Path(folder) / f"{rank}.pt")
    engine.close()
    distributed.destroy_process_group()


def test_two_ranks_share_a_server_and_the_first_keeps_it_up_to_date(policy_and_processor, random_policy, tmp_path):
    policy, processor = policy_and_processor
    fake = FakeVLLM(processor, policy.config)
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(work, args=(str(tmp_path), fake.url, random_policy), nprocs=2, start_method="forkserver")
    told = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert len({tuple(ids) for each in told for ids in each["drawn"]}) == 4
    assert fake.called.count("prism_load") == 2  # one a sync, not one a rank
    assert told[0]["version"] == told[1]["version"] == fake.version
    assert told[0]["stopped"].startswith("ValueError: rollout contract: a sync must send every parameter")
    assert told[1]["stopped"].startswith("RuntimeError: the first process of the run stopped: ValueError: rollout")
    fake.close()
