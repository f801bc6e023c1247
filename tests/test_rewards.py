"""`prism_pl.rewards.accuracy` case by case, and the shape rewards."""

import time

import pytest

from prism_pl.chat import lenient_answer, parse
from prism_pl.rewards import accuracy, format, overlong, timeouts

# What a release of the paper's code was seen to accept, wrongly.
WRONGLY_ACCEPTED = [
    (r"2\sqrt{3}", "2"),
    ("5 kg", "5 lb"),
    ("12 mm", "12 cm"),
    ("12 cm^2", "12 cm"),
    ("1.5x", "15x"),
    ("12", "(1,2)"),
    (r"3\pi", "3"),
    ("3x", "3"),
    ("5!", "5"),
    ("(A) and (B)", "A"),
    ("50%", "50"),
]
# What it was seen to reject, wrongly.
WRONGLY_REJECTED = [
    ("1,000", "1000"),
    ("(1, 2)", "(1,2)"),
    (r"$\sqrt8$", r"$2\sqrt2$"),
    ("2x+1", "1+2x"),
    (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}"),
    (r"\dfrac12", "1/2"),
    ("C", "C. cat"),
    ("−5", "-5"),
    ("50%", "0.5"),
]
# Equal whichever of the two is the answer.
EQUAL = {
    "choice": [
        ("B", "(B)"), ("B", "B."), ("B", "b"), ("B", "B) cat"), ("B", "B: cat"), ("B", r"\text{B}"), ("B", "**B**"),
        ("B", "The answer is B."), ("B", "Option B"), ("C. cat", "C) a cat"), ("H", "(H)"), ("B", r"\boxed{B}"),
        ("B. 5 kg", "B) 5"), ("(B) 1/2", "B: 0.5"), ("B. 7", "B"),
    ],
    "numbers": [
        ("3.0", "3"), ("+7", "7"), ("7.", "7"), ("1,234,567.5", "1234567.5"), (r"1\,000", "1000"), ("1{,}000", "1000"),
        ("2.5e3", "2500"), (r"2.5\times10^{3}", "2500"), ("2.5 × 10³", "2500"), ("1e-3", "0.001"), (".5", "0.5"),
        ("– 3", "-3"), ("７", "7"), ("007", "7"), ("three", "3"), ("-0", "0"), ("2 million", "2000000"), ("(5)", "5"),
        ("$7$", "7"), (r"\(7\)", "7"), (r"\boxed{7}", "7"), ("Answer: 7", "7"), ("7e0", "7"),
    ],
    "fractions": [
        ("1/2", "0.5"), (r"\frac{1}{2}", "0.5"), (r"\frac12", "1/2"), (r"\tfrac{1}{2}", "½"), ("1 1/2", "1.5"),
        ("1½", "3/2"), (r"1\frac{1}{2}", "1.5"), ("-1/2", r"-\frac{1}{2}"), ("2/4", "1/2"), ("0.333333", "1/3"),
        (r"\frac{-1}{2}", "-0.5"), (r"\frac{6}{2}", "3"),
    ],
    "percentages": [("50%", "0.5"), (r"50\%", "1/2"), ("50 percent", "50%"), ("12.5%", "0.125"), ("50.0%", "50 %")],
    "units": [
        ("5 kg", "5kg"), ("5 kg", "5"), ("5 kg", "5000 g"), ("100 cm", "1 m"), ("36 km/h", "10 m/s"),
        ("5 in.", "5 inches"),
        ("12 cm²", "12 cm^2"), (r"12\text{ cm}^2", "12 square centimeters"), ("1 m^2", "10000 cm^2"),
        ("2 h", "120 min"),
        (r"90^\circ", "90"), ("90 degrees", "90°"), ("$5", "5 dollars"), ("$1,000", "1000"), ("25 °C", "25 Celsius"),
        (r"2\sqrt{3} cm", r"2\sqrt{3}"), (r"2\sqrt{3} cm", r"\sqrt{12} cm"), ("5 m s^{-1}", "5 m/s"),
        ("60 mph", "60 mi/h"),
        ("5 meters squared", "5 m^2"), (r"\frac{1}{2} m", "50 cm"), ("3m", "3 m"), ("5 mL", "0.005 L"),
    ],
    "parts": [
        ("(1,2)", "( 1 , 2.0 )"), ("(1,2)", "1, 2"), ("3 and 4", "3, 4"), ("1, 2, and 3", "1,2,3"), ("3; 4", "3, 4"),
        ("x = 3, y = 4", "3, 4"), (r"\{2, 1\}", r"\{1, 2\}"), ("100,200", "100, 200"), ("(1/2, 50%)", "(0.5, 1/2)"),
        ("red, Blue", "red blue"), ("3, 1, 4", "3 1 4"), ("[1, 2)", "[1,2)"), (r"(-\infty, 3]", r"(-\infty,3]"),
        ("((1,2),(3,4))", "((1, 2), (3, 4))"), ("1,000 and 2,000", "1000, 2000"), ("$3$ and $4$", "3, 4"),
    ],
    "words": [
        ("Yes", "yes"), ("red", "Red."), ("top  left", "Top left"), ('"stop"', "STOP"), ("3:45 pm", "3:45 PM"),
        ("3 : 4", "3:4"), ("A cat", "a cat"),
    ],
    "assignments": [("x = 3", "3"), ("y = 2x+1", "2x + 1"), (r"\angle ABC = 30°", "30°"), ("f(x) = x^2", "x^2")],
    "mathematics": [
        ("2√3", r"2\sqrt{3}"), ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"), ("3π", r"3\pi"), ("x^2 - 1", "(x-1)(x+1)"),
        ("2*x", "2x"), ("2xy", "2yx"), ("x**2", "x^2"), ("2^3", "8"), ("4!", "24"), (r"\log_2 8", "3"),
        ("x > 3", "3 < x"),
        (r"x > 3", r"(3, \infty)"), (r"(1,2)\cup(3,4)", r"(3,4) \cup (1,2)"), (r"\sin^2 x+\cos^2 x", "1"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), ("y^2+x^2=1", "x^2+y^2=1"),
        (r"\left(\frac{1}{2}\right)^2", "0.25"), (r"\log_{2}(8)", "3"), (r"\log_2(8)", "3"), ("3(10^4)", "30000"),
        ("3(x+1)", "3x+3"), ("f(3)", "f(3)"), (r"\max(3,7)", r"\max(3,7)"), (r"\frac{10!}{8!}", "90"), ("2⋅x", "2x"),
        (r"\sin(\frac{\pi}{6})", "0.5"), (r"\frac{\sqrt{16}}{2}", "2"), (r"x \ge 7", r"[7, \infty)"), ("(-2)^2", "4"),
        (r"\frac{1}{2}(3+\sqrt{5})", r"\frac{3+\sqrt5}{2}"), ("3⋅10^4", "30000"),
    ],
}  # fmt: skip
# Different whichever of the two is the answer.
DIFFERENT = {
    "choice": [("A", "B"), ("B. cat", "C. cat"), ("A and B", "A"), ("A or B", "B"), ("A", "A, B, C, D"),
               ("B. 5", "B. 7"), ("B) 5 kg", "(B) 5 lb"), ("C. 1/2", "C. 1/3")],
    "numbers": [
        ("-5", "5"), ("1000001", "1000000"), ("1 2", "12"), ("0.33", "1/3"), ("1e-9", "0"), ("1/0", "5"), ("2", "3"),
    ],
    "percentages": [("50", "50%"), ("50%", "50 kg"), ("5%", "0.5")],
    "units": [
        ("5 mW", "5 MW"), ("90°C", "90°"), ("5 m/s", "5 m"), ("5 m^2", "5 m^3"), ("$5", "€5"), ("3m", "3"),
        ("x + 3 m", "x+3"),
        (r"2\sqrt{3} cm", r"2\sqrt{3} mm"), ("come in", "come"),
    ],
    "parts": [
        ("(1,2)", "(2,1)"), ("1,2", "1,2,3"), ("[1,2)", "(1,2)"), ("(1,2)", "[1,2]"), ("3 1 5", "3 1 4"),
        ("3, 4", "3"), ("[1,2)", "1, 2"),
    ],
    "words": [("red", "der"), ("no 1", "on 1"), ("yes", "no"), ("left", "top left"), ("cat", "act")],
    "assignments": [("x=3", "y=3"), ("3=7", "7"), ("7=3", "7")],
    "mathematics": [
        ("2x", "2X"), ("x", "y"), (r"\pm 3", "3"), ("x > 3", "x \\ge 3"), ("3:4", "0.75"), ("|x|", "x"),
        (r"\alpha", r"\beta"),
        ("x^2", "2x"), ("7_8", "7"), ("x > 3", r"[3, \infty)"),
    ],
}  # fmt: skip
# Answers that fish for a reward, each with the truth 7 (or A).
HACKS = [
    "", " ", ".", "3 or 7", "7 or 8", "7, 8", "7, 7", "6, 7, 8", "7 8", "7 7 7", "7\n8", "7; 8", "7 and 8", r"\{3,7\}",
    "7 (or 8)", "7/8/9", "6 < 7", "7..9", "7-8", ">= 7", r"7 \pm 1", "3 + 4", "0+7", r"7 \cdot 1", "x", "not 7",
    "7 not 8",
    "1 2 3 4 5 6 7 8 9", "x=7 or x=8", "7=8", "8=7", r"\boxed{7} \boxed{8}", "$7$ $8$", r"\min(7,8), 9", "{7", "7)(7",
    "A", "7%", "70%", "A, B, C, D", "(A) (B) (C) (D)", r"\mathbb{R}", r"\emptyset", "__import__('os')", "7'",
    '7"8', "the sum", r"\max(3,7)", r"\min(7, 9)", r"\max{(3,7)}", r"\gcd(14,21)", r"7 \lor 8", r"7 \approx 8",
    r"3 \approx 7", "3 ≈ 7", r"7 \approx 7.4", r"x = 7 \approx 8", r"x \ge 7", r"\lim_{x\to 7} x", r"\int_0^7 dx",
    r"\sqrt{9}+4", r"\sqrt{9+40}", "3!+1", r"\frac{7}{8}8", r"\frac{7}{8}(8)", r"\frac{7}{2}\sqrt{4}",
]  # fmt: skip
# A product of 3 and 4 left to be worked out, in the ways that math-verify or a font takes for one.
PRODUCTS = [
    "3(4)", "(3)(4)", "3 (4)", "(3)4", r"3\left(4\right)", r"3\ast 4", r"3\cdot 4", r"3 \times 4", "3*4", "3∗4", "3⋅4",
    "3∙4", "3⊗4", "3⋆4", "3·4", "3×4", r"3\sqrt{16}", r"\sqrt{9}\sqrt{16}", r"\sqrt{9}4", r"\sqrt{9}(4)",
    r"\sqrt[2]{9}4", r"\frac{3}{1}(4)", r"\frac{(3)(4)}{1}", "3[4]", "{3}{4}",
]  # fmt: skip
ROUNDED = [
    (r"x \approx 3.46", "3.46"), (r"2\sqrt{3} \approx 3.46", r"2\sqrt{3}"), (r"2\sqrt{3} ≈ 3.46", "3.46"),
    (r"x = 2\sqrt{3} \approx 3.46", r"2\sqrt{3}"), (r"\frac{1}{3} \approx 0.33", "1/3"), (r"\pi \approx 3.14", r"\pi"),
    (r"2\sqrt{3} cm \approx 3.46 cm", r"2\sqrt{3} cm"),
]  # fmt: skip
CHOICE_HACKS = [
    "", "A and B", "A or B", "A, B", "A/B", "AB", "A B C D", "A, B, C, D", "(A) and (B)", "(A)(B)", "A. cat B. dog",
    "A) cat\nB) dog", "(A) 3 (B) 4", "A. cat, B", "all", "ABCDEFGH", "A cat", "neither", "not A", "B (not A)",
]  # fmt: skip
COMMON = [
    ("7", "7"), ("8", "7"), ("yes", "no"), ("blue", "red blue"), ("top left", "left"), ("B", "C"), ("3, 4", "7"),
    ("seven or eight", "7"), ("1/2", "0.25"), ("5 kg", "5 lb"), ("3 1 4", "3 1 5"), ("(1, 2)", "(1, 3)"),
]  # fmt: skip
HUGE = [
    "7" * 100_000, "(" * 100_000, "7 " * 50_000, "x" * 100_000, "{" * 900, "1e999999999", "9**9**9", "9^{9^{9}}",
    "10^{10^{10}}", "10^{(10^{10})}", "99999999!",
    "7" * 900, "((" * 400 + "7" + "))" * 400, r"\frac{" * 150, "$" * 900, ", " * 450,
    "and " * 220, "2" + "^2" * 400, "A. " * 300,
]  # fmt: skip


def pairs(table):
    return [pytest.param(*pair, id=f"{group}: {pair[0]} ~ {pair[1]}") for group, rows in table.items() for pair in rows]


@pytest.mark.parametrize(("answer", "truth"), WRONGLY_ACCEPTED)
def test_what_the_release_accepts_wrongly_is_wrong_both_ways(answer, truth):
    assert accuracy(answer, truth) == 0.0
    assert accuracy(truth, answer) == 0.0


@pytest.mark.parametrize(("answer", "truth"), WRONGLY_REJECTED)
def test_what_the_release_rejects_wrongly_is_right_both_ways(answer, truth):
    assert accuracy(answer, truth) == 1.0
    assert accuracy(truth, answer) == 1.0


@pytest.mark.parametrize(("one", "other"), pairs(EQUAL))
def test_equal_answers_are_right_both_ways(one, other):
    assert accuracy(one, other) == 1.0
    assert accuracy(other, one) == 1.0
    assert accuracy(one, one) == accuracy(other, other) == 1.0


@pytest.mark.parametrize(("one", "other"), pairs(DIFFERENT))
def test_different_answers_are_wrong_both_ways(one, other):
    assert accuracy(one, other) == 0.0
    assert accuracy(other, one) == 0.0


@pytest.mark.parametrize("answer", HACKS)
def test_fishing_for_a_number_earns_nothing(answer):
    assert accuracy(answer, "7") == 0.0


@pytest.mark.parametrize("answer", PRODUCTS)
def test_a_product_left_to_be_worked_out_earns_nothing(answer):
    assert accuracy(answer, "12") == 0.0


@pytest.mark.parametrize(("answer", "truth"), ROUNDED)
def test_a_value_may_be_told_with_its_rounded_one(answer, truth):
    assert accuracy(answer, truth) == 1.0
    assert accuracy(answer.replace("6", "7").replace("0.33", "0.34").replace("3.14", "3.15"), truth) == 0.0


@pytest.mark.parametrize("answer", CHOICE_HACKS)
def test_fishing_for_an_option_earns_nothing(answer):
    assert accuracy(answer, "A") == 0.0
    assert accuracy(answer, "A. 12") == 0.0


@pytest.mark.parametrize("answer", HUGE, ids=lambda answer: f"{answer[:12]} ({len(answer)})")
def test_a_huge_answer_is_wrong_at_once(answer):
    accuracy("x+1", "1+x")  # the worker is running
    before, started = timeouts(), time.process_time()
    for truth in ("7", "A", "(1, 2)", r"2\sqrt{3}", "red"):
        assert accuracy(answer, truth) == 0.0
    assert time.process_time() - started < 1.0
    assert timeouts() == before


def test_steps_before_the_value_have_to_be_right():
    assert accuracy("3 + 4 = 7", "7") == 1.0
    assert accuracy("x = 3 + 4 = 7", "7") == 1.0
    assert accuracy("3 + 5 = 7", "7") == 0.0
    assert accuracy(r"\max(3,7) = 7", "7") == 1.0


def test_the_text_of_an_option_answers_for_its_letter():
    assert accuracy("cat", "C. cat") == 1.0
    assert accuracy("dog", "C. cat") == 0.0


def test_an_empty_truth_is_refused():
    with pytest.raises(ValueError, match="the truth is empty"):
        accuracy("7", " ")


def test_common_answers_never_reach_math_verify(monkeypatch):
    asked = []
    monkeypatch.setattr("prism_pl.rewards.equality.symbolically_equal", lambda *pair: bool(asked.append(pair)))
    for answer, truth in COMMON:
        accuracy(answer, truth)
    assert asked == []


def test_format_is_one_for_three_full_blocks_only():
    good = "<caption>\n- a red 3\n</caption>\n<think>\n1. read 3\n</think>\n<answer>\n3\n</answer>"
    assert format(good) == 1.0
    assert format(good.replace("\n3\n</answer>", "</answer>")) == 0.0
    assert format(good.replace("1. read 3", "<answer>3</answer>")) == 0.0
    assert format("3") == 0.0


@pytest.mark.parametrize("block", ["caption", "think", "answer"])
def test_a_block_of_invisible_characters_is_empty_and_of_signs_is_not(block):
    parts = {"caption": "- a red 3", "think": "1. read 3", "answer": "3"}

    def response(text):
        return "\n".join(f"<{name}>{text if name == block else part}</{name}>" for name, part in parts.items())

    for unseen in ("\u200b", "\u2060", "\ufeff", "\u00ad", "\u200e \u200f", "\ufe0f", "\u2800", "\u3164", "\x00"):
        assert parse(response(unseen)).reason == f"the <{block}> block is empty"
        assert format(response(unseen)) == 0.0
        assert lenient_answer(f"<answer>7</answer> <answer>{unseen}</answer>") == "7"
    for seen in ("-", "?", "<", "\u221e", "\\pi", "\u2713", "\u7532", "\u200b7"):
        assert format(response(seen)) == 1.0


def test_overlong_by_hand():
    # max 100, buffer 40: free up to 60, then 1/40 a token.
    assert overlong(0, 100, 40) == 0.0
    assert overlong(60, 100, 40) == 0.0
    assert overlong(70, 100, 40) == -0.25  # (70 - 60) / 40
    assert overlong(100, 100, 40) == -1.0
    assert overlong(150, 100, 40) == -1.0  # clipped
    assert overlong(90, 100, 40, penalty=2.0) == -1.5  # 2 * 30 / 40
    assert str(overlong(0, 100, 40)) == "0.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 5, "max_length": 100, "buffer": 0}, "buffer is 0"),
        ({"length": 5, "max_length": 100, "buffer": 101}, "buffer is 101"),
        ({"length": -1, "max_length": 100, "buffer": 10}, "length is -1"),
        ({"length": 5, "max_length": 100, "buffer": 10, "penalty": -1.0}, "penalty is -1.0"),
        ({"length": 5, "max_length": 100, "buffer": 10, "penalty": float("nan")}, "penalty is nan"),
    ],
)
def test_overlong_names_a_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        overlong(**arguments)
