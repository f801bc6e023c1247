"""`data check`: every planted fault is named, and a run leaves out what it lists."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from datamodules import DemonstrationsDataModule
from datamodules.batching import Batches, plan_batches
from prism_pl.__main__ import main
from prism_pl.batch import Example
from prism_pl.chat import parse, segments
from prism_pl.data.facts import FactFinder, looks, pixel_key, question_key
from prism_pl.data.overlap import Split, overlap
from prism_pl.data.report import histogram, report
from prism_pl.discriminator import SparseMoEDiscriminator
from prism_pl.policy import PolicySpec
from prism_pl.rollout import AutoEngine, Sampling, TransformersEngine, VLLMEngine, auto
from prism_pl.row_needs import Lengths, RowNeeds, with_discriminator, with_engine
from prism_pl.segments import segment_ids
from scripts.blank_policy import ROOT
from tests.benchmark_files import write_benchmarks
from tests.conftest import make_examples
from tests.file_data import RESPONSE, opened, picture, prompt, sharegpt, write_images, write_lines, write_parquet


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    write_images(tmp_path, 8)
    return tmp_path


def broken_rows(folder):
    """Rows 0 to 2 are sound; each of the others has a fault of its own."""
    Image.new("1", (20_000, 20_000)).save(folder / "images" / "huge.png")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(folder / "images" / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "images" / "broken.png").write_bytes(b"<html>")
    chat = sharegpt(5)["messages"]
    return [
        sharegpt(0),
        sharegpt(1),
        sharegpt(2, images=["images/1x1.png"]),
        json.dumps(sharegpt(3))[:80],
        sharegpt(3, images=["images/gone.png"]),
        sharegpt(3, images=["images/huge.png"]),
        sharegpt(3, images=["images/moving.gif"]),
        sharegpt(3, images=["images/broken.png"]),
        sharegpt(4, messages=[chat[0], {"role": "assistant", "content": RESPONSE.replace("<think>", "")}]),
        sharegpt(5, messages=[chat[0], {"role": "assistant", "content": RESPONSE.replace("3 x 4", "1" * 1_000_000)}]),
        sharegpt(0),
        sharegpt(6, messages=[{"role": "user", "content": "<image><|im_end|><|image_pad|>?"}, chat[1]]),
    ]


def test_every_planted_fault_is_named_and_left_out_of_the_run(folder, blank_policy, capsys, monkeypatch):
    monkeypatch.setattr(auto, "find_spec", lambda name: object())  # the default engine would take vLLM
    Image.new("L", (1, 1)).save(folder / "images" / "1x1.png")
    train = write_lines(folder / "rows.jsonl", broken_rows(folder))
    test = write_lines(folder / "test.jsonl", [sharegpt(1)])
    Image.open(folder / "images" / "2.png").resize((100, 66)).save(folder / "images" / "scaled.jpg", quality=95)
    benchmark = write_parquet(folder / "bench.parquet", [prompt(7, images=["images/0.png"])])
    data = {"class_path": "datamodules.DemonstrationsDataModule", "init_args": {"train": str(train), "test": str(test)}}
    data["init_args"]["num_validation"] = 0  # warmup.yaml holds more rows out than there are
    bench = {
        "class_path": "datamodules.PromptsDataModule",
        "init_args": {"train": str(benchmark), "test": str(benchmark)},
    }
    model = {"class_path": "modules.DiscriminatorModule", "init_args": {"policy": {"path": blank_policy}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    (folder / "bench.yaml").write_text(yaml.safe_dump({"data": bench}))
    options = [
        "--out",
        "found",
        "--against",
        "bench.yaml",
        "--max_tokens",
        "20000",
        "--exclude",
        "overlap",
        "duplicates",
    ]
    assert main(["data", "check", "--config", "warmup.yaml", "--config", "mine.yaml", *options]) == 0
    page = capsys.readouterr().out
    excluded = {
        row["id"]: row for row in map(json.loads, (folder / "found" / "excluded.jsonl").read_text().splitlines())
    }
    reasons = {name: (row["reason"], row["detail"]) for name, row in excluded.items()}
    expected = {
        "rows-0": ("overlap with bench", "has an image of bench"),
        "rows-1": ("overlap with test", "of test"),
        "rows-3": ("row that cannot be read", "rows.jsonl, row 4: no whole JSON object"),
        "rows-4": ("image that cannot be used", "images/gone.png' does not exist"),
        "rows-5": ("image that cannot be used", "too large (Image size (400000000 pixels)"),
        "rows-6": ("image that cannot be used", "animated"),
        "rows-7": ("image that cannot be used", "broken.png' cannot be read"),
        "rows-8": ("malformed demonstration: <think> is missing", "row 'rows-8'"),
        "rows-9": ("over 20000 tokens", "row 'rows-9'"),
        "rows-10": ("duplicate", "row 'rows-10' is row 'rows-0' again"),
    }
    assert reasons.keys() == expected.keys()
    for name, (reason, detail) in expected.items():
        assert reasons[name][0] == reason, name
        assert detail in reasons[name][1], name
        assert reason in page
    assert "| train" in page
    assert "What the stage needs of a row: demonstration, max length 20000, max images 4, max segment 128." in page
    assert "--data.check_folder found" in page

    kept = opened(DemonstrationsDataModule(str(train), test=str(test), check_folder="found", batch_size=1))
    trained = [row for batch in kept.train_dataloader() for row in batch]
    assert sorted(row.id for row in trained) == ["rows-11", "rows-2"]
    assert [row.id for batch in kept.predict_dataloader() for row in batch] == ["rows-2", "rows-11"]


def test_a_check_of_other_rows_is_refused(folder, blank_policy):
    write_lines(folder / "rows.jsonl", [sharegpt(n) for n in range(4)])
    sft = [
        "--config",
        "sft.yaml",
        "--data",
        "datamodules.DemonstrationsDataModule",
        "--data.train",
        "rows.jsonl",
        "--out",
        "found",
    ]
    sft += ["--data.num_validation", "0"]  # sft.yaml holds more rows out than there are
    check = ["data", "check", *sft, "--out", "found", "--model.policy.path", blank_policy, "--headers_only"]
    assert main(check) == 0
    opened(DemonstrationsDataModule("rows.jsonl", check_folder="found"))
    with pytest.raises(ValueError, match=r"found is a check of other rows than these \(num_rows: 4 -> 3"):
        opened(DemonstrationsDataModule("rows.jsonl", check_folder="found", num_rows=3))
    write_lines(folder / "rows.jsonl", [sharegpt(n) for n in (1, 0, 2, 3)])
    with pytest.raises(ValueError, match=r"check of other rows than these.*rows: "):
        opened(DemonstrationsDataModule("rows.jsonl", check_folder="found"))
    with pytest.raises(FileNotFoundError, match=r"none holds no check\.json.*data check"):
        opened(DemonstrationsDataModule("rows.jsonl", check_folder="none"))
    assert main(["data", "chek"]) == 2
    assert main([*check, "--exclude", "all"]) == 2


def test_lengths_are_the_collators(blank_policy):
    processor = PolicySpec(blank_policy).processor()
    examples = make_examples(3)
    examples[1] = replace(examples[1], images=[*examples[1].images, picture(1, (70, 40))])
    for pixels in (True, False):
        found = FactFinder(processor, RowNeeds(), pixels)(examples)
        for facts, example in zip(found, examples, strict=True):
            assert facts.prompt_tokens == len(processor.prompt(example).ids)
            assert facts.response_tokens == len(processor.response_ids(example.response))


def test_what_a_stage_needs():
    whole = Example("a", "Why?", response=RESPONSE, answers=["6"])
    bare, silent = replace(whole, response="6"), replace(whole, response=None, answers=[" "])
    nine = Lengths(4, 5)
    assert [RowNeeds(response=True).unmet(row, nine) for row in (whole, bare, silent)] == ["", "", "no response"]
    needs = RowNeeds(demonstration=True)
    assert [needs.unmet(row, nine) for row in (whole, bare, silent)] == [
        "", "malformed demonstration: <caption> is missing", "no response"
    ]  # fmt: skip
    assert [RowNeeds(answers=True).unmet(row, nine) for row in (whole, silent)] == ["", "no answer"]
    assert [RowNeeds(max_length=9).unmet(whole, Lengths(4, n)) for n in (5, 6)] == ["", "over 9 tokens"]
    assert RowNeeds(max_prompt=4).unmet(whole, nine) == ""
    assert RowNeeds(max_prompt=3).unmet(whole, nine).startswith("a prompt of over 3 tokens")
    assert RowNeeds(max_images=0).unmet(replace(whole, images=[b""]), nine).startswith("over 0 images")
    assert RowNeeds(max_segment=4).unmet(whole, Lengths(4, 9, 5)).startswith("a segment of over 4 tokens")
    # The warm start samples for no row that has a rejected response.
    spared = RowNeeds(max_prompt=3, unless_rejected=True)
    assert [bool(spared.unmet(row, nine)) for row in (whole, replace(whole, rejected="6"))] == [True, False]


@pytest.mark.parametrize(
    ("options", "max_segment", "experts"),
    [
        ({"path": "base", "init_heads": True}, 4096, ("perception", "reasoning")),
        ({"path": "base", "init_heads": True, "max_segment_tokens": 9, "segments": "whole"}, 9, ("response",)),
        ({"path": "warm"}, 128, ("perception", "reasoning")),
        ({"path": "hub/name"}, None, ("perception", "reasoning")),
    ],
)
def test_a_stage_knows_what_its_engine_and_discriminator_take(options, max_segment, experts, folder):
    (folder / "warm").mkdir()
    shutil.copy(ROOT / "assets" / "discriminator" / "discriminator.json", folder / "warm")
    engine = VLLMEngine(max_model_len=100, max_images=2)
    needs = with_engine(RowNeeds(demonstration=True), engine, Sampling(max_tokens=30))
    needs = with_discriminator(needs, partial(SparseMoEDiscriminator, **options))
    assert (needs.max_prompt, needs.max_images) == (70, 2)
    assert (needs.max_segment, needs.experts) == (max_segment, experts)
    assert with_engine(RowNeeds(), TransformersEngine(), Sampling()) == RowNeeds()


def test_the_default_engine_takes_what_the_one_that_it_would_choose_takes(monkeypatch):
    needs = RowNeeds(answers=True)
    row = replace(make_examples(1)[0], images=[b""] * 5, answers=["1"])
    monkeypatch.setattr(auto, "find_spec", lambda name: object())
    known = with_engine(needs, AutoEngine(), Sampling())
    assert known == with_engine(needs, VLLMEngine(), Sampling())
    assert known.unmet(row, Lengths()) == "over 4 images, the engine's max_images"
    assert with_engine(needs, AutoEngine(max_images=7), Sampling()).unmet(row, Lengths()) == ""
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    assert with_engine(needs, AutoEngine(), Sampling()) == needs  # transformers takes any number
    chosen = AutoEngine()
    monkeypatch.setattr(auto, "find_spec", lambda name: object())
    chosen.engine = chosen.fallback  # vLLM was there and did not load
    assert with_engine(needs, chosen, Sampling()) == needs


def test_the_limits_of_the_default_engine_cost_no_import_of_vllm():
    code = (
        "import sys; from prism_pl.rollout import AutoEngine; e = AutoEngine(); e.max_images, e.max_model_len;"
        "sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_segments_are_measured_as_the_discriminator_cuts_them(blank_policy):
    processor = PolicySpec(blank_policy).processor()
    example = make_examples(1)[0]
    texts = segments(parse(example.response or "")).values()
    longest = max(len(segment_ids(processor, text)) for text in texts)
    for most, reason in ((longest, ""), (longest - 1, f"a segment of over {longest - 1} tokens")):
        (facts,) = FactFinder(processor, RowNeeds(demonstration=True, max_segment=most))([example])
        assert facts.unusable.startswith(reason)
        assert bool(facts.unusable) == bool(reason)


def test_what_stops_alignment_is_said_and_a_long_prompt_is_left_out_where_asked_for(folder, capsys):
    """The shipped 4B settings: 8,192 tokens of which 6,144 are the response's, prompts filtered at 2,048."""
    picture(3, (1984, 1984)).save(folder / "images" / "big.png")
    rows = [prompt(n) for n in range(3)]
    rows.append(prompt(4, images=[{"bytes": (folder / "images" / "big.png").read_bytes(), "path": None}]))
    rows.append(prompt(5, teacher_cot=f"<think>{'1 + 1 = 2. ' * 2000}</think><answer>6</answer>"))
    write_parquet(folder / "rows.parquet", rows)
    shutil.copytree(ROOT / "assets" / "sft", folder / "policy")
    shutil.copytree(ROOT / "assets" / "discriminator", folder / "judge")
    file = folder / "policy" / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"longest_edge": 262144', '"longest_edge": 16777216'))
    said = {}
    for limit in ("null", "2048"):
        check = ["data", "check", "--config", "qwen3vl-4b/align.yaml", "--out", "found", "--headers_only"]
        check += ["--model.policy.path", "policy", "--model.discriminator.init_args.path", "judge"]
        check += ["--data.train", "rows.parquet", "--data.num_validation", "0", "--data.num_workers", "0"]
        assert main([*check, "--data.max_prompt_tokens", limit]) == 0
        said[limit] = capsys.readouterr().out
    assert "1 x a prompt of over 2048 tokens, the engine's max_model_len less sampling.max_tokens" in said["null"]
    assert "1 x a segment of over 128 tokens" in said["null"]
    assert "A run stops at the first of the 2 training rows" in said["null"]
    assert "1 of 5 training rows are left out by data.max_prompt_tokens." in said["2048"]
    assert "A run stops at the first of the 1 training rows" in said["2048"]


def test_bad_held_out_rows_are_counted_and_left_out(folder, blank_policy, capsys, caplog):
    held_out = np.sort(np.random.default_rng(0).permutation(8)[:3])
    rows = [sharegpt(n) for n in range(8)]
    rows[held_out[0]]["images"] = ["images/gone.png"]
    write_lines(folder / "rows.jsonl", rows)
    check = ["data", "check", "--config", "sft.yaml", "--data", "datamodules.DemonstrationsDataModule"]
    check += ["--data.train", "rows.jsonl", "--data.num_validation", "3", "--model.policy.path", blank_policy]
    assert main([*check, "--out", "found"]) == 0
    page = capsys.readouterr().out
    assert "A run can use all 5 training rows." in page
    assert "A run stops at the first of the 1 validation rows that it cannot use." in page
    data = opened(DemonstrationsDataModule("rows.jsonl", num_validation=3, check_folder="found"))
    with caplog.at_level("INFO"):
        left = [row.id for batch in data.val_dataloader() for row in batch]
    assert left == [f"rows-{n}" for n in held_out[1:]]
    assert "Data check: 1 of 3 validation rows left out; 1 x image that cannot be used." in caplog.text


def test_test_rows_alone_are_checked_as_an_evaluation_needs_them(folder, blank_policy, capsys):
    benchmark = write_benchmarks(folder / "files")[4]
    named = [{"class_path": "prism_pl.benchmarks.MMMU", "init_args": {"path": benchmark.path}}]
    model = {"policy": {"path": blank_policy}, "engine": "prism_pl.rollout.VLLMEngine"}
    (folder / "mine.yaml").write_text(yaml.safe_dump({"model": model, "data": {"benchmarks": named}}))
    check = ["data", "check", "--config", "benchmarks.yaml", "--config", "mine.yaml", "--out", "found"]
    check += ["--model.engine.max_model_len", "9000", "--headers_only"]
    assert main([*check, "--model.engine.max_images", "2"]) == 0
    page = capsys.readouterr().out
    assert "What the stage needs of a row: answers, max prompt 808, max images 2." in page
    assert "An evaluation can use all 3 test rows." in page
    assert main([*check, "--model.engine.max_images", "1"]) == 0
    page = capsys.readouterr().out
    assert "An evaluation does not begin: it cannot use 1 of 3 test rows (found/excluded.jsonl lists them)." in page
    (row,) = map(json.loads, (folder / "found" / "excluded.jsonl").read_text().splitlines())
    assert (row["id"], row["reason"]) == ("mmmu/validation_Geography_3", "over 1 images, the engine's max_images")
    assert main([*check, "--exclude", "duplicates"]) == 2
    assert "this configuration has test rows alone" in capsys.readouterr().err


def test_keys_tell_equal_images_and_questions():
    image = picture(3)
    assert pixel_key(image) == pixel_key(image.copy()) != pixel_key(image.resize((47, 32)))
    assert question_key("<image>\nWhat is 3 + 4?") == question_key("what  is 3 - 4") != question_key("What is 3 + 5?")


def test_images_that_look_alike_are_found_and_others_are_not(tmp_path):
    photo = picture(3, (24, 32)).resize((640, 480))
    photo.resize((200, 150)).save(tmp_path / "small.jpg", quality=60)
    differing = int.from_bytes(looks(photo), "big") ^ int.from_bytes(looks(Image.open(tmp_path / "small.jpg")), "big")
    assert 0 < differing.bit_count() < 10
    drawing = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(drawing).line([(20, 180), (180, 20)], "black", 5)
    other = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(other).line([(20, 20), (180, 180)], "black", 5)
    blank = Image.new("RGB", (50, 50), "white")

    def split(*images):
        return Split("train", FactFinder(None, RowNeeds())([Example("", f"{n}", [i]) for n, i in enumerate(images)]))

    train = split(photo, drawing, blank, picture(4, (12, 16)))
    test = split(tmp_path / "small.jpg", other, blank.resize((60, 60)), drawing.resize((100, 100)))
    found = overlap({"train": train, "test": test}, {})
    assert found.shared[("train", "train")]["images that look alike"] == 2
    assert found.shared[("train", "train")]["images"] == 0
    assert found.shared_rows.keys() == {0, 1}


def test_overlap_by_hand():
    def facts(question, image):
        found = FactFinder(None, RowNeeds())([Example(f"{question}-{image}", question, images=[picture(image)])])[0]
        return found

    train = Split("train", [facts("a", 0), facts("b", 1), facts("a", 0), facts("c", 2)])
    test = Split("test", [facts("a", 0), facts("b", 5), facts("d", 2)])
    found = overlap({"train": train, "test": test}, {})
    assert found.duplicates == {"train": {2: 0}, "test": {}}
    # Questions a, b, a; images 0, 0, 2; the row (a, 0) twice.
    assert found.shared[("train", "test")] == {"questions": 3, "images": 3, "images that look alike": 3, "rows": 2}
    assert found.shared_rows.keys() == {0, 2, 3}


@pytest.mark.parametrize("pixels", [True, False])
def test_rows_are_equal_only_where_their_images_were_compared(pixels, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"<html>")
    asked = [[picture(0)], [picture(1)], [tmp_path / "gone.png"], [picture(0), tmp_path / "broken.png"], []]
    rows = [Example(f"{n}", "Find x.", images=images) for n, images in enumerate(asked)] * 2
    train = Split("train", FactFinder(None, RowNeeds(), pixels)(rows))
    found = overlap({"train": train, "test": Split("test", train.facts[5:])}, {})
    # The two with pictures that can be read stand again, and the one without any.
    assert found.duplicates["train"] == ({5: 0, 6: 1, 9: 4} if pixels else {9: 4})
    assert found.shared_rows.keys() == ({0, 1, 4, 5, 6, 9} if pixels else {4, 9})


def test_what_was_not_compared_is_said():
    def split(name, images, pixels=True):
        rows = [Example(f"{name}-{n}", f"{n}?", images=[image]) for n, image in enumerate(images)]
        return Split(name, FactFinder(None, RowNeeds(), pixels)(rows))

    def page(splits, others):
        found = overlap(splits, others)
        return found, report(splits, others, found, RowNeeds(), Path("found"))

    pictures = [picture(n) for n in range(3)]
    train, astray = split("train", pictures), split("bench", [Path("gone", f"{n}.png") for n in range(3)])
    found, said = page({"train": train}, {"bench": astray, "half": split("half", [pictures[0], Path("gone.png")])})
    assert list(found.shared[("train", "bench")].values()) == [3, None, None, None]
    assert list(found.shared[("train", "half")].values()) == [2, 1, 1, 1]
    assert "| bench | 3 | 0 | 3 | - | 0 |" in re.sub(" +", " ", said)
    assert "| train | bench | 3 | - | - | - |" in re.sub(" +", " ", said)
    assert "3 x image that cannot be used\n    * row 'bench-0': the image 'gone/0.png' does not exist" in said
    assert "3 of 3 rows of bench could not be read: what training rows share with them is not known" in said
    assert "1 of 2 rows of half could not be read" in said

    headers = {name: split(name, pictures, pixels=False) for name in ("train", "test")}
    found, said = page(headers, {})
    assert list(found.shared[("train", "test")].values()) == [3, None, None, None]
    assert "| train | 3 | 3 | 3 | - | 0 |" in re.sub(" +", " ", said)
    assert "--headers_only reads none" in said
    _, said = page({"train": train, "test": split("test", pictures)}, {})
    assert "not compared" not in said
    assert "could not be read" not in said


def test_a_histogram_by_hand():
    lines = histogram([10, 10, 11, 12, 33])
    # 24 lengths in 12 ranges of 2; three rows are the fullest range, 40 marks long.
    assert lines[0] == "     10 to      11          3  " + "#" * 40
    assert lines[1] == "     12 to      13          1  " + "#" * 14
    assert lines[2] == "     14 to      15          0"
    assert lines[-1].startswith("     32 to      33          1  ")
    assert len(lines) == 12


# Batches of like length


def test_batches_by_number_hold_every_row_once_and_rows_of_like_length():
    lengths = np.random.default_rng(0).integers(10, 1000, 1003)
    plan = plan_batches(lengths, 10, None, seed=0)
    batches = [plan.batch(number) for number in range(len(plan))]
    assert len(batches) == 100
    assert all(len(batch) == 10 for batch in batches)
    assert len({row for batch in batches for row in batch}) == 1000
    padding = sum(lengths[batch].max() * 10 - lengths[batch].sum() for batch in batches) / lengths.sum()
    assert padding < 0.02
    assert batches != [plan_batches(lengths, 10, None, seed=1).batch(n) for n in range(100)]
    assert batches == [plan_batches(lengths, 10, None, seed=0).batch(n) for n in range(100)]


def test_batches_by_tokens_fill_the_budget_and_never_pass_it():
    lengths = np.random.default_rng(0).integers(10, 1000, 1003)
    plan = plan_batches(lengths, 64, 4000, seed=0)
    batches = [plan.batch(number) for number in range(len(plan))]
    assert sorted(row for batch in batches for row in batch) == list(range(1003))
    sizes = [len(batch) * lengths[batch].max() for batch in batches]
    assert max(sizes) <= 4000
    assert np.mean(sizes) > 0.8 * 4000
    assert max(map(len, batches)) <= 64
    with pytest.raises(ValueError, match="batch_tokens is 500, and the longest row has 9"):
        plan_batches(lengths, 64, 500, seed=0)
    rows = Batches([f"r{n}" for n in range(1003)], plan)  # pyright: ignore[reportArgumentType]
    assert rows[3] == [f"r{n}" for n in batches[3]]
