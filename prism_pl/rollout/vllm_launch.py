"""Start a vLLM engine inside a training process, from the trainer's live policy."""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from prism_pl.fingerprint import hash_path
from prism_pl.policy import save_processor
from prism_pl.processor import Processor
from prism_pl.rollout import vllm_compat
from prism_pl.rollout.vllm_limits import too_long

Dtype = Literal["auto", "float32", "bfloat16"]

# The engines of this process, which share its groups. The groups were made for them where the second is true.
_running: set[int] = set()
_own_group = False


@dataclass(frozen=True)
class LaunchOptions:
    """What `VLLMEngine` was given, see there."""

    tensor_parallel: int
    dtype: Dtype
    max_model_len: int | None
    max_num_seqs: int | None
    max_images: int
    gpu_memory: float
    kv_cache_mb: int | None
    enforce_eager: bool


class Launched:
    """A running engine with what it needs to be put away.

    Args:
        fill: loads the policy's weights into a model that vLLM has made.

    Attributes:
        llm: the `vllm.LLM`.
        dtype: of its weights.
        max_model_len: longest prompt and response together, in tokens.
    """

    def __init__(self, policy: Any, processor: Processor, options: LaunchOptions, fill: Callable[[Any], None]) -> None:
        vllm = vllm_compat.import_vllm()
        device = policy.get_input_embeddings().weight.device
        self.on_cpu = device.type == "cpu"
        folder = blank_folder(partial(write_blank, policy, processor), vllm_compat.cache_folder())
        vllm_compat.keep_process_groups()
        _join_group(device)
        with (
            vllm_compat.process_state(),
            vllm_compat.eager(self.on_cpu),
            vllm_compat.own_arithmetic(device.type),
            vllm_compat.own_shared_memory(self.on_cpu),
            _rank_in_environment(device),
        ):
            try:
                self.llm = vllm.LLM(
                    model=str(folder),
                    load_format=vllm_compat.register_loader(fill),
                    **_llm_options(options, self.on_cpu),
                    **vllm_compat.engine_options(self.on_cpu),
                )
            except BaseException as error:
                _leave_groups()
                if isinstance(error, ValueError) and (told := too_long(error, options.max_model_len)):
                    raise told from error
                raise
        # A run that fails is not torn down by Lightning: then the engine goes when it is collected.
        self._put_away = weakref.finalize(self, _put_away, self.llm)
        _running.add(id(self.llm))
        model_config = self.llm.llm_engine.vllm_config.model_config
        self.dtype: torch.dtype = model_config.dtype
        self.max_model_len: int = model_config.max_model_len

    def close(self) -> None:
        """Stop the engine, free its memory, and take down a process group that was made for it."""
        del self.llm
        self._put_away()


def _put_away(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
    _running.remove(id(llm))
    _leave_groups()


def _leave_groups() -> None:
    if not _running:
        vllm_compat.leave_process_groups(torchs_own=_own_group)


def blank_folder(write: Callable[[Path], None], within: Path) -> Path:
    """A folder of what `write` writes, named by its content, so that the same policy has the same folder in each run
    and rank: the model's path is a part of the name of vLLM's compiled graphs. It stays, as these do.

    Args:
        write: fills an empty folder.
        within: where the folder comes to lie, beside others.
    """
    within.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="new-", dir=within) as made:
        new = Path(made) / "blank"
        new.mkdir()
        write(new)
        folder = within / hash_path(new)
        if folder.is_dir() and hash_path(folder) != folder.name:  # something has cleared a part of it away
            folder.rename(Path(made) / "broken")
        try:
            new.rename(folder)
        except OSError:  # another rank or run was first
            if not folder.is_dir():
                raise
    return folder


def write_blank(policy: Any, processor: Processor, folder: Path) -> None:
    """Write all of a policy but its weights, as vLLM reads it: the engine can hold no other weights than those it is
    sent. Images are prepared by the trainer's very processor, its limits included."""
    from transformers import Qwen3VLVideoProcessor

    policy.config.save_pretrained(folder)
    save_processor(processor, folder)
    processor.image_processor.save_pretrained(folder)
    if not (folder / "video_preprocessor_config.json").exists():
        Qwen3VLVideoProcessor().save_pretrained(folder)


def _llm_options(options: LaunchOptions, on_cpu: bool) -> dict[str, Any]:
    # vLLM's own choice is made for a GPU. On a CPU a step's cost is mostly the scheduler's, whatever the policy.
    cache = options.kv_cache_mb or (256 if on_cpu else None)
    sequences = options.max_num_seqs or (256 if on_cpu else None)
    chosen: dict[str, Any] = {
        "dtype": ("float32" if on_cpu else "bfloat16") if options.dtype == "auto" else options.dtype,
        "max_model_len": options.max_model_len or -1,  # -1: as long as the policy's positions and the cache allow
        "tensor_parallel_size": options.tensor_parallel,
        "gpu_memory_utilization": options.gpu_memory,
        "limit_mm_per_prompt": {"image": options.max_images, "video": 0},
        "enable_prefix_caching": True,
        # Of the distribution that is sampled from: temperature applied, banned ids (and the tail of top_p) removed.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the policy's own defaults, such as a repetition penalty, must not act
        "disable_log_stats": True,
        "enforce_eager": options.enforce_eager or on_cpu,
        "seed": 0,
    }
    if cache is not None:
        chosen["kv_cache_memory_bytes"] = cache << 20
    if sequences is not None:
        chosen["max_num_seqs"] = sequences
    if torch.distributed.get_world_size() > 1:
        chosen["distributed_executor_backend"] = "external_launcher"
    return chosen


def _join_group(device: torch.device) -> None:
    """Make a process group of one where the trainer has none: vLLM would, for its own device's tensors alone."""
    global _own_group
    if torch.distributed.is_initialized():
        _own_group = _own_group and bool(_running)
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    # Lightning takes any group for several processes, and asks for reductions that a group of one does not need.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log.*sync_dist=True")
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    _own_group = True


@contextmanager
def _rank_in_environment(device: torch.device) -> Iterator[None]:
    """vLLM's external launcher reads its place from torchrun's variables, which other launchers do not set."""
    rank = torch.distributed.get_rank()
    wanted = {"RANK": str(rank), "LOCAL_RANK": str(rank if device.index is None else device.index)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
