"""`data distill` against a local endpoint, `data pairs` by a scripted engine, and the warm start on what they write."""

import asyncio
import base64
import io
import json
import shutil
import socket
import threading
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from aiohttp import web
from lightning import Trainer
from PIL import Image

from datamodules import DemonstrationsDataModule, PairsDataModule
from modules.pairs import PairModule
from prism_pl.__main__ import main
from prism_pl.batch import Example
from prism_pl.chat import SYSTEM_PROMPT, parse
from prism_pl.data.distill import Distillation
from prism_pl.data.store import Journal, read_journals
from prism_pl.endpoint import Cost
from prism_pl.endpoint import Endpoint as Client
from prism_pl.policy import PolicySpec
from prism_pl.rollout.engine import Sampling
from tests.conftest import DEMONSTRATION, make_examples
from tests.file_data import RESPONSE, WORSE, opened, pair, picture, png, prompt, rows_of, write_images, write_lines
from tests.file_data import write_parquet as write_table
from tests.test_evaluate import Scripted


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path


class Endpoint:
    """An OpenAI-compatible endpoint in a thread. `answers` maps a triangle's number to what is said about it: each
    entry a text, or a status of an error; the last one stays."""

    def __init__(self, answers):
        self.answers = {number: list(texts) for number, texts in answers.items()}
        self.asked, self.open_now, self.most_open = [], 0, 0

    async def _chat(self, request):
        body = await request.json()
        self.asked.append(body)
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        await asyncio.sleep(0.02)
        self.open_now -= 1
        question = next(part["text"] for part in body["messages"][1]["content"] if part["type"] == "text")
        queue = self.answers[int("".join(filter(str.isdigit, question)))]
        said = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(said, int):
            return web.Response(status=said, text="overloaded", headers={"Retry-After": "0.01"})
        usage = {"prompt_tokens": 100, "completion_tokens": 20}
        return web.json_response({"choices": [{"message": {"content": said}}], "usage": usage})

    def __enter__(self):
        started = threading.Event()

        async def serve():
            app = web.Application()
            app.router.add_post("/v1/chat/completions", self._chat)
            runner = web.AppRunner(app)
            await runner.setup()
            server = socket.create_server(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
            await web.SockSite(runner, server).start()
            self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
            started.set()
            await self.stop.wait()
            await runner.cleanup()

        self.thread = threading.Thread(target=lambda: asyncio.run(serve()))
        self.thread.start()
        started.wait()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()


def command(file, endpoint, *options):
    data = ["--data", "datamodules.PromptsDataModule", "--data.train", str(file)]
    waits = ["--first_wait", "0.01", "--out", "taught", "--data.num_validation", "0"]
    teach = ["--endpoint", endpoint.url, "--teacher", "gemini"]
    return ["data", "distill", "--config", "rlvr.yaml", *data, *teach, *waits, *options]


def test_distillation_keeps_what_parses_and_verifies_counts_the_rest_and_goes_on(folder, capsys):
    file = write_table(folder / "rows.parquet", [prompt(number) for number in range(5)])
    said = {0: [RESPONSE], 1: [429, 503, RESPONSE], 2: [WORSE, "6", RESPONSE], 3: [WORSE], 4: [400]}
    with Endpoint(said) as endpoint:
        options = ["--attempts", "3", "--price_in", "1", "--price_out", "10", "--concurrency", "2"]
        assert main(command(file, endpoint, *options)) == 0
        page = capsys.readouterr().out
        assert main(command(file, endpoint, *options)) == 0
        again = capsys.readouterr().out
    assert "5 rows answered, 3 demonstrations kept: taught/demonstrations.jsonl" in page
    assert "4 x the answer is wrong" in page  # once of row 2, three times of row 3
    assert "1 x malformed: <caption> is missing" in page
    assert "1 x refused by the endpoint" in page
    # Row 0: 1 request; 1: 3; 2: 3; 3: 3; 4: 1. The 8 that were answered have 100 + 20 tokens each.
    assert "11 requests, 2 retries, 800 + 160 tokens, cost 0.00" in page
    assert "5 rows answered (5 of them before this start), 3 demonstrations kept" in again
    assert "0 requests, 0 retries" in again
    assert endpoint.most_open == 2
    request = endpoint.asked[0]
    assert request["messages"][0] == {"role": "system", "content": SYSTEM_PROMPT}
    image, text = request["messages"][1]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
    assert sent.tobytes() in {picture(number).tobytes() for number in range(5)}
    assert text["text"].startswith("What is the area of triangle")
    rejected = [json.loads(line) for line in (folder / "taught" / "rejected.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rejected} == {"rows-2", "rows-3", "rows-4"}

    rows = rows_of(DemonstrationsDataModule("taught/demonstrations.jsonl", columns={"id": "id"}))
    assert {row.id for row in rows} == {"rows-0", "rows-1", "rows-2"}
    for row in rows:
        number = int(row.id[-1])
        assert row.question == f"What is the area of triangle {number}?"
        assert row.response == RESPONSE
        assert row.answers == ["6", "6 cm^2"]
        assert Path(row.images[0]).read_bytes() == png(number)


def test_a_folder_takes_responses_to_one_set_of_rows_alone(folder, capsys):
    file = write_table(folder / "rows.parquet", [prompt(0)])
    with Endpoint({number: [RESPONSE] for number in range(2)}) as endpoint:
        assert main(command(file, endpoint)) == 0
        first = (folder / "taught" / "demonstrations.jsonl").read_text()
        write_table(file, [prompt(1)])  # as FILE-ROW has it, the same id
        assert main(command(file, endpoint)) == 1
        assert "taught/journal.jsonl was begun with other settings (data.rows: " in capsys.readouterr().err
        assert (folder / "taught" / "demonstrations.jsonl").read_text() == first
        assert len(endpoint.asked) == 1
        assert main(command(file, endpoint, "--out", "elsewhere")) == 0
    assert "triangle 1?" in (folder / "elsewhere" / "demonstrations.jsonl").read_text()


def test_a_folder_takes_responses_of_one_making_alone(tmp_path):
    teacher = Client("http://127.0.0.1:9/v1", "a")
    Distillation(teacher, tmp_path, data={"rows": "x"})
    Distillation(teacher, tmp_path, data={"rows": "x"}, concurrency=3)
    for changed, says in (
        ({"max_tokens": 7}, r"max_tokens: \d+ -> 7"),
        ({"temperature": 0.5}, r"temperature: 1\.0 -> 0\.5"),
        ({"attempts": 2}, "attempts: 1 -> 2"),
        ({"unverified": True}, "unverified: False -> True"),
        ({"data": {"rows": "y"}}, "data.rows: x -> y"),
    ):
        options = {"data": {"rows": "x"}, **changed}
        asked = {name: options.pop(name) for name in ("max_tokens", "temperature") if name in options}
        with pytest.raises(ValueError, match=rf"journal.jsonl was begun with other settings \({says}\): bring them"):
            Distillation(replace(teacher, **asked), tmp_path, **options)


@pytest.mark.parametrize(
    ("status", "says"), [(401, "refuses the model 'gemini' .status 401"), (503, "did not answer row 'rows-")]
)
def test_an_endpoint_that_refuses_or_is_down_stops_with_one_message_and_keeps_what_was_paid_for(
    status, says, folder, capsys
):
    file = write_table(folder / "rows.parquet", [prompt(number) for number in range(14)])
    said = {0: [RESPONSE]} | {number: [status] for number in range(1, 14)}
    with Endpoint(said) as endpoint:
        options = ["--concurrency", "1", "--retries", "1"]
        assert main(command(file, endpoint, *options)) == 1
        screen = capsys.readouterr()
        assert len(endpoint.asked) == (2 if status == 401 else 1 + 10 * 2)
        endpoint.answers = {number: [RESPONSE] for number in range(14)}
        assert main(command(file, endpoint, *options)) == 0
    assert screen.err.count("error: ") == 1
    assert says.replace(".", "(") in screen.err
    assert "1 rows answered, 1 demonstrations kept" in screen.out
    assert "14 rows answered (1 of them before this start), 14 demonstrations kept" in capsys.readouterr().out


def test_other_settings_do_not_mix_and_half_a_line_is_asked_again(tmp_path):
    settings = {"teacher": "a"}
    journal = Journal(tmp_path / "journal.jsonl", settings)
    journal.append({"id": "é"})
    with journal.file.open("a") as lines:
        lines.write('{"id": "tw')
    assert list(read_journals(tmp_path, "journal.jsonl", settings)) == [{"id": "é"}]
    Journal(tmp_path / "journal.jsonl", settings).append({"id": "two"})
    assert list(read_journals(tmp_path, "journal.jsonl", settings)) == [{"id": "é"}, {"id": "two"}]
    with pytest.raises(ValueError, match=r"journal\.jsonl was begun with other settings \(teacher: a -> b\)"):
        list(read_journals(tmp_path, "journal.jsonl", {"teacher": "b"}))


def test_a_kill_within_a_character_leaves_a_journal_that_is_read(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", {})
    journal.append({"id": "é"})
    with journal.file.open("ab") as lines:
        lines.write('{"id": "é'.encode()[:-1])
    assert list(read_journals(tmp_path, "journal.jsonl", {})) == [{"id": "é"}]
    Journal(tmp_path / "journal.jsonl", {}).append({"id": "two"})
    assert list(read_journals(tmp_path, "journal.jsonl", {})) == [{"id": "é"}, {"id": "two"}]


def test_a_line_of_a_journal_ends_where_the_file_says_so_alone(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", {})
    entry = {"id": "a", "row": {"response": "one\u2028two\u0085three\x1c"}}
    journal.append(entry)
    assert list(read_journals(tmp_path, "journal.jsonl", {})) == [entry]


def test_rows_without_an_answer_are_kept_only_where_asked_for(tmp_path):
    teacher = Client("http://127.0.0.1:9/v1", "a")
    row = Example("a", "Why?")
    assert "no answer to verify" in Distillation(teacher, tmp_path).unfit(RESPONSE, row)
    assert Distillation(teacher, tmp_path / "all", unverified=True).unfit(RESPONSE, row) == ""
    with pytest.raises(ValueError, match="--attempts is 0"):
        Distillation(teacher, tmp_path, attempts=0)


def test_cost_by_hand():
    cost = Cost(price_in=2.0, price_out=10.0)
    for _ in range(3):
        cost.add({"prompt_tokens": 100_000, "completion_tokens": 50_000})
    cost.add(None)
    assert cost.money == pytest.approx(0.3 * 2 + 0.15 * 10)  # 300,000 and 150,000 tokens


# Pairs


def run_pairs(folder, policy, rows, texts, engine=None):
    module = PairModule(PolicySpec(policy), engine or Scripted(texts, lengths=[4] * len(texts)), Sampling(), len(texts))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(default_root_dir=folder, accelerator="cpu", **quiet)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=module.collator)  # pyright: ignore[reportArgumentType]
    trainer.predict(module, loader)
    return module


class Killed(Scripted):
    """Breaks at the second batch."""

    def generate(self, examples, num_samples, sampling, on_group=None):
        if self.seeds:
            raise ValueError("killed")
        return super().generate(examples, num_samples, sampling, on_group)


@pytest.mark.filterwarnings("ignore")
def test_pairs_are_written_in_the_authors_columns_and_a_killed_run_goes_on(random_policy, folder):
    examples = make_examples(4)
    texts = [WORSE, "no blocks"]
    with pytest.raises(ValueError, match="killed"):
        run_pairs(folder / "a", random_policy, examples, texts, Killed(texts, lengths=[4, 4]))
    assert not (folder / "a" / "pairs.jsonl").exists()
    asked = run_pairs(folder / "a", random_policy, examples, texts).engine
    assert len(asked.seeds) == 1, "two of four rows were done"
    lines = [json.loads(line) for line in (folder / "a" / "pairs.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"row-{n}" for n in range(4)], "the malformed half makes no pair"
    assert lines[0]["teacher_caption"].startswith("<caption>")
    assert lines[0]["teacher_cot"].endswith("</answer>")
    data = PairsDataModule("a/pairs.jsonl", columns={"id": "id"}, keep_system=True)
    for row, example in zip(rows_of(data), examples, strict=True):
        assert (row.id, row.question, row.answers) == (example.id, example.question, example.answers)
        assert (row.response, row.system) == (DEMONSTRATION, example.system)
        assert parse(row.rejected).caption == parse(WORSE).caption
        assert Image.open(row.images[0]).tobytes() == example.images[0].tobytes()
    assert list((folder / "a").glob("*.part.jsonl")) == []


@pytest.mark.filterwarnings("ignore")
def test_a_row_without_a_demonstration_makes_no_pair(random_policy, folder):
    examples = make_examples(1)
    examples[0].response = "10"
    with pytest.raises(ValueError, match="row 'row-0': the demonstration is malformed"):
        run_pairs(folder / "a", random_policy, examples, [WORSE])


@pytest.mark.usefixtures("without_vllm")
def test_pairs_from_the_command_line_and_a_warm_start_on_pairs_alone(random_policy, folder, capsys, caplog):
    caplog.set_level("INFO")
    policy = ["--model.policy.path", random_policy]
    few = ["--data.num_train", "2", "--model.sampling.max_tokens", "4", "--data.eval_batch_size", "2"]
    assert main(["data", "pairs", "--config", "pairs.yaml", *policy, *few]) == 0, capsys.readouterr().err
    assert Path("runs/pairs/pairs.jsonl").read_text() == "", "random responses are malformed"
    assert "0 pairs, 2 malformed responses; 2 x <caption> is missing" in caplog.text

    write_images(folder, 8)
    write_lines(folder / "pairs.jsonl", [pair(number) for number in range(8)])
    shutil.copytree(random_policy, folder / "policy")
    (folder / "policy" / "model.safetensors").unlink()  # only its processor may be read
    data = ["--data", "datamodules.PairsDataModule", "--data.train", "pairs.jsonl", "--data.batch_size", "2"]
    model = ["--model.rollout", "null", "--model.policy.path", "policy", "--model.discriminator.path", random_policy]
    quick = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "null", "--trainer.callbacks", "null"]
    short = ["--model.discriminator.max_segment_tokens", "512", "--data.num_validation", "2"]
    assert main(["fit", "--config", "warmup.yaml", *data, *model, *short, *quick]) == 0, capsys.readouterr().err
    bad = [{**pair(0), "student_caption": None, "student_cot": None, "student_response": "x"}]
    write_lines(folder / "demos.jsonl", [{"question": "a", "response": RESPONSE}] * 4 + bad)
    demos = ["--data", "datamodules.DemonstrationsDataModule", "--data.train", "demos.jsonl", "--data.batch_size", "2"]
    away = ["--trainer.default_root_dir", "runs/b", "--data.num_rows", "4", "--data.num_validation", "0"]
    assert main(["fit", "--config", "warmup.yaml", *demos, *model, *short[:2], *quick, *away]) == 1
    assert "has no rejected response, and model.init_args.rollout is null" in capsys.readouterr().err


def test_an_opened_data_module_hands_out_rejected_responses(folder):
    write_images(folder, 2)
    write_lines(folder / "pairs.jsonl", [pair(0), pair(1)])
    (batch,) = opened(PairsDataModule("pairs.jsonl", batch_size=2)).train_dataloader()
    assert all(parse(row.rejected).answer == "12" and parse(row.response).answer == "6" for row in batch)
