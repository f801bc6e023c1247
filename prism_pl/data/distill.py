"""`data distill`: demonstrations from a teacher behind an OpenAI-compatible endpoint, for the questions of any data.

    python -m prism_pl data distill --config rlvr.yaml --endpoint http://127.0.0.1:8000/v1 --teacher NAME

Kept is a response that has the three blocks and whose answer is one of the row's. `demonstrations.jsonl` is read by
`datamodules.DemonstrationsDataModule`; `rejected.jsonl` says what was not kept and why. The same command goes on after
a kill: what was paid for is in `journal.jsonl`. A folder takes the responses of one making: of the same rows, teacher
and options.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

from prism_pl.batch import Example
from prism_pl.chat import parse
from prism_pl.data.reading import DataOnlyCLI, read_split
from prism_pl.data.store import Journal, read_journals, store_images
from prism_pl.endpoint import Cost, Endpoint, EndpointGone, EndpointRefused
from prism_pl.errors import UsageError
from prism_pl.evaluation import write_lines
from prism_pl.images import image_part, open_image
from prism_pl.pass_rates import HasRecipe
from prism_pl.processor import IMAGE_MARK, chat_messages
from prism_pl.rewards import accuracy

JOURNAL = "journal.jsonl"
DEMONSTRATIONS, REJECTED = "demonstrations.jsonl", "rejected.jsonl"
TOLD_EVERY = 30.0  # seconds
MOST_FAILURES = 10  # rows in a row that are not answered, before the endpoint is taken to be down


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and takes no shortened options: they may be the run's."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"data distill: {message}. All options: python -m prism_pl data distill --help")


def run(args: list[str]) -> None:
    """Ask the teacher about every training row that is not done; what follows is fit's command line with options of its
    own.

    Raises:
        UsageError: the command line.
        ConnectionError: the endpoint does not answer; what was answered is kept.
    """
    options, rest = _parser().parse_known_args(args)
    cli = DataOnlyCLI(rest)
    cost = Cost(options.price_in, options.price_out)
    teacher = Endpoint(
        options.endpoint,
        options.teacher,
        options.temperature,
        options.max_tokens,
        options.retries,
        options.first_wait,
        options.timeout,
        options.key_variable,
        cost,
    )
    rows = (row for batch in read_split(cli.datamodule, cli.trainer, "train", list) for row in batch)
    first = list(islice(rows, 1))  # opens the data, which can say then what its rows are made of
    data = cli.datamodule.row_recipe() if isinstance(cli.datamodule, HasRecipe) else None
    distillation = Distillation(
        teacher, Path(options.out), options.attempts, options.concurrency, options.unverified, data
    )
    try:
        asyncio.run(distillation.run(chain(first, rows)))
    finally:
        print(distillation.write(), flush=True)


def _parser() -> Parser:
    parser = Parser(prog="python -m prism_pl data distill", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--endpoint", required=True, help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--teacher", required=True, metavar="NAME", help="the model's name there")
    parser.add_argument("--out", default="runs/distill", help="folder for demonstrations.jsonl and rejected.jsonl")
    parser.add_argument("--attempts", type=int, default=1, help="responses asked for a row until one is kept")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once")
    parser.add_argument("--unverified", action="store_true", help="keep responses to rows without an answer, too")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max_tokens", type=int, default=8192, help="of a response")
    parser.add_argument("--retries", type=int, default=5, help="of a request that failed for the moment")
    parser.add_argument("--first_wait", type=float, default=1.0, help="seconds before the first retry; then doubled")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one response")
    parser.add_argument("--price_in", type=float, default=0.0, help="of a million prompt tokens")
    parser.add_argument("--price_out", type=float, default=0.0, help="of a million response tokens")
    parser.add_argument("--key_variable", default="OPENAI_API_KEY", help="environment variable that holds the key")
    return parser


@dataclass
class Distillation:
    """Rows on their way to demonstrations.

    Args:
        folder: where the files go.
        attempts: responses for a row until one is kept.
        concurrency: rows in flight.
        unverified: keep well-formed responses to rows without an answer.
        data: what the rows are made of, in plain values: rows of another making may have the same ids.
    """

    teacher: Endpoint
    folder: Path
    attempts: int = 1
    concurrency: int = 16
    unverified: bool = False
    data: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("attempts", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least 1")
        self.settings = {
            "teacher": self.teacher.model,
            "temperature": self.teacher.temperature,
            "max_tokens": self.teacher.max_tokens,
            "attempts": self.attempts,
            "unverified": self.unverified,
            "data": self.data,
        }
        self.done = {entry["id"] for entry in self._entries()}
        self.resumed = len(self.done)
        self.unanswered: list[str] = []
        self.failures = 0
        self.judging = asyncio.Lock()
        self.journal = Journal(self.folder / JOURNAL, self.settings)

    async def run(self, rows: Iterator[Example]) -> None:
        """Ask for every row that is not done. One that is not answered for now is left to the next start; after ten
        of them on end, or where the endpoint refuses all, those in flight are given up. Raises ConnectionError then."""
        free = asyncio.Semaphore(self.concurrency)
        told = time.monotonic()
        try:
            async with self.teacher.session(self.concurrency) as session, asyncio.TaskGroup() as tasks:
                for row in rows:
                    if row.id in self.done:
                        continue
                    self.done.add(row.id)
                    await free.acquire()  # before the next row is read: its images stay in memory while it waits
                    tasks.create_task(self._row(session, row)).add_done_callback(lambda _: free.release())
                    if time.monotonic() - told > TOLD_EVERY:
                        told = time.monotonic()
                        print(f"{len(self.done):,} rows asked; {self.teacher.cost}", flush=True)
        except* ConnectionError as group:
            raise group.exceptions[0] from None

    async def _row(self, session: Any, row: Example) -> None:
        rejected = []
        for _ in range(self.attempts):
            try:
                parts = [image_part(open_image(image, row.id)) for image in row.images]
                response = await self.teacher.ask(session, chat_messages(row, parts), f"row {row.id!r}")
            except ValueError as error:
                refused = isinstance(error, EndpointRefused)
                reason = "refused by the endpoint" if refused else "image that cannot be used"
                rejected.append({"reason": reason, "detail": str(error)})
                break
            except ConnectionError as error:
                self.failures += 1
                self.unanswered.append(row.id)
                if isinstance(error, EndpointGone) or self.failures >= MOST_FAILURES:
                    raise
                return
            self.failures = 0
            async with self.judging:  # one comparison at a time: they share a process
                reason = await asyncio.to_thread(self.unfit, response, row)
            if not reason:
                self.journal.append({"id": row.id, "row": self._demonstration(row, response), "rejected": rejected})
                return
            rejected.append({"reason": reason, "response": response})
        self.journal.append({"id": row.id, "row": None, "rejected": rejected})

    def unfit(self, response: str, row: Example) -> str:
        """Why a response is not kept, "" where it is."""
        parsed = parse(response)
        if not parsed.valid:
            return f"malformed: {parsed.reason}"
        if not row.answers:
            return "" if self.unverified else "the row has no answer to verify against"
        right = any(accuracy(parsed.answer, truth) == 1.0 for truth in row.answers)
        return "" if right else "the answer is wrong"

    def _demonstration(self, row: Example, response: str) -> dict[str, Any]:
        """In LLaMA-Factory's sharegpt form."""
        marks = "" if IMAGE_MARK in row.question else f"{IMAGE_MARK}\n" * len(row.images)
        system = [] if row.system is None else [{"role": "system", "content": row.system}]
        turns = [{"role": "user", "content": marks + row.question}, {"role": "assistant", "content": response}]
        images = store_images(row, self.folder)
        return {"id": row.id, "messages": [*system, *turns], "images": images, "answers": row.answers}

    def write(self) -> str:
        """Write both files from the journal; says what was kept, what was not and why, and what it cost."""
        entries = list(self._entries())
        kept = [entry["row"] for entry in entries if entry["row"] is not None]
        rejected = [{"id": entry["id"], **each} for entry in entries for each in entry["rejected"]]
        write_lines(kept, self.folder / DEMONSTRATIONS)
        write_lines(rejected, self.folder / REJECTED)
        reasons = Counter(each["reason"] for each in rejected)
        why = "".join(f"\n  {count:,} x {reason}" for reason, count in reasons.most_common())
        resumed = f" ({self.resumed:,} of them before this start)" if self.resumed else ""
        gone = f"\n{len(self.unanswered):,} rows not answered: start again to ask them" if self.unanswered else ""
        return (
            f"{len(entries):,} rows answered{resumed}, {len(kept):,} demonstrations kept: "
            f"{self.folder / DEMONSTRATIONS}\n"
            f"{len(rejected):,} responses rejected: {self.folder / REJECTED}{why}{gone}\n"
            f"This start: {self.teacher.cost}"
        )

    def _entries(self) -> Iterator[dict[str, Any]]:
        return read_journals(self.folder, JOURNAL, self.settings)
