"""Symbolic equality by math-verify, in a process of its own that can be killed.

math-verify's timeouts are SIGALRM handlers: off the main thread they fail, and on it they cannot interrupt one long
integer operation (`9**9**9`). So it always runs in one small worker process, started at the first question, with a
limit on CPU time that the kernel enforces. A comparison that hits the limit counts as wrong, is counted in
`timeouts()`, and is logged as a warning.
"""

import atexit
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

CPU_SECONDS = 3.0  # of one comparison; typical ones take 5 to 50 ms
WALL_SECONDS = 60.0  # only for a worker that is stuck without using the CPU, so that a busy machine changes no verdict


class Worker:
    """One worker process, started when it is needed and restarted after a timeout. Safe to use from any thread."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS) -> None:
        self.cpu_seconds = cpu_seconds
        self.wall_seconds = wall_seconds
        self.timeouts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        self.ask = lru_cache(maxsize=8192)(self._ask)  # rollouts of one prompt repeat their answers

    def equal(self, answer: str, truth: str, decimals: int | None = None) -> bool:
        """Whether two LaTeX expressions are equal; False, counted and logged, when the limit was hit."""
        with self.lock:
            verdict = self.ask(answer, truth, decimals)
            self.timeouts += verdict is None
        if verdict is None:
            logger.warning(
                "math-verify gave no verdict in %.1f s of CPU on answer %r, truth %r: counted as wrong (%d so far)",
                self.cpu_seconds, answer[:80], truth[:80], self.timeouts,
            )  # fmt: skip
        return bool(verdict)

    def close(self) -> None:
        """End the worker process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, answer: str, truth: str, decimals: int | None) -> bool | None:
        """The verdict, or None for a timeout, after which the worker is gone."""
        process = self.process if self.process is not None and self.process.poll() is None else self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"answer": answer, "truth": truth, "decimals": decimals}).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process, self.wall_seconds)
        except BaseException:
            self.close()  # interrupted between question and reply: the reply must not be read as the next one's
            raise
        if not line.endswith(b"\n"):
            self.close()  # ended by the kernel's limit, crashed, or stuck: no verdict in each case
            return None
        verdict = json.loads(line)
        if verdict.get("error") == "out of memory":
            self.close()  # a fresh process gives the memory back
            return None
        if "error" in verdict:
            logger.warning("math-verify cannot compare %r with %r: %s", answer[:80], truth[:80], verdict["error"])
        return verdict["equal"]

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        script = Path(__file__).with_name("symbolic_worker.py")
        command = [sys.executable, "-P", str(script), str(self.cpu_seconds)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if _read_line(self.process, 10 * self.wall_seconds) != b"ready\n":
            self.close()
            raise RuntimeError("the math-verify worker did not start; is math-verify installed? Its error is above")
        return self.process


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of the worker's output; what there is of it when it ends, or takes longer than `seconds`."""
    assert process.stdout is not None
    deadline, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(process.stdout.fileno(), 65536) if ready else b""
        if not piece:
            break
        line += piece
    return line


_worker = Worker()


def _forget_worker() -> None:
    """In a forked child: the parent's worker, its pipes and a lock that another thread may hold are not ours."""
    global _worker
    _worker = Worker()


os.register_at_fork(after_in_child=_forget_worker)
atexit.register(lambda: _worker.close())


def symbolically_equal(answer: str, truth: str, decimals: int | None = None) -> bool:
    """Whether two cleaned LaTeX expressions are equal, by math-verify. Blocks for at most a few seconds.

    Args:
        decimals: to which numeric values are rounded before they are compared; None is math-verify's own six.
    """
    return _worker.equal(answer, truth, decimals)


def timeouts() -> int:
    """How many comparisons of this process got no verdict (time, memory, crash); each counts as a wrong answer."""
    return _worker.timeouts
