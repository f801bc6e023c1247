"""Rollouts with transformers' own `generate`, on any device that transformers runs on.

Each prompt is prefilled once, images included, for all its samples; `generate` goes on from the prefilled cache. It
samples from the live policy, so there are no weights to copy.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prism_pl.batch import Example
from prism_pl.optim import check_finite
from prism_pl.policy import no_image
from prism_pl.processor import Processor, Prompt
from prism_pl.rollout.draws import Draws
from prism_pl.rollout.engine import GroupDone, Rollout, Sampling
from prism_pl.rollout.inference import compute_dtype, inference
from prism_pl.rollout.probe import Probe
from prism_pl.rollout.ranks import RankCheck, check_same_number
from prism_pl.strategy import inside, is_sharded


class TransformersEngine:
    """Samples with transformers' `generate`.

    A resumed run draws what the whole one would have drawn (`prism_pl.rollout.draws.Draws`), and the global random
    number generator stays as it is.

    Args:
        batch_size: sequences decoded at once.
    """

    def __init__(self, batch_size: int = 128) -> None:
        if batch_size < 1:
            raise ValueError(f"engine batch_size is {batch_size}: decode at least 1 sequence at once")
        self.batch_size = batch_size

    def start(self, policy: Any, processor: Processor, *, rank: int) -> None:
        """Keep hold of the live policy. Called once, before everything else."""
        self.policy = policy
        self.processor = processor
        self.draws = Draws(rank)
        self.ranks = RankCheck(self.draws)
        self.probe = Probe()

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        """`num_samples` rollouts an example, prompt by prompt. A response ends at the end-of-turn token or, as Qwen's
        own generation configuration has it, at the end-of-text token. Greedy log-probabilities are of temperature 1.
        `on_group` is not called: a batch is finished all at once.
        """
        rollouts = self._generate(examples, num_samples, sampling)
        self.probe.remember(examples)
        self.ranks.remember(rollouts, sampling)
        return rollouts

    @torch.no_grad()
    def _generate(self, examples: Sequence[Example], num_samples: int, sampling: Sampling) -> list[Rollout]:
        prompts = [self.processor.prompt(example) for example in examples]
        # Neighbours of like length share a batch: less padding. Rows of a prompt stay together.
        order = sorted(range(len(prompts) * num_samples), key=lambda b: len(prompts[b // num_samples].ids))
        if is_sharded(self.policy):
            check_same_number(len(order), self.policy.device)
        rollouts: dict[int, Rollout] = {}
        device = self.policy.get_input_embeddings().weight.device
        with inference(self.policy), self.draws.seeded(sampling, device):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                chunk = self._generate_chunk([prompts[b // num_samples] for b in rows], sampling)
                rollouts.update(zip(rows, chunk, strict=True))
        return [rollouts[b] for b in range(len(order))]

    def _generate_chunk(self, row_prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """One rollout for each entry of `row_prompts`, decoded together; equal neighbours share their prefill."""
        from transformers import GenerationConfig

        distinct: list[Prompt] = []
        prompt_of: list[int] = []
        for prompt in row_prompts:
            if not distinct or prompt is not distinct[-1]:
                distinct.append(prompt)
            prompt_of.append(len(distinct) - 1)
        device = self.policy.get_input_embeddings().weight.device
        row_of = torch.tensor(prompt_of, device=device)
        ids_PS, mask_PS, positions_3PS = left_padded(distinct, self.processor.pad_id, device)
        cache = inside(self.policy, lambda: _prefill(self.policy.model, distinct, ids_PS, mask_PS, positions_3PS))
        cache.batch_select_indices(row_of)
        stop_ids = [self.processor.eos_id, self.processor.pad_id]
        warpers = _warpers(sampling, self.processor.banned_ids, device)
        recorder = _LogpRecorder([prompt.id for prompt in distinct])
        ids_BS = self.policy.generate(
            ids_PS[row_of],
            attention_mask=mask_PS[row_of],
            position_ids=positions_3PS[:, row_of],
            past_key_values=cache,
            generation_config=GenerationConfig(
                do_sample=sampling.temperature > 0,
                # Our own processors do all of this, in transformers' order, so that the recorder stands behind them.
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=stop_ids,
                pad_token_id=self.processor.pad_id,
            ),
            logits_processor=[*warpers, recorder],
            # Each token gathers the weights from all ranks, so all decode as long as the longest.
            synced_gpus=is_sharded(self.policy),
        )
        responses = ids_BS[:, ids_PS.shape[1] :].tolist()
        logps = recorder.finish(ids_BS).tolist()
        rows = zip(row_prompts, responses, logps, strict=True)
        return [self._rollout(prompt, ids, row_logps, stop_ids) for prompt, ids, row_logps in rows]

    def _rollout(self, prompt: Prompt, ids: list[int], logps: list[float], stop_ids: list[int]) -> Rollout:
        """Cut a decoded row behind its first stop token; what follows is padding."""
        end = next((t for t, token in enumerate(ids) if token in stop_ids), None)
        length = len(ids) if end is None else end + 1
        response = ids[:length]
        return Rollout(
            prompt_ids=list(prompt.ids),
            response_ids=response,
            sampler_logps=logps[:length],
            text=self.processor.decode(response),
            finish_reason="length" if end is None else "stop",
        )

    def dtype(self) -> torch.dtype:
        """The live policy's, or that of the autocast around the call."""
        return compute_dtype(self.policy)

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to copy: it reads the live policy, and no cache outlives a `generate`. Probed all the same."""
        self.ranks.check_draws()
        self.probe.check(self._generate, self.policy, self.processor)

    def sleep(self) -> None:
        """Nothing to free: between calls the engine holds no memory of its own."""

    def wake(self) -> None:
        """Nothing to take back."""

    def metrics(self) -> dict[str, float]:
        """The probe's difference after the last sync, and the share of draws that other ranks drew too."""
        return self.probe.metrics() | self.ranks.metrics()

    def state_dict(self) -> dict[str, Any]:
        """What the next draws depend on, the same for every rank."""
        return self.draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on drawing where `state` was saved."""
        self.draws.load_state_dict(state)

    def close(self) -> None:
        """Nothing to shut down."""


def left_padded(prompts: Sequence[Prompt], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (P, S), attention mask (P, S) and positions (3, P, S), padded at the left as decoding needs it."""
    lengths_P = torch.tensor([len(prompt.ids) for prompt in prompts])
    ids_PS = pad_sequence(
        [torch.tensor(prompt.ids) for prompt in prompts], batch_first=True, padding_value=pad_id, padding_side="left"
    )
    positions_PS3 = pad_sequence([prompt.positions_3S.T for prompt in prompts], batch_first=True, padding_side="left")
    longest = ids_PS.shape[1]
    mask_PS = (torch.arange(longest) >= longest - lengths_P[:, None]).long()
    return ids_PS.to(device), mask_PS.to(device), positions_PS3.permute(2, 0, 1).to(device)


def _prefill(model: Any, prompts: Sequence[Prompt], ids_PS: Tensor, mask_PS: Tensor, positions_3PS: Tensor) -> Any:
    """The key-value cache of all prompt tokens but the last, which `generate` reads itself."""
    from transformers.cache_utils import Cache

    from prism_pl.rollout.growing_cache import GrowingLayer

    ids_PS = ids_PS[:, :-1]
    embeds = model.get_input_embeddings()(ids_PS)
    visual_PS, deepstack = None, None
    if not any(len(prompt.grids_I3) for prompt in prompts):
        embeds = embeds + no_image(model).to(embeds.dtype) if is_sharded(model) else embeds
    else:
        pixel_values_NC = torch.cat([prompt.pixel_values_NC for prompt in prompts]).to(ids_PS.device)
        grids_I3 = torch.cat([prompt.grids_I3 for prompt in prompts]).to(ids_PS.device)
        # The tower itself: what `get_image_features` makes of its deepstack features changes between versions.
        images = model.visual(pixel_values_NC.to(model.visual.dtype), grid_thw=grids_I3, return_dict=True)
        visual_PS = ids_PS == model.config.image_token_id
        embeds = embeds.masked_scatter(visual_PS.unsqueeze(-1), images.pooler_output.to(embeds.dtype))
        deepstack = images.deepstack_features
    return model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask_PS[:, :-1],
        position_ids=positions_3PS[:, :, :-1],
        past_key_values=Cache(layer_class_to_replicate=GrowingLayer),
        use_cache=True,
        visual_pos_masks=visual_PS,
        deepstack_visual_embeds=deepstack,
    ).past_key_values


def _warpers(sampling: Sampling, banned_ids: Sequence[int], device: torch.device) -> list[Any]:
    """transformers' logits processors for these options, in the order in which it applies them."""
    from transformers.generation.logits_process import (
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers: list[Any] = [SuppressTokensLogitsProcessor(list(banned_ids), device=str(device))] if banned_ids else []
    if sampling.temperature == 0:
        return warpers
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


class _LogpRecorder:
    """A last logits processor that keeps the log-probability of what was drawn.

    The draw comes after the processors, so a step's scores wait for the next call, whose ids carry it. One step's
    (B, V) scores exist at a time; `output_scores` would keep all T of them (20 GB for 64 x 512 at Qwen's vocabulary).

    The first step's scores are checked: drawing from NaN stops without a word on whose fault it is, on a GPU for good.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = ids
        self.waiting_BV: Tensor | None = None
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.waiting_BV is None:
            check_finite(scores.logsumexp(dim=-1).sum(), "the policy's next-token distribution", self.ids)
        else:
            self._record(self.waiting_BV, input_ids[:, -1])
        self.waiting_BV = scores
        return scores

    def _record(self, scores_BV: Tensor, drawn_B: Tensor) -> None:
        drawn = scores_BV.gather(1, drawn_B[:, None]).squeeze(1)
        self.logps.append(drawn - scores_BV.logsumexp(dim=-1))

    def finish(self, ids_BS: Tensor) -> Tensor:
        """Log-probabilities (B, T) of the decoded tokens; meaningless behind a row's end."""
        assert self.waiting_BV is not None
        self._record(self.waiting_BV, ids_BS[:, -1])
        self.waiting_BV = None
        return torch.stack(self.logps, dim=1)
