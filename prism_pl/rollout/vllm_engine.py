"""Rollouts with vLLM, inside the training process: one engine a rank, or one for several by tensor parallelism.

The engine holds a copy of the policy's weights, so it samples from what the last `sync` sent. What can go wrong with
that is checked in the loop, see `prism_pl.rollout.contract`.
"""

import gc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from prism_pl.batch import Example
from prism_pl.errors import EngineStopped
from prism_pl.images import open_image
from prism_pl.lora import whole_parameters
from prism_pl.optim import check_finite
from prism_pl.processor import Processor
from prism_pl.rollout import vllm_compat
from prism_pl.rollout.contract import check_prompt_ids
from prism_pl.rollout.draws import Draws
from prism_pl.rollout.engine import GroupDone, Rollout, Sampling
from prism_pl.rollout.probe import Probe
from prism_pl.rollout.ranks import RankCheck, TensorGroup
from prism_pl.rollout.read_back import ReadBack
from prism_pl.rollout.vllm_launch import Dtype, Launched, LaunchOptions
from prism_pl.rollout.vllm_limits import check_fits, check_images, check_temperature
from prism_pl.rollout.vllm_logps import sampled_logps_alone
from prism_pl.rollout.vllm_sync import WeightSender


class VLLMEngine:
    """Samples with vLLM 0.24 to 0.32.

    A resumed run draws what the whole one would have drawn (`prism_pl.rollout.draws.Draws`): vLLM draws from the global
    generators, which are seeded for each call and put back after it, so draws cost what vLLM's own do.

    Args:
        tensor_parallel: ranks that share an engine. They generate for the batches of all of them, together.
        dtype: of the engine's weights; `auto` is float32 on a CPU and bfloat16 on a GPU.
        max_model_len: longest prompt and response together, in tokens; None: what the policy and the cache allow.
        max_num_seqs: sequences decoded at once; None: 256 on a CPU, vLLM's default on a GPU.
        max_images: most images in a prompt.
        gpu_memory: the engine's share of a GPU's memory, weights and cache. It is lent to training while it sleeps.
        kv_cache_mb: size of the key-value cache in MiB; None: 256 on a CPU, by `gpu_memory` on a GPU.
        sleep: give the memory back during the training part of a step (on a GPU; a CPU engine keeps it).
        enforce_eager: compile nothing and record no CUDA graphs: the engine starts sooner and decodes slower, which
            pays in runs of a few steps. A CPU engine always does so.
    """

    def __init__(
        self,
        tensor_parallel: int = 1,
        dtype: Dtype = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_images: int = 4,
        gpu_memory: float = 0.4,
        kv_cache_mb: int | None = None,
        sleep: bool = True,
        enforce_eager: bool = False,
    ) -> None:
        counts = {"tensor_parallel": tensor_parallel, "max_images": max_images}
        counts |= {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "kv_cache_mb": kv_cache_mb}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"engine {name} is {value}: give at least 1")
        if not 0 < gpu_memory < 1:
            raise ValueError(f"engine gpu_memory is {gpu_memory}: a share of the memory, give a number between 0 and 1")
        self.options = LaunchOptions(
            tensor_parallel, dtype, max_model_len, max_num_seqs, max_images, gpu_memory, kv_cache_mb, enforce_eager
        )
        # What `data check` knows of an engine that was not started, see `prism_pl.row_needs.HasLimits`.
        self.max_model_len, self.max_images = max_model_len, max_images
        self.sleeps = sleep
        self.launched: Launched | None = None
        self.dead: str | None = None
        self.asleep = False

    def start(self, policy: Any, processor: Processor, *, rank: int) -> None:
        """Start vLLM from the live policy, whatever it was loaded from. Called once, before everything else."""
        self.close()
        self.policy, self.processor = policy, processor
        self.on_cpu = policy.get_input_embeddings().weight.device.type == "cpu"
        size = self.options.tensor_parallel
        self.tensor_group = TensorGroup(size)
        self.draws = Draws(rank // size)
        self.tensor_group.share(self.draws)
        self.ranks = RankCheck(self.draws, size)
        self.sender = WeightSender(policy)
        self.read_back = ReadBack(self.sender.expected, policy.config.tie_word_embeddings)
        self.launched = Launched(policy, processor, self.options, partial(self.sender.fill, policy))
        self.stale = True
        self.probe = Probe(self.launched.dtype)
        self._memory: dict[str, float] = {}

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        """`num_samples` rollouts an example, prompt by prompt. A response ends at the end-of-turn token or, as Qwen's
        own generation configuration has it, at the end-of-text token. Greedy log-probabilities are of temperature 1.

        Raises EngineStopped where vLLM stops, with its reason, and ValueError for a prompt that does not fit.
        """
        if self.stale:
            # A strategy may restore a checkpoint after the start.
            self._load(whole_parameters(self.policy))
        self.wake()
        rollouts = self._generate(examples, num_samples, sampling, on_group)
        self.ranks.remember(rollouts, sampling)
        return rollouts

    def _generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        everyones, mine = self.tensor_group.union(examples)
        self.tensor_group.share(self.draws)
        prompts = [self._prompt(example, sampling) for example in everyones]
        greedy = sampling.temperature == 0
        if not greedy:
            # A cached prefix changes which sequences are decoded together, and with them which of them draws what.
            self._forget_prompts()
        params = self._sampling_params(1 if greedy else num_samples, sampling)
        device = self.policy.get_input_embeddings().weight.device
        groups: dict[int, list[Rollout]] = {}
        drawn: dict[int, list[list[int]]] = {}

        def finished(p: int, output: Any) -> None:
            # Checked by every rank of the engine: all stop, or none.
            group = self._group(everyones[p].id, prompts[p][1], output)
            drawn[p] = [rollout.response_ids for rollout in group]
            if p not in mine:
                return
            groups[p] = group * num_samples if greedy else group
            if on_group is not None:
                on_group(p - mine.start, groups[p])

        with self.draws.seeded(sampling, device), vllm_compat.eager(self.on_cpu):
            self._run([prompt for prompt, _ in prompts], params, [example.id for example in everyones], finished)
        self.tensor_group.check_draws(drawn)
        # Whoever has no row probes with another's: a probe is a call that all ranks of the engine make together.
        self.probe.remember(examples or everyones)
        return [rollout for p in mine for rollout in groups[p]]

    def _group(self, row: str, prompt_ids: list[int], output: Any) -> list[Rollout]:
        """The rollouts of one prompt. ValueError where vLLM read another prompt, or drew from NaN."""
        check_prompt_ids(output.prompt_token_ids, prompt_ids, self.processor.image_token_id, row)
        drawn = [self._rollout(prompt_ids, completion) for completion in output.outputs]
        total = torch.tensor([sum(rollout.sampler_logps) for rollout in drawn]).sum()
        check_finite(total, "the policy's next-token distribution", [row])
        return drawn

    def _prompt(self, example: Example, sampling: Sampling) -> tuple[dict[str, Any], list[int]]:
        """vLLM's request, and the prompt ids that it must come to."""
        assert self.launched is not None
        check_images(len(example.images), self.options.max_images, example.id)
        images = [open_image(image, example.id) for image in example.images]
        text = self.processor.prompt_text(example)
        ids = self.processor.prompt_ids(text, images)
        longest, remedy = self.launched.max_model_len, "raise its max_model_len or kv_cache_mb"
        check_fits(len(ids), sampling, longest, example.id, remedy)
        request: dict[str, Any] = {"prompt": text}
        if images:
            request["multi_modal_data"] = {"image": images}
        return request, ids

    def _sampling_params(self, num_samples: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        check_temperature(sampling)
        return SamplingParams(
            n=num_samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=[self.processor.eos_id, self.processor.pad_id],
            ignore_eos=True,  # the line above says where a response ends, whatever the config does
            logit_bias={i: float("-inf") for i in self.processor.banned_ids},
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )

    def _run(
        self, requests: list[dict[str, Any]], params: Any, rows: list[str], finished: Callable[[int, Any], None]
    ) -> None:
        """Hand each of vLLM's outputs to `finished`, with its number. Whatever stops vLLM leaves requests behind
        inside: the engine is not used again."""
        llm = self._llm
        broken: list[Exception] = []

        def told(p: int, output: Any) -> None:
            try:
                finished(p, output)
            except Exception as error:  # not vLLM's: it goes on to its end, and stays usable
                broken.append(error)

        try:
            with (
                vllm_compat.own_arithmetic("cpu" if self.on_cpu else "cuda"),
                sampled_logps_alone(),
                vllm_compat.watching(llm, told),
            ):
                llm.generate(requests, params, use_tqdm=False)
        except Exception as error:
            self.dead = f"{type(error).__name__}: {error}"
            raise EngineStopped(f"the rollout engine (vLLM) stopped on rows {rows[:4]}: {self.dead}") from error
        if broken:
            raise broken[0]

    @property
    def _llm(self) -> Any:
        """The running `vllm.LLM`."""
        if self.dead is not None:
            raise EngineStopped(f"the rollout engine stopped before: {self.dead}")
        assert self.launched is not None, "start the engine first"
        return self.launched.llm

    def _rollout(self, prompt_ids: list[int], completion: Any) -> Rollout:
        ids = list(completion.token_ids)
        logps = list(completion.logprobs.logprobs)
        assert len(logps) == len(ids), (len(logps), len(ids))
        return Rollout(
            prompt_ids=prompt_ids,
            response_ids=ids,
            sampler_logps=logps,
            text=self.processor.decode(ids),
            finish_reason=completion.finish_reason,
        )

    def dtype(self) -> torch.dtype:
        """In which vLLM computes."""
        assert self.launched is not None, "start the engine first"
        return self.launched.dtype

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the policy's weights, forget every cache made with the old ones, and probe. A sleeping engine
        wakes: memory for the weights, the weights, and only then memory for the cache."""
        self.ranks.check_draws()
        self._load(named_parameters)
        self.probe.check(self._generate, self.policy, self.processor)

    def _load(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        llm = self._llm
        if self.asleep:
            self._wake("weights")
        try:
            self.sender.send(llm, named_parameters, self.on_cpu)
        except Exception as error:
            self.dead = f"a weight sync broke off and left it between two policies ({error})"
            raise
        self.read_back.check(llm, self.policy, self.on_cpu)
        if self.asleep:
            self._wake("kv_cache")
            self.asleep = False
            self._note_memory("awake")
        self.stale = False
        self._forget_prompts()
        self._forget_images()

    def _wake(self, part: Literal["weights", "kv_cache"]) -> None:
        # vLLM takes this memory from the device, and training's freed blocks lie in torch's cache.
        torch.cuda.empty_cache()
        try:
            self._llm.wake_up(tags=[part])
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            self.dead = "the GPU had no room for it to wake"
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
            raise EngineStopped(
                f"vLLM could not take its {part} back beside the training: {free:.1f} of {total:.1f} GiB are free. "
                "Lower rollout.init_args.gpu_memory or micro_batch_tokens, or under DeepSpeed set "
                "trainer.strategy.init_args.park_optimizer_states"
            ) from error

    def _forget_prompts(self) -> None:
        """Keys, values and image features of earlier prompts."""
        if not self._llm.reset_prefix_cache():
            raise ValueError(
                "rollout contract: vLLM did not forget the keys and values of the old weights, because requests still "
                "hold them: give every `generate` its end before the next sync"
            )
        self._llm.llm_engine.reset_encoder_cache()

    def _forget_images(self) -> None:
        """Prepared images of earlier prompts."""
        self._llm.reset_mm_cache()

    def sleep(self) -> None:
        """Drop weights and cache until the next `sync`, `wake` or `generate`, which bring the policy's weights anew."""
        if not self.sleeps or self.asleep:
            return
        self._note_memory("before_sleep")
        self._llm.sleep(level=2)
        self.asleep = True
        self._note_memory("asleep")

    def wake(self) -> None:
        """Wake up with the policy's weights as they are now. Nothing where the engine is awake."""
        if self.asleep:
            self._load(whole_parameters(self.policy))

    def _note_memory(self, when: str) -> None:
        """GPU memory in use, by everything on this GPU, in GiB."""
        if self.on_cpu:
            return
        free, total = torch.cuda.mem_get_info()
        name = f"rollout/memory_gib/{when}"
        first = name not in self._memory
        self._memory[name] = (total - free) / 2**30
        if first:
            rank_zero_info(f"rollout engine, {when}: {(total - free) / 2**30:.1f} GiB of GPU memory in use")

    def metrics(self) -> dict[str, float]:
        """The probe's difference after the last sync, the share of draws that other engines drew too, and the GPU
        memory in use before the engine sleeps, while it does, and after it woke."""
        return self.probe.metrics() | self.ranks.metrics() | self._memory

    def state_dict(self) -> dict[str, Any]:
        """What the next draws depend on, the same for every rank."""
        return self.draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on drawing where `state` was saved."""
        self.draws.load_state_dict(state)

    def close(self) -> None:
        """Stop vLLM and free what it held. A closed engine may be started again."""
        if self.launched is not None:
            self.launched.close()
            gc.collect()
        self.launched, self.dead, self.asleep = None, None, False
