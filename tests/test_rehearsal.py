"""What measuring at full size with random weights rests on: engines that say something well-formed, and the dry run."""

import yaml

from benchmarks.dry_run import BASELINE, prepare
from benchmarks.rehearsal import RehearsedEngine
from prism_pl.batch import Example
from prism_pl.chat import parse
from prism_pl.pipeline.graph import build_graph
from prism_pl.pipeline.schema import load_pipeline
from prism_pl.rollout import Rollout, Sampling, VLLMEngine


def test_groups_are_told_as_they_are_handed_out_and_some_are_right(monkeypatch):
    """`on_group` and the returned list hold the same well-formed texts over the ids that were sampled."""

    def sampled(engine, examples, num_samples, sampling, on_group=None):
        groups = [[Rollout([1], [p, g], [0.0, 0.0], "raw", "length") for g in range(num_samples)] for p in (0, 1)]
        for p, group in enumerate(groups):
            if on_group is not None:
                on_group(p, group)
        return [one for group in groups for one in group]

    monkeypatch.setattr(VLLMEngine, "generate", sampled)
    engine, told = RehearsedEngine(num_lines=2), {}
    rows = [Example("a", "?", answers=["truth"]), Example("b", "?")]
    rollouts = engine.generate(rows, 4, Sampling(), told.__setitem__)
    assert [told[0], told[1]] == [rollouts[:4], rollouts[4:]]
    assert engine.generate(rows, 4, Sampling()) == rollouts
    answers = [parse(one.text).answer for one in rollouts]
    # The ids sum to 0, 1, 2, 3: every other rollout of the row with a truth says it.
    assert [answer == "truth" for answer in answers] == [False, True, False, True, *[False] * 4]
    assert all(parse(one.text).valid and one.finish_reason == "stop" for one in rollouts)
    assert [one.response_ids for one in rollouts[:2]] == [[0, 0], [0, 1]]


def test_the_dry_run_lays_over_the_shipped_pipeline(tmp_path):
    file = prepare(tmp_path / "dry", "tiny", devices=1, offload=False, baseline=False)
    graph = build_graph(load_pipeline(["qwen3vl-4b/pipeline.yaml", str(file)], {}))
    whole = build_graph(load_pipeline(["qwen3vl-4b/pipeline.yaml"], {}))
    assert set(whole) - set(graph) == set(BASELINE)
    for name, node in graph.items():
        if node.stage.command == "fit":
            assert node.stage.set["trainer.max_steps"] == 2, name
            assert node.stage.set["trainer.enable_checkpointing"] is False, name
    overlay = yaml.safe_load(file.read_text())
    assert overlay["run_folder"] == str(tmp_path / "dry" / "run")
