"""Every stage in turn on the embedded default, RLVR from both starts, and an evaluation of each policy.

Launch: python scripts/demo.py runs/demo
Output: a run's folder for each stage and evaluation. Finished stages are found and left as they are; evaluations are
made again. Each command is printed as one would type it. Importing the libraries takes a good part of a short stage, so
they are imported once, and every command runs in a fork of this process.
"""

import contextlib
import gc
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EVALUATE = "--model.sampling.temperature 1.0 --model.num_samples 4 --model.pass_k [1,4] --data.num_hard 64"


def commands(runs: str) -> list[str]:
    """What the demo runs, in order."""
    runs = shlex.quote(runs)
    stages = [
        f"fit --config configs/sft.yaml --trainer.default_root_dir {runs}/sft",
        f"fit --config configs/warmup.yaml --trainer.default_root_dir {runs}/warmup "
        f"--model.policy.path {runs}/sft/export --model.discriminator.path {runs}/sft/export",
        f"fit --config configs/align.yaml --trainer.default_root_dir {runs}/align "
        f"--model.policy.path {runs}/sft/export --model.discriminator.path {runs}/warmup/export",
        f"fit --config configs/rlvr.yaml --trainer.default_root_dir {runs}/sft-rlvr "
        f"--model.policy.path {runs}/sft/export",
        f"fit --config configs/rlvr.yaml --trainer.default_root_dir {runs}/align-rlvr "
        f"--model.policy.path {runs}/align/export",
    ]
    policies = {name: f"{runs}/{name}/export" for name in ("sft", "align", "sft-rlvr", "align-rlvr")}
    evaluations = [
        f"test --config configs/evaluate.yaml {EVALUATE} --trainer.default_root_dir {runs}/evaluate/{name} "
        f"--model.name {name} --model.policy.path {path}"
        for name, path in {"base": "assets/base", **policies}.items()
    ]
    return stages + evaluations


def run(command: str) -> int:
    """Run one `python -m prism_pl` command, and return its exit code."""
    import torch

    print(f"\n$ python -m prism_pl {command}", flush=True)
    start = time.monotonic()
    args = shlex.split(command)
    # Ctrl+C is the command's: it says how to go on, and this process ends with it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A process that has spoken to a GPU cannot be forked.
    code = in_a_fork(args, before) if torch.version.cuda is None else in_a_process(args, before)
    signal.signal(signal.SIGINT, before)
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    return code


def in_a_fork(args: list[str], on_interrupt: Any) -> int:
    """What `python -m prism_pl ARGS` does, with everything imported already."""
    child = os.fork()
    if child == 0:
        from prism_pl.__main__ import main

        signal.signal(signal.SIGINT, on_interrupt)
        sys.argv = ["prism_pl", *args]
        sys.exit(main())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_a_process(args: list[str], on_interrupt: Any) -> int:
    """The same in a process that imports everything anew."""
    restore = partial(signal.signal, signal.SIGINT, on_interrupt)
    return subprocess.call([sys.executable, "-m", "prism_pl", *args], preexec_fn=restore)


def load() -> None:
    """Import what every command needs. Nothing is computed: a fork would lack the threads that compute."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as `python -m prism_pl` has it
    import prism_pl.cli  # noqa: F401
    from prism_pl.rollout.vllm_compat import import_vllm

    with contextlib.suppress(Exception):  # the command that needs it says what is wrong
        import_vllm().LLM  # noqa: B018  (imported where it is named)
        import vllm.model_executor.models.qwen3_vl
        import vllm.v1.worker.cpu_worker  # noqa: F401
    gc.freeze()  # a child's collections then pass over what was imported


def main() -> int:
    """Run all commands; the exit code of the first that fails."""
    load()
    return next((code for command in commands(sys.argv[1]) if (code := run(command))), 0)


if __name__ == "__main__":
    sys.exit(main())
