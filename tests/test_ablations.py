"""Ablations: what arms share, what a second start runs, and tables whose numbers are known beforehand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from prism_pl.__main__ import main
from prism_pl.ablations.arms import Cell, Merged, merge
from prism_pl.ablations.command import run
from prism_pl.ablations.schema import load_ablations, load_arms
from prism_pl.errors import PipelineFailed, UsageError
from prism_pl.metrics.bootstrap_crossed import crossed_interval
from prism_pl.pipeline.graph import build_graph
from prism_pl.pipeline.schema import load_pipeline
from tests.fake_stages import FakeRunner
from tests.run_data import response, write_evaluation

ROOT = Path(__file__).parent.parent
FULL = """
keep_going: true
stages:
  base: {command: test, config: evaluate.yaml, set: {model.policy.path: weights}}
  sft: {command: fit, config: sft.yaml, set: {model.policy.path: weights}}
  warmup: {command: fit, config: warmup.yaml, set: {model.policy.path: "{sft.export}", model.kind: experts}}
  align:
    command: fit
    config: align.yaml
    set: {model.policy.path: "{sft.export}", model.path: "{warmup.export}", model.alpha: 0.5}
  # Each reads something of the other.
  filter:
    command: predict
    config: filter.yaml
    set: {model.policy.path: "{align.export}", data.num: "{rlvr.data.num}"}
  rlvr:
    command: fit
    config: rlvr.yaml
    set: {model.policy.path: "{align.export}", data.pass_rates: "{filter.pass_rates}", data.num: 8}
  evaluate: {command: test, config: evaluate.yaml, set: {model.policy.path: "{rlvr.export}"}}
"""
ARMS = {
    "dense": "stages: {warmup: {set: {model.kind: dense}}}",
    "half": "stages: {align: {set: {model.alpha: 0.5}}}",
    "quarter": "stages: {align: {set: {model.alpha: 0.25}}}",
    "unaligned": """
stages:
  warmup: null
  align: null
  filter: {set: {model.policy.path: "{sft.export}"}}
  rlvr:
    set:
      model.policy.path: "{sft.export}"
      trainer.max_steps: "{full.align.trainer.max_steps + full.rlvr.trainer.max_steps}"
""",
    "large": "stages: {sft: {set: {data.num: 100}}}",  # a scale
}
ABLATIONS = """
arms: [full.yaml, dense.yaml, half.yaml, quarter.yaml, unaligned.yaml]
seeds: [1, 2]
seeded: {fit: [seed_everything]}
scales: {large: [large.yaml]}
tables: {evaluate: After RLVR, base: Before}
"""
STEPS = {"sft": 100, "warmup": 5, "align": 30, "rlvr": 40, "filter": 0, "evaluate": 0}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A current folder with ablations in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRISM_TRACEBACK", "")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("base")
    for name, max_steps in STEPS.items():
        settings = {"model": {"policy": {"path": "?"}}, "data": {}, "trainer": {"max_steps": max_steps}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    # An arm's file and the fit's YAML of the same name must not meet.
    for name, text in {"full": FULL, "ablations": ABLATIONS, **ARMS}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def merged(file: str = "ablations.yaml", scale: str | None = None, **settings: dict[str, Any]) -> Merged:
    ablations = load_ablations(Path(file).absolute())
    return merge(load_arms(ablations, scale, settings, {}), ablations)


def names(arms: Merged, seed: int, arm: str) -> dict[str, str]:
    """Stage -> where it runs, without the seed: the arm whose stage it is."""
    found = {cell.stage: name for cell, name in arms.name_of.items() if (cell.seed, cell.arm) == (seed, arm)}
    assert all(name.startswith("s") and name.endswith(f"-{stage}") for stage, name in found.items())
    return {stage: name.split("-", 1)[1].removesuffix(f"-{stage}") for stage, name in found.items()}


# The graph of arms


def test_arms_share_what_comes_out_the_same(folder):
    arms = merged()
    of_full = dict.fromkeys(("base", "sft", "warmup", "align", "filter", "rlvr", "evaluate"), "full")
    assert names(arms, 2, "full") == of_full
    assert names(arms, 2, "half") == of_full  # alpha 0.5 is the whole method's
    own = dict.fromkeys(("warmup", "align", "filter", "rlvr", "evaluate"), "dense")
    assert names(arms, 2, "dense") == of_full | own
    own = dict.fromkeys(("align", "filter", "rlvr", "evaluate"), "quarter")
    assert names(arms, 2, "quarter") == of_full | own
    own = dict.fromkeys(("filter", "rlvr", "evaluate"), "unaligned")
    assert names(arms, 2, "unaligned") == {"base": "full", "sft": "full", **own}
    # Seeds share what has none in it: the policy that nothing was trained for.
    assert {arms.name_of[Cell(seed, arm, "base")] for seed in (1, 2) for arm in ("full", "dense")} == {"s1-full-base"}
    assert len(arms.pipeline.stages) == 1 + 2 * (6 + 5 + 4 + 3)


def test_stages_depend_on_those_of_their_arm_and_seed(folder):
    graph = build_graph(merged().pipeline)
    assert graph["s2-dense-align"].parents == {"s2-full-sft": ("export",), "s2-dense-warmup": ("export",)}
    assert graph["s2-dense-rlvr"].parents == {"s2-dense-align": ("export",), "s2-dense-filter": ("pass_rates",)}
    assert graph["s2-dense-filter"].consulted == {"s2-dense-rlvr"}
    unaligned = graph["s1-unaligned-rlvr"]
    assert unaligned.parents == {"s1-full-sft": ("export",), "s1-unaligned-filter": ("pass_rates",)}
    assert unaligned.consulted == {"s1-full-align", "s1-full-rlvr"}
    assert [graph[f"s{seed}-full-sft"].stage.set["seed_everything"] for seed in (1, 2)] == [1, 2]
    assert "seed_everything" not in graph["s2-full-evaluate"].stage.set
    # Fits come first, and early ones before late ones: no chain of fits is left for the end.
    order = [name.rsplit("-", 1)[1] for name, node in graph.items() if node.stage.command == "fit"]
    assert order.index("warmup") > max(n for n, stage in enumerate(order) if stage == "sft")


def test_a_part_is_a_part_of_the_whole_and_has_what_it_needs(folder):
    whole = merged()
    part = whole.only(["quarter"], [2])
    assert {cell.seed for cell in part.name_of if cell.stage != "base"} == {2}
    assert part.pipeline.stages.keys() == {
        "s1-full-base",
        *(f"s2-full-{stage}" for stage in ("sft", "warmup")),
        *(f"s2-quarter-{stage}" for stage in ("align", "filter", "rlvr", "evaluate")),
    }
    assert all(part.pipeline.stages[name] == whole.pipeline.stages[name] for name in part.pipeline.stages)
    # What it takes over of settings is there too.
    assert "s1-full-align" in whole.only(["unaligned"], [1]).pipeline.stages


def test_a_scale_and_the_command_line_reach_every_arm(folder):
    stages = merged(scale="large", rlvr={"data.num": "3"}).pipeline.stages
    assert stages["s1-full-sft"].set["data.num"] == 100
    assert [stages[f"s1-{arm}-rlvr"].set["data.num"] for arm in ("full", "dense", "unaligned")] == ["3"] * 3


ALIGNED = ["align", "rlvr", "evaluate-align", "evaluate-rlvr"]
WHOLE = ["sft", "warmup", "align", "rlvr", "evaluate-sft", "evaluate-align", "evaluate-rlvr"]
OWN = {
    "full": WHOLE,
    "dense": ["warmup", *ALIGNED],
    "text-only": ["warmup", *ALIGNED],
    "whole-response": ["warmup", *ALIGNED],
    "no-alignment": ["rlvr", "evaluate-rlvr"],
    "no-sft": ALIGNED,
    "curated-sft": WHOLE,
    "alpha-0": ALIGNED,
    "alpha-025": ALIGNED,
    "alpha-05": [],
    "alpha-075": ALIGNED,
    "alpha-1": ALIGNED,
    "released-advantage": ALIGNED,
}


@pytest.mark.parametrize("scale", [None, "gpu"])
def test_the_shipped_arms_have_of_their_own_what_they_change(scale):
    arms = merged(str(ROOT / "configs" / "ablations.yaml"), scale)
    assert {arm: [stage for stage, owner in names(arms, 3, arm).items() if owner == arm] for arm in OWN} == OWN
    assert {cell.arm for cell in arms.name_of} == OWN.keys()
    build_graph(arms.pipeline)
    set_of = {name: stage.set for name, stage in arms.pipeline.stages.items()}
    assert [set_of[f"s1-alpha-{a}-align"]["model.alpha"] for a in ("0", "025", "075", "1")] == [0, 0.25, 0.75, 1]
    assert set_of["s2-no-sft-align"]["model.discriminator.path"] == "{s2-full-warmup.export}"
    assert set_of["s2-no-alignment-rlvr"]["trainer.max_steps"] == (
        "{s2-full-align.trainer.max_steps + s2-full-rlvr.trainer.max_steps}"
    )
    # All are evaluated on the same rows.
    assert not [name for name, keys in set_of.items() if "evaluate" in name and "data.seed" in keys]


# Runs


class Evaluating(FakeRunner):
    """Writes evaluations of four prompts, all right for the arm `full` and half of them for the others."""

    def start(self, args: list[str], log: Path, on_screen: bool) -> Any:
        job = super().start(args, log, on_screen)
        if args[0] == "test" and job.code == 0:
            name = log.parent.name
            right = 4 if "-full-" in name else 2
            write_evaluation(log.parent, name, [response(n < right) for n in range(4)], "weights")
        return job


def start(*options: str, runner: FakeRunner | None = None) -> FakeRunner:
    runner = runner or Evaluating()
    run(["ablations", "--config", "ablations.yaml", "--run_folder", "run", *options], runner)
    return runner


def cells(text: str, row: str) -> list[str]:
    return next(
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {row} |")
    )


def test_a_run_ends_with_the_tables_and_is_finished_the_next_time(folder, capsys):
    first = start()
    assert len(first.started) == 37
    said = capsys.readouterr().out
    assert "5 arms x 2 seeds: 66 stages, 37 of them different." in said
    assert "half       nothing of its own" in said
    assert cells(said, "dense")[:6] == ["dense", "1, 2", "50.0", "50.0", "50.0 [0.0, 100.0]", "-50.0 [-100.0, +0.0]"]
    assert "As full, by the same stages: half." in said
    page = Path("run/ablations.md").read_text()
    assert page.strip() in said
    again = start()
    assert again.started == []
    assert Path("run/ablations.md").read_text() == page
    assert start("--tables").started == []


def test_a_failure_leaves_the_other_arms_running_and_the_same_command_goes_on(folder, capsys):
    broken = Evaluating({"s1-dense-align": 1})
    with pytest.raises(PipelineFailed, match="Stage s1-dense-align failed with exit code 1") as error:
        start(runner=broken)
    assert "python -m prism_pl ablations --config ablations.yaml --run_folder run" in str(error.value)
    lost = [f"s1-dense-{stage}" for stage in ("filter", "rlvr", "evaluate")]
    assert len(broken.started) == 37 - len(lost)
    said = capsys.readouterr().out
    assert cells(said, "dense")[1] == "2"
    assert "Not evaluated yet, by seed: dense (1)." in said
    assert start().started == ["s1-dense-align", *lost]
    assert json.loads(Path("run/ledger.json").read_text())["status"] == "finished"


def test_seeds_and_arms_may_come_one_after_the_other(folder, capsys):
    start("--seeds", "1", "--arms", "full")
    assert cells(capsys.readouterr().out, "full")[1] == "1"
    rest = start("--arms", "full", "quarter")
    assert "s1-full-sft" not in rest.started
    assert "s1-quarter-align" in rest.started
    said = capsys.readouterr().out
    assert cells(said, "full")[1] == cells(said, "quarter")[1] == "1, 2"
    # What the first command ran and this one does not ask for is in the tables all the same.
    start("--seeds", "2", "--arms", "full")
    assert cells(capsys.readouterr().out, "quarter")[1] == "1, 2"


def test_print_config_is_a_pipeline_that_runs_the_same(folder, capsys):
    start("--arms", "unaligned", "--seeds", "2", "--print_config")
    written = capsys.readouterr().out
    Path("printed.yaml").write_text(written)
    printed = load_pipeline(["printed.yaml"], {})
    assert printed.stages == merged().only(["unaligned"], [2]).pipeline.stages
    assert printed.options.keep_going


def test_a_dry_run_writes_nothing(folder, capsys):
    assert start("--dry-run").started == []
    assert not Path("run").exists()
    assert "--model.kind dense" in capsys.readouterr().out


# Tables


def planted(folder: Path, right: dict[str, list[list[bool]]]) -> None:
    """Finished evaluations: arm -> seed -> prompt -> whether it is right. Families: sum, count, sum, count."""
    stages = {}
    for arm, by_seed in right.items():
        for seed, prompts in enumerate(by_seed, start=1):
            name = f"s{seed}-{arm}-evaluate"
            write_evaluation(folder / name, "rlvr", [response(one) for one in prompts], "weights")
            stages[name] = {"status": "finished", "folder": name}
    content = {"format": 1, "command": "ran", "stages": stages, "dropped": {}}
    (folder / "ledger.json").write_text(json.dumps(content))


def test_tables_by_hand(folder, capsys):
    yes, no = True, False
    full = [[yes, yes, yes, no], [yes, yes, no, no]]  # 3 and 2 of 4
    dense = [[yes, no, no, no], [no, no, no, no]]  # 1 and 0 of 4
    Path("run").mkdir()
    planted(Path("run"), {"full": full, "dense": dense, "quarter": full[:1]})
    start("--tables")
    page = capsys.readouterr().out
    header = next(line for line in page.splitlines() if line.startswith("| arm"))
    assert header == "| arm | seeds | count | sum | average | less full | by seed |"
    # sum: prompts 0 and 2, 3 right of 4; count: prompts 1 and 3, 2 of 4; all 5 of 8.
    assert cells(page, "full")[:4] == ["full", "1, 2", "50.0", "75.0"]
    assert cells(page, "full")[4].startswith("62.5 [")
    assert cells(page, "full")[5:] == ["", ""]
    # 1 of 8, so -50 points; by seed 1/4 - 3/4 and 0 - 2/4.
    assert cells(page, "dense")[2:4] == ["0.0", "25.0"]
    assert cells(page, "dense")[4].startswith("12.5 [")
    assert cells(page, "dense")[5].startswith("-50.0 [")
    assert cells(page, "dense")[6] == "-50.0 -50.0"
    # Paired with the seed that both have: no difference, though two seeds of `full` average lower.
    assert cells(page, "quarter")[1] == "1"
    assert cells(page, "quarter")[5] == "+0.0 [+0.0, +0.0]"
    families = page.split("| less full | count | sum |")[1]
    assert cells(families, "dense")[1:] == ["-50.0 [-100.0, +0.0]", "-50.0 [-100.0, +0.0]"]
    spread = page.split("| arm | lenient |")[1]
    assert cells(spread, "full")[1] == "62.5 (50.0 to 75.0)"
    assert cells(spread, "full")[2] == "100.0 (100.0 to 100.0)"
    assert "Not evaluated yet, by seed: quarter (2); unaligned (1, 2)." in page


def test_arms_evaluated_on_other_prompts_are_not_compared(folder):
    Path("run").mkdir()
    planted(Path("run"), {"full": [[True] * 4], "dense": [[True] * 3]})
    with pytest.raises(ValueError, match=r"dense with seed 1 was evaluated on other prompts.*such as 'row-3'"):
        start("--tables")


def test_crossed_intervals_resample_runs_and_prompts():
    # A single run: its prompts alone.
    assert crossed_interval(np.array([[0.0, 1.0]]), 2000)[:3] == (0.5, 0.0, 1.0)
    assert crossed_interval(np.full((3, 5), 2.0), 100) == (2.0, 2.0, 2.0, 5)
    # Runs that agree where the prompts do not: Student's t over the runs would have no width.
    assert crossed_interval(np.array([[0.0, 1.0], [0.0, 1.0]]), 2000)[:3] == (0.5, 0.0, 1.0)
    # Many runs: t is near the normal, and the interval that of independent draws of runs and of prompts, Owen (2007),
    # equation 6, up to 1/(S P) terms.
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 60)) + rng.normal(size=(1, 60))
    by_run, by_prompt = values.mean(1), values.mean(0)
    low, high = crossed_interval(values, 20_000)[1:3]
    assert (high - low) / (2 * 1.96) == pytest.approx(np.sqrt(by_run.var() / 12 + by_prompt.var() / 60), rel=0.15)
    with pytest.raises(ValueError, match=r"needs values of shape \(runs, prompts\) and got \(0, 3\)"):
        crossed_interval(np.zeros((0, 3)))


def test_few_runs_that_disagree_get_students_interval():
    # Means 0, 3, 6: standard deviation 3, over the root of 3; t of two degrees is 4.3027. Resamples end at 0 and 6.
    runs = np.repeat([[0.0], [3.0], [6.0]], 400, axis=1)
    mean, low, high, _ = crossed_interval(runs, 2000)
    assert (mean, low, high) == pytest.approx((3.0, 3 - 4.3027 * math.sqrt(3), 3 + 4.3027 * math.sqrt(3)), abs=1e-4)
    # All three below 0, and no proof: p = 0.25.
    luck = crossed_interval(np.repeat([[-1.7], [-1.0], [-7.8]], 100, axis=1), 2000)
    assert (luck.low, luck.high) == pytest.approx((-12.8, 5.8), abs=0.05)
    assert not luck.excludes_zero()
    # Their true mean lies in the interval as often as it says.
    rng = np.random.default_rng(0)
    found = [crossed_interval(rng.normal(size=(3, 1)), 200) for _ in range(600)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.025)


# Wrong YAML and options


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("ablations.yaml", "dense.yaml", "dens.yaml", "dens.yaml: no such file"),
        ("ablations.yaml", "seeds: [1, 2]", "seeds: []", "seeds is empty; give at least one, a number"),
        ("ablations.yaml", "seeds:", "seedz:", "ablations.yaml: seedz: there is no such key. Did you mean seeds?"),
        ("ablations.yaml", "half.yaml", "dense.yaml", "'dense' stands twice"),
        (
            "unaligned.yaml",
            "full.align.t",
            "ful.align.t",
            "there is no stage 'ful' in the arm 'unaligned'. Did you mean full?",
        ),
        (
            "unaligned.yaml",
            "full.align.t",
            "full.alin.t",
            "there is no stage 'alin' in the arm 'full'. Did you mean align?",
        ),
        (
            "dense.yaml",
            "{warmup",
            "{report: {command: report}, warmup",
            "dense.yaml: stages.report: a report reads all",
        ),
    ],
)
def test_wrong_ablations_are_one_message(folder, file, old, new, said):
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as error:
        start()
    assert said in str(error.value)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arms", "dens"], "--arms dens: there is no such one. Did you mean dense?"),
        (["--seeds", "3"], "--seeds 3: there is no such one. Known: 1, 2."),
        (["--scale", "larg"], "--scale larg: there is no such scale. Did you mean large?"),
        (["--alin.model.alpha", "1"], "--alin.KEY: no arm has a stage 'alin'. Did you mean align?"),
        (
            ["--arm", "dense"],
            "There is no option --arm. Did you mean --arms? All options: python -m prism_pl ablations --help",
        ),
        (["--tables"], "run holds no ablations yet"),
        (["--rlvr.model.wrong", "1"], "There is no key wrong."),
    ],
)
def test_a_wrong_command_line_is_one_message(folder, options, said):
    with pytest.raises(UsageError) as error:
        start(*options)
    assert said in str(error.value)
    assert not Path("run/ledger.json").exists()


def test_help_is_light(capsys):
    assert main(["ablations", "--help"]) == 0
    assert "--scale NAME" in capsys.readouterr().out


# What is shipped


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_arms_open_with_what_they_do_and_a_command_that_runs_them(file, capsys):
    opening = re.match(r"(?:# [^\n]+\n)+", file.read_text())
    assert opening
    launch = next(line.split() for line in opening[0].splitlines() if line.startswith("# Launch:"))[2:]
    assert launch[:3] == ["python", "-m", "prism_pl"]
    assert main([*launch[3:], "--print_config"]) == 0, capsys.readouterr().err
    printed = yaml.safe_load(capsys.readouterr().out)["stages"]
    if launch[3] == "ablations" and file.stem not in ("gpu", "alpha-05"):
        assert any(f"-{file.stem}-" in name for name in printed)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [[], ["--scale", "gpu"]], ids=["cpu", "gpu"])
def test_every_shipped_arm_is_read_by_the_real_parsers(scale, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ablations", "--config", "ablations.yaml", "--seeds", "1", *scale, "--dry-run"]) == 0
    said = capsys.readouterr().out
    discriminators = re.findall(r"fit --config \S+/(warmup|align)\.yaml .*?--model\.discriminator (\S+)", said)
    assert len(discriminators) == 6  # three kinds beside the YAMLs' own, in two stages each
    assert not list(tmp_path.iterdir())
