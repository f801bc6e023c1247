"""A teacher behind an OpenAI-compatible endpoint, and what it costs to ask it."""

import asyncio
import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prism_pl.batch import Example
from prism_pl.images import image_part, open_image
from prism_pl.processor import chat_messages

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

LONGEST_WAIT = 60.0  # seconds
# The endpoint will say the same to every row: the key, the address or the model's name is wrong, or the money is gone.
FATAL = (401, 402, 403, 404, 405)
PASSING = (408, 409, 425, 429)


class TeacherRefused(ValueError):
    """The endpoint does not answer this row, and will not."""


class TeacherGone(ConnectionError):
    """The endpoint would refuse every row."""


@dataclass
class Cost:
    """Tokens and requests so far.

    Attributes:
        price_in, price_out: of a million tokens, in any currency.
    """

    price_in: float = 0.0
    price_out: float = 0.0
    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, usage: dict[str, Any] | None) -> None:
        """Count an answer's usage, where the endpoint tells it."""
        self.prompt_tokens += int((usage or {}).get("prompt_tokens") or 0)
        self.completion_tokens += int((usage or {}).get("completion_tokens") or 0)

    @property
    def money(self) -> float:
        """What the tokens cost at the given prices."""
        return (self.prompt_tokens * self.price_in + self.completion_tokens * self.price_out) / 1e6

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens"
        told = f"{self.requests} requests, {self.retries} retries, {tokens}"
        return told + (f", cost {self.money:.2f}" if self.price_in or self.price_out else "")


@dataclass
class Teacher:
    """Answers questions about images.

    Args:
        url: of the endpoint, such as http://127.0.0.1:8000/v1.
        model: its name there.
        temperature, max_tokens: of a response.
        retries: how often a request that failed for the moment is tried again, each time after twice as long.
        first_wait: seconds before the first of them, unless the endpoint says how long.
        timeout: seconds for one response.
        key_variable: the environment variable with the endpoint's key, if it wants one.
    """

    url: str
    model: str
    temperature: float = 1.0
    max_tokens: int = 8192
    retries: int = 5
    first_wait: float = 1.0
    timeout: float = 600.0
    key_variable: str = "OPENAI_API_KEY"
    cost: Cost = field(default_factory=Cost)

    def session(self, concurrency: int) -> "ClientSession":
        """Connections to the endpoint, to be used as an asynchronous context."""
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        key = os.environ.get(self.key_variable)
        return ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=ClientTimeout(total=self.timeout),
            connector=TCPConnector(limit=concurrency),
        )

    async def ask(self, session: "ClientSession", example: Example) -> str:
        """The teacher's response, which may be cut or empty.

        Raises:
            TeacherRefused: the endpoint refuses this row.
            ValueError: one of the row's images cannot be used.
            TeacherGone: the endpoint would refuse every row.
            ConnectionError: it does not answer this one for now, and all retries are spent.
        """
        from aiohttp import ClientError

        parts = [image_part(open_image(image, example.id)) for image in example.images]
        body = {
            "model": self.model,
            "messages": chat_messages(example, parts),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        for attempt in range(self.retries + 1):
            self.cost.requests += 1
            wait = min(self.first_wait * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.25)
            try:
                async with session.post(f"{self.url.rstrip('/')}/chat/completions", json=body) as response:
                    if response.status == 200:
                        return self._text(await response.json())
                    trouble = await self._trouble(response)
                    wait = float(response.headers.get("Retry-After") or wait)
            except (ClientError, OSError, TimeoutError, ValueError, LookupError) as error:
                if isinstance(error, TeacherRefused | TeacherGone):
                    raise
                trouble = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                self.cost.retries += 1
                await asyncio.sleep(min(wait, LONGEST_WAIT))
        raise ConnectionError(f"{self.url} did not answer row {example.id!r} in {self.retries + 1} tries ({trouble})")

    def _text(self, answer: dict[str, Any]) -> str:
        self.cost.add(answer.get("usage"))
        return answer["choices"][0]["message"].get("content") or ""

    async def _trouble(self, response: "ClientResponse") -> str:
        """What went wrong for the moment. Raises where trying again would not help."""
        said = f"status {response.status}: {' '.join((await response.text()).split())[:200]}"
        if response.status in FATAL:
            raise TeacherGone(
                f"{self.url} refuses the model {self.model!r} ({said}): check --endpoint, --teacher and the key in the "
                f"environment variable {self.key_variable}"
            )
        if response.status < 500 and response.status not in PASSING:
            raise TeacherRefused(said)
        return said
