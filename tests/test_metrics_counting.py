import pytest
import torch

from prism_pl.chat import render
from prism_pl.metrics import DescriptiveItems, ReasoningSteps, count_items, describe_rule

LIST = "I see two digits:\n- a red 3\n  - it is large. It leans.\n* a blue 5\n"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("I read 3. Then I add 4. The sum is 7.", 3),
        ("no end mark at all", 1),
        ("A 3.5 and a .5 make 4.0 in x.y.", 1),
        ("Is it a 3? Yes! It is.", 3),
        ("Wait... it is 3.", 2),
        ("Compare e.g. 3 vs. 5, i.e. two digits (cf. Fig. 2), approx. equal.", 1),
        ("No. 3 is red. It is odd.", 2),
        ("Is it red? No. It is blue.", 3),
        ("At 5 p.m. it is dark. Digits, letters, etc. Then more, etc. and so on.", 3),
        ("So the answer is B. Done.", 2),
        ("The sum is 12. The maximum is 9. Answer: 12.", 3),
        ("1. read 3; 2. add 4; 3. say 7", 1),
        ("1. Read 3. 2. Add 4. 3. Say 7.", 3),
        ("first line\nsecond line without stops", 2),
        ('He said "it is 3." Then (so it was.) $x = 3.$ **Done.** ok', 5),
        ("第一个数字是3。第二个是5。和是8。", 3),
        ("", 0),
        ("... !\n---", 0),
    ],
)
def test_sentences(text, count):
    assert count_items(text, "sentences") == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (LIST, 3),  # the lead-in is no bullet; the nested one is, once
        ("1. read 3; 2. add 4", 1),
        ("1. read 3\n2) add 4\n(3) say 7\n**4.** done", 4),
        ("Step 1: read 3\n### Step 2\n**Step 3:** say 7\nStep 4 follows from step 3", 3),
        ("• a 3\n– a 5\n+ a 7", 3),
        ("-5 is negative\n3.5 is not a number of a list\n**bold** text\n*emphasis* too", 0),
        ("- \n---\n* * *\n1.\n", 0),
        ("2024. was a year", 0),
    ],
)
def test_bullets(text, count):
    assert count_items(text, "bullets") == count


def test_the_default_counts_bullets_and_falls_back_to_sentences():
    assert count_items(LIST) == count_items(LIST, "bullets") == 3
    # "I see two digits:" / "- a red 3" / "- it is large." "It leans." / "* a blue 5": line ends count too
    assert count_items(LIST, "sentences") == 5
    assert count_items("I read 3. I read 5.") == 2
    assert count_items("I read 3. I read 5.", "bullets") == 0


def test_lines_ignore_blank_and_decorative_lines():
    assert count_items("a. b. c.\n\n---\n  \nd", "lines") == 2


def test_an_unknown_rule_names_the_choices_and_the_nearest():
    with pytest.raises(ValueError, match=r"rule='sentence' is unknown.*lines.*Did you mean 'sentences'"):
        count_items("x", "sentence")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="rule='words' is unknown"):
        ReasoningSteps(rule="words")  # pyright: ignore[reportArgumentType]


def responses() -> list[str]:
    """Captions of 1, 3 and 2 items, reasoning of 2, 4 and 6 steps."""
    return [
        render("- a", "1. a\n2. b", "7"),
        render("- a\n- b\n- c", "1. a\n2. b\n3. c\n4. d", "7"),
        render("- a\n- b", "A. " * 6, "7"),
    ]


def test_reasoning_steps_hand_values():
    metric = ReasoningSteps()
    metric.update([*responses(), "<think>no blocks</think>", ""])
    # counts 2, 4, 6: mean 4, variance (4 + 0 + 4) / 3
    assert_values(metric.compute(), mean=4.0, std=(8 / 3) ** 0.5, n=3, malformed=2)


def test_descriptive_items_read_the_caption_only():
    metric = DescriptiveItems()
    metric.update(responses())
    # counts 1, 3, 2: mean 2, variance (1 + 1 + 0) / 3
    assert_values(metric.compute(), mean=2.0, std=(2 / 3) ** 0.5, n=3, malformed=0)


def test_equal_counts_have_a_std_of_exactly_zero():
    metric = DescriptiveItems()
    for _ in range(7):
        metric.update([render("- a\n- b\n- c", "x", "y")])
    assert metric.compute()["std"] == 0


def test_without_a_valid_response_the_mean_is_nan():
    metric = ReasoningSteps()
    metric.update(["malformed"])
    result = metric.compute()
    assert result["mean"].isnan()
    assert result["std"].isnan()
    assert (result["n"], result["malformed"]) == (0, 1)


def test_the_rule_is_named_in_the_output():
    assert ReasoningSteps().rule == "bullets_or_sentences"
    assert "bullets or numbered lines, else sentences" in ReasoningSteps().describe()
    assert DescriptiveItems(rule="lines").describe().startswith("descriptive items")
    assert describe_rule("lines") in DescriptiveItems(rule="lines").describe()


def test_the_rule_decides_the_count():
    metric = ReasoningSteps(rule="sentences")
    metric.update([render("- a", "1. Read 3. Keep it.\n2. Add.", "7")])
    assert metric.compute()["mean"] == 3


def assert_values(result, **expected):
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(result[key].double(), torch.tensor(value, dtype=torch.float64), rtol=1e-6, atol=0)
