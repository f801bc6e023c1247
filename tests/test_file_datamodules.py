"""Every published format, from files that the tests make in its schema: what an Example holds, and what is refused."""

import base64
import json
import re
from pathlib import Path

import datasets
import pytest

from datamodules import DemonstrationsDataModule, PairsDataModule, PromptsDataModule
from datamodules.json_rows import array_items
from datamodules.prompt_lengths import short_enough
from datamodules.sources import Source
from prism_pl.bad_rows import BadRow
from prism_pl.chat import SYSTEM_PROMPT, parse
from prism_pl.errors import report
from prism_pl.images import open_image
from prism_pl.policy import PolicySpec
from tests.file_data import (
    RESPONSE,
    WORSE,
    WORSE_COT,
    Rows,
    opened,
    pair,
    picture,
    png,
    prompt,
    rows_of,
    sharegpt,
    write_images,
    write_lines,
    write_parquet,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    return tmp_path


def pixels(example):
    return [open_image(image, example.id).tobytes() for image in example.images]


def check_demonstration(example, number=0):
    assert example.question == f"What is the area of triangle {number}?"
    assert example.response == RESPONSE
    assert pixels(example) == [picture(number).tobytes()]


# Demonstrations


def as_conversations(row):
    named = {"user": "human", "assistant": "gpt"}
    messages = [{"from": named[m["role"]], "value": m["content"]} for m in row.pop("messages")]
    return {"conversations": messages, **row}


def as_parts(row):
    """Hugging Face's conversational form: an image part without an image stands for the next of the column."""
    question = [{"type": "image", "text": None}, {"type": "text", "text": row["messages"][0]["content"][8:]}]
    reply = [{"type": "text", "text": RESPONSE}]
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}],
        "images": row["images"],
    }


def as_prompt_and_completion(row):
    return {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]}


def as_columns(row):
    return {"question": row["messages"][0]["content"], "response": RESPONSE, "image": row["images"][0]}


SPELLINGS = {
    "sharegpt": lambda row: row,
    "conversations": as_conversations,
    "parts": as_parts,
    "prompt and completion": as_prompt_and_completion,
    "columns": as_columns,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("file", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_demonstrations_in_every_spelling_and_file(spelling, file, folder):
    rows = [SPELLINGS[spelling](sharegpt(number)) for number in range(3)]
    if file == "rows.json":
        (folder / file).write_text(json.dumps(rows, indent=1))
    elif file == "rows.jsonl":
        write_lines(folder / file, rows)
    else:
        write_parquet(folder / file, rows)
    found = rows_of(DemonstrationsDataModule(str(folder / file)))
    assert [row.id for row in found] == ["rows-0", "rows-1", "rows-2"]
    for number, row in enumerate(found):
        check_demonstration(row, number)
        assert row.system is None  # the one of prism_pl.chat
        assert row.meta == {"family": "rows", "split": "train", "source": "rows", "row": number}


def test_images_by_bytes_data_uri_and_image_column(folder):
    uri = "data:image/png;base64," + base64.b64encode(png(0)).decode()
    question = {"type": "text", "text": "What is the area of triangle 0?"}
    parts = [{"type": "image_url", "image_url": {"url": uri}}, question]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": RESPONSE}]
    write_lines(folder / "uri.jsonl", [{"messages": chat}])
    check_demonstration(*rows_of(DemonstrationsDataModule(str(folder / "uri.jsonl"))))
    rows = [sharegpt(images=[{"bytes": png(0), "path": None}])]
    for images in (False, True):
        file = write_parquet(folder / f"{images}.parquet", rows, images=images)
        (row,) = rows_of(DemonstrationsDataModule(str(file)))
        check_demonstration(row)
        assert isinstance(row.images[0], bytes), "images are opened where they are needed"


def test_several_images_stand_where_the_question_says(folder):
    said = [{"role": "user", "content": "A: <image>, B: <image>?"}, {"role": "assistant", "content": RESPONSE}]
    before = [{"role": "user", "content": "<image><image>\nWhich?"}, {"role": "assistant", "content": RESPONSE}]
    images = ["images/1.png", "images/0.png"]
    write_lines(folder / "rows.jsonl", [{"messages": chat, "images": images} for chat in (said, before)])
    one, two = rows_of(DemonstrationsDataModule(str(folder / "rows.jsonl")))
    assert one.question == "A: <image>, B: <image>?"
    assert two.question == "Which?"
    assert pixels(one) == pixels(two) == [picture(1).tobytes(), picture(0).tobytes()]


def test_a_saved_data_set_a_folder_and_several_sources(folder):
    rows = [sharegpt(number, images=[png(number)]) for number in range(2)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder / "saved")
    (folder / "shards").mkdir()
    write_lines(folder / "shards" / "a.jsonl", [sharegpt(0)])
    write_lines(folder / "shards" / "b.jsonl", [sharegpt(1), sharegpt(2)])
    sources = [Source(str(folder / "saved")), Source(str(folder / "shards"), image_folder=str(folder))]
    found = rows_of(DemonstrationsDataModule(sources))
    assert [row.id for row in found] == ["saved-0", "saved-1", "shards-0", "shards-1", "shards-2"]
    for row, number in zip(found, [0, 1, 0, 1, 2], strict=True):
        check_demonstration(row, number)
    with pytest.raises(ValueError, match=r"saved has no split 'dev': give one of train"):
        rows_of(DemonstrationsDataModule(Source(str(folder / "saved"), split="dev")))


def test_a_hub_repository_is_asked_for_by_name_file_and_revision(folder, monkeypatch):
    asked = []

    def load(path, *args, **options):
        asked.append((path, *args, options))
        return datasets.Dataset.from_list([prompt()])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source("prism-vlm/rl_dataset", only="rl_training_data_5.9k.parquet", revision="abc")
    (row, *_) = rows_of(PromptsDataModule(source))
    assert row.id == "rl_training_data_5.9k-0"
    options = {"data_files": ["rl_training_data_5.9k.parquet"], "split": "train", "revision": "abc"}
    assert asked[0] == ("prism-vlm/rl_dataset", None, options)

    def fail(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("gone")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FileNotFoundError, match=r"'prism-vlm/gone' is neither here nor on the hub"):
        rows_of(PromptsDataModule("prism-vlm/gone"))


def test_columns_are_mapped_and_a_wrong_one_is_named(folder):
    write_lines(folder / "rows.jsonl", [{"q": "Area?", "meta": {"reply": RESPONSE, "key": 7}, "pic": "images/0.png"}])
    columns = {"question": "q", "response": "meta.reply", "images": "pic", "id": "meta.key"}
    (row,) = rows_of(DemonstrationsDataModule(str(folder / "rows.jsonl"), columns=columns))
    assert (row.id, row.question, row.response) == ("7", "Area?", RESPONSE)
    assert pixels(row) == [picture(0).tobytes()]
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 1: no question: nothing in the column 'quest'"):
        rows_of(DemonstrationsDataModule(str(folder / "rows.jsonl"), columns={**columns, "question": "quest"}))
    with pytest.raises(ValueError, match=r"there is no field 'respons'\. Did you mean response\?"):
        DemonstrationsDataModule(str(folder / "rows.jsonl"), columns={"respons": "q"})


def test_the_system_prompt_is_ours_unless_rows_keep_theirs(folder):
    file = write_parquet(folder / "rows.parquet", [prompt()])
    assert [rows_of(PromptsDataModule(str(file), **options))[0].system for options in (
        {}, {"system_prompt": "Look."}, {"keep_system": True}
    )] == [None, "Look.", "Write XML."]  # fmt: skip
    assert opened(PromptsDataModule(str(file))).row_recipe()["system_prompt"] == SYSTEM_PROMPT


# Pairs


def test_pairs_of_the_release_and_legacy_ones(folder):
    legacy = {"question": "Area of triangle 2?", "image": "images/2.png"}
    legacy |= {"teacher_response": RESPONSE, "student_response": WORSE}
    several = pair(1, images=["images/1.png", "images/0.png"])
    del several["image"]
    write_lines(
        folder / "pairs.jsonl", [pair(0), several, legacy, pair(3, teacher_caption=f"<caption>{'x'}</caption>")]
    )
    found = rows_of(PairsDataModule(str(folder / "pairs.jsonl")))
    assert [len(row.images) for row in found] == [1, 2, 1, 1]
    assert [row.question for row in found] == [f"Area of triangle {n}?" for n in range(4)]
    assert found[0].response == RESPONSE
    assert parse(found[0].rejected).answer == "12"
    assert (found[2].response, found[2].rejected) == (RESPONSE, WORSE)
    assert parse(found[3].response).caption == "x", "tags of a caption are not doubled"


def test_a_pair_of_one_side_is_named(folder):
    row = pair()
    del row["student_cot"]
    write_lines(folder / "pairs.jsonl", [row])
    with pytest.raises(ValueError, match=r"pairs\.jsonl, row 1: no student side: give student_caption and student_cot"):
        rows_of(PairsDataModule(str(folder / "pairs.jsonl")))


# Prompts


def test_prompts_of_the_release(folder):
    rlvr = {name: value for name, value in prompt(1).items() if not name.startswith("teacher")}
    numbers = {"style": "rule", "ground_truth": "6.5", "equivalent_answers": None}
    align = write_parquet(folder / "align.parquet", [prompt(0), prompt(1)], images=True)
    (row, _) = rows_of(PromptsDataModule(str(align)))
    assert row.question == "What is the area of triangle 0?"
    assert row.answers == ["6", "6 cm^2"]
    assert row.response == RESPONSE
    assert row.meta["family"] == "geometry"
    assert pixels(row) == [picture(0).tobytes()]
    file = write_parquet(folder / "rlvr.parquet", [{**rlvr, "reward_model": numbers}])
    (row,) = rows_of(PromptsDataModule(str(file)))
    assert (row.response, row.answers) == (None, ["6.5"])


def test_a_whole_response_stands_in_for_parts_that_make_none(folder):
    bare = prompt(teacher_cot="3 x 4 / 2 = 6, so 6")
    broken = prompt(teacher_cot="3 x 4 / 2 = 6, so 6", teacher_response="6")
    file = write_parquet(folder / "rows.parquet", [bare, broken])
    found = rows_of(PromptsDataModule(str(file)))
    assert found[0].response == RESPONSE
    assert not parse(found[1].response).valid
    assert "so 6" in found[1].response


# Splits


def test_held_out_rows_are_the_same_ones_each_time_and_never_trained_on(folder):
    file = write_lines(folder / "rows.jsonl", [sharegpt(0) for _ in range(20)])
    data = opened(DemonstrationsDataModule(str(file), num_validation=5, batch_size=3, num_rows=18))
    held_out = [row.id for batch in data.val_dataloader() for row in batch]
    trained = [row.id for batch in data.train_dataloader() for row in batch]
    assert len(held_out) == 5
    assert sorted(held_out + [row.id for batch in data.predict_dataloader() for row in batch]) == sorted(
        f"rows-{n}" for n in range(18)
    )
    assert not set(trained) & set(held_out)
    again = opened(DemonstrationsDataModule(str(file), num_validation=5, num_rows=18))
    assert held_out == [row.id for batch in again.val_dataloader() for row in batch]
    assert data.test_dataloader() == []
    tested = opened(DemonstrationsDataModule(str(file), test=str(file), validation=str(file)))
    assert [row.meta["split"] for batch in tested.test_dataloader() for row in batch] == ["test"] * 20
    with pytest.raises(ValueError, match="num_validation is 20, and there are 20 training rows"):
        opened(DemonstrationsDataModule(str(file), num_validation=20))


def test_long_prompts_are_left_out_and_counted(folder, blank_policy, caplog):
    processor = PolicySpec(blank_policy).processor()
    rows = [sharegpt(n, images=["images/0.png"]) for n in range(6)]
    for number in (1, 4):
        rows[number]["messages"][0]["content"] += " Look closely." * 100
    rows[5] = "{"  # what cannot be read is left to the loader, which names it
    file = str(write_lines(folder / "rows.jsonl", rows))
    longest = max(processor.prompt_length(row) for row in rows_of(DemonstrationsDataModule(file, num_rows=1)))
    data = opened(DemonstrationsDataModule(file, num_validation=2, max_prompt_tokens=longest), Rows())
    data.trainer.lightning_module.processor = processor
    assert len([row for batch in data.predict_dataloader() for row in batch]) == 4, "a check reads all rows"
    data.trainer.lightning_module.collator = list
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert f"Prompts over {longest} tokens:" in caplog.text
    long = {"rows-1", "rows-4"}
    trained = {data.train_rows[n].id for n in range(len(data.train_rows))}
    validated = {row.id for row in data.val_dataloader().dataset}
    held_out = {f"rows-{n}" for n in data._held_out}
    assert validated == held_out - long
    assert trained == {f"rows-{n}" for n in range(6)} - held_out - long
    with pytest.raises(ValueError, match=r"max_prompt_tokens is 3, and each of \d training rows has a longer prompt"):
        short_enough(data._rows["train"], [0, 1], 3, processor, "training")
    with pytest.raises(ValueError, match="max_prompt_tokens is 0"):
        DemonstrationsDataModule(file, max_prompt_tokens=0)


def test_other_rows_under_a_checkpoint_are_refused(folder):
    file = write_lines(folder / "rows.jsonl", [sharegpt(0), sharegpt(1)])
    state = opened(DemonstrationsDataModule(str(file))).state_dict()
    (folder / "moved.jsonl").write_text(file.read_text())
    opened(DemonstrationsDataModule(str(folder / "moved.jsonl"))).load_state_dict(state)
    other = write_lines(folder / "other.jsonl", [sharegpt(1), sharegpt(0)])
    with pytest.raises(ValueError, match="do not hold the rows that this run began with"):
        opened(DemonstrationsDataModule(str(other))).load_state_dict(state)


# Rows and files that cannot be read

TURNS = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
BAD_ROWS = {
    "truncated": (json.dumps(sharegpt())[:90], "no whole JSON object (Unterminated string"),
    "empty line": ("", "the line is empty"),
    "a list": ("[1, 2]", "a JSON list where an object is expected"),
    "no answer": ({"messages": TURNS[:1], "images": []}, "no response: no assistant message"),
    "two turns": ({"messages": TURNS}, "the turns are user, assistant, user, assistant: one question is read"),
    "a tool": ({"messages": [{"role": "tool", "content": "x"}]}, "a message has the role 'tool'"),
    "no content": ({"messages": [{"role": "user"}]}, "the user message has no content"),
    "a video": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "a content part is of the type 'video'",
    ),
    "no image": (sharegpt(images=[]), "1 times <image> in the question, and 0 images"),
    "no question": (
        {"messages": [{"role": "user", "content": "<image>"}, TURNS[1]], "images": ["a"]},
        "question is empty",
    ),
    "a number": (sharegpt(images=[7]), "an image is 7: give a path or the file's bytes"),
    "on the web": (sharegpt(images=["https://x.org/a.png"]), "is on the web: download it"),
    "no base64": (sharegpt(images=["data:image/png;base64,@"]), "a data URI that is no base64"),
    "half a character": (
        json.dumps(sharegpt()).replace("the area", "the \\ud83d area"),
        r"a text holds \ud83d, half of a character: write the character whole",
    ),
    "a long answer": (sharegpt(answers=["9" * 1_000_000]), "an answer has 1,000,000 characters: at most 4,096"),
}


def test_every_bad_row_is_named_by_file_row_and_reason_and_spoils_no_other(folder):
    rows = [sharegpt(0), *(row for row, _ in BAD_ROWS.values()), sharegpt(1)]
    data = DemonstrationsDataModule(str(write_lines(folder / "rows.jsonl", rows)))
    first, *bad, last = rows_of(data, Rows())
    check_demonstration(first, 0)
    check_demonstration(last, 1)
    for number, (row, (kind, (_, reason))) in enumerate(zip(bad, BAD_ROWS.items(), strict=True), start=2):
        assert isinstance(row, BadRow), kind
        assert re.search(rf"rows\.jsonl, row {number}: .*{re.escape(reason)}", str(row)), str(row)
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: no whole JSON object .*data check"):
        rows_of(DemonstrationsDataModule(str(folder / "rows.jsonl")))


def test_a_bad_row_of_several_files_names_its_own(folder):
    (folder / "shards").mkdir()
    write_lines(folder / "shards" / "a.jsonl", [sharegpt(0)])
    write_lines(folder / "shards" / "b.jsonl", [sharegpt(1), "{"])
    bad = rows_of(DemonstrationsDataModule(str(folder / "shards")), Rows())[2]
    assert "b.jsonl, row 2: no whole JSON object" in str(bad)


@pytest.mark.filterwarnings("ignore")
def test_a_bad_row_met_in_a_worker_stops_the_run_with_its_message(folder, capsys):
    write_lines(folder / "rows.jsonl", [sharegpt(0), "{"])
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: no whole JSON object") as raised:
        rows_of(DemonstrationsDataModule(str(folder / "rows.jsonl"), num_workers=1))
    report(raised.value)
    screen = capsys.readouterr().err.strip()
    assert screen.startswith(f"error: {folder}/rows.jsonl, row 2: no whole JSON object")
    assert len(screen.splitlines()) == 1


def test_files_that_cannot_be_read_are_named(folder):
    (folder / "cut.json").write_text(json.dumps([sharegpt(0), sharegpt(1)])[:-40])
    with pytest.raises(ValueError, match=r"cut\.json cannot be read \(row 2 of the list is no whole JSON"):
        rows_of(DemonstrationsDataModule(str(folder / "cut.json")))
    (folder / "object.json").write_text("{}")
    with pytest.raises(ValueError, match=r"object\.json is no JSON list: name a file of one object a line \.jsonl"):
        rows_of(DemonstrationsDataModule(str(folder / "object.json")))
    (folder / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read"):
        rows_of(PromptsDataModule(str(folder / "bad.parquet")))
    (folder / "latin.jsonl").write_bytes('{"question": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl cannot be read \(.*utf-8"):
        rows_of(PromptsDataModule(str(folder / "latin.jsonl")))
    for missing, says in {
        str(folder / "gone.jsonl"): "there is no file",
        "./gone": "there is no file",
        "rows.csv": "there is no file",
        str(folder / "images" / "0.png"): "is of no kind that is read",
        str(folder / "images"): "holds no file of a kind that is read",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            rows_of(PromptsDataModule(missing))
    write_lines(folder / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        rows_of(PromptsDataModule(str(folder / "empty.jsonl")))


def test_a_long_json_list_is_read_in_pieces(folder):
    items = [{"text": "é]}[," * n, "n": n} for n in range(50)]
    (folder / "list.json").write_text(json.dumps(items, ensure_ascii=False))
    for chunk in (1, 7, 100, 10_000):
        assert [json.loads(item) for item in array_items(str(folder / "list.json"), chunk)] == items, chunk
    assert list(array_items(str(write_lines(folder / "none.json", ["[]"])))) == []


def test_relative_images_lie_beside_the_file_or_in_the_given_folder(folder, tmp_path):
    file = write_lines(folder / "rows.jsonl", [sharegpt(0)])
    assert rows_of(DemonstrationsDataModule(str(file)))[0].images == [folder / "images" / "0.png"]
    elsewhere = Source(str(file), image_folder="/data")
    assert rows_of(DemonstrationsDataModule(elsewhere))[0].images == [Path("/data/images/0.png")]


def test_unused_columns_of_a_pair_do_no_harm(folder):
    write_lines(folder / "pairs.jsonl", [pair(teacher_response=None, student_response="", score=0.5)])
    (row,) = rows_of(PairsDataModule(str(folder / "pairs.jsonl")))
    assert parse(row.rejected).answer == parse(f"<caption>x</caption>{WORSE_COT}").answer
