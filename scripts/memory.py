"""How much GPU and CPU memory a configuration of configs/qwen3vl-*/ needs, computed; nothing is loaded.

Launch: python scripts/memory.py configs/qwen3vl-4b/align.yaml configs/qwen3vl-4b/align-2gpus.yaml

Bytes of a process, with n processes and P parameters of a network, T of them trained:

    DeepSpeed (bf16-mixed)   weights 2 P, or 2 P / n at stage 3; gradients 4 T and states 12 T (float32 master weights,
                             two moments), together 16 T / n on the GPU
    `offload_optimizer`      on the GPU gradients 4 T / n, added up there until the step; alignment holds both players'
                             at once. In CPU memory master weights and gradients, 4 T / n each, and weights in bf16,
                             2 T / n, all three pinned, for which torch takes the next power of two; two moments
                             8 T / n; and while a network steps, two temporaries of AdamW, 8 T / n
    one process (`auto`)     weights 4 P in float32, gradients 4 T, two moments 8 T
    frozen                   2 P under DeepSpeed, else 4 P: an evaluated policy, or the warm start's with an engine
    vLLM                     gpu_memory times the card while it generates, lent to training while it sleeps
    activations              recomputed layer by layer: 2 layers hidden bytes a token of a micro-batch, then the logits
                             of chunk_tokens in float32 three times, and 2 GB for the rest
    CPU memory               what is offloaded, or before that 4 P of the largest network a process while it is loaded

The peak is the larger of training (with vLLM asleep) and generating. Measured runs take some GB more or less.
"""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

GB = 1e9
CARD = 80.0  # GB that `gpu_memory` is a share of


class Size(NamedTuple):
    """Parameters in all and of the vision tower with its projectors; layers and width of the text model."""

    parameters: float
    vision: float
    layers: int
    hidden: int
    vocabulary: int = 151_936


# From the published configurations: embeddings, attention, MLPs and vision tower, summed.
SIZES = {
    "Qwen3-VL-2B": Size(2.13e9, 0.41e9, 28, 2048),
    "Qwen3-VL-4B": Size(4.44e9, 0.42e9, 36, 2560),
    "Qwen3-VL-8B": Size(8.77e9, 0.58e9, 36, 4096),
    "sparse 2B x 4": Size(5.31e9, 0.41e9, 28, 2048),
}
# Inputs and outputs of a layer's seven linear layers, summed: a LoRA of rank r trains r times as many.
LORA_WIDTHS = {"Qwen3-VL-4B": 57_344, "Qwen3-VL-8B": 75_776}


class Needs(NamedTuple):
    """GB of one GPU at its fullest, and of the machine's memory over all processes."""

    gpu: float
    cpu: float


def needs(config: dict[str, Any], size: str) -> Needs:
    """What a configuration of a policy of that size needs.

    Args:
        config: one YAML, with those laid over it.
        size: a key of `SIZES`.
    """
    model, trainer = config["model"]["init_args"], config["trainer"]
    policy, n, options = SIZES[size], trainer.get("devices", 1), _strategy(trainer)
    stage = config["model"]["class_path"].rpartition(".")[2]
    engine = model.get("rollout", model.get("engine"))
    trained: list[tuple[Size, float]] = []
    frozen: list[Size] = []
    if stage in ("SFTModule", "AdversarialAlignModule", "RLVRModule"):
        trained.append((policy, _trained(model, policy, size)))
    elif engine is not None:
        frozen.append(policy)
    if "discriminator" in model:
        judge = SIZES["sparse 2B x 4"]
        trained.append((judge, judge.parameters))
    held = _held(trained, options, n) + sum((4 if options["stage"] is None else 2) * net.parameters for net in frozen)
    generating = (engine or {}).get("init_args", {}).get("gpu_memory", 0) * CARD * GB
    train = _activations(model, [network for network, _ in trained]) if trained else 0.0
    offloaded = 0.0
    if options.get("offload_optimizer"):
        train += sum(4 * count / n for _, count in trained)
        offloaded = n * _offloaded([count / n for _, count in trained])
    largest = max(network.parameters for network in [*frozen, *(network for network, _ in trained)])
    return Needs((held + max(train, generating)) / GB, max(offloaded, 4 * largest * n) / GB)


def _strategy(trainer: dict[str, Any]) -> dict[str, Any]:
    strategy = trainer.get("strategy", "auto")
    return {"stage": None} if isinstance(strategy, str) else {"stage": 2, **strategy["init_args"]}


def _trained(model: dict[str, Any], policy: Size, size: str) -> float:
    lora = model["policy"].get("lora")
    if lora:
        return lora["rank"] * LORA_WIDTHS[size] * policy.layers
    return policy.parameters - (policy.vision if model.get("freeze") else 0)


def _held(trained: list[tuple[Size, float]], options: dict[str, Any], n: int) -> float:
    """Bytes of one GPU that weights and states take throughout."""
    if options["stage"] is None:
        return sum(4 * net.parameters + 12 * count for net, count in trained)
    shards = n if options["stage"] == 3 else 1
    weights = sum(2 * net.parameters / shards for net, _ in trained)
    return weights + (0 if options.get("offload_optimizer") else sum(16 * count for _, count in trained) / n)


def _offloaded(counts: list[float]) -> float:
    """Bytes of a process's CPU memory at the step, for the parameters of each network that are its own."""
    kept = sum(2 * _pinned(4 * count) + _pinned(2 * count) + 8 * count for count in counts)
    return kept + 8 * max(counts)


def _pinned(num_bytes: float) -> float:
    return 2.0 ** math.ceil(math.log2(num_bytes))


def _activations(model: dict[str, Any], networks: list[Size]) -> float:
    tokens = model.get("micro_batch_tokens") or 0
    layers = max(2 * net.layers * net.hidden * tokens for net in networks)
    return layers + 3 * 4 * model.get("chunk_tokens", 2048) * networks[0].vocabulary + 2 * GB


def laid_over(below: Any, above: Any) -> Any:
    """Two configurations, the second over the first."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: laid_over(below.get(key), value) for key, value in above.items()}}


def said(files: list[str]) -> str:
    """What the configuration of the given files, each laid over those before, needs, as their headers say it."""
    config: dict[str, Any] = {}
    for file in files:
        config = laid_over(config, yaml.safe_load(Path(file).read_text()))
    found = needs(config, "Qwen3-VL-8B" if "qwen3vl-8b" in files[0] else "Qwen3-VL-4B")
    devices = config["trainer"].get("devices", 1)
    return f"{devices} GPU{'s' if devices > 1 else ''} with {found.gpu:.0f} GB each, {found.cpu:.0f} GB of CPU memory"


if __name__ == "__main__":
    print(said(sys.argv[1:]))
