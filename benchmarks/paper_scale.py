"""The paper's networks at their true dimensions with random weights: nothing is downloaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from prism_pl.discriminator import SparseMoEDiscriminator
from prism_pl.policy import PolicySpec, build_policy, save_policy

ROOT = Path(__file__).resolve().parent.parent

# What Qwen3-VL-4B-Instruct and Qwen3-VL-2B-Instruct share, and where they differ.
TEXT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rope_theta": 5000000,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000000,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
TEXT_BY_SIZE = {
    "2b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "depth": 24,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}


def write_blank(folder: Path, size: str) -> None:
    """The tiny policy's processor with a configuration of Qwen3-VL's dimensions (`2b` or `4b`; `tiny` keeps its own), and
    no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (ROOT / "assets" / "sft").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    if size == "tiny":
        return
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= TEXT | TEXT_BY_SIZE[size]
    config["vision_config"] |= VISION | {"out_hidden_size": TEXT_BY_SIZE[size]["hidden_size"]}
    for part in ("text_config", "vision_config"):
        config[part]["initializer_range"] = 0.02
    (folder / "config.json").write_text(json.dumps(config))


def write_policy(folder: Path, size: str, device: str) -> None:
    """A policy with random weights, in bf16, in Hugging Face format."""
    blank = folder.with_name(f"{folder.name}-blank")
    write_blank(blank, size)
    spec = PolicySpec(str(blank), from_scratch=True)
    processor = spec.processor()
    with torch.device(device):
        policy = build_policy(spec)
    save_policy(policy, processor, folder, "bfloat16")


def write_discriminator(folder: Path, policy: Path, max_segment_tokens: int, device: str) -> None:
    """The release's mixture, upcycled from the policy in that folder, as a warm start leaves it, in bf16."""
    with torch.device(device):
        network = SparseMoEDiscriminator(
            str(policy), init_heads=True, max_segment_tokens=max_segment_tokens, likelihood_weight=0.0
        )
    network.save(folder, "bfloat16")
