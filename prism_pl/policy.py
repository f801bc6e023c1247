"""Load or build a policy, run it over batches, and save it in Hugging Face format with its processor."""

import fnmatch
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prism_pl.batch import SequenceBatch
from prism_pl.checkpoint_files import put_in_place
from prism_pl.errors import UsageError
from prism_pl.lora import LoraSpec, add_lora, freeze_adapters, has_lora, whole_parameters
from prism_pl.processor import Processor
from prism_pl.strategy.ranks import world_size
from prism_pl.strategy.sharding import (
    build_sharded,
    builds_sharded,
    gathered_state,
    is_first_rank,
    is_sharded,
    whole_construction,
)

PROCESSOR_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHT_INDEX = "model.safetensors.index.json"


@dataclass
class PolicySpec:
    """Which policy to train and how to hold it.

    Attributes:
        path: a folder in Hugging Face format or a hub id.
        from_scratch: take only configuration and processor from `path` and draw the weights anew.
        attn_implementation: of the text layers: `sdpa`, `eager`, or a flash-attention implementation of transformers.
        gradient_checkpointing: recompute each layer in the backward pass (non-reentrant).
        max_pixels: images above this many pixels are scaled down; None keeps the processor's own limit.
        lora: train low-rank adapters instead of the weights; None trains the weights. Exports hold merged weights.
    """

    path: str
    from_scratch: bool = False
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    max_pixels: int | None = None
    lora: LoraSpec | None = None

    def processor(self) -> Processor:
        """The tokenizer and image processor at `path`."""
        check_policy_path(self.path)
        if (Path(self.path) / "discriminator.json").exists():
            raise UsageError(
                f"policy.path {self.path!r} is a discriminator: name the export/ folder of a policy's run, such as "
                "runs/sft/export, and this one as discriminator.path"
            )
        return Processor.from_path(self.path, self.max_pixels)


def check_policy_path(path: str, key: str = "policy.path", model_types: Sequence[str] = ("qwen3_vl",)) -> None:
    """Refuse what is no vision-language model, before anything heavy is loaded. UsageError.

    Args:
        key: what the message calls the path.
        model_types: what its configuration may say.
    """
    folder = Path(path)
    if not folder.is_dir():
        meant = folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1 or folder.parent.is_dir()
        if meant:
            raise UsageError(
                f"{key} {path!r} is no folder: name a folder in Hugging Face format or a hub id such as "
                "Qwen/Qwen3-VL-4B-Instruct"
            )
        config_file = _hub_config(path, key)
    else:
        config_file = folder / "config.json"
    if not config_file.exists():
        raise UsageError(f"{key} {path!r} holds no config.json: name the export/ folder of a run, or a hub id")
    try:
        model_type = json.loads(config_file.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise UsageError(f"{config_file} is no JSON ({error}): export or download the model anew") from None
    if model_type not in model_types:
        raise UsageError(
            f"{key} {path!r} is a {model_type!r} model, not a vision-language model of the family qwen3_vl"
        )


def _hub_config(path: str, key: str) -> Path:
    """The config.json of a hub id, from the cache or the hub. UsageError where neither has it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "config.json"))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{key} {path!r} is no folder here, and as a hub id it could not be read ({reason}): name the "
            "export/ folder of a run, or a hub id such as Qwen/Qwen3-VL-4B-Instruct"
        ) from error


def build_policy(spec: PolicySpec, freeze: Sequence[str] = ()) -> Any:
    """A `Qwen3VLForConditionalGeneration` in float32, in training mode.

    Args:
        freeze: name patterns of parameters that stay as they are, e.g. `model.visual.*` (vision tower and projectors).

    Weights are read from safetensors only, and no code from the checkpoint is run. Raises ValueError where weights are
    missing, where only pickled weights are found, or where a freeze pattern matches nothing.
    """
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    check_policy_path(spec.path)
    if spec.from_scratch:
        config = AutoConfig.from_pretrained(spec.path, trust_remote_code=False)
        policy = Qwen3VLForConditionalGeneration._from_config(
            config, attn_implementation=spec.attn_implementation, dtype=torch.float32
        )
    else:
        policy = load_safetensors(Qwen3VLForConditionalGeneration, spec.path, spec.attn_implementation)
    batch_vision_attention(policy)
    if spec.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    freeze_matching(policy, freeze)
    if spec.lora is not None:
        add_lora(policy, spec.lora)
        freeze_adapters(policy, freeze)
    return policy.train()


def load_safetensors(kind: Any, path: str, attn_implementation: str) -> Any:
    """`kind.from_pretrained` that accepts safetensors only, no missing weight and none of another shape. ValueError."""
    if builds_sharded():
        return build_sharded(
            kind,
            kind.config_class.from_pretrained(path, trust_remote_code=False),
            lambda: load_safetensors(kind, path, attn_implementation).state_dict(),
            attn_implementation=attn_implementation,
        )
    folder = Path(path)
    if folder.is_dir():
        _check_weight_files(path, list(folder.glob("model*.safetensors")))
    model, info = kind.from_pretrained(
        path,
        attn_implementation=attn_implementation,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused here, by a message that names them
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path!r} lacks {len(missing)} weights of its own config, e.g. {missing[0]!r}: export or download it anew"
        )
    for name, held, wanted in info["mismatched_keys"]:
        raise ValueError(
            f"{path!r} holds {name!r} of the shape {tuple(held)}, and its own config wants {tuple(wanted)}: export or "
            "download it anew"
        )
    return model


def _check_weight_files(path: str, files: Sequence[Path]) -> None:
    """ValueError where a folder has no safetensors, or one that is broken or something else under that name."""
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    if not files:
        pickles = [p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(suffix)]
        found = f"only pickled weights ({', '.join(sorted(pickles))}), which can run code" if pickles else "no weights"
        raise ValueError(f"{path!r} holds {found}: convert them to model.safetensors (save_pretrained does)")
    for file in files:
        try:
            # Reads the header alone.
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}): export or download it anew") from None


def freeze_matching(module: nn.Module, patterns: Sequence[str]) -> None:
    """Turn off gradients for the parameters whose names match. A pattern that matches nothing is a ValueError."""
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"freeze pattern {pattern!r} matches no parameter; names look like {names[0]!r}")
    for name, parameter in module.named_parameters():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def batch_vision_attention(policy: Any) -> None:
    """Attend over all images at once. Under sdpa transformers' vision tower loops over images; an implementation whose
    name says flash gets the image bounds instead, so ours carries that word and takes them."""
    from transformers import AttentionInterface

    AttentionInterface.register("prism_flash_bounds", bounded_attention)
    policy.model.visual.config._attn_implementation_internal = "prism_flash_bounds"


def bounded_attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention inside each image of a packed row of N patches, H heads, D a head.

    Args:
        cu_seq_lens_q: bounds of the images in the row, from 0 to N.
        max_length_q: the longest image.

    Returns:
        The attended values, (1, N, H, D), and no weights.
    """
    assert attention_mask is None
    assert dropout == 0.0
    num_images = cu_seq_lens_q.numel() - 1
    _, heads, length, width = query_1HND.shape
    if num_images * max_length_q == length:  # one grid for all: a plain batch
        shape = (heads, num_images, max_length_q, width)
        query, key, value = (x.view(shape).transpose(0, 1) for x in (query_1HND, key_1HND, value_1HND))
        out = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return out.transpose(1, 2).reshape(1, length, heads, width), None
    if query_1HND.is_cuda and query_1HND.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query_1HND, key_1HND, value_1HND))
        bounds = cu_seq_lens_q.to(torch.int32)
        out = varlen_attn(query, key, value, bounds, bounds, max_length_q, max_length_q, scale=scaling)
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    sizes = cu_seq_lens_q.diff().tolist()
    images = zip(*(x.split(sizes, dim=2) for x in (query_1HND, key_1HND, value_1HND)), strict=True)
    parts = [nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in images]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def hidden_states(model: Any, batch: SequenceBatch) -> Tensor:
    """Last hidden states, (B, S, hidden), of a Qwen3-VL backbone (`Qwen3VLModel`) over a batch.

    The vision tower runs once an image, however many sequences share it. Right padding needs no mask: under causal
    attention no real token sees what stands behind it.
    """
    embeds = model.get_input_embeddings()(batch.input_ids_BS)
    if len(batch.grids_I3) == 0:
        if world_size() > 1:
            embeds = embeds + no_image(model).to(embeds.dtype)
        return model.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids_3BS, use_cache=False
        ).last_hidden_state
    visual_BS, features, deepstack = image_tokens(model, batch)
    embeds = embeds.masked_scatter(visual_BS.unsqueeze(-1), features.to(embeds.dtype))
    return model.language_model(
        inputs_embeds=embeds,
        position_ids=batch.position_ids_3BS,
        use_cache=False,
        visual_pos_masks=visual_BS,
        deepstack_visual_embeds=deepstack,
    ).last_hidden_state


def no_image(model: Any) -> Tensor:
    """0, by way of the vision tower. Where other ranks' batches may hold images, each rank must gather and reduce the
    tower's weights as often as they do, or all wait forever."""
    vision, size = model.visual.config, model.visual.spatial_merge_size
    grid_I3 = torch.tensor([[1, size, size]], device=model.visual.device)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    blank_NC = torch.zeros(size * size, width, dtype=model.visual.dtype, device=model.visual.device)
    out = model.visual(blank_NC, grid_thw=grid_I3, return_dict=True)
    return 0 * torch.stack([features.sum() for features in (out.pooler_output, *out.deepstack_features)]).sum()


def image_tokens(model: Any, batch: SequenceBatch) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Where the visual tokens stand, their features, and the features of the deepstack layers, in batch order."""
    visual_BS = batch.input_ids_BS == model.config.image_token_id
    return visual_BS, *image_features(model, batch, batch.image_of.tolist())


def image_features(model: Any, batch: SequenceBatch, order: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Features of the images of `order`, one image after the other, and those of the deepstack layers. The vision tower
    runs once over the batch's images, however often one is named."""
    # Of the vision tower itself: what `get_image_features` splits for us differs between transformers 5.17 and 5.19.
    out = model.visual(batch.pixel_values_NC.to(model.visual.dtype), grid_thw=batch.grids_I3, return_dict=True)
    tokens = (batch.grids_I3.prod(-1) // model.visual.spatial_merge_size**2).tolist()
    deepstack = [_images_in_order(layer, tokens, order) for layer in out.deepstack_features]
    return _images_in_order(out.pooler_output, tokens, order), deepstack


def _images_in_order(features: Tensor, tokens: list[int], order: Sequence[int]) -> Tensor:
    """The rows of each image of `order`, one image after the other; `tokens` are the rows of each."""
    images = features.split(tokens)
    return torch.cat([images[i] for i in order])


def save_policy(
    policy: Any, processor: Processor, folder: Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> None:
    """Write weights (safetensors), configuration, generation configuration, tokenizer and processor to `folder`.

    Written to a temporary name beside it and renamed, so that a kill never leaves half an export. Every rank comes
    here, and the first writes.
    """
    held = dict(whole_parameters(policy)) if has_lora(policy) else policy.state_dict(keep_vars=True)
    weights = gathered_state(held, getattr(torch, dtype))
    if not is_first_rank():
        return
    temporary = fresh_temporary(folder)
    write_model(policy, weights, temporary)
    set_dtype(temporary / "config.json", dtype)
    save_processor(processor, temporary)
    put_in_place(temporary, folder)


def write_model(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """transformers' `save_pretrained` of whole weights. It looks at the shapes of the model's own, to lay out experts
    as its files have them: where those are sharded away, at the shapes of a model without any weights."""
    if is_sharded(model):
        with whole_construction(), torch.device("meta"):
            # Of a plain configuration: transformers does not build on our attention's name.
            shell = type(model)(type(model.config).from_dict(model.config.to_dict()))
        shell.config = model.config
        if model.can_generate():
            shell.generation_config = model.generation_config
        model = shell
    model.save_pretrained(folder, state_dict=dict(weights))


def fresh_temporary(folder: Path) -> Path:
    """The name beside `folder` to write to before `put_in_place`, cleared of what a killed export left there."""
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    return temporary


def set_dtype(config_file: Path, dtype: str) -> None:
    """Say in a saved configuration, and in its parts, which dtype the weights beside it have."""
    config = json.loads(config_file.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def save_processor(processor: Processor, folder: Path) -> None:
    """Copy the tokenizer and processor files as they stand, from the source's folder or the hub's cache, so that an
    export's processor is its source's to the byte and has all that other programs ask for (vLLM and transformers want
    the one for videos too)."""
    source = Path(processor.source)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(processor.source, allow_patterns=list(PROCESSOR_FILES)))
    for pattern in PROCESSOR_FILES:
        for file in source.glob(pattern):
            if file.name not in ("config.json", "generation_config.json", WEIGHT_INDEX):
                shutil.copy(file, folder / file.name)
