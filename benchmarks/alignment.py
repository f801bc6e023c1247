"""Step time and peak memory of alignment at the paper's size: a 4B policy against an upcycled 2B discriminator.

Each case is the shipped command, `python -m prism_pl fit --config align.yaml --config strategy/<overlay>.yaml`, with
random weights of the true dimensions, noise images, and rollouts sampled in full by vLLM. The numbers come from what
the runs logged; the first step, which warms up, does not count.

Launch: python benchmarks/alignment.py prepare --folder /tmp/paper
        python benchmarks/alignment.py run --folder /tmp/paper
        python benchmarks/alignment.py table --folder /tmp/paper
A case is OVERLAY:GPUS[:OPTION=VALUE...], the options being init_args of the strategy. Two cases that differ in the
number of GPUs alone give a scaling: the others are hidden, and each GPU has the same work.

The cases that run by default fit 141 GB: on one GPU only with parked optimisers (127 GiB otherwise, before vLLM and
gradients), with 109 GiB of CPU memory for them and AdamW `fused`, whose plain form takes another 20 GiB for a moment.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prism_pl.fingerprint import versions  # noqa: E402
from prism_pl.report.events import Curves, read_curves  # noqa: E402

PHASES = ("rollout", "score", "policy", "discriminator", "sync")
PARKED = "park_optimizer_states=true"
CASES = [f"zero2:2:{PARKED}", f"zero2:1:{PARKED}", "zero3:2"]


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
        *(f"{model}{player}_optimizer.init_args.fused=true" for player in ("policy", "discriminator")),
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
    """Run the cases one after the other; one that fails, or takes too long, shows the end of its log."""
    ran_on = {"card": card(), "versions": versions()}
    for case in cases:
        started = time.perf_counter()
        line, environment = command(folder, case, args)
        shutil.rmtree(run_folder(folder, case), ignore_errors=True)
        log = folder / f"{run_folder(folder, case).name}.log"
        status = run_for(args.timeout, line, environment, log)
        ended = "stopped, too slow," if status is None else f"exit {status}"
        print(f"{case}: {ended} after {time.perf_counter() - started:.0f} s", flush=True)
        if status == 0:
            told = {"case": case, "settings": vars(args)} | ran_on
            (run_folder(folder, case) / "settings.json").write_text(json.dumps(told))
        else:
            print("\n".join(log.read_text(errors="replace").splitlines()[-30:]), flush=True)


def run_for(seconds: float, line: list[str], environment: dict[str, str], log: Path) -> int | None:
    """Run a command and return its exit status; None where it was not done in time. All of its processes end."""
    with log.open("w") as out:
        process = subprocess.Popen(
            line, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def card() -> str:
    """The GPU's name. Asked for by a process of its own, which leaves nothing behind on it."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def table(folder: Path) -> str:
    """The finished cases as a Markdown table, medians over the steps behind the first; below it the scaling between
    cases with the same settings, and what they ran on.

    A step's time is the wall clock's from one step's log to the next. Of the phases there are seconds, torch's peak (in
    which a sleeping vLLM counts), and the device's memory in use at the end, both in GiB.
    """
    heads = [f"{phase}, s (peak / in use)" for phase in PHASES]
    lines = [
        "| case | parked | step, s | tokens/s a GPU | " + " | ".join(heads) + " |",
        "|" + " --- |" * (len(PHASES) + 4),
    ]
    cases = [Measured.read(file) for file in sorted((folder / "runs").glob("*/settings.json"))]
    for one in cases:
        cells = [f"{one.median(f'time/{p}'):.2f} ({one.memory(p)})" for p in PHASES]
        parked = "both optimisers" if PARKED in one.told["case"] else "nothing"
        rate = one.median("align/tokens") / one.step / one.num_gpus
        lines.append(f"| {one.told['case']} | {parked} | {one.step:.2f} | {rate:,.0f} | " + " | ".join(cells) + " |")
    lines += ["", *scalings(cases)]
    for ran_on in dict.fromkeys(f"{one.told['card']}; {_shown(one.told['versions'])}" for one in cases):
        lines.append(f"* {ran_on}")
    return "\n".join(lines)


def _shown(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


@dataclass(frozen=True)
class Measured:
    """A finished case: what it was, and its curves."""

    told: dict[str, Any]
    curves: Curves

    @classmethod
    def read(cls, settings: Path) -> "Measured":
        events = next(iter(settings.parent.rglob("events.out.tfevents*"))).parent
        return cls(json.loads(settings.read_text()), read_curves(events))

    @property
    def num_gpus(self) -> int:
        return int(self.told["case"].split(":")[1])

    @property
    def setting(self) -> dict[str, Any]:
        """What has to be equal where cases are compared: all but the time that they were given."""
        work = {name: value for name, value in self.told["settings"].items() if name != "timeout"}
        return work | {key: self.told[key] for key in ("card", "versions")}

    @property
    def step(self) -> float:
        """Seconds from the end of a step to that of the next."""
        times = self.curves["align/tokens"].times
        return statistics.median(after - before for before, after in pairwise(times))

    def median(self, tag: str) -> float:
        return statistics.median(self.curves[tag].values[1:]) if tag in self.curves else float("nan")

    def memory(self, phase: str) -> str:
        return f"{self.median(f'memory/{phase}'):.1f} / {self.median(f'memory_used/{phase}'):.1f}"


def scalings(cases: Sequence[Measured]) -> list[str]:
    """How many times as much is done on more GPUs in the same time, a line for each two cases of the same settings."""
    lines = []
    for many in cases:
        overlay, num, *options = many.told["case"].split(":")
        for one in cases:
            if one.told["case"].split(":") == [overlay, "1", *options] and num != "1" and one.setting == many.setting:
                lines.append(f"* {many.told['case']} over {one.told['case']}: {int(num) * one.step / many.step:.2f} x")
    return lines


def main() -> None:
    """Prepare, run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "run", "table"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", nargs=2, default=["4b", "2b"], help="of the policy and of the dense discriminator")
    parser.add_argument("--cases", nargs="+", default=CASES)
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
    parser.add_argument("--timeout", type=float, default=400, help="seconds for a case")
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
