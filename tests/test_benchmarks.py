"""Published benchmarks: rows to examples, rules on published edge cases, and all of them through the command line."""

import json
import time
from pathlib import Path

import pytest
import yaml

from prism_pl.__main__ import main
from prism_pl.batch import Example
from prism_pl.benchmarks import MMMU, Benchmark, MathVision
from prism_pl.benchmarks.hallusionbench import yes_or_no
from prism_pl.benchmarks.options import picked
from prism_pl.processor import open_image
from prism_pl.report.evaluations import read_evaluation
from prism_pl.rewards import same_when_rounded
from tests.benchmark_files import write_benchmarks


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> dict[str, Benchmark]:
    return {each.name: each for each in write_benchmarks(tmp_path_factory.mktemp("benchmarks") / "files")}


@pytest.fixture(scope="module")
def examples(benchmarks) -> dict[str, list[Example]]:
    return {name: [each.example(row) for row in each.rows()] for name, each in benchmarks.items()}


def test_every_row_is_an_example_with_its_pictures(examples):
    assert {name: len(rows) for name, rows in examples.items()} == {
        "mathvista": 4,
        "mathverse": 4,
        "mathvision": 5,
        "wemath": 7,
        "mmmu": 3,
        "mmmu_pro_standard": 1,
        "mmmu_pro_vision": 1,
        "hallusionbench": 6,
    }
    rows = [row for of_one in examples.values() for row in of_one]
    assert len({row.id for row in rows}) == len(rows)
    num_images = {row.id: len(row.images) for row in rows if len(row.images) != 1}
    # A figure that is only a supplement is left out; both pictures of a question, three of shuffled options.
    assert num_images == {
        "hallusionbench/VS_map_0_0_0": 0,
        "mmmu/validation_Geography_3": 2,
        "mmmu_pro_standard/test_Art_1": 3,
    }
    assert {open_image(image, row.id).size for row in rows for image in row.images} == {(48, 48)}


def test_prompts_are_question_options_and_the_form_of_the_answer(examples):
    by_id = {row.id: row.question for rows in examples.values() for row in rows}
    assert by_id["mathvista/1"] == (
        "Question: What is the mean height of the bars? (Unit: cm)\n"
        "Give a number with 1 decimal places as the final answer."
    )
    assert by_id["mathvista/3"] == (
        "Question: Which bar is the tallest?\nChoices:\n(A) red\n(B) green\n(C) dark green\n"
        "Choose one option and give its letter as the final answer."
    )
    assert by_id["mathverse/1"].startswith("Give the answer at once.\nQuestion: Angle A")
    assert "(A)" not in by_id["mathvision/2"], "options that are their letters are not listed"
    assert "\n(B) $2$\n" in by_id["mathvision/4"]
    assert "\nA. 3; B. 4;C. 6π;  D. No correct answer\n" in by_id["wemath/2steps_1/2steps_1"]
    assert "\nA. a third\nB. a fifth\n" in by_id["mmmu/validation_Music_1"]
    assert "J. none of 7" in by_id["mmmu_pro_standard/test_Art_1"]
    assert "option 3" not in by_id["mmmu_pro_vision/test_Art_1"]
    assert by_id["hallusionbench/VD_figure_0_0_0"] == "Are the lines parallel?\nAnswer yes or no."


def test_without_instructions_question_and_options_stand_alone(benchmarks):
    bare = MathVision(benchmarks["mathvision"].path, instructions=False)
    assert bare.example(bare.rows()[0]).question == "How many dots?\n<image1>"


def test_pictures_stand_in_the_order_of_their_marks(examples, benchmarks):
    (row,) = examples["mmmu_pro_standard"]
    # <image 2>, <image 3>, <image 4> are shown: the first, second and third picture that the policy sees.
    assert row.question.startswith("Which picture has the colour of <image 1>?\nA. <image 3>\nB. <image 2>\n")
    reds = [open_image(image, row.id).getpixel((0, 0))[0] for image in row.images]  # pyright: ignore
    assert reds == [80, 120, 160]
    broken = {**benchmarks["mmmu_pro_standard"].rows()[0], "image_3": None}
    with pytest.raises(ValueError, match=r"'test_Art_1' shows <image 3> and has no image_3"):
        benchmarks["mmmu_pro_standard"].example(broken)


# Benchmark, row, answer, verdict. Where ours differs from the published code the line says so.
RULES = [
    # MathVista: precision, integers cut, the nearest option.
    ("mathvista", 0, "2.5", True),
    ("mathvista", 0, "2.46", True),  # rounds to 2.5
    ("mathvista", 0, "2.44", False),
    ("mathvista", 0, "2.5 cm", True),  # published after an extraction by a language model
    ("mathvista", 0, "2.5 kg", True),  # the unit stands in the question, not in the truth
    ("mathvista", 1, "4.9", True),  # int(float("4.9"))
    ("mathvista", 1, "4", True),
    ("mathvista", 1, "four", True),  # published: None
    ("mathvista", 1, "5", False),
    ("mathvista", 1, "nan", False),
    ("mathvista", 2, "B", True),
    ("mathvista", 2, "(B) green", True),
    ("mathvista", 2, "green", True),
    ("mathvista", 2, "dark green", False),
    ("mathvista", 2, "greenish", True),  # nearest by edit distance: green 3, dark green 8
    ("mathvista", 2, "(Z)", False),
    ("mathvista", 2, "", False),
    ("mathvista", 3, "[2001, 2003]", True),
    ("mathvista", 3, "2001, 2003", False),
    # MathVerse: letters, options' texts, values.
    ("mathverse", 0, "B", True),
    ("mathverse", 0, "150°", True),
    ("mathverse", 0, "150", True),
    ("mathverse", 0, "B:150°", True),
    ("mathverse", 0, "A or B", False),
    ("mathverse", 1, "150°", True),  # options stand in the image, `question_for_eval` tells them
    ("mathverse", 2, "5 cm", True),
    ("mathverse", 2, "6", False),
    # MATH-Vision: letter, the option's value, two decimals.
    ("mathvision", 0, "6", True),
    ("mathvision", 0, "6.001", True),  # rounds to 6.00
    ("mathvision", 0, "6.01", False),
    ("mathvision", 1, "(D)", True),
    ("mathvision", 1, "d.", True),
    ("mathvision", 1, "C", False),
    ("mathvision", 2, "4\\pi", True),
    ("mathvision", 2, "12.57", True),
    ("mathvision", 2, "12.5", False),
    ("mathvision", 3, "A", True),
    ("mathvision", 3, "\\sqrt{2}", True),
    ("mathvision", 3, "1.414", True),
    ("mathvision", 3, "B", False),
    ("mathvision", 4, "0.25", True),  # a truth with a form feed
    # We-Math: letters; "(C)" and the text are wrong in the published code.
    ("wemath", 0, "C", True),
    ("wemath", 0, "C. 6π", True),
    ("wemath", 0, "(C)", True),
    ("wemath", 0, "6π", True),
    ("wemath", 0, "A", False),
    ("wemath", 0, "A. 3; C. 6π", False),
    # MMMU: no random option; open answers by number and by words.
    ("mmmu", 0, "B", True),
    ("mmmu", 0, "a fifth", True),
    ("mmmu", 0, "cannot be told", False),  # published: one of the options, at random
    ("mmmu", 1, "1250.5", True),
    ("mmmu", 1, "about 1,250.50 W", True),
    ("mmmu", 1, "1250.504", True),  # two decimals
    ("mmmu", 1, "1250.5 or 1300", False),  # published: True, any number counts
    ("mmmu", 1, "1251", False),
    ("mmmu", 2, "The city of bonn", True),
    ("mmmu", 2, "It is Bonn, on the Rhine", True),
    ("mmmu", 2, "Bonnet", False),  # published: True, "bonn" in "bonnet"
    # MMMU-Pro: letters up to J.
    ("mmmu_pro_standard", 0, "J", True),
    ("mmmu_pro_standard", 0, "J. none of 7", True),
    ("mmmu_pro_standard", 0, "A", False),
    ("mmmu_pro_vision", 0, "I", True),
    ("mmmu_pro_vision", 0, "option 8", True),
    ("mmmu_pro_vision", 0, "none", False),
    # HallusionBench: yes and no; unclear is right only where the figure is a supplement and left out.
    ("hallusionbench", 0, "Yes", True),
    ("hallusionbench", 0, "Yes, they are.", True),
    ("hallusionbench", 0, "correct", True),
    ("hallusionbench", 0, "No", False),
    ("hallusionbench", 0, "It cannot be told", False),
    ("hallusionbench", 4, "It cannot be told", True),
    ("hallusionbench", 4, "no", False),
    ("hallusionbench", 4, "", False),
]


@pytest.mark.parametrize(("name", "row", "answer", "right"), RULES)
def test_rules(benchmarks, examples, name, row, answer, right):
    assert benchmarks[name].is_right(answer, examples[name][row]) is right


def test_a_judge_is_told_what_the_rule_knows(examples):
    """The options that stand in a picture, and that "cannot be told" is right without the figure."""
    (vision,) = examples["mmmu_pro_vision"]
    assert "A. option 0\n" in vision.meta["asked"]
    assert "\nI. option 8\n" in vision.meta["asked"]
    told = {row.id: "cannot be told counts as right" in row.meta["asked"] for row in examples["hallusionbench"]}
    assert [row for row, unclear in told.items() if unclear] == ["hallusionbench/VS_map_0_0_0"]
    assert examples["hallusionbench"][4].meta["asked"].startswith("Is the lake north of the town? (In words: ")


def test_a_choice_is_one_option_of_those_there_are():
    assert picked("E", ["1", "2", "3", "4"]) is None
    assert picked("J", [str(n) for n in range(10)]) == "J"
    assert picked("3", ["3", "three"]) == "A"  # the same text before an equal value
    assert picked("3.0", ["3", "three"]) is None
    assert picked("", ["1", "2"]) is None


def test_yes_and_no_are_first_words():
    said = {text: yes_or_no(text) for text in ("NO.", "**Yes**", "The answer is yes.", "false", "There is no lake", "")}
    assert list(said.values()) == ["no", "yes", "yes", "no", None, None]


def test_rounding_compares_values_alone():
    assert same_when_rounded("0.333", "1/3", 2)
    assert not same_when_rounded("0.33", "1/3", 3)
    assert not same_when_rounded("3 cm", "3 kg", 2)
    assert not same_when_rounded("red", "der", 2)


def test_wrong_files_are_named(tmp_path, benchmarks):
    wrong = tmp_path / "rows.jsonl"
    wrong.write_text(json.dumps({"id": "1", "question": "?", "option": [], "answer": "1"}) + "\n")
    with pytest.raises(ValueError, match=r"no column 'options'. Did you mean option\?.*file of this benchmark"):
        MathVision(str(wrong)).rows()
    wrong.write_text('{"id": "1", "question')
    with pytest.raises(ValueError, match=r"rows\.jsonl is no whole JSON.*download it anew"):
        MathVision(str(wrong)).rows()
    with pytest.raises(FileNotFoundError, match=r"'/nowhere/mmmu\.parquet'.*could not be read.*hub name"):
        MMMU("/nowhere/mmmu.parquet").rows()
    with pytest.raises(ValueError, match="limit is 0"):
        MMMU(limit=0)
    assert len(MathVision(benchmarks["mathvision"].path, limit=2).rows()) == 2
    assert len(MMMU(benchmarks["mmmu"].path, limit=2).rows()) == 2


def test_texts_may_hold_the_ends_of_lines_of_other_alphabets(tmp_path):
    row = {"id": "1", "question": "a\u2028b\u0085c", "options": [], "answer": "1", "image": "1.png", "subject": "s"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert list(MathVision(str(tmp_path / "rows.jsonl")).rows()) == [row]


def test_a_truth_that_is_no_letter_is_the_option_of_its_value(benchmarks):
    row = {**benchmarks["mathvision"].rows()[0], "options": ["5", "6"], "answer": "6"}
    example = benchmarks["mathvision"].example(row)
    right = [benchmarks["mathvision"].is_right(answer, example) for answer in ("6", "B", "A", "no idea")]
    assert right == [True, True, False, False]
    none_of_them = benchmarks["mathvision"].example({**row, "answer": "7"})
    assert [benchmarks["mathvision"].is_right(answer, none_of_them) for answer in ("7", "6", "B")] == [
        True,
        False,
        False,
    ]


def test_a_long_answer_is_judged_at_once(benchmarks):
    choices = ["a long choice of words " * 2] * 4 + ["z"]
    row = {**benchmarks["mathvista"].rows()[2], "choices": choices, "answer": "z"}
    example = benchmarks["mathvista"].example(row)
    begun = time.monotonic()
    assert not benchmarks["mathvista"].is_right("word soup " * 3000, example)
    assert time.monotonic() - begun < 5  # all 30,000 characters: 40 s


def test_all_benchmarks_through_the_command_line(random_policy, tmp_path, monkeypatch, without_vllm):
    """The shipped YAML with the tiny policy, on the files: a table each, with the scores over several questions."""
    folder = tmp_path / "files"
    benchmarks = write_benchmarks(folder)
    config = yaml.safe_load((Path(__file__).parent.parent / "configs" / "benchmarks.yaml").read_text())
    named = config["data"]["init_args"]["benchmarks"]
    for entry, benchmark in zip(named, benchmarks, strict=True):
        assert entry["class_path"] == f"prism_pl.benchmarks.{type(benchmark).__name__}"
        entry.setdefault("init_args", {})["path"] = benchmark.path
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"benchmarks": named}}}))
    monkeypatch.chdir(tmp_path)
    command = ["test", "--config", "benchmarks.yaml", "--config", "mine.yaml", "--model.policy.path", random_policy]
    assert (
        main([*command, "--model.sampling.max_tokens", "8", "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    )
    found = read_evaluation(tmp_path / "run")
    assert list(found.tables) == [benchmark.name for benchmark in benchmarks]
    assert found.tables["wemath"]["all"].keys() >= {"strict", "loose", "lenient_strict"}
    assert found.tables["hallusionbench"]["all"].keys() >= {"aAcc", "fAcc", "qAcc"}
    assert found.tables["mathvista"]["all"]["accuracy"]["prompts"] == 4
    assert found.settings["sampling"]["temperature"] == 0
