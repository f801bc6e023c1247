"""Step time and peak memory of alignment at the paper's size: a 4B policy against an upcycled 2B discriminator.

Each case is the shipped command, `python -m prism_pl fit --config align.yaml --config strategy/<overlay>.yaml`, with
random weights of the true dimensions, noise images, and rollouts sampled in full by vLLM. The numbers come from what
the runs logged; the first step, which warms up, does not count.

Launch: python benchmarks/alignment.py prepare --folder /tmp/paper
        python benchmarks/alignment.py run --folder /tmp/paper --cases zero2:2 zero3:2 zero2:1
        python benchmarks/alignment.py table --folder /tmp/paper
A case is OVERLAY:GPUS[:OPTION=VALUE...], the options being init_args of the strategy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PHASES = ("rollout", "score", "policy", "discriminator", "sync")


def prepare(folder: Path, sizes: tuple[str, str], max_segment_tokens: int) -> None:
    """Write the policy and the discriminator."""
    import torch

    from benchmarks.paper_scale import write_discriminator, write_policy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_policy(folder / "policy", sizes[0], device)
    write_policy(folder / "dense", sizes[1], device)
    write_discriminator(folder / "discriminator", folder / "dense", max_segment_tokens, device)


def command(folder: Path, case: str, args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """What runs a case, and its environment."""
    overlay, num, *options = case.split(":")
    model, data = "--model.init_args.", "--data.init_args."
    set_ = [
        *("--config", "align.yaml", "--config", f"strategy/{overlay}.yaml", "--trainer.devices", num),
        *("--trainer.default_root_dir", str(run_folder(folder, case))),
        *("--trainer.max_steps", str(args.steps), "--trainer.limit_val_batches", "0"),
        *("--trainer.accelerator", "auto", "--trainer.enable_checkpointing", "false"),
        *("--trainer.callbacks", "callbacks.RewardGap", "--trainer.precision", args.precision),
        *(f"{model}policy.path", str(folder / "policy"), f"{model}policy.gradient_checkpointing", "true"),
        *(f"{model}discriminator", "prism_pl.discriminator.SparseMoEDiscriminator"),
        *(f"{model}discriminator.init_args.path", str(folder / "discriminator")),
        *(f"{model}discriminator.init_args.gradient_checkpointing", "true"),
        *(f"{model}rollout", "benchmarks.rehearsal.RehearsedEngine"),
        *(f"{model}rollout.init_args.num_lines", str(args.lines)),
        *(f"{model}rollout.init_args.gpu_memory", str(args.gpu_memory)),
        *(f"{model}sampling.max_tokens", str(args.tokens), f"{model}num_rollouts", str(args.rollouts)),
        *(f"{model}micro_batch_tokens", str(args.micro_batch_tokens)),
        *("--data", "benchmarks.rehearsal.NoiseImages", f"{data}batch_size", str(args.prompts)),
        *(f"{data}num_lines", str(args.lines), f"{data}side", str(args.side)),
    ]
    for option in options:
        name, value = option.split("=")
        set_ += [f"--trainer.strategy.init_args.{name}", value]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if args.hide:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(int(num))))
    return [sys.executable, "-m", "prism_pl", "fit", *set_], environment


def run_folder(folder: Path, case: str) -> Path:
    """Where a case's run lies."""
    return folder / "runs" / case.replace(":", "-").replace("=", "-")


def run(folder: Path, cases: list[str], args: argparse.Namespace) -> None:
    """Run the cases one after the other; one that fails shows the end of its log."""
    for case in cases:
        started = time.perf_counter()
        line, environment = command(folder, case, args)
        log = folder / f"{run_folder(folder, case).name}.log"
        with log.open("w") as out:
            status = subprocess.run(line, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT).returncode
        print(f"{case}: exit {status} after {time.perf_counter() - started:.0f} s", flush=True)
        if status:
            print("\n".join(log.read_text(errors="replace").splitlines()[-30:]), flush=True)
        else:
            (run_folder(folder, case) / "settings.json").write_text(json.dumps(vars(args)))


def table(folder: Path) -> str:
    """The finished cases as a Markdown table: medians over the steps behind the first."""
    from prism_pl.report.events import read_curves

    heads = [f"{phase}, s (GiB)" for phase in PHASES]
    lines = ["| case | step, s | tokens/s a GPU | " + " | ".join(heads) + " |", "|" + " --- |" * (len(PHASES) + 3)]
    for one in sorted((folder / "runs").glob("*/settings.json")):
        events = next(iter(one.parent.rglob("events.out.tfevents*"))).parent
        curves = read_curves(events)

        def median(tag: str, curves=curves) -> float:  # noqa: ANN001
            return statistics.median(curves[tag].values[1:]) if tag in curves else float("nan")

        times = {phase: median(f"time/{phase}") for phase in PHASES}
        step = sum(times.values())
        cells = [f"{times[phase]:.2f} ({median(f'memory/{phase}'):.1f})" for phase in PHASES]
        tokens = median("align/tokens") / step
        lines.append(f"| {one.parent.name} | {step:.2f} | {tokens:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prepare, run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "run", "table"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", nargs=2, default=["4b", "2b"], help="of the policy and of the dense discriminator")
    parser.add_argument("--cases", nargs="+", default=["zero2:2", "zero3:2", "zero2:1"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4, help="a rank")
    parser.add_argument("--rollouts", type=int, default=16, help="a prompt")
    parser.add_argument("--tokens", type=int, default=512, help="a response")
    parser.add_argument("--lines", type=int, default=32, help="of caption and of reasoning in what is said")
    parser.add_argument("--side", type=int, default=448, help="of an image, pixels")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--gpu-memory", type=float, default=0.15, help="vLLM's share while it generates")
    parser.add_argument("--no-hide", dest="hide", action="store_false", help="leave CUDA_VISIBLE_DEVICES as it is")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    if args.what == "prepare":
        prepare(args.folder, tuple(args.sizes), max_segment_tokens=2048)
    elif args.what == "run":
        given = {k: v for k, v in vars(args).items() if k not in ("folder", "what", "cases")}
        run(args.folder, args.cases, argparse.Namespace(**given))
    else:
        print(table(args.folder))


if __name__ == "__main__":
    main()
