"""The stages in turn, or side by side, with the ledger kept up to date by this one process."""

import shlex
import shutil
import signal
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from prism_pl.errors import EXIT_STOPPED, PipelineFailed, Stopped
from prism_pl.fingerprint import hash_path, hash_value, versions
from prism_pl.folders import free_folder
from prism_pl.ledger import EARLIER, LOCK, Attempt, Entry, Ledger, Status, now
from prism_pl.pipeline.graph import OUTPUTS, Graph
from prism_pl.pipeline.jobs import SIGNALS, Job, Runner
from prism_pl.pipeline.plan import Step, Wanted, checkpoint_in, took
from prism_pl.pipeline.results import begun_at, keep_of, outputs_of, results_of, step_of

LOG = "stage.log"
# What a command that ended well has written; what a fit has to leave, its children say.
REQUIRED = {kind: tuple(OUTPUTS[kind].values()) for kind in ("test", "predict", "report")}
PAUSE = 0.05  # seconds between two looks at the running stages


class Execution:
    """Runs a plan.

    Args:
        graph: the stages, parents first.
        wanted: each stage's command and configuration.
        plan: what to do with each.
        ledger: is kept up to date.
        runner: starts the commands.
        parallel: stages at once.
        command: what goes on with the pipeline, for messages.
        keep_going: after a failure, run what does not depend on the stage that failed.
    """

    def __init__(
        self,
        graph: Graph,
        wanted: Mapping[str, Wanted],
        plan: Mapping[str, Step],
        ledger: Ledger,
        runner: Runner,
        parallel: int,
        command: str,
        keep_going: bool = False,
    ) -> None:
        self.graph, self.wanted, self.plan, self.ledger, self.runner = graph, wanted, plan, ledger, runner
        self.parallel, self.command, self.keep_going = parallel, command, keep_going
        self.versions = versions()
        self.running: dict[str, tuple[Job, float]] = {}
        self.log_begins: dict[str, int] = {}  # where this attempt's part of the log begins, in bytes
        self.failed: dict[str, str] = {}  # stage -> what is wrong with it, in a sentence
        self.interrupted = False

    def run(self) -> None:
        """Run every stage that the plan does not skip.

        Raises:
            PipelineFailed: a stage failed; no further one was started, or with `keep_going` none that depends on it.
            Stopped: Ctrl+C; the stages that ran have ended in order.
        """
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            self._make_way()
            while self._start_ready() or self.running:
                for name in list(self.running):
                    self._look_at(name)
                if self.running:
                    time.sleep(PAUSE)
        except BaseException:
            self._end_all()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self._say_how_it_ended()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        for job, _ in self.running.values():
            job.interrupt()

    def _end_all(self) -> None:
        """This process cannot go on: no stage is left behind."""
        jobs = [job for job, _ in self.running.values()]
        for job in jobs:
            job.interrupt()
        while any([job.poll() is None for job in jobs]):
            time.sleep(PAUSE)

    def _make_way(self) -> None:
        """Move aside what is run anew, children first: broken off here, no child outlives its parent."""
        self.ledger.content["status"] = "running"
        for name in reversed(list(self.graph)):
            if self.plan[name].action != "rerun":
                continue
            entry = self.ledger.stages.pop(name, None) or self._new_entry(name)
            folder = self.ledger.path(entry)
            if entry["taken_from"] is None and folder.exists():
                aside = free_folder(self.ledger.folder / EARLIER / name, LOCK)
                aside.parent.mkdir(exist_ok=True)
                shutil.move(folder, aside)
                entry["folder"] = f"{EARLIER}/{aside.name}"
                entry["log"] = f"{entry['folder']}/{LOG}"
            self.ledger.content["earlier"].append({"name": name, **entry})
            self.ledger.write()
        # The report shows the stages as the ledger lists them.
        for name in self.graph:
            entry = self.ledger.stages.pop(name, None)
            self.ledger.stages[name] = entry or self._new_entry(name)
        self.ledger.write()

    def _new_entry(self, name: str) -> Entry:
        wanted, kind = self.wanted[name], self.graph[name].stage.command
        return Entry(
            kind=kind,
            command="python -m prism_pl " + shlex.join(wanted.args),
            folder=name,
            log=f"{name}/{LOG}",
            status="pending",
            started=None,
            ended=None,
            seconds=None,
            resumed_from_step=None,
            exit_code=None,
            attempts=[],
            parents={},
            inputs=wanted.inputs,
            config=wanted.config,
            config_sha256=hash_value(wanted.config),
            data_sha256=wanted.data_hash,
            versions=self.versions,
            outputs={},
            results={},
            taken_from=None,
        )

    def _start_ready(self) -> bool:
        """Start what can start; whether anything did."""
        started = False
        for name, node in self.graph.items():
            stop = self.failed and not self.keep_going
            if self.interrupted or stop or len(self.running) >= self.parallel:
                break
            stages = self.ledger.stages
            waits = stages[name]["status"] == "finished" or name in self.running or name in self.failed
            if not waits and all(stages[parent]["status"] == "finished" for parent in node.parents):
                try:
                    parents = self._read_of_parents(name)
                except PipelineFailed as error:
                    self.failed[name] = str(error)
                    continue
                self._start(name, parents)
                started = True
        return started

    def _start(self, name: str, parents: dict[str, dict[str, str]]) -> None:
        wanted, folder = self.wanted[name], self.ledger.folder / name
        entry = self._new_entry(name)
        entry["attempts"], entry["parents"] = self.ledger.stages[name]["attempts"], parents
        for attempt in entry["attempts"]:
            if attempt["status"] == "running":  # the pipeline was killed with it, and noted nothing
                _end_of_killed(attempt, folder / LOG)
        step = step_of(checkpoint_in(folder)) if entry["kind"] == "fit" else None
        attempt = Attempt(
            started=now(), ended=None, seconds=None, status="running", exit_code=None, resumed_from_step=step
        )
        entry["attempts"].append(attempt)
        entry["started"] = entry["attempts"][0]["started"]
        entry["resumed_from_step"] = step
        entry["status"] = "running"
        self.ledger.stages[name] = entry
        self.ledger.write()
        here = f", from step {step}" if step is not None else ""
        if self.parallel == 1:
            print(f"\n[{name}]{here} $ {entry['command']}", flush=True)
        else:
            print(f"[{name}] started{here}; prints to {folder / LOG}", flush=True)
        self.runner.prepare(wanted.config)
        log = folder / LOG
        self.log_begins[name] = log.stat().st_size if log.exists() else 0
        job = self.runner.start(wanted.args, log, on_screen=self.parallel == 1)
        self.running[name] = (job, time.monotonic())
        if self.interrupted:  # the signal came while it was started
            job.interrupt()

    def _read_of_parents(self, name: str) -> dict[str, dict[str, str]]:
        """The hashes of what a stage is about to read of its parents, which has to be what they left."""
        found: dict[str, dict[str, str]] = {}
        for parent, names in self.graph[name].parents.items():
            entry = self.ledger.stages[parent]
            found[parent] = dict(entry["outputs"]) if not names else {}
            for what in names:
                path = self.ledger.path(entry) / OUTPUTS[entry["kind"]][what]
                sha = entry["outputs"].get(what)
                if sha is None:
                    raise PipelineFailed(f"{name} starts from {path}, which {parent} did not write.{_who_writes(what)}")
                if not path.exists() or hash_path(path) != sha:
                    raise PipelineFailed(
                        f"{path} is not what {parent} left, so {name} was not started. Put it back, or run {parent} "
                        "anew with --update."
                    )
                found[parent][what] = sha
        return found

    def _look_at(self, name: str) -> None:
        job, start = self.running[name]
        code = job.poll()
        if code is None:
            return
        del self.running[name]
        entry = self.ledger.stages[name]
        status: Status = "failed"
        folder = self.ledger.path(entry)
        unwritten = [path for path in REQUIRED.get(entry["kind"], ()) if not (folder / path).exists()]
        if code == 0 and not unwritten:
            status = "finished"
            entry["outputs"] = outputs_of(entry["kind"], folder)
            readers = [other for other, node in self.graph.items() if "pass_rates" in node.parents.get(name, ())]
            entry["results"] = results_of(entry, folder, keep_of([self.wanted[other].config for other in readers]))
        elif code == EXIT_STOPPED or self.interrupted:
            status = "interrupted"
            self.interrupted = True
        attempt = entry["attempts"][-1]
        attempt.update(ended=now(), seconds=round(time.monotonic() - start, 1), status=status, exit_code=code)
        attempt["resumed_from_step"] = begun_at(folder, attempt)
        entry["status"], entry["exit_code"], entry["ended"] = status, code, attempt["ended"]
        entry["resumed_from_step"] = attempt["resumed_from_step"]
        entry["seconds"] = round(sum(one["seconds"] or 0 for one in entry["attempts"]), 1)
        self.ledger.write()
        if status == "failed":
            self.failed[name] = self._failure(name, unwritten)
        print(f"[{name}] {status} in {took(attempt['seconds'])}{_exit(code)}", flush=True)

    def _say_how_it_ended(self) -> None:
        ended = all(entry["status"] == "finished" for entry in self.ledger.stages.values())
        self.ledger.content["status"] = "finished" if ended else "failed" if self.failed else "interrupted"
        self.ledger.write()
        if ended:
            return
        if self.interrupted and not self.failed:
            names = [name for name, entry in self.ledger.stages.items() if entry["status"] == "interrupted"]
            where = f" in {', '.join(names)}" if names else ""
            raise Stopped(f"Stopped{where}. The same command goes on: {self.command}")
        raise PipelineFailed(
            f"{' '.join(self.failed.values())} Mend it and go on with the same command: {self.command}"
        )

    def _failure(self, name: str, unwritten: list[str]) -> str:
        entry = self.ledger.stages[name]
        log = self.ledger.path(entry, "log")
        if entry["exit_code"] == 0:
            return f"Stage {name} ended without writing {', '.join(unwritten)}; its log is {log}."
        # Of this attempt alone: what an earlier one said was mended, or is not what ended this one.
        said = log.read_bytes()[self.log_begins[name] :] if log.exists() else b""
        lines = said.decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()]
        last = f" It said: {errors[-1].removeprefix('error: ')}" if errors else ""
        return f"Stage {name} failed{_exit(entry['exit_code'])}; its log is {log}.{last}"


def _end_of_killed(attempt: Attempt, log: Path) -> None:
    """Note when an attempt last printed as its end, so that the stage's time counts it."""
    start = datetime.fromisoformat(attempt["started"])
    last = datetime.fromtimestamp(log.stat().st_mtime, UTC) if log.exists() else start
    attempt.update(
        status="interrupted",
        ended=max(start, last).isoformat(timespec="seconds"),
        seconds=round(max(0.0, (last - start).total_seconds()), 1),
    )


def _exit(code: int | None) -> str:
    """An exit code in words; nothing for 0 and for Ctrl+C's."""
    if code is None or code in (0, EXIT_STOPPED):
        return ""
    if code > 0:
        return f" with exit code {code}"
    hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
    return f", ended by {signal.Signals(-code).name}{hint}"


def _who_writes(what: str) -> str:
    return " Add callbacks.Export to its trainer.callbacks." if what.startswith("export") else ""
