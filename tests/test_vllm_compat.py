"""What the rollout engine changes in vLLM, without starting an engine."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed

from prism_pl.rollout import vllm_compat

pytest.importorskip("vllm")


@pytest.fixture
def communicator(monkeypatch):
    """Of a group of this process alone, as vLLM's workers make one under an external launcher."""
    vllm_compat.import_vllm()
    importlib.import_module("vllm._custom_ops")  # loads the kernels
    monkeypatch.setenv("VLLM_DIST_IDENT", "//")  # what it makes of env://
    own = not distributed.is_initialized()
    if own:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    group = distributed.group.WORLD
    yield SimpleNamespace(unique_name="tp:test", ranks=[0], rank=0, world_size=1, device_group=group, cpu_group=group)
    if own:
        distributed.destroy_process_group()


def test_shared_memory_of_each_start_has_a_name_of_its_own_and_is_gone_at_once(communicator):
    """vLLM's own name is taken until a destructor runs, which this process, like one that was killed, has not."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    before = set(Path("/dev/shm").iterdir())
    open_files = _CPUSHMDistributed._init_cpu_shm
    names = []
    for _ in range(2):
        with vllm_compat.own_shared_memory(on_cpu=True):
            names.append(_CPUSHMDistributed(communicator).group_name)
    assert _CPUSHMDistributed._init_cpu_shm is open_files
    assert len(set(names)) == 2
    left = {file.name for file in set(Path("/dev/shm").iterdir()) - before}
    assert not [name for name in left if name.startswith(("prism_pl-", "-tp:test"))]


def test_shared_memory_is_left_alone_on_gpus_and_where_vllm_has_none(monkeypatch):
    from vllm.distributed.device_communicators import cpu_communicator

    shared = cpu_communicator._CPUSHMDistributed
    open_files = shared._init_cpu_shm
    with vllm_compat.own_shared_memory(on_cpu=False):
        assert shared._init_cpu_shm is open_files
    monkeypatch.delattr(cpu_communicator, "_CPUSHMDistributed")
    with vllm_compat.own_shared_memory(on_cpu=True):
        assert shared._init_cpu_shm is open_files


def test_what_is_kept_of_a_token_is_its_log_probability_even_where_a_step_has_several():
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    own = LogprobsProcessor._update_sample_logprobs
    request = LogprobsProcessor(None, FlatLogprobs(), None, 0.0, 0, None)
    with vllm_compat.sampled_logps_alone():
        for step in ([[-0.5, -9.0]], [[-0.25, -9.0], [-2.0, -9.0]]):
            told = np.array(step, dtype=np.float32)
            request._update_sample_logprobs(LogprobsLists(np.zeros_like(told), told, np.zeros(len(told))))
    assert request.logprobs.logprobs == [-0.5, -0.25, -2.0]
    assert LogprobsProcessor._update_sample_logprobs is own


def test_the_log_probabilities_of_a_step_are_those_that_vllm_finds():
    from vllm.v1.sample.sampler import Sampler

    own = Sampler.gather_logprobs
    logps_BV, sampled_B = torch.randn(5, 11).log_softmax(-1), torch.tensor([3, 0, 10, 7, 3])
    with vllm_compat.eager(on_cpu=True):
        theirs = own(logps_BV, 0, token_ids=sampled_B)
    with vllm_compat.sampled_logps_alone():
        ours = Sampler.gather_logprobs(logps_BV, 0, token_ids=sampled_B)
        with pytest.raises(AssertionError):
            Sampler.gather_logprobs(logps_BV, 2, token_ids=sampled_B)
    assert Sampler.gather_logprobs is own
    assert theirs.logprobs[:, 0].tolist() == logps_BV[range(5), sampled_B].tolist()
    for name in ("logprob_token_ids", "logprobs"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert ours.selected_token_ranks.shape == theirs.selected_token_ranks.shape


def test_a_vllm_that_notes_log_probabilities_under_another_name_does_so_by_itself(monkeypatch):
    from vllm.v1.engine.logprobs import LogprobsProcessor

    monkeypatch.delattr(LogprobsProcessor, "_update_sample_logprobs")
    with vllm_compat.sampled_logps_alone():
        assert not hasattr(LogprobsProcessor, "_update_sample_logprobs")
