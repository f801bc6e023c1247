"""The process in which math-verify runs: from threads, past its limits, and never left behind."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prism_pl.rewards import accuracy, symbolic, timeouts
from prism_pl.rewards.symbolic import Worker

ENDLESS = "(10^{9})!"  # minutes inside one integer product, which no Python signal handler interrupts


@pytest.fixture
def worker():
    worker = Worker(cpu_seconds=0.5)
    yield worker
    worker.close()


def is_alive(pid):
    """Whether a process runs (a zombie that nobody has waited for does not)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid, seconds):
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_verdicts_from_threads_are_those_of_the_main_thread():
    cases = [("x^2 + 1", "1 + x^2", 1.0), (r"\sqrt{8}", r"2\sqrt{2}", 1.0), (r"2\sqrt{3}", "2", 0.0)] * 4
    found = [None] * len(cases)

    def ask(index):
        found[index] = accuracy(cases[index][0], cases[index][1])

    before = timeouts()
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected for _, _, expected in cases]
    assert timeouts() == before


def test_a_timeout_is_counted_and_logged_and_the_next_verdict_is_right(monkeypatch, caplog, worker):
    monkeypatch.setattr(symbolic, "_worker", worker)
    assert accuracy("1 + x", "x + 1") == 1.0
    pid = worker.process.pid
    with caplog.at_level(logging.WARNING):
        assert accuracy(ENDLESS, "7") == 0.0
    assert timeouts() == 1
    assert "no verdict" in caplog.text
    assert ENDLESS in caplog.text
    assert not is_alive(pid)
    started = time.monotonic()
    assert accuracy(ENDLESS, "7") == 0.0  # remembered: counted again, but not waited for again
    assert time.monotonic() - started < 0.4
    assert timeouts() == 2
    assert accuracy("2 + x", "x + 2") == 1.0
    assert worker.process.pid != pid
    assert timeouts() == 2


def test_a_worker_that_died_or_is_stuck_without_using_the_cpu_is_replaced(worker):
    assert worker.equal("1 + x", "x + 1")
    worker.process.kill()
    worker.process.wait()
    assert worker.equal("2 + x", "x + 2")
    assert worker.timeouts == 0
    pid = worker.process.pid
    os.kill(pid, signal.SIGSTOP)
    worker.wall_seconds = 0.3
    assert not worker.equal("3 + x", "x + 3")
    assert worker.timeouts == 1
    assert not is_alive(pid)
    worker.wall_seconds = 60.0
    assert worker.equal("4 + x", "x + 4")


def test_a_forked_child_has_a_worker_of_its_own():
    assert accuracy("1 + x", "x + 1") == 1.0
    pid = symbolic._worker.process.pid
    child = os.fork()
    if child == 0:
        right = accuracy("5 + x", "x + 5") == 1.0 and symbolic._worker.process.pid != pid
        symbolic._worker.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert symbolic._worker.process.pid == pid
    assert accuracy("6 + x", "x + 6") == 1.0


def run_beside_the_library(program):
    """Start a Python that imports `symbolic` alone: torch would take seconds."""
    # At the end of the path, because the folder holds a `numbers` too.
    start = f"import sys, time; sys.path.append({str(Path(symbolic.__file__).parent)!r}); import symbolic\n"
    return subprocess.Popen([sys.executable, "-c", start + program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_does_not_outlive_a_killed_parent(busy):
    # In the busy case the worker cannot see that its input closed; its CPU limit ends it.
    then = f"worker.equal({ENDLESS!r}, '7')" if busy else "time.sleep(60)"
    parent = run_beside_the_library(
        "worker = symbolic.Worker(cpu_seconds=0.5); worker.equal('1+x', 'x+1')\n"
        f"print(worker.process.pid, flush=True); {then}"
    )
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.communicate()
    assert gone_within(pid, 20)


def test_a_normal_exit_ends_the_worker_without_a_word():
    parent = run_beside_the_library(
        "assert symbolic.symbolically_equal('1+x', 'x+1'); print(symbolic._worker.process.pid, flush=True)"
    )
    out, errors = parent.communicate()
    assert gone_within(int(out), 5)
    assert errors == b""


def test_importing_the_rewards_imports_no_math_verify():
    program = "import sys, prism_pl.rewards; sys.exit('math_verify' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
