"""What a vLLM server says about itself, and what it must be to sample for a trainer."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from prism_pl.processor import Processor
from prism_pl.rollout.vllm_compat import NEWEST, OLDEST, version_of

WORKER = "prism_pl.rollout.vllm_server_worker.ServerWorker"

# What decides the names and shapes of a policy's weights, and how its images become tokens.
_SHAPING = {
    "": ("model_type", "image_token_id"),
    "text_config": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    "vision_config": (
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "out_hidden_size",
        "num_position_embeddings",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "deepstack_visual_indexes",
    ),
}


@dataclass(frozen=True)
class ServerFacts:
    """What a server's worker says of itself: vLLM's version and options, and its model's.

    Attributes:
        device: "cpu" or "cuda".
        transfer: the backend of vLLM's own weight transfer; None where it was not asked for.
        image_options: how images are prepared, beside what the served folder says.
        architecture: see `architecture`.
        parameters: of the model, by vLLM's names.
    """

    version: str
    device: str
    dtype: str
    max_model_len: int
    logprobs_mode: str
    generation_config: str
    chunked_prefill: bool
    sleep_mode: bool
    transfer: str | None
    image_options: dict[str, Any]
    architecture: dict[str, Any]
    parameters: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As it travels."""
        return asdict(self)

    @classmethod
    def read(cls, told: dict[str, Any], url: str) -> "ServerFacts":
        """What `as_dict` gave on the server. ValueError where it is another prism_pl's."""
        if told.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"the rollout server {url} runs another prism_pl: install the trainer's version there")
        return cls(**told)


def architecture(config: Any, tied: bool) -> dict[str, Any]:
    """What decides the shapes of a policy, by its keys in config.json.

    Args:
        tied: what config.json says of tie_word_embeddings; vLLM may have changed its copy.
    """
    found: dict[str, Any] = {"tie_word_embeddings": tied}
    for part, names in _SHAPING.items():
        owner = getattr(config, part) if part else config
        found |= {f"{part}.{name}" if part else name: _plain(getattr(owner, name)) for name in names}
    return found


def image_options(processor: Processor) -> dict[str, Any]:
    """What a server must be told to leave images as they are sent, at the size that the trainer cuts into patches:
    nothing, unless `policy.max_pixels` lies above the limit in the policy's folder."""
    from transformers import Qwen2VLImageProcessorPil

    ours, written = processor.image_processor.size, Qwen2VLImageProcessorPil.from_pretrained(processor.source).size
    small, large = "shortest_edge", "longest_edge"
    if ours[small] >= written[small] and ours[large] <= written[large]:
        return {}
    return {"size": {small: ours[small], large: ours[large]}}


def launch_line(path: str, device: str, image_options: dict[str, Any]) -> str:
    """The line that starts a server.

    Args:
        path: the policy's.
        device: "cpu" or "cuda".
        image_options: see there.
    """
    options = f"--worker-extension-cls {WORKER} --logprobs-mode processed_logprobs --generation-config vllm"
    if image_options:
        options += f" --mm-processor-kwargs '{json.dumps(image_options)}'"
    if device == "cpu":
        # vLLM's CPU build goes by another name on PyPI, and its `vllm serve` looks for its own.
        return (
            "VLLM_SERVER_DEV_MODE=1 TORCH_COMPILE_DISABLE=1 python -m vllm.entrypoints.openai.api_server "
            f"--model {path} {options} --dtype float32 --enforce-eager --no-enable-chunked-prefill "
            "--kv-cache-memory-bytes 1G"
        )
    return f"""VLLM_SERVER_DEV_MODE=1 vllm serve {path} {options} --weight-transfer-config '{{"backend": "nccl"}}'"""


def check_facts(facts: ServerFacts, policy_config: Any, images: dict[str, Any], sleep: bool, url: str) -> None:
    """ValueError where a server cannot sample for this policy, with the option that it lacks.

    Args:
        images: see `image_options`.
        sleep: whether the server is to lend its memory.
    """
    if not OLDEST <= version_of(facts.version) <= NEWEST:
        raise ValueError(
            f"the rollout server {url} is vLLM {facts.version}; the engine is made for 0.24 to 0.32 (run "
            "so far with 0.24 and 0.32)"
        )
    ours = architecture(policy_config, policy_config.tie_word_embeddings)
    other = {key: (facts.architecture.get(key), value) for key, value in ours.items()}
    other = {key: pair for key, pair in other.items() if pair[0] != pair[1]}
    if other:
        key, (theirs, wanted) = next(iter(other.items()))
        raise ValueError(
            f"the rollout server {url} serves another model than the policy: its {key} is {theirs}, the policy's "
            f"{wanted} ({len(other)} keys of config.json differ): start `vllm serve` with the path of this policy"
        )
    _check_options(facts, images, sleep, url)


def check_same(before: Sequence[ServerFacts], now: Sequence[ServerFacts], url: str) -> None:
    """ValueError where a server came back as another one in the middle of a run.

    Args:
        before, now: of each of its workers.
    """
    changed = [f"{len(now)} workers, {len(before)} before"] if len(now) != len(before) else []
    for ours, theirs in zip(before, now, strict=False):
        pairs = {key: (value, theirs.as_dict()[key]) for key, value in ours.as_dict().items()}
        del pairs["parameters"]  # they follow from the architecture and the version
        changed += [f"{key} {new}, {old} before" for key, (old, new) in pairs.items() if new != old]
    if changed:
        raise ValueError(
            f"the rollout server {url} was started anew with other options ({changed[0]}): start it as it was, or "
            "start the run again in its folder"
        )


def _check_options(facts: ServerFacts, images: dict[str, Any], sleep: bool, url: str) -> None:
    def demand(holds: bool, reason: str, option: str) -> None:
        if not holds:
            raise ValueError(f"the rollout server {url} {reason}: start it {option}")

    demand(
        facts.logprobs_mode == "processed_logprobs",
        f"gives {facts.logprobs_mode}, not the log-probabilities of the distribution that it samples from",
        "with --logprobs-mode processed_logprobs",
    )
    demand(
        facts.generation_config == "vllm",
        "takes sampling defaults from the policy's generation_config.json, which would act unseen",
        "with --generation-config vllm",
    )
    demand(
        facts.device != "cpu" or not facts.chunked_prefill,
        "cuts prompts into chunks, and on a CPU vLLM stops where such a request has a seed",
        "with --no-enable-chunked-prefill",
    )
    wanted = f"with --mm-processor-kwargs '{json.dumps(images)}'"
    demand(not images or facts.image_options == images, "takes smaller images than the trainer", wanted)
    demand(facts.sleep_mode or not sleep, "cannot sleep, and the engine's `sleep` is true", "with --enable-sleep-mode")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
