"""A vLLM server for as long as a context lasts, started by the line that the engine's messages give."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prism_pl.rollout.vllm_compat import ENVIRONMENT
from prism_pl.rollout.vllm_server_facts import launch_line
from scripts.blank_policy import ROOT

SECONDS_TO_START = 300
# What the line runs, and this interpreter's words for it: neither need be on PATH.
PROGRAMS = {"python": [], "vllm": ["-m", "vllm.entrypoints.cli.main"]}


@contextmanager
def serving(
    path: str, device: str, *options: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server's process, which leads a group of its own, and its address on this machine. The whole group is killed at
    the end. RuntimeError with the end of its log where it does not start.

    Args:
        path: the policy's.
        device: "cpu" or "cuda".
        options: behind those of the line.
        log: the file for what it prints.
        environment: beside this process's, such as CUDA_VISIBLE_DEVICES.
    """
    variables, program, arguments = _words(launch_line(path, device, {}))
    command = [sys.executable, *PROGRAMS[program], *arguments, *options]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with listening(command, log, quiet_environment() | ours | variables | dict(environment or {})) as server:
        yield server


@contextmanager
def listening(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process of any command that serves as vLLM does, and its address, as `serving` has it.

    Args:
        command: without --host and --port.
        environment: all of it.
    """
    port = _free_port()
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, process, log)
        yield process, url
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill a process and what it started, which lives on where it alone dies."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def quiet_environment() -> dict[str, str]:
    """This process's environment, without what an engine inside it has set for itself."""
    inherited = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    return inherited | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def _words(line: str) -> tuple[dict[str, str], str, list[str]]:
    """The variables that a line of a shell sets, its program and the arguments."""
    words = shlex.split(line)
    start = next(i for i, word in enumerate(words) if word in PROGRAMS)
    return dict(word.split("=", 1) for word in words[:start]), words[start], words[start + 1 :]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
