"""What the kinds of discriminator share: a Qwen3-VL backbone, heads at the last token, and a folder of their own."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prism_pl.batch import SequenceBatch
from prism_pl.checkpoint_files import put_in_place
from prism_pl.discriminator.folder import (
    Settings,
    fresh_settings,
    read_heads,
    warm_settings,
    write_heads,
    write_settings,
)
from prism_pl.discriminator.interface import Discriminator, RowScores
from prism_pl.logprobs import head_logps
from prism_pl.packing import Layout, attend_packed, packed_layout, padded_layout
from prism_pl.policy import (
    batch_vision_attention,
    check_policy_path,
    freeze_matching,
    fresh_temporary,
    image_features,
    no_image,
    save_processor,
    set_dtype,
    write_model,
)
from prism_pl.processor import Processor
from prism_pl.strategy.ranks import world_size
from prism_pl.strategy.sharding import gathered_state, is_first_rank


class Head(nn.Linear):
    """In float32 also under bf16 autocast and on bf16 weights: bf16 keeps 8 bits, too few to rank near-equal scores."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float())


class BackboneDiscriminator(Discriminator):
    """A Qwen3-VL backbone and heads (dropout, linear without bias, as in PRISM's release).

    Args:
        load: `(path, anew, attn_implementation)` -> the backbone.
        path: a folder (or hub id) that holds a warm-started discriminator; with `init_heads` a policy to start from.
        init_heads: draw the heads anew, on the backbone of the policy at `path`. Only the warm start wants this.
        settings: by name, as `Settings` has them. None takes the warm start's, or the default with `init_heads`.
        dropout: before each head.
        freeze: name patterns of parameters that stay as they are, e.g. `model.visual.*`.
        attn_implementation, gradient_checkpointing: as in `PolicySpec`.
        packed: run all sequences in one row, and the prompt that they share once, see `prism_pl.packing`.

    ValueError where trained weights are expected and missing: they are never random in silence.
    """

    text_only: ClassVar[bool] = False

    def __init__(
        self,
        load: Callable[[str, bool, str], Any],
        path: str,
        init_heads: bool,
        settings: Mapping[str, Any],
        dropout: float,
        freeze: Sequence[str],
        attn_implementation: str,
        gradient_checkpointing: bool,
        packed: bool,
    ) -> None:
        super().__init__()
        self.settings = self._settle(path, init_heads, settings)
        self.experts = self.settings.experts
        self.max_segment_tokens: int = self.settings.max_segment_tokens
        self.likelihood_weight: float = self.settings.likelihood_weight
        self.packed = packed
        self.processor = Processor.from_path(path, self.settings.max_pixels, self.text_only)
        self.model: Any = load(path, init_heads, attn_implementation)
        if self.likelihood_weight and not self.model.config.tie_word_embeddings:
            raise ValueError(
                f"likelihood_weight is {self.likelihood_weight}, and {path!r} has no tied embeddings: set 0"
            )
        batch_vision_attention(self)
        if packed:
            attend_packed(self.model)
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.dropout = nn.Dropout(dropout)
        self.heads = self._heads(path, init_heads)
        if self.text_only:
            self.model.visual.requires_grad_(False)
        freeze_matching(self, freeze)
        self.train()

    def _settle(self, path: str, init_heads: bool, settings: Mapping[str, Any]) -> Settings:
        check_policy_path(path, "discriminator.path", ("qwen3_vl", "qwen3_vl_moe"))
        cap = settings["max_segment_tokens"]
        if cap is not None and cap < 1:
            raise ValueError(f"max_segment_tokens is {cap}: give at least 1, or null for the warm start's (4096 anew)")
        given = {"kind": type(self).__name__, **settings}
        if not init_heads:
            return warm_settings(path, given)
        settled = fresh_settings(path, given)
        check_policy_path(path, "discriminator.path")
        return settled

    def _heads(self, path: str, init_heads: bool) -> nn.ModuleDict:
        hidden = self.model.config.text_config.hidden_size
        names = self.experts if self.settings.heads == "per_expert" else ("shared",)
        heads = nn.ModuleDict({name: Head(hidden, 1, bias=False) for name in names})
        if not init_heads:
            heads.load_state_dict(read_heads(path, heads.state_dict()))
            return heads
        for parameter in heads.parameters():
            # Hidden states leave the last norm with entries near 1, so scores start near 0.1 in size: the first gaps
            # are close to 0, and the backbone gets a gradient from the first step, which zero heads would not give it.
            nn.init.normal_(parameter, std=0.1 / math.sqrt(hidden))
        return heads

    def forward(self, sequences: SequenceBatch, expert_N: Tensor) -> RowScores:
        shared_B = self.shares(sequences, expert_N)
        layout = padded_layout(sequences) if shared_B is None else packed_layout(sequences, shared_B)
        readers_KN = layout.readers_KN(expert_N, len(self.experts))
        output = self._run(sequences, layout, **self.text_options(readers_KN))
        hidden_NH = output.last_hidden_state.flatten(0, 1)
        last_B = layout.place_of_BS.gather(1, sequences.lengths_B[:, None] - 1).squeeze(1)
        last_BH = hidden_NH[last_B]
        by_head = torch.cat([head(self.dropout(last_BH)) for head in self.heads.values()], dim=1)
        column_B = expert_N if len(self.heads) > 1 else torch.zeros_like(expert_N)
        scores_B = by_head.gather(1, column_B[:, None]).squeeze(1)
        diagnostics = {}
        if self.likelihood_weight:
            likelihood_B = self._mean_logps(hidden_NH, sequences, layout)
            scores_B = scores_B + self.likelihood_weight * likelihood_B
            diagnostics["segment_logp"] = likelihood_B.detach().mean()
        return RowScores(scores_B, self.sums(output, readers_KN), diagnostics)

    def shares(self, sequences: SequenceBatch, expert_B: Tensor) -> Tensor | None:
        return sequences.prompt_of_B if self.packed else None

    def text_options(self, readers_KN: Tensor) -> dict[str, Any]:
        """Further keywords of the text model's forward pass.

        Args:
            readers_KN: how many sequences of each segment kind read each of N places.
        """
        return {}

    def sums(self, output: Any, readers_KN: Tensor) -> dict[str, Tensor]:
        """`RowScores.sums` of the text model's output."""
        return {}

    def _run(self, batch: SequenceBatch, layout: Layout, **options: Any) -> Any:
        """The text model's output over the places of a layout. The vision tower runs once an image."""
        model = self.model
        ids = batch.input_ids_BS.flatten()[layout.token_of_N].view(layout.shape)
        positions = batch.position_ids_3BS.flatten(1)[:, layout.token_of_N].view(3, *layout.shape)
        embeds = model.get_input_embeddings()(ids)
        if layout.images:
            features, deepstack = image_features(model, batch, layout.images)
            visual = ids == model.config.image_token_id
            embeds = embeds.masked_scatter(visual.unsqueeze(-1), features.to(embeds.dtype))
            options |= {"visual_pos_masks": visual, "deepstack_visual_embeds": deepstack}
        elif world_size() > 1 and not self.text_only:
            embeds = embeds + no_image(model).to(embeds.dtype)
        if layout.blocks is not None:
            options["blocks"] = layout.blocks
        return model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **options)

    def _mean_logps(self, hidden_NH: Tensor, batch: SequenceBatch, layout: Layout) -> Tensor:
        """Mean log-likelihood (nats a token) of each segment, so that length alone is worth nothing."""
        embeddings = self.model.get_input_embeddings()
        mask_BT = batch.mask_BT
        before_BT = layout.place_of_BS.gather(1, (batch.response_index_BT - 1).clamp_min(0))
        # In float32 also under bf16 autocast, as the heads: a false word among forty moves the mean by little.
        with torch.autocast(hidden_NH.device.type, enabled=False):
            logps, _ = head_logps(hidden_NH[before_BT[mask_BT]].float(), embeddings, batch.response_ids_BT[mask_BT])
        logps_BT = torch.zeros(mask_BT.shape, device=logps.device).masked_scatter(mask_BT, logps)
        return logps_BT.sum(-1) / mask_BT.sum(-1)

    def save(self, folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        """Write backbone and heads (safetensors), settings, tokenizer and processor; a kill leaves no half folder.
        Every rank comes here, and the first writes."""
        weights = gathered_state(self.model.state_dict(keep_vars=True), getattr(torch, dtype))
        heads = gathered_state(self.heads.state_dict(keep_vars=True), torch.float32)
        if not is_first_rank():
            return
        temporary = fresh_temporary(folder)
        write_model(self.model, weights, temporary)
        set_dtype(temporary / "config.json", dtype)
        write_heads(heads, temporary)
        write_settings(self.settings, temporary)
        save_processor(self.processor, temporary)
        put_in_place(temporary, folder)
