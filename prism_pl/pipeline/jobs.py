"""A stage's command as a process of its own, with its output in a log and, where it runs alone, on the screen.

Importing the libraries takes a good part of a short stage, so they are imported once, and every command runs in a fork
of this process. A process that may speak to a GPU cannot be forked; there each command imports everything anew.
"""

import atexit
import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from prism_pl.importing import no_collections
from prism_pl.parent import end_with_parent

# Colours, cursor movements and titles that a terminal understands and a log should not hold.
TERMINAL_CODE = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")
ENGINES = re.compile(r"prism_pl\.rollout\.(\w+\.)*(AutoEngine|VLLMEngine)")
# What vLLM leaves to each start of an engine.
IMPORTED_BY_AN_ENGINE = (
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3_vl",
    "vllm.model_executor.layers.quantization.online.base",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Job(Protocol):
    """A stage that runs."""

    def poll(self) -> int | None:
        """Take over what it printed; its exit code once it has ended, negative for a signal."""
        ...

    def interrupt(self) -> None:
        """Ask it to end in order, as Ctrl+C does."""
        ...


class Runner(Protocol):
    """What resolves and starts the stages' commands."""

    def resolve(self, args: list[str]) -> dict[str, Any]:
        """The complete configuration of a command, as plain values. UsageError where it is wrong."""
        ...

    def complete(self, command: str, config: dict[str, Any]) -> dict[str, Any]:
        """A configuration as the command reads it, with what is missing at its default. UsageError where it has what
        the command does not know or lacks what has no default."""
        ...

    def prepare(self, config: dict[str, Any]) -> None:
        """Before a stage of this configuration starts: what can be done once for it and all later ones."""
        ...

    def start(self, args: list[str], log: Path, on_screen: bool) -> Job:
        """Start `python -m prism_pl ARGS`."""
        ...


class ProcessRunner:
    """Runs the real commands.

    Args:
        lock: file descriptor that the stages inherit; it keeps the run folder taken while one of them lives.
        parallel: stages at once. Each then computes with its share of the cores: with as many threads as cores in every
            one of them, all would wait for each other.
    """

    def __init__(self, lock: int | None = None, parallel: int = 1) -> None:
        self.lock = lock
        self.threads = max(1, (os.cpu_count() or 1) // parallel) if parallel > 1 else None
        self._cli: Any = None
        self._prepared = False

    def resolve(self, args: list[str]) -> dict[str, Any]:
        return _options(args) if args[0] == "report" else self._resolver()(args)

    def complete(self, command: str, config: dict[str, Any]) -> dict[str, Any]:
        return config if command == "report" else self._resolver().complete(command, config)

    def _resolver(self) -> Any:
        with no_collections():
            from prism_pl.pipeline.resolve import Resolver

        if self._cli is None:
            self._cli = Resolver()
        return self._cli

    def prepare(self, config: dict[str, Any]) -> None:
        """Import the engine before the first stage that names one; those that name none need not wait for it. Nothing
        is computed: a fork would lack the threads that compute."""
        if self._prepared or not can_fork() or not ENGINES.search(str(config)):
            return
        self._prepared = True
        from prism_pl.rollout.vllm_compat import import_vllm

        with no_collections(), contextlib.suppress(Exception):  # the command that needs it says what is wrong
            import_vllm().LLM  # noqa: B018  (imported where it is named)
            for name in IMPORTED_BY_AN_ENGINE:
                importlib.import_module(name)
        gc.freeze()  # collections in a fork then pass over what was imported
        atexit.register(gc.unfreeze)

    def start(self, args: list[str], log: Path, on_screen: bool) -> Job:
        terminal = on_screen and sys.stdout.isatty()
        reader, writer = _terminal() if terminal else os.pipe()
        os.set_blocking(reader, False)
        log.parent.mkdir(parents=True, exist_ok=True)
        with _signals_wait():
            if can_fork():
                process: Any = multiprocessing.get_context("fork").Process(
                    target=_child, args=(args, writer, self.threads)
                )
                process.start()
            else:
                process = _python(args, writer, self.lock, self.threads)
        os.close(writer)
        return ProcessJob(process, reader, log.open("ab"), on_screen)


class ProcessJob:
    """A started process, its output read from `reader`."""

    def __init__(self, process: Any, reader: int, log: IO[bytes], on_screen: bool) -> None:
        self.process, self.reader, self.log, self.on_screen = process, reader, log, on_screen
        self._line = b""

    def poll(self) -> int | None:
        popen = isinstance(self.process, subprocess.Popen)
        code = self.process.poll() if popen else self.process.exitcode
        self._drain()
        if code is not None:
            self._write(self._line)
            os.close(self.reader)
            with contextlib.suppress(OSError):  # what was not written above
                self.log.close()
        return code

    def interrupt(self) -> None:
        # The group, as a terminal does: further ranks and workers are in it.
        try:
            os.killpg(self.process.pid, signal.SIGINT)
        except ProcessLookupError:  # not a group of its own yet, or gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)

    def _drain(self) -> None:
        while True:
            try:
                read = os.read(self.reader, 65536)
            except OSError:  # nothing there now; or a pseudo-terminal whose other side has closed
                break
            if not read:
                break
            if self.on_screen:
                sys.stdout.flush()
                sys.stdout.buffer.write(read)
                sys.stdout.buffer.flush()
            *lines, self._line = (self._line + read).split(b"\n")
            for line in lines:
                self._write(line + b"\n")

    def _write(self, line: bytes) -> None:
        """A line of the log: without terminal codes, and only the last state of one that was written over."""
        text = TERMINAL_CODE.sub(b"", line).rstrip(b"\r\n").rpartition(b"\r")[2]
        with contextlib.suppress(OSError):  # a full disk: the stage itself says so when it wants to save
            self.log.write(text + b"\n" if line.endswith(b"\n") else text)
            self.log.flush()


def can_fork() -> bool:
    """Whether a process with everything imported can be forked: on Linux, with a torch that knows no GPU."""
    import torch

    return sys.platform == "linux" and torch.version.cuda is None and torch.version.hip is None


def _options(args: list[str]) -> dict[str, Any]:
    """The settings of a command that takes no YAML: option -> the words after it."""
    found: dict[str, list[str]] = {}
    for word in args[1:]:
        if word.startswith("--"):
            found[word.removeprefix("--")] = []
        elif found:
            list(found.values())[-1].append(word)
    return found


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that come while a process is started are delivered afterwards, not lost in the new one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _own_process() -> None:
    """Of a new process: a session of its own, an end with the pipeline's, and Python's own handling of signals."""
    os.setsid()
    # A pipeline that is killed takes its stages along: the next start finds no second writer in their folders.
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _child(args: list[str], writer: int, threads: int | None) -> None:
    """What `python -m prism_pl ARGS` does, in a fork with everything imported already. See `_python` for `threads`."""
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(fd, "w", closefd=False), "utf-8", "backslashreplace", line_buffering=True)
        for fd in (1, 2)
    )
    sys.argv = ["prism_pl", *args]
    if threads is not None and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(threads)
    from prism_pl.__main__ import main

    _own_process()
    sys.exit(main(args))


def _python(args: list[str], writer: int, lock: int | None, threads: int | None) -> "subprocess.Popen[bytes]":
    """The same in a process that imports everything anew, with so many threads unless OMP_NUM_THREADS is set."""
    environment = ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}) | os.environ
    return subprocess.Popen(
        [sys.executable, "-m", "prism_pl", *args],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        env=environment,
        pass_fds=() if lock is None else (lock,),
        preexec_fn=_own_process,
    )


def _terminal() -> tuple[int, int]:
    """A pseudo-terminal of this one's size, so that a stage shows its progress; (to read from, to write to)."""
    reader, writer = os.openpty()
    with contextlib.suppress(termios.error):
        termios.tcsetwinsize(writer, termios.tcgetwinsize(sys.stdout.fileno()))
    return reader, writer
