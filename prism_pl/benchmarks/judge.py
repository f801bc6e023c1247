"""A language model behind an OpenAI-compatible endpoint that looks at every answer after the rule, and may turn its
verdict either way. One that is asked about wrong answers alone can only raise a score."""

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from prism_pl.endpoint import Endpoint

if TYPE_CHECKING:
    from aiohttp import ClientSession

logger = logging.getLogger(__name__)

PROMPT = """You check answers of an exam. Decide whether the candidate's answer says the same as the reference.

Question:
{question}

Reference: {reference}

Candidate: {answer}

Another wording, unit sign or equivalent form of the reference is right; for a choice, its letter or its text is. An
answer that contradicts the reference, leaves out a part of it, or gives several answers is wrong.
Reply with one word: right or wrong."""
_VERDICT = re.compile(r"\b(right|wrong)\b", re.IGNORECASE)


class Asked(NamedTuple):
    """One answer to judge."""

    question: str
    reference: str
    answer: str


class JudgeModel:
    """The judge.

    Args:
        url: of the endpoint, such as http://127.0.0.1:8000/v1.
        model: its name there.
        prompt: holds {question}, {reference} and {answer}; the reply's last "right" or "wrong" is the verdict.
        max_tokens: of a reply; more for a model that thinks first.
        concurrency: requests at once.
        retries: how often a request that failed is tried again. One that fails for good, and a reply without a verdict,
            leaves the rule's verdict and is counted.
        timeout: seconds for one reply.
        key_variable: the environment variable that holds the endpoint's key, if it wants one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str = PROMPT,
        max_tokens: int = 16,
        concurrency: int = 32,
        retries: int = 4,
        timeout: float = 120.0,
        key_variable: str = "JUDGE_API_KEY",
    ) -> None:
        missing = [part for part in ("{question}", "{reference}", "{answer}") if part not in prompt]
        if missing:
            raise ValueError(f"judge.prompt lacks {', '.join(missing)}: it is told the answer through them")
        self.url, self.model, self.prompt, self.concurrency = url, model, prompt, concurrency
        self.endpoint = Endpoint(url, model, 0.0, max_tokens, retries, timeout=timeout, key_variable=key_variable)

    def check(self) -> None:
        """One question, before anything is sampled. ConnectionError says what came instead of a verdict."""
        (reply,) = asyncio.run(self._ask([Asked("What is 1 + 1?", "2", "2")]))
        if isinstance(reply, Exception) or read_verdict(reply) is None:
            raise ConnectionError(
                f"judge {self.model!r} at {self.url} gave no verdict on a trial ({reply}): is the server running, does "
                f"it know the model, and is its key in {self.endpoint.key_variable}? Without a judge: "
                "--model.judge null"
            )

    def __call__(self, asked: Sequence[Asked]) -> list[bool | None]:
        """Verdicts in order; None where there is none."""
        replies = asyncio.run(self._ask(asked))
        for reply in replies:
            if isinstance(reply, Exception):
                logger.warning("judge %s at %s: %s; the rule's verdict stands", self.model, self.url, reply)
        return [None if isinstance(reply, Exception) else read_verdict(reply) for reply in replies]

    async def _ask(self, asked: Sequence[Asked]) -> list[str | Exception]:
        # A request's time begins when it is made: those behind the connections' limit would spend theirs waiting.
        open_now = asyncio.Semaphore(self.concurrency)
        async with self.endpoint.session(self.concurrency) as session:
            return list(await asyncio.gather(*(self._one(session, open_now, one) for one in asked)))

    async def _one(self, session: "ClientSession", open_now: asyncio.Semaphore, one: Asked) -> str | Exception:
        messages = [{"role": "user", "content": filled(self.prompt, one)}]
        try:
            async with open_now:
                return await self.endpoint.ask(session, messages, f"about {one.answer[:40]!r}")
        except (ValueError, ConnectionError) as error:
            return error


def filled(prompt: str, one: Asked) -> str:
    """The prompt with its three parts, in one pass: a part may hold braces, or the name of another."""
    return re.sub(r"\{(question|reference|answer)\}", lambda part: getattr(one, part[1]), prompt)


def read_verdict(reply: str) -> bool | None:
    """True for right; None where the reply says neither. Of several the last one counts."""
    found = _VERDICT.findall(reply)
    return found[-1].lower() == "right" if found else None
