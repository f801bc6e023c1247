"""The difficulty filter: measured pass rates, what is kept of them, what is recorded, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch
import yaml
from lightning import Trainer
from torch.utils.data import DataLoader

from datamodules.difficulty import keep_by_difficulty
from datamodules.digits import DigitsDataModule
from modules.pass_rates import PassRateModule
from prism_pl.__main__ import main
from prism_pl.chat import render
from prism_pl.pass_rates import KEPT_IDS, PASS_RATES, histogram, read_pass_rates, read_recipe
from prism_pl.pipeline.results import results_of
from prism_pl.policy import PolicySpec
from prism_pl.rewards import RewardOutput
from prism_pl.rollout.engine import Sampling
from tests.conftest import make_examples
from tests.test_evaluate import BARE, RIGHT, Scripted

OTHER = render("- red 3", "1. guess", "9")


def predict(folder, policy, rows, texts, **options):
    """A predict run with these responses to every prompt; the lines that it wrote."""
    engine = options.pop("engine", None) or Scripted(texts, lengths=[4] * len(texts))
    settings = {"sampling": Sampling(), "num_samples": len(texts), **options}
    module = PassRateModule(PolicySpec(policy), engine, **settings)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(default_root_dir=folder, accelerator="cpu", **quiet)
    trainer.predict(module, DataLoader(rows, batch_size=2, collate_fn=module.collator))
    header, *lines = [json.loads(line) for line in (Path(folder) / PASS_RATES).read_text().splitlines()]
    assert header["recipe"] == {"data": None, "policy": policy, "sampling": ANY, "num_samples": settings["num_samples"]}
    return lines


def test_pass_rates_by_hand(random_policy, tmp_path):
    rows = make_examples(3)
    rows[1].answers = ["9"]
    lines = predict(tmp_path, random_policy, rows, [RIGHT, BARE, OTHER, RIGHT])
    # The answer is 10 but for row 1, where it is 9; a bare right answer is malformed and counts as wrong.
    assert lines == [
        {"id": "row-0", "pass_rate": 0.5, "num_samples": 4, "num_correct": 2, "format_rate": 0.75},
        {"id": "row-1", "pass_rate": 0.25, "num_samples": 4, "num_correct": 1, "format_rate": 0.75},
        {"id": "row-2", "pass_rate": 0.5, "num_samples": 4, "num_correct": 2, "format_rate": 0.75},
    ]
    predict(tmp_path, random_policy, rows, [OTHER, OTHER])
    assert {path.name for path in tmp_path.iterdir()} == {PASS_RATES, "pass_rates-1.jsonl"}
    assert read_pass_rates(tmp_path / PASS_RATES) == {"row-0": 0.0, "row-1": 1.0, "row-2": 0.0}


def test_the_pipeline_reads_the_file_as_predict_writes_it(random_policy, tmp_path):
    rows = make_examples(3)
    rows[1].answers = ["9"]
    predict(tmp_path, random_policy, rows, [RIGHT, BARE, OTHER, RIGHT])  # pass rates 1/2, 1/4, 1/2
    assert results_of({"kind": "predict"}, tmp_path, (0.2, 0.3)) == {  # pyright: ignore[reportArgumentType]
        "prompts": 3,
        "mean_pass_rate": pytest.approx(5 / 12),
        "keep": (0.2, 0.3),
        "kept": 1,
        "none_right": 0,
        "all_right": 0,
    }


class Killed(Scripted):
    """Breaks at the second batch."""

    def generate(self, examples, num_samples, sampling, on_group=None):
        if self.seeds:
            raise ValueError("killed")
        return super().generate(examples, num_samples, sampling, on_group)


def test_a_broken_measurement_leaves_the_file_of_before(random_policy, tmp_path):
    rows = make_examples(3)
    with pytest.raises(ValueError, match="killed"):
        predict(tmp_path, random_policy, rows, [RIGHT], engine=Killed([RIGHT], lengths=[4]))
    assert list(tmp_path.iterdir()) == []
    lines = predict(tmp_path, random_policy, rows, [RIGHT])
    with pytest.raises(ValueError, match="killed"):
        predict(tmp_path, random_policy, rows, [OTHER], engine=Killed([OTHER], lengths=[4]))
    assert [json.loads(line) for line in (tmp_path / PASS_RATES).read_text().splitlines()][1:] == lines


def test_wrong_options_and_rewards_are_named(random_policy, tmp_path):
    with pytest.raises(ValueError, match=r"num_samples is 8 and sampling\.temperature 0"):
        PassRateModule(PolicySpec(random_policy), Scripted([]), Sampling(temperature=0.0))
    with pytest.raises(ValueError, match="num_samples is 0"):
        PassRateModule(PolicySpec(random_policy), Scripted([]), Sampling(), num_samples=0)

    class Half:
        def __call__(self, responses, examples):
            return RewardOutput(torch.ones(len(responses)), {"accuracy": torch.full((len(responses),), 0.5)})

    with pytest.raises(ValueError, match=r'Half gives no part "accuracy" of 0 or 1 for row \'row-0\''):
        predict(tmp_path, random_policy, make_examples(1), [RIGHT], reward=Half())


# What is kept


def write(file, rates):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"id": id, "pass_rate": rate}) + "\n" for id, rate in rates.items()))
    return file


def kept(folder, rates, keep=(0.2, 0.8), ids=None):
    """Ids of the rows that are kept of those with these pass rates."""
    file = write(folder / "filter" / PASS_RATES, rates)
    ids = list(rates) if ids is None else ids
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(folder / "run"))
    rows = keep_by_difficulty(ids, ids, file, keep, trainer)  # pyright: ignore[reportArgumentType]
    return [rows[index] for index in range(len(rows))]  # pyright: ignore[reportArgumentType]


def test_both_bounds_are_kept_and_what_lies_outside_is_not(tmp_path):
    rates = {"a": 0.0, "b": 1 / 5, "c": 0.1999, "d": 0.5, "e": 4 / 5, "f": 0.8001, "g": 1.0}
    assert kept(tmp_path, rates) == ["b", "d", "e"]
    recorded = json.loads((tmp_path / "run" / KEPT_IDS).read_text())
    assert recorded["ids"] == ["b", "d", "e"]
    assert recorded["keep"] == [0.2, 0.8]
    assert kept(tmp_path, rates, keep=(1.0, 1.0)) == ["g"]
    assert kept(tmp_path, rates, ids=["g", "b", "a"]) == ["b"], "rows of the file that are not trained on do not matter"


def test_a_run_that_goes_on_goes_on_with_the_rows_it_began_with(tmp_path):
    kept(tmp_path, {"a": 0.5, "b": 1.0})
    kept(tmp_path, {"a": 0.5, "b": 0.5})  # before its first checkpoint a run may begin with others
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    assert kept(tmp_path, {"a": 0.4, "b": 0.6}) == ["a", "b"]
    with pytest.raises(ValueError, match=r"kept_ids\.json: the run began with 2 rows.*now keeps 1.*--fresh"):
        kept(tmp_path, {"a": 0.5, "b": 1.0})


def test_an_empty_result_shows_the_histogram(tmp_path):
    with pytest.raises(ValueError, match=r"keep \[0\.2, 0\.8\] leaves none of 3 rows.*: 0 x 2, 1 x 1\. Widen keep"):
        kept(tmp_path, {"a": 0.0, "b": 0.0, "c": 1.0})
    assert not (tmp_path / "run").exists()


def test_many_pass_rates_are_shown_in_tenths():
    assert histogram([0.0, 0.5, 0.5]) == "0 x 1, 0.5 x 2"
    assert histogram([n / 100 for n in range(0, 101, 5)]).endswith("0.8 to 0.9 x 2, 0.9 to 1.0 x 3")


def test_rows_without_a_pass_rate_are_an_error_that_names_the_first(tmp_path):
    with pytest.raises(
        ValueError, match=r"no pass rate of the training row 'b' and 1 rows more: measure the same rows"
    ):
        kept(tmp_path, {"a": 0.5}, ids=["a", "b", "c"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("oops", r"line 2: not a JSON object"),
        ("[1]", r'line 2: give an object with "id" and "pass_rate"'),
        ('{"id": "b"}', r'line 2: give an object with "id" and "pass_rate"'),
        ('{"id": "b", "pass_rate": 1.5}', r"line 2: pass_rate is 1\.5"),
        ('{"id": "b", "pass_rate": NaN}', r"line 2: pass_rate is nan"),
        ('{"id": "b", "pass_rate": "0.5"}', r"line 2: pass_rate is '0\.5'"),
        ('{"id": "a", "pass_rate": 0.5}', r"line 2: the row 'a' stands twice"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, says):
    file = tmp_path / "rates.jsonl"
    file.write_text(f'{{"id": "a", "pass_rate": 0.5}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"rates\.jsonl, {says}"):
        read_pass_rates(file)


def test_an_id_may_hold_the_end_of_a_line_of_another_alphabet(tmp_path):
    file = tmp_path / "rates.jsonl"
    file.write_text('{"id": "a\u2028b", "pass_rate": 0.5}\n')
    assert read_pass_rates(file) == {"a\u2028b": 0.5}


def test_a_missing_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.jsonl.*python -m prism_pl predict"):
        read_pass_rates(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no pass rates"):
        read_pass_rates(tmp_path / "empty.jsonl")


def test_pass_rates_of_other_data_are_refused_and_of_unknown_data_taken_by_id(tmp_path):
    file = write(tmp_path / "filter" / PASS_RATES, {"a": 0.5})
    trainer = SimpleNamespace(is_global_zero=False, default_root_dir=str(tmp_path))
    recipe = {"rows": "5f1c", "system_prompt": "Look."}
    keep_by_difficulty(["a"], ["a"], file, (0, 1), trainer, recipe)  # pyright: ignore[reportArgumentType]
    file.write_text(json.dumps({"recipe": {"data": recipe}}) + "\n" + file.read_text())
    keep_by_difficulty(["a"], ["a"], file, (0, 1), trainer, recipe)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"measured on other data than is trained on.*rows: 5f1c -> 77aa"):
        keep_by_difficulty(["a"], ["a"], file, (0, 1), trainer, {**recipe, "rows": "77aa"})  # pyright: ignore[reportArgumentType]


# The digits data and the command line


def test_the_digits_data_trains_on_what_is_kept_and_predicts_on_all(tmp_path):
    ids = [f"digits-rlvr-0-{n}" for n in range(6)]
    file = write(tmp_path / PASS_RATES, dict(zip(ids, [0.0, 0.5, 1.0, 0.2, 0.8, 0.1], strict=True)))
    data = DigitsDataModule(rows="rlvr", num_train=6, batch_size=2, pass_rates=str(file))
    collator = SimpleNamespace(collator=list, hparams={})
    data.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        is_global_zero=True, default_root_dir=tmp_path, world_size=1, global_rank=0, lightning_module=collator
    )
    data.setup("fit")
    trained = {row.id for batch in data.train_dataloader() for row in batch}
    assert trained <= {ids[1], ids[3], ids[4]}
    assert len(data.train_rows) == 3  # pyright: ignore[reportArgumentType]
    assert [row.id for batch in data.predict_dataloader() for row in batch] == ids
    with pytest.raises(ValueError, match="rows is 'align'"):
        DigitsDataModule(rows="align", pass_rates=str(file))
    with pytest.raises(ValueError, match=r"keep is \[0\.8, 0\.2\]"):
        DigitsDataModule(rows="rlvr", keep=(0.8, 0.2))


def test_predict_and_fit_from_the_command_line(random_policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    engine = "prism_pl.rollout.TransformersEngine"
    few = ["--data.num_train", "4", "--data.batch_size", "2", "--model.policy.path", random_policy]
    sampling = ["--model.num_samples", "2", "--model.sampling.max_tokens", "4", "--model.engine", engine]
    assert main(["predict", "--config", "filter.yaml", *few, *sampling]) == 0, capsys.readouterr().err
    assert list(read_pass_rates(Path("runs/filter") / PASS_RATES).values()) == [0.0] * 4
    measured = read_recipe(Path("runs/filter") / PASS_RATES) or {}
    assert measured["data"]["digits"] == "rlvr"
    assert measured["policy"] == random_policy
    Path("mine.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"pass_rates": "runs/filter"}}}))
    fit = ["fit", "--config", "rlvr.yaml", "--config", "mine.yaml", *few, "--model.rollout", engine]
    assert main([*fit, "--trainer.default_root_dir", "runs/a"]) == 1
    assert "leaves none of 4 rows" in capsys.readouterr().err
    steps = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--model.sampling.max_tokens", "4"]
    assert main([*fit, *steps, "--data.seed", "1", "--trainer.default_root_dir", "runs/a"]) == 1
    assert "measured on other data than is trained on" in capsys.readouterr().err
    assert main([*fit, *steps, "--data.keep", "[0, 0.5]", "--trainer.default_root_dir", "runs/b"]) == 0
    assert len(json.loads(Path("runs/b", KEPT_IDS).read_text())["ids"]) == 4
    assert main(["predict", "--config", "sft.yaml"]) == 2
    assert "SFTModule has no predict_step" in capsys.readouterr().err
