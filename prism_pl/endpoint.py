"""A language model behind an OpenAI-compatible endpoint: a teacher or a judge, and what it costs to ask it."""

import asyncio
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

LONGEST_WAIT = 60.0  # seconds
# It will say the same to every request: the key, the address or the model's name is wrong, or the money is gone.
FATAL = (401, 402, 403, 404, 405)
PASSING = (408, 409, 425, 429)


class EndpointRefused(ValueError):
    """The endpoint does not answer this request, and will not."""


class EndpointGone(ConnectionError):
    """The endpoint would refuse every request."""


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
class Endpoint:
    """Answers conversations.

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

    async def ask(self, session: "ClientSession", messages: Sequence[dict[str, Any]], name: str) -> str:
        """The response, which may be cut or empty.

        Args:
            messages: the conversation.
            name: what is asked about, such as a row, for messages.

        Raises:
            EndpointRefused: the endpoint refuses this request.
            EndpointGone: it would refuse every request.
            ConnectionError: it does not answer this one for now, and all retries are spent.
        """
        from aiohttp import ClientError

        body = {
            "model": self.model,
            "messages": list(messages),
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
                if isinstance(error, EndpointRefused | EndpointGone):
                    raise
                trouble = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                self.cost.retries += 1
                await asyncio.sleep(min(wait, LONGEST_WAIT))
        raise ConnectionError(f"{self.url} did not answer {name} in {self.retries + 1} tries ({trouble})")

    def _text(self, answer: dict[str, Any]) -> str:
        self.cost.add(answer.get("usage"))
        return answer["choices"][0]["message"].get("content") or ""

    async def _trouble(self, response: "ClientResponse") -> str:
        """What went wrong for the moment. Raises where trying again would not help."""
        said = f"status {response.status}: {' '.join((await response.text()).split())[:200]}"
        if response.status in FATAL:
            raise EndpointGone(
                f"{self.url} refuses the model {self.model!r} ({said}): check its address, the model's name there "
                f"and the key in the environment variable {self.key_variable}"
            )
        if response.status < 500 and response.status not in PASSING:
            raise EndpointRefused(said)
        return said
