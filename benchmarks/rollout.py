"""Tokens per second of the rollout engines beside raw vLLM and stock `generate`, on the same prompts in one run.

Every sequence has the full length: end tokens are banned. All are warm, caches of earlier prompts are dropped before
each timed call, and the engines take turns; the medians are compared.

Launch: python benchmarks/rollout.py                     the tiny policy, any CPU, two or three minutes
        python benchmarks/rollout.py --dimensions 4b     Qwen3-VL-4B's dimensions, random weights, one GPU, no network
Output: a table, on a GPU also weight sync, sleep and log-probability differences; on a CPU how far stock `generate` is
from the floor, the bare matrix products, which bounds what any engine can gain on it; and the ratios in the last line.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.paper_scale import write_blank  # noqa: E402
from prism_pl.batch import Example  # noqa: E402
from prism_pl.images import open_image  # noqa: E402
from prism_pl.logprobs import token_logps  # noqa: E402
from prism_pl.policy import PolicySpec, build_policy  # noqa: E402
from prism_pl.processor import Processor  # noqa: E402
from prism_pl.rollout import Rollout, Sampling, TransformersEngine, VLLMEngine, rollout_batch, vllm_engine  # noqa: E402
from prism_pl.rollout.transformers_engine import left_padded  # noqa: E402

Timed = Callable[[], int]  # runs once and returns the number of tokens it sampled


def load(dimensions: str, device: str) -> tuple[Any, Processor]:
    """The policy in float32, as a trainer holds it, and its processor."""
    if dimensions == "tiny":
        spec = PolicySpec(str(ROOT / "assets" / "sft"))
        return build_policy(spec).to(device).eval(), spec.processor()
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        write_blank(Path(folder), "4b")
        spec = PolicySpec(folder, from_scratch=True)
        with torch.device("cpu"):
            processor = spec.processor()
        policy = build_policy(spec).to(device).eval()
    processor.source = str(ROOT / "assets" / "sft")  # the folder is gone, and the files are the same
    return policy, processor


def make_prompts(num: int, side: int) -> list[Example]:
    """Questions about different noise images of `side` pixels."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(num)]
    return [Example(id=f"row-{i}", question="What is the sum of all digits?", images=[x]) for i, x in enumerate(images)]


def raw_vllm(engine: VLLMEngine, examples: Sequence[Example], num: int, max_tokens: int, logprobs: bool) -> Timed:
    """`vllm.LLM.generate` as one would write it, with nothing around it."""
    from vllm import SamplingParams

    requests = [
        {"prompt": engine.processor.prompt_text(e), "multi_modal_data": {"image": [open_image(e.images[0], e.id)]}}
        for e in examples
    ]
    bias = dict.fromkeys(engine.processor.banned_ids, float("-inf"))
    options: dict[str, Any] = {"logprobs": 0} if logprobs else {}
    params = SamplingParams(n=num, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logit_bias=bias, **options)

    def run() -> int:
        outputs = engine._llm.generate(requests, params, use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    return run


def ours(engine: VLLMEngine | TransformersEngine, examples: Sequence[Example], num: int, max_tokens: int) -> Timed:
    """One of the project's engines."""
    sampling = Sampling(max_tokens=max_tokens)
    return lambda: sum(len(r.response_ids) for r in engine.generate(examples, num, sampling))


def with_own_record(run: Timed) -> Timed:
    """The same, while vLLM keeps all that it notes of a token by itself."""

    def kept() -> int:
        with mock.patch.object(vllm_engine, "sampled_logps_alone", nullcontext):
            return run()

    return kept


def stock_generate(policy: Any, processor: Processor, examples: Sequence[Example], num: int, max_tokens: int) -> Timed:
    """transformers' batched `generate` with `num_return_sequences`, as its documentation has it."""
    device = policy.get_input_embeddings().weight.device
    prompts = [processor.prompt(example) for example in examples]
    ids_PS, mask_PS, _ = left_padded(prompts, processor.pad_id, device)
    inputs = {
        "input_ids": ids_PS,
        "attention_mask": mask_PS,
        "mm_token_type_ids": (ids_PS == processor.image_token_id).int(),
        "pixel_values": torch.cat([p.pixel_values_NC for p in prompts]).to(device, policy.dtype),
        "image_grid_thw": torch.cat([p.grids_I3 for p in prompts]).to(device),
    }
    options = {"do_sample": True, "num_return_sequences": num, "max_new_tokens": max_tokens, "top_k": 0}

    @torch.no_grad()
    def run() -> int:
        ids = policy.generate(**inputs, **options, suppress_tokens=processor.banned_ids, pad_token_id=processor.pad_id)
        return (ids.shape[1] - ids_PS.shape[1]) * ids.shape[0]

    return run


def bare_products(policy: Any, num_rows: int, max_tokens: int) -> Timed:
    """The floor: each token's products with the weights of the text layers (fused as vLLM fuses them) and of the head,
    at the rollouts' batch size. No prompts, images, attention, norms, sampling or scheduling."""
    weights: list[torch.Tensor] = []
    for layer in policy.model.language_model.layers:
        read, mlp = layer.self_attn, layer.mlp
        fused = [read.q_proj, read.k_proj, read.v_proj], [read.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
        weights += [torch.cat([linear.weight.detach() for linear in linears]) for linears in fused]
    weights.append(policy.lm_head.weight.detach())
    inputs = [weight.new_ones(num_rows, weight.shape[1]) for weight in weights]

    def run() -> int:
        for _ in range(max_tokens):
            for weight, rows in zip(weights, inputs, strict=True):
                torch.mm(rows, weight.T)
        return num_rows * max_tokens

    return run


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, the GPU's work included, and what it returns."""
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def race(entries: dict[str, Timed], repeats: int, before: Callable[[], None]) -> dict[str, float]:
    """Median tokens per second of each entry; one warm-up, then all in turn, to and fro."""
    speeds: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(repeats + 1):
        for name, run in list(entries.items())[:: -1 if turn % 2 else 1]:
            before()
            took, tokens = seconds(run)
            if turn:
                speeds[name].append(tokens / took)
    return {name: statistics.median(values) for name, values in speeds.items()}


def print_sync_and_sleep(engine: VLLMEngine, before_start: float) -> None:
    """Weight sync, with and without its probe, and what sleeping frees of the engine's memory."""
    llm, named = engine._llm, engine.policy.named_parameters

    def median_ms(call: Callable[[], Any]) -> float:
        return 1e3 * statistics.median(seconds(call)[0] for _ in range(5))

    def send() -> None:
        engine.sender.send(llm, named(), engine.on_cpu)

    sends = median_ms(send)
    with mock.patch.object(engine.sender.plan, "copies", {}):  # on a CPU there is none
        by_loaders = median_ms(send)
    reads = median_ms(lambda: engine.read_back.check(llm, engine.policy, engine.on_cpu))
    resets = median_ms(lambda: (engine._forget_prompts(), engine._forget_images()))
    with as_trained(engine.on_cpu):
        probes = median_ms(lambda: engine.probe.check(engine._generate, engine.policy, engine.processor))
    print(
        f"weight sync, median of 5: weights and checksums {sends:.1f} ms"
        + ("" if engine.on_cpu else f" (by vLLM's loaders {by_loaders:.1f})")
        + f", read back {reads:.1f} ms, "
        f"cache resets {resets:.1f} ms; the probe after it {probes:.0f} ms"
    )
    print(f"probe difference: {engine.metrics()['rollout/probe_difference']:.4f}")
    if engine.on_cpu:
        return
    awake = used_gib()
    asleep_s, _ = seconds(engine.sleep)
    asleep = used_gib()
    awake_s, _ = seconds(engine.wake)
    share = (awake - asleep) / (awake - before_start)
    print(
        f"engine's memory {awake - before_start:.1f} GiB; asleep it frees {awake - asleep:.1f} ({100 * share:.1f}%), "
        f"sleep {asleep_s:.2f} s, wake with weights {awake_s:.2f} s"
    )


def as_trained(on_cpu: bool) -> torch.autocast:
    """A context in which the policy computes as in training: under bf16 autocast on a GPU."""
    return torch.autocast("cpu" if on_cpu else "cuda", torch.bfloat16, enabled=not on_cpu)


def used_gib() -> float:
    """GPU memory in use by everything, torch's unused blocks given back first."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


@torch.no_grad()
def print_differences(engine: VLLMEngine, examples: Sequence[Example], rollouts: list[Rollout], num: int) -> None:
    """Log-probabilities of the sampler against the trainer's, as it trains: under bf16 autocast on a GPU."""
    processor, policy = engine.processor, engine.policy
    device = policy.get_input_embeddings().weight.device
    parts = []
    for p, example in enumerate(examples):
        group = rollouts[p * num : (p + 1) * num]
        batch, sampler_BT = rollout_batch(processor, [processor.prompt(example)], group, num)
        moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        vars(batch).update(moved)
        with as_trained(engine.on_cpu):
            trainer_BT = token_logps(policy, batch, banned_ids=processor.banned_ids).logps_BT
        parts.append((sampler_BT.to(device) - trainer_BT)[batch.mask_BT].abs().float().cpu())
    p50, p95, largest = torch.cat(parts).quantile(torch.tensor([0.5, 0.95, 1.0])).tolist()
    print(f"log-probability difference, nats a token: p50 {p50:.2g}, p95 {p95:.2g}, max {largest:.2g}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", choices=["tiny", "4b"], default="tiny")
    parser.add_argument("--prompts", type=int, help="default 16, with 4b 32")
    parser.add_argument("--samples", type=int, help="a prompt; default 8, with 4b 16")
    parser.add_argument("--tokens", type=int, help="a response; default 64, with 4b 512")
    parser.add_argument("--repeats", type=int, help="timed turns; default 15, with 4b 3")
    parser.add_argument("--gpu-memory", type=float, default=0.5)
    args = parser.parse_args()
    tiny = args.dimensions == "tiny"
    num_prompts, num, tokens = args.prompts or (16 if tiny else 32), args.samples or (8 if tiny else 16), args.tokens
    tokens = tokens or (64 if tiny else 512)
    repeats = args.repeats or (15 if tiny else 3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, processor = load(args.dimensions, device)
    processor.banned_ids += [processor.eos_id, processor.pad_id]
    examples = make_prompts(num_prompts, 96 if tiny else 448)
    before_start = used_gib() if device == "cuda" else 0.0
    engine = VLLMEngine(gpu_memory=args.gpu_memory, max_num_seqs=num_prompts * num)
    took, _ = seconds(lambda: engine.start(policy, processor, rank=0))
    import vllm

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, vllm {vllm.__version__}")
    print(f"{num_prompts} prompts x {num} samples x {tokens} tokens; engine start {took:.1f} s")
    vllm_entries = {
        "raw vLLM": raw_vllm(engine, examples, num, tokens, logprobs=False),
        "raw vLLM with log-probabilities": raw_vllm(engine, examples, num, tokens, logprobs=True),
        "VLLMEngine": ours(engine, examples, num, tokens),
        "VLLMEngine, vLLM's own record": with_own_record(ours(engine, examples, num, tokens)),
    }
    speeds = race(vllm_entries, repeats, before=engine._forget_prompts)
    # On a GPU transformers gets a short piece of the same prompts: all of it would take minutes.
    few, short = (examples, tokens) if tiny else (examples[:4], 128)
    print_sync_and_sleep(engine, before_start)
    print_differences(engine, few, engine.generate(few, num, Sampling(max_tokens=short)), num)
    engine.close()
    if device == "cuda":
        policy.to(torch.bfloat16)
    fallback = TransformersEngine()
    fallback.start(policy, processor, rank=0)
    others = {
        "TransformersEngine": ours(fallback, few, num, short),
        "stock generate": stock_generate(policy, processor, few, num, short),
    }
    if tiny:  # on a GPU vLLM's batch is larger than that of the short piece: there is no common floor
        others["bare matrix products"] = bare_products(policy, len(few) * num, short)
    speeds |= race(others, repeats if tiny else 1, before=lambda: None)
    for entry, speed in speeds.items():
        print(f"{entry:34s}{speed:10,.0f} tokens/s")
    if tiny:
        floor = speeds["bare matrix products"] / speeds["stock generate"]
        print(f"floor: the bare matrix products are {floor:.1f} x stock generate; no engine can gain more on it here")
    mine = speeds["VLLMEngine"]
    print(
        "VLLMEngine : "
        + ", ".join(f"{mine / speeds[other]:.2f} x {other}" for other in speeds if other != "VLLMEngine")
    )


if __name__ == "__main__":
    main()
