"""Seconds of a weight sync to a vLLM server on a second GPU: by NCCL, and by a folder.

Launch: python benchmarks/server_sync.py --dimensions 4b     Qwen3-VL-4B's dimensions, random weights, two GPUs
        python benchmarks/server_sync.py                     the tiny policy and a server on the CPU, by a folder alone
Output: hardware and versions; then a line for each way: the median of 5 loads with their checksums and cache resets,
what that is in GiB/s of the server's weights, and the probe's difference after the sync, in nats.
"""

import argparse
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.paper_scale import write_blank  # noqa: E402
from benchmarks.rollout import as_trained, seconds  # noqa: E402
from prism_pl.batch import Example  # noqa: E402
from prism_pl.policy import PolicySpec, build_policy  # noqa: E402
from prism_pl.processor import Processor  # noqa: E402
from prism_pl.rollout import Sampling, VLLMServerEngine  # noqa: E402
from prism_pl.rollout.vllm_nccl import installed_version  # noqa: E402
from scripts.serving import serving  # noqa: E402

# The server starts from noise, with which vLLM fills buffers that no sync sends too, such as 0.32's of image
# normalisation: so the probe's prompt has no image.
EXAMPLE = Example(id="row-0", question="What is the sum of all digits?", images=[])
OPTIONS = ("--load-format", "dummy", "--enforce-eager")
REPEATS = 5


def measure(url: str, transfer: str, folder: str | None, policy: Any, processor: Processor) -> str:
    """The line of one way."""
    engine = VLLMServerEngine(url, transfer=transfer, folder=folder)
    engine.start(policy, processor, rank=0)
    engine.generate([EXAMPLE], 1, Sampling(max_tokens=8))  # the first load warms up, and the probe has its prompt
    took = statistics.median(seconds(lambda: engine._load(policy.named_parameters()))[0] for _ in range(REPEATS))
    with as_trained(engine.on_cpu):
        engine.sync(policy.named_parameters())
    gib = sum(parameter.numel() for parameter in policy.parameters()) * engine.dtype().itemsize / 2**30
    difference = engine.metrics()["rollout/probe_difference"]
    engine.close()
    return (
        f"{transfer}: {1e3 * took:,.0f} ms, median of {REPEATS}; {gib:.3g} GiB in {engine.dtype()}, "
        f"{gib / took:.3g} GiB/s; probe difference {difference:.3g}"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", choices=["tiny", "4b"], default="tiny")
    parser.add_argument("--folder", help="for `path`, where files are written; default: the temporary folder")
    args = parser.parse_args()
    on_gpus = torch.cuda.device_count() > 1
    if args.dimensions != "tiny" and not on_gpus:
        parser.error("--dimensions 4b needs two GPUs")
    device = "cuda" if on_gpus else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        blank = Path(folder) / "policy"
        write_blank(blank, args.dimensions)
        spec = PolicySpec(str(blank), from_scratch=True)
        processor = spec.processor()
        environment = {"CUDA_VISIBLE_DEVICES": "1"} if on_gpus else {}
        with serving(str(blank), device, *OPTIONS, log=Path(folder) / "log", environment=environment) as (_, url):
            with torch.device(device) if on_gpus else nullcontext():
                policy = build_policy(spec).eval()
            print_setting(policy, args.dimensions)
            for transfer in ("nccl", "path") if on_gpus else ("path",):
                print(measure(url, transfer, args.folder, policy, processor), flush=True)


def print_setting(policy: Any, dimensions: str) -> None:
    """Hardware, versions, and what is sent."""
    names = [torch.cuda.get_device_name(i) for i in range(2)] if torch.cuda.device_count() > 1 else ["CPU"]
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    print(
        f"{' and '.join(names)}, torch {torch.__version__}, vllm {installed_version()}; {dimensions}: "
        f"{parameters / 1e9:.3g} B parameters in {len(list(policy.parameters()))} tensors",
        flush=True,
    )


if __name__ == "__main__":
    main()
