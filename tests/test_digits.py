"""The embedded default: rows, the teacher, and the checks of captions and steps."""

import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from datamodules.digits import (
    DigitsDataset,
    Recipe,
    caption_items,
    check_steps,
    corpus,
    faithfulness,
    make_example,
    scene_items,
)
from datamodules.digits_questions import FAMILIES
from datamodules.digits_scene import COLOURS, PLACES, handwriting_instances
from prism_pl import chat

SPLITS = ("pretrain", "sft", "warmup", "align", "rlvr", "validation", "test", "hard")


def rows(split, num, seed=0, recipe=None, **options):
    return [make_example(split, index, seed, recipe, with_image=False, **options) for index in range(num)]


def item(digit, colour, place):
    cell = PLACES.index(place)
    row, col = divmod(cell, 3)
    return {"digit": digit, "colour": colour, "place": place, "row": row, "col": col, "instance": 0, "dx": 0, "dy": 0}


def digit_named(scene, name):
    """The digit of the only item that has the name as its colour or place."""
    found = [i["digit"] for i in scene if name in (i["colour"], i["place"])]
    assert len(found) == 1, (scene, name)
    return found[0]


def answer_again(question, scene):
    """An independent second way from question and scene to the answer."""
    digits = [i["digit"] for i in scene]
    of_colour = {c: [i["digit"] for i in scene if i["colour"] == c] for c in COLOURS}
    words = question.rstrip("?.").split()

    def take(pattern):
        return re.fullmatch(pattern, question)

    if question == "Sum of all digits?":
        return str(sum(digits))
    if m := take(r"Sum of the (\w+) digits\?"):
        return str(sum(of_colour[m[1]]))
    if m := take(r"Sum of (.+) and (.+)\?"):
        return str(digit_named(scene, m[1]) + digit_named(scene, m[2]))
    if question == "Difference of largest and smallest?":
        return str(sorted(digits)[-1] - sorted(digits)[0])
    if m := take(r"Difference of (.+) and (.+)\?"):
        return str(abs(digit_named(scene, m[1]) - digit_named(scene, m[2])))
    if question == "Largest digit?":
        return str(sorted(digits)[-1])
    if question == "Colour of the largest?":
        return max(scene, key=lambda i: i["digit"])["colour"]
    if m := take(r"Largest (\w+) digit\?"):
        return str(sorted(of_colour[m[1]])[-1])
    if m := take(r"How many digits larger than (\d)\?"):
        return str(sum(d > int(m[1]) for d in digits))
    if m := take(r"How many (even|odd) digits\?"):
        return str(sum(d % 2 == (m[1] == "odd") for d in digits))
    if m := take(r"How many (\w+) digits\?"):
        return str(len(of_colour[m[1]]))
    if m := take(r"Is (.+) larger than (.+)\?"):
        return "yes" if digit_named(scene, m[1]) > digit_named(scene, m[2]) else "no"
    if m := take(r"Which is larger, (.+) or (.+)\?"):
        return m[1] if digit_named(scene, m[1]) > digit_named(scene, m[2]) else m[2]
    if m := take(r"Read the (digits|colours) in order\."):
        in_order = sorted(scene, key=lambda i: 3 * i["row"] + i["col"])
        return " ".join(str(i[m[1][:-1]]) for i in in_order)
    if m := take(r"Where is the (\w+) (\d)\?"):
        (place,) = [i["place"] for i in scene if (i["colour"], i["digit"]) == (m[1], int(m[2]))]
        return place
    if m := take(r"Where is the (\w+) digit\?"):
        (place,) = [i["place"] for i in scene if i["colour"] == m[1]]
        return place
    if m := take(r"Which (digit|colour) is at (.+)\?"):
        (value,) = [i[m[1]] for i in scene if i["place"] == m[2]]
        return str(value)
    asked = words[-1]
    value = sum(digits) if question.startswith("Is the sum") else digit_named(scene, " ".join(words[1:-1]))
    return "yes" if (value % 2 == 0) == (asked == "even") else "no"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    for split in SPLITS:
        once, again = make_example(split, 5, seed=3), make_example(split, 5, seed=3)
        assert once.images[0].tobytes() == again.images[0].tobytes()
        assert replace(once, images=[]) == replace(again, images=[])
        assert once.images[0].size == (96, 96)
        assert once.images[0].mode == "RGB"
    assert make_example("sft", 5, seed=3).images[0].tobytes() != make_example("sft", 5, seed=4).images[0].tobytes()


def test_splits_draw_different_scenes_under_one_seed():
    scenes = [[repr(row.meta["scene"]) for row in rows(split, 100)] for split in SPLITS]
    assert len({scene for split in scenes for scene in split}) == 100 * len(SPLITS)


def test_handwriting_never_crosses_between_training_validation_and_test():
    parts = {name: set(np.concatenate(part).tolist()) for name, part in handwriting_instances().items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1197, "validation": 300, "test": 300}
    assert set.union(*parts.values()) == set(range(1797))
    own = {"validation": "validation", "test": "test", "hard": "test"}
    for split in SPLITS:
        used = {i["instance"] for row in rows(split, 200) for i in row.meta["scene"]}
        assert used <= parts[own.get(split, "train")], split


def test_an_image_shows_each_digit_in_its_own_cell_and_colour():
    row = make_example("hard", 1, seed=0)
    cells = np.asarray(row.images[0]).astype(int).reshape(3, 32, 3, 32, 3).transpose(0, 2, 1, 3, 4)
    held = {(i["row"], i["col"]): i["colour"] for i in row.meta["scene"]}
    for place in np.ndindex(3, 3):
        if place not in held:
            assert np.ptp(cells[place]) == 0
            continue
        brightest = cells[place].reshape(-1, 3)[cells[place].sum(-1).argmax()]
        nearest = min(COLOURS, key=lambda colour: np.abs(brightest - COLOURS[colour]).sum())
        assert nearest == held[place]


@pytest.mark.parametrize("split", ["rlvr", "hard"])
def test_answers_are_right_by_an_independent_recomputation(split):
    for row in rows(split, 1600):
        assert row.answers == [answer_again(row.question, row.meta["scene"])], (row.question, row.meta["scene"])


def test_the_recipe_can_narrow_the_families_and_takes_them_in_turn():
    assert [row.meta["family"] for row in rows("rlvr", 8)] == list(FAMILIES)
    narrow = rows("rlvr", 4, recipe=Recipe(families=("parity", "sum")))
    assert [row.meta["family"] for row in narrow] == ["parity", "sum", "parity", "sum"]


def test_answers_cannot_be_guessed():
    by_kind = defaultdict(Counter)
    for row in rows("rlvr", 4000):
        kind = "yes or no" if row.answers[0] in ("yes", "no") else "other"
        by_kind[row.meta["family"], kind][row.answers[0]] += 1
    for (family, kind), answers in by_kind.items():
        share = answers.most_common(1)[0][1] / answers.total()
        assert share < 0.6, (family, kind, answers)


def test_hard_has_more_digits_than_training_ever_shows():
    for split in SPLITS[:-1]:
        assert {row.meta["num_digits"] for row in rows(split, 200)} == {1, 2, 3}
    assert {row.meta["num_digits"] for row in rows("hard", 200)} == {4, 5}


@pytest.mark.parametrize("split", ["warmup", "align", "validation", "test", "hard"])
def test_curated_demonstrations_are_exact_and_every_step_holds(split):
    for row in rows(split, 600):
        parsed = chat.parse(row.response)
        assert parsed.valid
        assert [parsed.answer] == row.answers
        assert caption_items(parsed.caption) == scene_items(row.meta["scene"])
        steps = check_steps(parsed.reasoning, row.meta["scene"], row.meta)
        assert steps.correct == steps.stated == steps.expected, (row.question, parsed.reasoning)


def test_public_demonstrations_are_imprecise_and_skip_steps_at_their_stated_shares():
    public = [r for r in rows("sft", 4000, recipe=Recipe(imprecise=0.4, skipped=0.2)) if r.meta["style"] == "public"]
    inexact = 0
    for row in public:
        parsed = chat.parse(row.response)
        assert parsed.valid
        assert [parsed.answer] == row.answers
        exact = faithfulness(parsed.caption, row.meta["scene"]).exact
        assert exact != row.meta["imprecise"]
        steps = check_steps(parsed.reasoning, row.meta["scene"], row.meta)
        assert steps.correct == steps.stated
        inexact += not exact
        only_concludes = re.fullmatch(r"(1\. )?the \w+ is [^,.]+\.?", parsed.reasoning) is not None
        assert row.meta["skipped"] == only_concludes, parsed
    # About 3,000 rows: three standard errors are 3 * sqrt(0.4 * 0.6 / 3000) = 0.027.
    assert abs(inexact / len(public) - 0.4) < 0.03
    assert abs(sum(row.meta["skipped"] for row in public) / len(public) - 0.2) < 0.03
    assert abs(len(public) / 4000 - 0.75) < 0.03


def test_curated_is_clearly_denser_than_public():
    def proxies(row):
        parsed = chat.parse(row.response)
        bullets = [line for line in parsed.caption.splitlines() if line.startswith("- ")]
        sentences = [part for part in parsed.caption.split(".") if part.strip()]
        numbered = re.findall(r"(?m)^\d+\. ", parsed.reasoning)
        clauses = [part for part in parsed.reasoning.split(".") if part.strip()]
        return len(bullets) or len(sentences), len(numbered) or len(clauses)

    by_style = defaultdict(list)
    for row in rows("sft", 2000):
        by_style[row.meta["style"]].append(proxies(row))
    public, curated = (np.mean(by_style[style], axis=0) for style in ("public", "curated"))
    assert (curated > public + 1).all(), (public, curated)


def test_each_split_has_its_kind_of_response():
    styles = {split: {row.meta["style"] for row in rows(split, 60)} for split in SPLITS}
    curated = {split: {"curated"} for split in ("warmup", "align", "validation", "test", "hard")}
    assert styles == {"pretrain": {"brief", "caption"}, "sft": {"public", "curated"}, "rlvr": {None}, **curated}
    assert all(row.response is None and row.answers for row in rows("rlvr", 20))


def test_the_base_policys_rows_know_no_block_and_stand_under_both_system_prompts():
    base = rows("pretrain", 400) + rows("validation", 400, brief=True)
    assert not any("<" in row.response for row in base)
    assert {row.system for row in base} == {"Answer.", "Write <caption>, <think>, <answer>."}
    for row in base:
        if row.meta["style"] == "caption":
            assert row.question == "Describe the image."
            assert caption_items(row.response) == scene_items(row.meta["scene"])
        else:
            assert [row.response] == row.answers


def test_caption_items_reads_every_style():
    assert caption_items("- 2 digits\n- red 3 at top left\n- blue 4 at right") == ["red 3 top left", "blue 4 right"]
    assert caption_items("A red 3 at the top left and a blue 4 at right.") == ["red 3 top left", "blue 4 right"]
    assert caption_items("red 3. 4 at top. 1 digit.") == ["red 3", "4 top"]
    assert caption_items("1. red 3\n2. blue 14") == ["red 3"]
    assert caption_items("nothing") == []


def test_faithfulness_counts_true_missed_and_invented():
    scene = [item(3, "red", "top left"), item(3, "red", "left"), item(4, "blue", "right")]
    # "red 3" can be the left one, so that "3 at top left" is true as well; there is no blue 5; blue 4 is missed.
    found = faithfulness("red 3. 3 at top left. blue 5 at right.", scene)
    assert (found.stated, found.true, found.missed, found.invented, found.exact) == (3, 2, 1, 1, False)
    # "top" is another place than "top left".
    assert faithfulness("red 3 at top.", scene).true == 0
    assert faithfulness("an image", scene).missed == 3
    assert faithfulness("red 3 at left. red 3 at top left. blue 4 at right.", scene).exact


@pytest.mark.parametrize(
    ("reasoning", "correct", "stated"),
    [
        ("1. digits: 3 4 2\n2. 3 + 4 = 7\n3. 7 + 2 = 9\n4. the sum is 9", 4, 4),
        ("3 + 4 + 2 = 9, so the sum is 9.", 1, 1),
        ("3 + 4 + 2 = 9. the sum is 9.", 2, 2),
        ("1. digits: 3 4 1\n2. 3 + 4 = 8\n3. the sum is 8", 0, 3),  # not the scene, not arithmetic, not the answer
        ("5 + 4 = 9. the sum is 9.", 1, 2),  # there is no 5
        ("1. 3 + 4 = 7\n2. 3 + 2 = 5\n3. the sum is 9", 2, 3),  # the 3 is spent
        ("7 + 2 = 9. the sum is 9.", 1, 2),  # 7 was not reached
        ("the sum is 9. the sum is 9. the sum is 9.", 1, 3),  # said once
        ("look at it, so the sum is 9.", 0, 1),  # not a claim that can be checked
        ("red: 3. left: 2. top row: 3 4. even: 4 2. larger than 3: 4. largest: 3.", 5, 6),
        ("3 < 4. 4 > 3. 4 < 3. 4 < 9. 3 is odd. 4 is odd. red 3 at top left. red 3 at top.", 4, 8),
        ("", 0, 0),
    ],
)
def test_steps_are_checked_against_the_scene_and_each_other(reasoning, correct, stated):
    scene = [item(3, "red", "top left"), item(4, "blue", "top right"), item(2, "blue", "left")]
    meta = {"relevant": [0, 1, 2], "number": None, "answer": "9", "num_steps": 4}
    found = check_steps(reasoning, scene, meta)
    assert (found.correct, found.stated, found.expected) == (correct, stated, 4)


def test_the_corpus_holds_every_style_and_is_reproducible():
    texts = list(corpus(300, seed=1))
    assert len(texts) == 4 * 300  # system, question, the answer's role, answer
    assert texts == list(islice(corpus(400, seed=1), 4 * 300))
    joined = "\n".join(texts)
    assert "Describe the image." in joined
    assert "system\nAnswer." in joined
    assert "<think>" in joined
    assert " = " in joined


def test_a_dataset_makes_its_rows_on_demand():
    dataset = DigitsDataset("align", 10, seed=2)
    index = random.Random(0).randrange(10)
    assert len(dataset) == 10
    assert dataset[index].id == make_example("align", index, 2).id
    with pytest.raises(IndexError, match="row 10 of 10"):
        dataset[10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_digits": 1}, "max_digits is 1"),
        ({"hard_digits": (3, 5)}, r"hard_digits is \(3, 5\)"),
        ({"curated": 1.5}, "curated is 1.5"),
        ({"families": ("sums",)}, "give at least one of sum, difference"),
    ],
)
def test_an_option_that_is_not_allowed_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_told_rows_hold_the_scene_in_words_and_true_steps_and_no_block():
    recipe = Recipe(told=1.0)
    for index in range(64):
        row = make_example("pretrain", index, seed=3, recipe=recipe)
        assert row.images == []
        assert not chat.parse(row.response).valid
        assert caption_items(row.question.rsplit(". ", 1)[0]) == scene_items(row.meta["scene"])
        check = check_steps(row.response, row.meta["scene"], {**row.meta, "family": FAMILIES[index % len(FAMILIES)]})
        assert check.correct == check.stated == check.expected
        assert row.response.endswith(f" is {row.answers[0]}.")


def test_explained_rows_show_the_scene_then_true_steps_and_no_block():
    recipe = Recipe(explained=1.0)
    in_lines = 0
    for index in range(64):
        row = make_example("pretrain", index, seed=3, recipe=recipe)
        assert len(row.images) == 1
        assert not chat.parse(row.response).valid
        lines = row.question.startswith("Explain in lines. ")
        in_lines += lines
        assert lines or row.question.startswith("Explain. ")
        number = len(row.meta["scene"])
        parts = row.response.splitlines() if lines else row.response.split(". ")
        seen = "\n".join(parts[:number]) if lines else ". ".join(parts[:number]) + "."
        assert caption_items(seen) == scene_items(row.meta["scene"])
        steps = "\n".join(parts[number:]) if lines else ". ".join(parts[number:])
        check = check_steps(steps, row.meta["scene"], {**row.meta, "family": FAMILIES[index % len(FAMILIES)]})
        assert check.correct == check.stated == check.expected
    assert 16 < in_lines < 48


def test_rows_that_ask_other_questions_have_other_ids():
    ids = {make_example("rlvr", 0, 0, recipe, with_image=False).id for recipe in (None, Recipe(), Recipe(captions=0.1))}
    assert ids == {"digits-rlvr-0-0"}  # the share of captions is of `pretrain` rows
    others = [Recipe(max_digits=2), Recipe(hard_digits=(5, 6)), Recipe(families=("sum",)), Recipe(system_prompt=None)]
    ids |= {make_example("rlvr", 0, 0, recipe, with_image=False).id for recipe in others}
    assert len(ids) == 5
    assert DigitsDataset("rlvr", 1, 0, Recipe(max_digits=2)).ids[0] in ids
