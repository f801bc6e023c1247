"""What the rollout engine changes in vLLM, without starting an engine."""

import importlib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import distributed

from prism_pl.rollout import vllm_compat

pytest.importorskip("vllm")


def test_the_model_runner_is_the_one_that_was_tried():
    assert vllm_compat.import_vllm().envs.VLLM_USE_V2_MODEL_RUNNER is False


def test_what_vllms_own_code_will_have_to_change_is_not_said_to_users():
    vllm_compat.import_vllm()
    with warnings.catch_warnings(record=True) as said:
        warnings.resetwarnings()
        vllm_compat.import_vllm()
        for module in ("vllm.triton_utils.dispatcher", "vllm_of_the_users", "modules.align"):
            warnings.warn_explicit("deprecated", FutureWarning, "file.py", 1, module=module, registry={})
    assert len(said) == 2


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
