"""Everything that depends on vLLM's version or build, 0.24 to 0.32, so that nothing else asks; the trainer's end of its
transfer by NCCL is in `vllm_nccl`, and what it keeps of a sampled token in `vllm_logps`.

vLLM's CPU build has no distribution of the name `vllm`: the version is read from the module.
"""

import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OLDEST, NEWEST = (0, 24), (0, 32)

# Read by vLLM when it is imported, or while it starts.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process, beside the weights
    "VLLM_LOGGING_LEVEL": "CRITICAL",  # at ERROR a dying engine prints every input it holds
    "VLLM_NO_USAGE_STATS": "1",
    # 0.32 would take its second model runner on a GPU, whose sampling nothing here was tried with.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads stay where they are
}


def import_vllm() -> Any:
    """The module, set up for an engine inside a training process. ImportError where it is not installed or broken,
    ValueError for a version that was never tried."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Of its own code, against the torch that it asks for.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    import vllm

    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    version = version_of(vllm.__version__)
    if not OLDEST <= version <= NEWEST:
        raise ValueError(
            f"vllm {vllm.__version__} is installed; the rollout engine is made for 0.24 to 0.32: install one of these, "
            "or take prism_pl.rollout.TransformersEngine"
        )
    return vllm


def version_of(text: str) -> tuple[int, int]:
    """The first two numbers: (0, 32) for "0.32.0+cpu"."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def cache_folder() -> Path:
    """Where ours may lie beside what vLLM keeps from one run to the next."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "prism_pl"


def engine_options(on_cpu: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that depend on the build."""
    if on_cpu:
        # Blocks of 128, the CPU's default, are longer than most prompts of a small policy: none would be shared.
        return {"block_size": 32}
    return {"enable_sleep_mode": True}


def eager(on_cpu: bool) -> Any:
    """A context in which vLLM compiles nothing, on a CPU: helper functions of its sampler would take half a minute."""
    return torch.compiler.set_stance("force_eager") if on_cpu else nullcontext()


@contextmanager
def own_arithmetic(device_type: str) -> Iterator[None]:
    """vLLM computes as by itself meanwhile: the trainer's autocast would cast the inputs of its own kernels, and a
    network that ZeRO-3 has sharded leaves DeepSpeed's linear function in the place of torch's, for all the process."""
    functional: Any = torch.nn.functional
    own: Any = torch._C
    replaced = functional.linear
    functional.linear = own._nn.linear
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        functional.linear = replaced


@contextmanager
def process_state() -> Iterator[None]:
    """Start an engine and leave the process as it was: starting one seeds all generators, freezes the garbage
    collector's objects and, on a CPU, takes `torch.set_num_threads` away."""
    import gc
    import random

    import numpy as np

    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    matmul = torch.get_float32_matmul_precision()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)
            torch.set_float32_matmul_precision(matmul)
            gc.unfreeze()


@contextmanager
def own_shared_memory(on_cpu: bool) -> Iterator[None]:
    """Start an engine whose ranks, where they talk through shared memory, have files of a name of its own, which are
    gone from /dev/shm once every rank has opened them.

    vLLM goes by the launcher's address, which is the same for all that torchrun or Lightning started, and leaves the
    files to a destructor: a run that was killed could not start again, and two on one machine would meet in them.
    """
    if not on_cpu:
        yield
        return
    from vllm.distributed.device_communicators import cpu_communicator

    shared = getattr(cpu_communicator, "_CPUSHMDistributed", None)
    if shared is None:
        yield
        return
    open_files = shared._init_cpu_shm

    def open_own_files(self: Any) -> Any:
        first, group = self.communicator.ranks[0], self.communicator.cpu_group
        name = [f"prism_pl-{secrets.token_hex(8)}"]
        torch.distributed.broadcast_object_list(name, src=first, group=group)
        self.group_name = f"/{name[0]}"
        handle = open_files(self)  # ends with a barrier: what one rank unlinks then, all have mapped
        if torch.distributed.get_rank() == first:
            for file in Path("/dev/shm").glob(f"{name[0]}_*"):
                file.unlink()
        return handle

    shared._init_cpu_shm = open_own_files
    try:
        yield
    finally:
        shared._init_cpu_shm = open_files


def register_loader(load: Callable[[Any], None]) -> str:
    """A load format by which `load(model)` fills a new model with weights. vLLM's own `dummy` would do for the
    parameters, but it also overwrites buffers that no sync sends, such as 0.32's image normalisation."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class LiveWeights(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """There is nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            load(model)

    register_model_loader("prism_live")(LiveWeights)
    return "prism_live"


def load_weights(worker: Any, stream: Iterable[tuple[str, Tensor]], on_cpu: bool) -> set[str]:
    """Load a stream of weights with their Hugging Face names; the names that vLLM gives what it loaded.

    On a GPU the parameters take the weights over as they come. On a CPU linear layers are packed: each is put together
    from its checkpoint form and packed anew, and loading into the packed one would corrupt it. A tied head is packed by
    hand: its weights arrive under the embeddings' name, and vLLM 0.32 would go on with the head that it packed before.
    """
    model = worker.get_model()
    if not on_cpu:
        return model.load_weights(stream)
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    loaded = model.load_weights(stream)
    finalize_layerwise_reload(model, worker.model_config)
    head = model.language_model.lm_head
    head.quant_method.process_weights_after_loading(head)
    return loaded


def model_of(worker: Any) -> Any:
    """A worker's model."""
    return worker.get_model()


def place_of(model: Any, name: str) -> tuple[str, int] | None:
    """Where vLLM keeps what has this Hugging Face name: its own name for it, and the place in what it is fused with.
    None where it keeps no such parameter."""
    mapped = model.hf_to_vllm_mapper._map_name(name)  # by this name in all versions
    if mapped is None:
        return None
    owner, _, leaf = mapped.rpartition(".")
    layer, _, last = owner.rpartition(".")
    for fused, parts in model.packed_modules_mapping.items():
        if last in parts:
            owner = f"{layer}.{fused}"
            return f"{owner}.{leaf}", parts.index(last)
    return mapped, 0


def held_columns(model: Any, bands: Mapping[str, tuple[range, int]], on_cpu: bool) -> dict[str, Tensor]:
    """Columns of a model's parameters, by vLLM's names. What is not a matrix is made one, first dimension as it is.

    On a CPU linear layers are packed, and may keep a weight beside it that they do not compute with: so they are asked
    what they make of unit vectors. A one times a weight, and zeros added, is that very weight in any dtype.

    Args:
        bands: which columns, and of how many; where this rank holds another number of them, it is left out.
    """
    from vllm.model_executor.layers.linear import LinearBase

    held: dict[str, Tensor] = {}
    for name, (band, num_columns) in bands.items():
        owner, _, leaf = name.rpartition(".")
        layer = model.get_submodule(owner)
        weight = getattr(layer, leaf)
        head = owner.endswith("lm_head")
        if on_cpu and leaf == "weight" and (head or isinstance(layer, LinearBase)):
            if num_columns != (layer.embedding_dim if head else layer.input_size_per_partition):
                continue
            units = torch.zeros(len(band), num_columns, dtype=weight.dtype)
            units[range(len(band)), band] = 1
            held[name] = layer.quant_method.apply(layer, units, bias=None).T
        else:
            table = weight.flatten(1) if weight.dim() > 1 else weight[:, None]
            if table.shape[1] != num_columns:
                continue
            held[name] = table[:, band.start : band.stop]
        if head or owner.endswith("embed_tokens"):
            held[name] = held[name][: layer.org_vocab_size]  # behind it is padding
    return held


@contextmanager
def watching(llm: Any, finished: Callable[[int, Any], None]) -> Iterator[None]:
    """Meanwhile, tell each output of `llm.generate` when it is finished, with its number in the call."""
    engine, first = llm.llm_engine, llm.request_counter.counter
    step, replaced = engine.step, "step" in vars(engine)

    def watched() -> Any:
        outputs = step()
        for output in outputs:
            if output.finished:
                finished(int(output.request_id) - first, output)
        return outputs

    engine.step = watched
    try:
        yield
    finally:
        del engine.step
        if replaced:
            engine.step = step


def says_tied(model_config: Any) -> bool:
    """Whether the served config.json ties head and embeddings. vLLM 0.32 takes that back in its copy for a while, where
    the weights hold a head as well."""
    return model_config.hf_config.tie_word_embeddings or getattr(
        model_config, "word_embeddings_untied_by_checkpoint", False
    )


def watch_loads(
    model: Any,
    tap: Callable[[Iterable[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]],
    note: Callable[[set[str]], Any],
) -> None:
    """Look on while vLLM's own weight transfer loads a model, until `unwatch_loads`.

    Args:
        tap: what each part of the stream goes through.
        note: gets the names that were loaded, part by part.
    """
    load = type(model).load_weights

    def watched(stream: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> set[str]:
        loaded = load(model, tap(stream), *args, **kwargs)
        note(loaded)
        return loaded

    model.load_weights = watched


def unwatch_loads(model: Any) -> None:
    """The model's own `load_weights` again."""
    model.__dict__.pop("load_weights", None)


def keep_process_groups() -> None:
    """An engine that stops, be it that it is collected, would take torch's process groups down, the trainer's too."""
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = lambda: None


def leave_process_groups(torchs_own: bool) -> None:
    """Take down vLLM's model-parallel groups, once no engine is left; the next one may have other sizes.

    Args:
        torchs_own: and torch's group, where it was made for the engines alone.
    """
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    if not torch.distributed.is_initialized():
        return  # the trainer took its own down first, and vLLM's with them
    destroy_model_parallel()
    if torchs_own:
        destroy_distributed_environment()
