"""Stages that take no time: they read their YAML and write what the real commands would, and no more."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from prism_pl.errors import UsageError
from prism_pl.pipeline.command import run
from prism_pl.pipeline.jobs import ProcessRunner

PIPELINE = """
stages:
  base: {command: test, config: evaluate.yaml, set: {model.policy.path: weights}}
  sft: {command: fit, config: sft.yaml, set: {model.policy.path: weights}}
  align: {command: fit, config: align.yaml, set: {model.policy.path: "{sft.export}"}}
  filter: {command: predict, config: filter.yaml, set: {model.policy.path: "{align.export}"}}
  rlvr:
    command: fit
    config: rlvr.yaml
    set: {model.policy.path: "{align.export}", data.pass_rates: "{filter.pass_rates}"}
  filter-sft: {command: predict, config: filter.yaml, set: {model.policy.path: "{sft.export}"}}
  baseline:
    command: fit
    config: rlvr.yaml
    set:
      model.policy.path: "{sft.export}"
      data.pass_rates: "{filter-sft.pass_rates}"
      trainer.max_steps: "{align.trainer.max_steps + rlvr.trainer.max_steps}"
      model.lr: 0.5  # so that rlvr.yaml's does not reach it
  evaluate-rlvr: {command: test, config: evaluate.yaml, set: {model.policy.path: "{rlvr.export}"}}
  evaluate-baseline: {command: test, config: evaluate.yaml, set: {model.policy.path: "{baseline.export}"}}
  report: {command: report}
"""
CONFIGS = {"sft": 100, "align": 30, "rlvr": 40, "filter": 0, "evaluate": 0}


class FakeJob:
    """Ends at the first look, or when told."""

    def __init__(self, code: int | None, on_poll: Callable[[], Any]) -> None:
        self.code, self.on_poll = code, on_poll

    def poll(self) -> int | None:
        self.on_poll()
        return self.code

    def interrupt(self) -> None:
        self.code = 130


class FakeRunner:
    """Remembers what it started. `codes` are exit codes by stage; None runs until it is interrupted. `model` are
    options of the model with their defaults; `lost` is one that the code does not know (any more)."""

    def __init__(
        self,
        codes: dict[str, int | None] | None = None,
        on_poll: Callable[[], Any] = lambda: None,
        model: dict[str, Any] | None = None,
        lost: str = "",
    ) -> None:
        self.codes, self.on_poll, self.model, self.lost = codes or {}, on_poll, model or {}, lost
        self.started: list[str] = []
        self.jobs: list[FakeJob] = []

    def prepare(self, config: dict[str, Any]) -> None: ...

    def resolve(self, args: list[str]) -> dict[str, Any]:
        config: dict[str, Any] = {}
        if args[0] == "report":
            return ProcessRunner().resolve(args)
        for key, value in zip(args[1::2], args[2::2], strict=True):
            if key == "--config":
                config |= yaml.safe_load(Path(value).read_text())
                continue
            *groups, last = key.removeprefix("--").split(".")
            place = config
            for group in groups:
                place = place.setdefault(group, {})
            if last == "wrong":
                raise UsageError("There is no key wrong.")
            place[last] = yaml.safe_load(value)
        return self.complete(args[0], config)

    def complete(self, command: str, config: dict[str, Any]) -> dict[str, Any]:
        model = config.get("model", {})
        if self.lost in model:
            raise UsageError(f"There is no option {self.lost}.")
        return config | {"model": self.model | model}

    def start(self, args: list[str], log: Path, on_screen: bool) -> FakeJob:
        self.started.append(log.parent.name)
        code = self.codes.get(log.parent.name, 0)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as handle:
            handle.write("prints\n" if code == 0 else "Traceback\nerror: the loss is not finite\nbye\n")
        if code in (0, None):
            write_outputs(args, log.parent, self.resolve(args))
        self.jobs.append(FakeJob(code, self.on_poll))
        return self.jobs[-1]


def write_outputs(args: list[str], folder: Path, config: dict[str, Any]) -> None:
    """What the command leaves in its folder; an export depends on the settings."""
    if args[0] == "fit":
        (folder / "export").mkdir(exist_ok=True)
        (folder / "export" / "model.safetensors").write_text(json.dumps([config["model"], config["trainer"]]))
    elif args[0] == "test":
        table = {"accuracy": {"mean": 0.5, "low": 0.4, "high": float("nan"), "prompts": 3}}
        content = {"name": folder.name, "tables": {"test": {"all": table}}}
        (folder / "evaluation.json").write_text(json.dumps(content).replace("NaN", "null"))
    elif args[0] == "predict":
        rates = [0.0, 0.5, 1.0, 0.75]
        lines = [json.dumps({"id": f"row-{i}", "pass_rate": rate}) for i, rate in enumerate(rates)]
        recipe = json.dumps({"recipe": {"data": None}})  # as `predict` writes it, first
        (folder / "pass_rates.jsonl").write_text("\n".join([recipe, *lines]) + "\n")
    else:
        Path(args[args.index("--out") + 1]).write_text("# report\n")


def write_pipeline(folder: Path) -> None:
    """A pipeline with its YAMLs and a policy to start from."""
    (folder / "weights").mkdir()
    (folder / "weights" / "model.safetensors").write_text("base")
    (folder / "pipeline.yaml").write_text(PIPELINE)
    for name, max_steps in CONFIGS.items():
        data = {"keep": [0.2, 0.8]} if name == "rlvr" else {}
        settings = {"model": {"lr": 0.1, "policy": {"path": "?"}}, "data": data, "trainer": {"max_steps": max_steps}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def start(*options: str, runner: FakeRunner | None = None) -> FakeRunner:
    """Run the pipeline in `run` and return the runner."""
    runner = runner or FakeRunner()
    run(["pipeline", "--config", "pipeline.yaml", "--run_folder", "run", *options], runner)
    return runner


def ledger(folder: str = "run") -> dict[str, Any]:
    """The ledger's content."""
    return json.loads((Path(folder) / "ledger.json").read_text())


def statuses(folder: str = "run") -> dict[str, str]:
    """Stage -> status in the ledger."""
    return {name: entry["status"] for name, entry in ledger(folder)["stages"].items()}
