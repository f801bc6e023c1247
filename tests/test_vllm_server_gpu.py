"""The engine for a vLLM server between two GPUs, started by the README's line: weights by NCCL and by a folder, a whole
run, and a server that dies of a sync. One server for all of the file, one engine at a time."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from datamodules.digits import DigitsDataModule
from prism_pl.logprobs import token_logps
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.report.events import read_curves
from prism_pl.rollout import Sampling, VLLMServerEngine, rollout_batch, vllm_server_client
from prism_pl.rollout.vllm_nccl import in_thread
from prism_pl.rollout.vllm_server_sync import NCCLTransfer, PathTransfer, _Control
from scripts.blank_policy import ROOT
from scripts.serving import kill, serving
from tests.stubs import equal, shake, weights

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("__import__('torch').cuda.device_count() < 2", reason="needs two GPUs"),
]

PATH = str(ROOT / "assets" / "sft")
SAMPLED = Sampling(max_tokens=48)
NUM = 4  # samples a prompt
# Nats a token at the 95th percentile, bf16 in the server and bf16 autocast in the trainer.
ROUNDING = 0.1
RUN = """
model:
  init_args:
    policy: {path: ASSETS/sft}
    rollout:
      class_path: prism_pl.rollout.VLLMServerEngine
      init_args: {url: "URL", transfer: nccl}
    num_rollouts: 4
data:
  init_args: {num_train: 16, num_validation: 4, batch_size: 4}
trainer:
  accelerator: gpu
  precision: bf16-mixed
  max_steps: 2
  limit_val_batches: 0
  callbacks: [{class_path: callbacks.Export}]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server's process on the second GPU, and its address."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(PATH, "cuda", log=log, environment={"CUDA_VISIBLE_DEVICES": "1"}) as started:
        yield started


@pytest.fixture(scope="module")
def policy():
    """In float32, as a trainer holds it, on the first GPU."""
    return build_policy(PolicySpec(PATH)).to("cuda:0").eval()


@pytest.fixture(scope="module")
def processor():
    return PolicySpec(PATH).processor()


@pytest.fixture(scope="module")
def first(policy):
    """The policy's own weights, which each test starts with."""
    return weights(policy)


@pytest.fixture(scope="module", params=["nccl", "path"])
def started(server, policy, processor, first, request):
    engine = VLLMServerEngine(server[1], transfer=request.param, retries=2)
    engine.start(policy, processor, rank=0)
    yield engine
    engine.close()


@pytest.fixture
def engine(started, policy, first):
    if not equal(weights(policy), first):
        policy.load_state_dict(first)
        sync(started, policy)
    started.draws.load_state_dict({"seed": 7, "num_draws": 0})
    return started


@pytest.fixture(scope="module")
def examples():
    data = DigitsDataModule(rows="rlvr", num_train=8, num_validation=8)
    return [data.train_rows[i] for i in range(8)]


def sync(engine, policy) -> None:
    """As a trainer in bf16-mixed does it."""
    with torch.autocast("cuda", torch.bfloat16):
        engine.sync(policy.named_parameters())


@torch.no_grad()
def p95(policy, processor, examples, rollouts) -> float:
    """Of the difference between the server's log-probabilities and the trainer's, nats a token."""
    batch, sampler_BT = rollout_batch(processor, [processor.prompt(each) for each in examples], rollouts, NUM)
    batch = move_data_to_device(batch, "cuda:0")
    with torch.autocast("cuda", torch.bfloat16):
        trainer_BT = token_logps(policy, batch, banned_ids=processor.banned_ids).logps_BT
    return float((sampler_BT.to(trainer_BT) - trainer_BT)[batch.mask_BT].abs().float().quantile(0.95))


def ids(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def test_weights_travel_the_way_that_was_asked_for(engine, request):
    kind = {"nccl": NCCLTransfer, "path": PathTransfer}[request.node.callspec.params["started"]]
    assert type(engine.weights.transfer) is kind
    assert engine.facts.device == "cuda"
    assert engine.dtype() == torch.bfloat16


def test_the_server_samples_from_the_trainers_policy_before_and_after_a_sync(engine, policy, processor, examples):
    old = engine.generate(examples, NUM, SAMPLED)
    before = p95(policy, processor, examples, old)
    shake(policy)
    sync(engine, policy)
    new = engine.generate(examples, NUM, SAMPLED)
    after, kept = (p95(policy, processor, examples, rollouts) for rollouts in (new, old))
    told = f"p95 {before:.3g} before, {after:.3g} after; the old weights' {kept:.3g}"
    assert before <= ROUNDING, told
    assert after <= ROUNDING, told
    assert kept > ROUNDING, told


def test_seeds_reproduce_draws(engine, examples):
    """One sequence at a time: others beside it would change how bf16 rounds. Its prompt is cached before."""

    def draws():
        engine.draws.load_state_dict({"seed": 7, "num_draws": 0})
        return [ids(engine.generate(examples[:1], 1, SAMPLED))[0] for _ in range(4)]

    draws()
    first = draws()
    assert len({tuple(each) for each in first}) > 1
    assert draws() == first


def test_a_cache_that_is_kept_breaks_the_contract(engine, policy, examples, monkeypatch):
    engine.generate(examples, 1, SAMPLED)
    shake(policy, scale=0.5)  # bf16 hides less
    with monkeypatch.context() as patch:
        patch.setattr("prism_pl.rollout.vllm_server.forget_prompts", lambda server: None)
        with pytest.raises(ValueError, match=r"rollout contract: after a sync .* cached under the old ones"):
            sync(engine, policy)
    sync(engine, policy)


def test_a_run_of_two_steps_trains_with_weights_by_nccl(server, tmp_path):
    (tmp_path / "gpu.yaml").write_text(RUN.replace("ASSETS", str(ROOT / "assets")).replace("URL", server[1]))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}
    line = [sys.executable, "-m", "prism_pl", "fit", "--config", "rlvr.yaml", "--config", "gpu.yaml"]
    line += ["--trainer.default_root_dir", "run"]
    ended = subprocess.run(
        line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    curves = read_curves(next((tmp_path / "run").rglob("events.out.tfevents*")).parent)
    mismatch = curves["rlvr/mismatch_p95"].values
    assert len(mismatch) == 2
    assert all(math.isfinite(value) and value <= 2 * ROUNDING for value in mismatch), mismatch
    assert (tmp_path / "run" / "export" / "config.json").exists()


def test_a_server_that_dies_of_a_sync_is_reported_and_leaves_the_gpu_free(
    server, policy, processor, examples, monkeypatch
):
    """The last test here: the server is gone."""
    monkeypatch.setattr(vllm_server_client, "FIRST_WAIT", 0.05)
    engine = VLLMServerEngine(server[1], transfer="nccl", retries=2)
    engine.start(policy, processor, rank=0)
    engine.generate(examples, 1, SAMPLED)
    post = _Control.update_weights

    def die(control, update_info) -> None:
        kill(server[0])
        post(control, update_info)

    monkeypatch.setattr(_Control, "update_weights", die)
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"{server[1]} gave no answer to /update_weights"):
        sync(engine, policy)
    assert time.monotonic() - begun < 60
    in_thread(torch.cuda.synchronize).result(timeout=30)  # nothing of NCCL waits there for the server
    torch.cuda.empty_cache()
    with pytest.raises(ConnectionError, match="gave no answer"):
        sync(engine, policy)
    engine.close()
