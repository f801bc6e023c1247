"""Evaluation: hand-computed tables, the JSON that is written, paired differences, and a run of the real engine."""

import json
import math
import shutil
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from scipy.stats import wasserstein_distance
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from modules.evaluate import EvaluateModule
from prism_pl.chat import render
from prism_pl.data.usable import check_usable
from prism_pl.metrics import CaptionFaithfulness, DescriptiveItems, DistributionDistance, PassAtK, StepCorrectness
from prism_pl.metrics.drift_bootstrap import distance_interval, paired_distance_difference
from prism_pl.policy import PolicySpec
from prism_pl.report.comparisons import differences
from prism_pl.report.evaluations import read_evaluation
from prism_pl.report.tables import results_table
from prism_pl.rollout.engine import Rollout, Sampling
from prism_pl.rollout.transformers_engine import TransformersEngine
from prism_pl.row_needs import RowNeeds
from tests.conftest import make_examples

RIGHT = render("- red 3 at top left\n- blue 7 at centre", "1. 3 + 7 = 10", "10")  # 2 items, 1 step
WRONG = render("- red 3", "1. read 3\n2. guess", "9")  # 1 item, 2 steps
BARE = "The answer is 10."  # malformed, right if read leniently


class Scripted:
    """An engine that gives the same written responses to every prompt."""

    def __init__(self, texts, lengths=(4, 8)):
        self.texts, self.lengths = texts, lengths
        self.seeds = []

    def start(self, policy, processor, *, rank): ...

    def generate(self, examples, num_samples, sampling, on_group=None):
        self.seeds.append(sampling.seed)
        samples = [
            Rollout([0], [1] * self.lengths[g], [0.0] * self.lengths[g], self.texts[g], "length" if g else "stop")
            for g in range(num_samples)
        ]
        return samples * len(examples)

    def dtype(self): ...

    def sync(self, named_parameters): ...

    def sleep(self): ...

    def wake(self): ...
    def metrics(self): ...

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...

    def close(self): ...


class Checker:
    """Captions are as true as they are long; the first step is right, and three are expected."""

    def check_caption(self, caption, example):
        stated = len(caption.splitlines())
        return SimpleNamespace(true=stated, missed=2 - stated, invented=1, exact=stated == 2)

    def check_steps(self, reasoning, example):
        return SimpleNamespace(correct=1, stated=len(reasoning.splitlines()), expected=3)


class Rows(LightningDataModule):
    """Four examples: three of test in two families, one hard. Their demonstration has 2 items and 3 steps."""

    def __init__(self, num=4):
        super().__init__()
        self.examples = make_examples(num)
        for n, example in enumerate(self.examples):
            example.meta = {"family": "sum" if n < 2 else "count", "split": "hard" if n == 3 else "test"}

    def test_dataloader(self):
        return DataLoader(self.examples, batch_size=3, collate_fn=self.trainer.lightning_module.collator)


class RowsWithScenes(Rows):
    def __init__(self):
        super().__init__()
        self.scene_checker = Checker()


def evaluate(folder, policy, texts, data=None, **options):
    options = {"sampling": Sampling(temperature=1.0), "num_samples": 2, "pass_k": [1, 2], **options}
    module = EvaluateModule(PolicySpec(policy), options.pop("engine", None) or Scripted(texts), **options)
    trainer = Trainer(
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version=""),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, datamodule=data or RowsWithScenes(), verbose=False)
    return module


def means(table):
    return {metric: entry["mean"] for metric, entry in table.items()}


def test_tables_by_hand(random_policy, tmp_path, capsys):
    module = evaluate(tmp_path, random_policy, [RIGHT, WRONG])
    assert module.tables.keys() == {"test", "hard"}
    assert module.tables["test"].keys() == {"all", "count", "sum"}
    found = means(module.tables["test"]["all"])
    demonstration_tokens = len(module.processor.response_ids(module.trainer.datamodule.examples[0].response))
    expected = {
        "accuracy": 0.5,
        "lenient_accuracy": 0.5,
        "format": 1.0,
        "truncated": 0.5,
        "pass_at_1": 0.5,
        "pass_at_2": 1.0,
        "response_length/policy": 6.0,  # (4 + 8) / 2
        "response_length/supervision": demonstration_tokens,
        "response_length/distance": demonstration_tokens - 6,  # all supervision tokens lie above both lengths
        "descriptive_items/policy": 1.5,
        "descriptive_items/supervision": 2.0,
        "descriptive_items/distance": 0.5,  # half of the mass moves from 1 to 2
        "reasoning_steps/policy": 1.5,
        "reasoning_steps/supervision": 3.0,
        "reasoning_steps/distance": 1.5,
        "caption_precision/policy": 0.6,  # (2 + 1) / (3 + 2)
        "caption_recall/policy": 0.75,  # 3 / 4
        "caption_exact/policy": 0.5,
        "step_correctness/policy": 2 / 3,  # (1 + 1) / (1 + 2)
        "step_completeness/policy": 1 / 3,
        "caption_precision/supervision": 2 / 3,
        "caption_recall/supervision": 1.0,
        "caption_exact/supervision": 1.0,
        "step_correctness/supervision": 1 / 3,
        "step_completeness/supervision": 1 / 3,
    }
    assert found == pytest.approx(expected)
    entry = module.tables["test"]["all"]["descriptive_items/policy"]
    assert (entry["prompts"], entry["responses"]) == (3, 6)
    assert module.tables["hard"]["all"]["accuracy"]["prompts"] == 1
    shown = capsys.readouterr().out
    assert "50.0 [50.0, 50.0]" in shown  # three prompts
    assert "50.0 [n/a]" in shown  # a single one


def test_tables_are_the_metrics_of_the_same_name(random_policy, tmp_path):
    texts = [RIGHT, WRONG, BARE]
    options = {"engine": Scripted(texts, lengths=[4, 8, 2]), "num_samples": 3, "pass_k": [1, 2]}
    module = evaluate(tmp_path, random_policy, [], **options)
    found = means(module.tables["test"]["all"])
    responses = [response for record in module.records[:3] for response in record["policy"]]
    captions, steps = CaptionFaithfulness(), StepCorrectness()
    for response in responses:
        if (caption := response["caption"]) is not None:
            said = ["t"] * caption["true"] + ["i"] * caption["invented"]
            captions.update([said], [["t"] * (caption["true"] + caption["missed"])])
        if (reasoning := response["reasoning"]) is not None:
            steps.update(**{name: [count] for name, count in reasoning.items()})
    for metric, names in (
        (captions, {"precision": "caption_precision", "recall": "caption_recall"}),
        (steps, {"right": "step_correctness", "present": "step_completeness"}),
    ):
        for name, column in names.items():
            assert metric.compute()[name].item() == pytest.approx(found[f"{column}/policy"])
    distance, items = DistributionDistance(segment="caption"), DescriptiveItems()
    demonstrations = [example.response for example in module.trainer.datamodule.examples[:3]]
    distance.update(policy=texts * 3, supervision=demonstrations)
    items.update(texts * 3)
    assert distance.compute()["distance"].item() == pytest.approx(found["descriptive_items/distance"])
    assert items.compute()["mean"].item() == pytest.approx(found["descriptive_items/policy"])
    right = PassAtK([1, 2])
    right.update(torch.tensor([[1, 0, 0]] * 3))
    for k in (1, 2):
        assert right.compute()[f"pass_at_{k}"].item() == pytest.approx(found[f"pass_at_{k}"])


def test_malformed_responses_count_for_nothing_but_format_and_lenient_accuracy(random_policy, tmp_path):
    table = evaluate(tmp_path, random_policy, [RIGHT, BARE]).tables["test"]["all"]
    assert table["accuracy"]["mean"] == 0.5
    assert table["lenient_accuracy"]["mean"] == 1.0
    assert table["format"]["mean"] == 0.5
    assert table["descriptive_items/policy"]["mean"] == 2.0
    assert table["descriptive_items/policy"]["responses"] == 3
    all_bare = evaluate(tmp_path / "bare", random_policy, [BARE, BARE]).tables["test"]["all"]
    assert math.isnan(all_bare["descriptive_items/policy"]["mean"])
    assert math.isnan(all_bare["descriptive_items/distance"]["mean"])
    assert all_bare["descriptive_items/policy"]["responses"] == 0
    written = json.loads((tmp_path / "bare" / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert written["tables"]["test"]["all"]["descriptive_items/policy"]["mean"] is None
    assert math.isnan(read_evaluation(tmp_path / "bare").table("test")["descriptive_items/policy"]["mean"])


def test_without_scenes_and_without_supervision_those_metrics_are_absent(random_policy, tmp_path):
    data = Rows()
    for example in data.examples:
        example.response = None
    table = evaluate(tmp_path, random_policy, [RIGHT, WRONG], data).tables["test"]["all"]
    assert not [metric for metric in table if "caption_" in metric or "step_" in metric]
    assert not [metric for metric in table if metric.endswith(("/supervision", "/distance"))]
    assert table["descriptive_items/policy"]["mean"] == 1.5


def test_json_holds_records_and_settings_and_tensorboard_the_scalars(random_policy, tmp_path):
    evaluate(tmp_path, random_policy, [RIGHT, WRONG], name="tiny", sampling=Sampling(seed=5))
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert not list(tmp_path.glob("*.tmp"))
    assert written["name"] == "tiny"
    assert written["policy"] == random_policy
    assert written["sampling"]["seed"] == 5
    assert written["rule_in_words"] == "bullets or numbered lines, else sentences"
    assert {"torch", "transformers", "lightning", "prism_pl"} == written["versions"].keys()
    first = written["records"][0]
    assert (first["id"], first["family"], first["split"]) == ("row-0", "sum", "test")
    assert [response["correct"] for response in first["policy"]] == [True, False]
    assert [response["items"] for response in first["policy"]] == [2, 1]
    assert first["policy"][0]["caption"] == {"true": 2, "missed": 0, "invented": 1, "exact": 1}
    assert first["supervision"]["steps"] == 3
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("evaluate/test/sum/accuracy")[0].value == 0.5
    assert events.Scalars("evaluate/hard/all/descriptive_items/distance")[0].value == 0.5


def test_each_batch_has_its_own_seed(random_policy, tmp_path):
    engine = Scripted([RIGHT])
    evaluate(tmp_path, random_policy, [], engine=engine, sampling=Sampling(seed=5), num_samples=1, pass_k=[1])
    assert engine.seeds == [5, 6]


def test_wrong_options_and_rows_are_named(random_policy, tmp_path):
    with pytest.raises(ValueError, match=r"num_samples is 2 and sampling\.temperature 0"):
        EvaluateModule(PolicySpec(random_policy), Scripted([]), num_samples=2)
    with pytest.raises(ValueError, match=r"pass_k is \[4\].*num_samples=2"):
        EvaluateModule(PolicySpec(random_policy), Scripted([]), Sampling(), num_samples=2, pass_k=[4])
    data = Rows()
    data.examples[1].answers = []
    with pytest.raises(ValueError, match=r"1 of 4 test rows cannot be used.*no answer: 'row-1'"):
        evaluate(tmp_path, random_policy, [RIGHT, WRONG], data)
    data = Rows()
    data.examples[1].id = "row-0"
    with pytest.raises(ValueError, match="two rows have the id 'row-0'"):
        evaluate(tmp_path, random_policy, [RIGHT, WRONG], data)
    assert not (tmp_path / "evaluation.json").exists()


class RowsWithRule(Rows):
    def is_right(self, answer, example):
        return answer == "9"


def test_where_the_data_have_a_rule_rows_need_no_answer(random_policy, tmp_path):
    data = RowsWithRule()
    data.examples[1].answers = []
    module = evaluate(tmp_path, random_policy, [RIGHT, WRONG], data)
    assert [response["correct"] for response in module.records[1]["policy"]] == [False, True]


class Small(Scripted):
    """An engine that says beforehand what it takes (`prism_pl.row_needs.HasLimits`)."""

    max_images = 1

    def __init__(self, max_model_len):
        super().__init__([RIGHT, WRONG])
        self.max_model_len, self.started = max_model_len, False

    def start(self, policy, processor, *, rank):
        self.started = True


def test_rows_that_do_not_fit_are_all_named_before_the_engine_starts(random_policy, tmp_path):
    data = Rows()
    longest = max(map(PolicySpec(random_policy).processor().prompt_length, data.examples))
    data.examples[0].question *= 20
    data.examples[2].images = [*data.examples[2].images, tmp_path / "gone.png"]
    data.examples[3].images *= 2
    engine = Small(longest + 8)
    with pytest.raises(ValueError, match="3 of 4 test rows cannot be used, so nothing was sampled") as error:
        evaluate(tmp_path, random_policy, [], data, engine=engine, sampling=Sampling(max_tokens=8))
    assert f"a prompt of over {longest} tokens, the engine's max_model_len less sampling.max_tokens: 'row-0'" in str(
        error.value
    )
    assert "image that cannot be used: 'row-2' (the first: row 'row-2': the image" in str(error.value)
    assert "over 1 images, the engine's max_images: 'row-3'" in str(error.value)
    assert not engine.started
    evaluate(tmp_path, random_policy, [], Rows(), engine=engine, sampling=Sampling(max_tokens=8))
    assert engine.started


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_looked_at_without_a_trace(workers, random_policy):
    """As many as the run takes of each loader; draws go on as if nobody had looked."""
    processor, examples = PolicySpec(random_policy).processor(), make_examples(6)
    examples[5].answers = []
    loaders = [DataLoader(examples, batch_size=2, shuffle=workers == 0, num_workers=workers), [examples]]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="1 of 6 held-out rows"):
        check_usable(loaders, [math.inf, 1], processor, RowNeeds(answers=True), "held-out")
    assert torch.equal(torch.get_rng_state(), state)
    ordered = DataLoader(examples, batch_size=2, num_workers=workers)
    check_usable([ordered], [2], processor, RowNeeds(answers=True), "held-out")
    with pytest.raises(ValueError, match="1 of 6 held-out rows"):
        check_usable([ordered], [3], processor, RowNeeds(answers=True), "held-out")


def test_another_checkpoints_results_are_not_overwritten(random_policy, tmp_path):
    evaluate(tmp_path, random_policy, [RIGHT, WRONG], name="first")
    evaluate(tmp_path, random_policy, [RIGHT, RIGHT], name="first")
    with pytest.raises(ValueError, match=r"'first'.*'second'.*default_root_dir"):
        evaluate(tmp_path, random_policy, [RIGHT, WRONG], name="second")
    assert read_evaluation(tmp_path).table("test")["accuracy"]["mean"] == 1.0


def test_another_policy_under_the_same_name_is_refused(random_policy, tmp_path):
    evaluate(tmp_path / "run", random_policy, [RIGHT, RIGHT], name="first")
    copy = shutil.copytree(random_policy, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"'first' \(policy .*random\).*'first' \(policy .*copy\).*default_root_dir"):
        evaluate(tmp_path / "run", str(copy), [RIGHT, WRONG], name="first")
    assert read_evaluation(tmp_path / "run").table("test")["accuracy"]["mean"] == 1.0


def test_paired_differences(random_policy, tmp_path):
    evaluate(tmp_path / "a", random_policy, [RIGHT, RIGHT], name="align")
    evaluate(tmp_path / "b", random_policy, [RIGHT, WRONG], name="sft")
    a, b = read_evaluation(tmp_path / "a"), read_evaluation(tmp_path / "b" / "evaluation.json")
    assert "| align | 100.0 [100.0, 100.0] |" in "\n".join(results_table({"align": a, "sft": b}))
    found = differences(a, b)
    # Every prompt has the same responses, so each resample gives the same difference and the interval is a point.
    assert found["accuracy"] == pytest.approx((0.5, 0.5, 0.5, 3))
    assert found["descriptive_items/distance"] == pytest.approx((-0.5, -0.5, -0.5, 3))  # 0 - 0.5
    assert found["reasoning_steps/distance"] == pytest.approx((0.5, 0.5, 0.5, 3))  # |1 - 3| - 1.5
    assert found["caption_precision"] == pytest.approx((2 / 3 - 0.6,) * 3 + (3,))
    assert found["format"].excludes_zero() is False
    evaluate(tmp_path / "c", random_policy, [RIGHT, RIGHT], name="by lines", rule="lines")
    with pytest.raises(ValueError, match="different rules"):
        results_table({"align": a, "by lines": read_evaluation(tmp_path / "c")})


def test_images_of_the_first_prompts_of_each_split_are_kept(random_policy, tmp_path):
    data = RowsWithScenes()
    data.examples[0].id = "a/b: 1"
    data.examples[1].images = [Image.new("RGB", (1024, 64)), Image.new("RGB", (32, 32))]
    evaluate(tmp_path, random_policy, [RIGHT, WRONG], data, num_images=2)
    kept = {record["id"]: record["images"] for record in read_evaluation(tmp_path).records}
    assert [len(kept[id]) for id in ("a/b: 1", "row-1", "row-2", "row-3")] == [1, 2, 0, 1]  # row-3 is hard
    assert sorted(f"images/{path.name}" for path in (tmp_path / "images").iterdir()) == sorted(chain(*kept.values()))
    assert [Image.open(tmp_path / name).size for name in kept["row-1"]] == [(512, 32), (32, 32)]


def test_distance_bootstrap_is_wasserstein_and_pairs_the_prompts():
    generator = np.random.default_rng(1)
    a, b, s = (
        {str(p): generator.integers(low, high, n).tolist() for p in range(60)}
        for low, high, n in ((0, 6, 4), (2, 9, 4), (5, 9, 1))
    )
    pooled = [[count for counts in side.values() for count in counts] for side in (a, b, s)]
    of_a, of_b = wasserstein_distance(pooled[0], pooled[2]), wasserstein_distance(pooled[1], pooled[2])
    interval = distance_interval(a, s, 500)
    assert interval.mean == pytest.approx(of_a)
    assert interval.low < of_a < interval.high
    difference = paired_distance_difference(a, b, s, 500)
    assert difference.mean == pytest.approx(of_a - of_b)
    assert difference.excludes_zero()
    assert paired_distance_difference(a, a, s, 500)[:3] == (0, 0, 0)
    shuffled = dict(reversed(list(a.items())))
    assert distance_interval(shuffled, s, 500) == interval
    with pytest.raises(ValueError, match="such as '59'"):
        distance_interval({k: v for k, v in a.items() if k != "59"}, s)


def test_distance_bootstrap_resamples_one_row_a_prompt():
    # One prompt of two has a distance of 4, the other of 0: resamples give 0 (1 in 4), 2 or 4 (1 in 4).
    policy, supervision = {"a": [1], "b": [9]}, {"a": [1], "b": [5]}
    assert distance_interval(policy, supervision, 2000) == (2.0, 0.0, 4.0, 2)
    assert math.isnan(distance_interval({"a": [], "b": [1]}, supervision, 200).low)


def test_the_real_engine_on_real_digits(random_policy, tmp_path):
    from datamodules.digits import DigitsDataModule

    data = DigitsDataModule(num_test=3, num_hard=2, batch_size=4, system_prompt="Answer.")
    options = {"sampling": Sampling(temperature=0.0, max_tokens=6), "num_samples": 1, "pass_k": [1]}
    module = evaluate(tmp_path, random_policy, [], data, engine=TransformersEngine(), **options)
    assert [record["split"] for record in module.records] == ["test"] * 3 + ["hard"] * 2
    assert all(1 <= record["policy"][0]["tokens"] <= 6 for record in module.records)
