"""Trainings on one rank or several, each a process of its own with gloo between them, for comparing what they trained.

The processes are forks of one that has imported everything: half of a short run is that.
"""

import json
import os
import socket
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Ranks:
    """Starts trainings. `close` ends the process that they are forked from."""

    def __init__(self) -> None:
        variables = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks"], cwd=ROOT, env=os.environ | variables, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, folder: Path, num_ranks: int, **options: Any) -> dict[str, Any]:
        """What the first rank tells of a training (see `train`). AssertionError with their output where a rank
        failed."""
        codes, screen = self.codes(folder, num_ranks, **options)
        assert codes == [0] * num_ranks, screen
        import torch

        return torch.load(folder / "told.pt", weights_only=True)

    def codes(self, folder: Path, num_ranks: int, **options: Any) -> tuple[list[int], str]:
        """Exit codes of the ranks, minus the signal that ended one, and all that they printed."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        self.server.stdin.write(json.dumps([str(folder), num_ranks, options]) + "\n")
        self.server.stdin.flush()
        codes = json.loads(self.server.stdout.readline())
        return codes, "\n".join((folder / f"screen-{rank}.txt").read_text() for rank in range(num_ranks))

    def close(self) -> None:
        self.server.communicate()


def serve() -> None:
    """The process that trainings are forked from."""
    import deepspeed  # noqa: F401

    import tests.ranked_stages  # noqa: F401

    for line in sys.stdin:
        folder, num_ranks, options = json.loads(line)
        port = free_port()
        children = [fork(partial(train_on, rank, num_ranks, port, Path(folder), options)) for rank in range(num_ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def fork(act: Any) -> int:
    child = os.fork()
    if child:
        return child
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train_on(rank: int, num_ranks: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    screen = os.open(folder / f"screen-{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    # As torchrun sets them, so that Lightning starts no processes itself.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from tests.ranked_stages import train

    train(rank, num_ranks, folder, **options)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    serve()
