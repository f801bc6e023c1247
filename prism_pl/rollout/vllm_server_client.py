"""Talks to a vLLM server: many requests at once, each tried again with back-off, all of the answers or none."""

import asyncio
import json
import logging
import os
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import ClientSession

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before a request is tried again: doubled each time
_OPEN_AT_ONCE = 256  # connections; the server queues what it cannot run
_SECONDS_TO_CONNECT = 10.0


class ServerError(ValueError):
    """The server answered, and would answer the same again: a 4xx, or a failure of its own that it names."""


class Server:
    """A vLLM server by its address.

    An answer of 500 and more, a lost connection and a timeout are tried again, an answer of 400 to 499 is not. The key
    that a server may ask for (`vllm serve --api-key`) is taken from the environment, VLLM_API_KEY, as the server does.

    Args:
        url: such as http://other-machine:8000.
        retries: how often a request is tried again.
        timeout: seconds for one answer, its time in the server's queue included.
        way_out: what to do where the server is not there; the end of the error message.
    """

    def __init__(self, url: str, retries: int, timeout: float, way_out: str = "is it running?") -> None:
        self.url = url.rstrip("/")
        self.retries, self.timeout, self.way_out = retries, timeout, way_out
        self.num_retried = 0

    def get(self, path: str) -> Any:
        """The answer to a GET."""
        return _run(self._all([("GET", path, None)], self.retries))[0]

    def post(self, path: str, body: Any = None, *, retry: bool = True) -> Any:
        """The answer to a POST.

        Args:
            retry: False for what must not be done twice.
        """
        return self.post_all(path, [body], retry=retry)[0]

    def post_all(self, path: str, bodies: Sequence[Any], *, retry: bool = True) -> list[Any]:
        """The answers to many POSTs, all sent at once, in order. The first that fails for good ends the others.

        Raises ConnectionError where the server cannot be reached, and ServerError where it refuses.
        """
        return _run(self._all([("POST", path, body) for body in bodies], self.retries if retry else 0))

    def rpc(self, method: str, *args: str, retry: bool = True) -> list[dict[str, Any]]:
        """Call a method of `ServerWorker` on every worker of the server. ServerError with the reason of one that
        could not.

        Args:
            retry: False where a failure would only come again.
        """
        try:
            answers = self.post("/collective_rpc", {"method": method, "args": list(args)}, retry=retry)["results"]
        except ServerError as error:
            raise ServerError(f"{error}\nThe server lacks what a trainer needs: {self.way_out}") from error
        for answer in answers:
            if "error" in answer:
                raise ServerError(f"the rollout server {self.url} could not do {method}: {answer['error']}")
        return answers

    async def _all(self, requests: Sequence[tuple[str, str, Any]], retries: int) -> list[Any]:
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        key = os.environ.get("VLLM_API_KEY")
        said: set[int] = set()
        open_now = asyncio.Semaphore(_OPEN_AT_ONCE)
        failed: BaseException | None = None
        tasks: list[asyncio.Task[Any]] = []
        async with ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=ClientTimeout(total=self.timeout, sock_connect=_SECONDS_TO_CONNECT),
            connector=TCPConnector(limit=0),
        ) as session:
            try:
                async with asyncio.TaskGroup() as group:
                    for request in requests:
                        tasks.append(group.create_task(self._one(session, open_now, request, retries, said)))
            except ExceptionGroup as errors:
                failed = errors.exceptions[0]
        if failed is not None:
            raise failed
        return [task.result() for task in tasks]

    async def _one(
        self,
        session: "ClientSession",
        open_now: asyncio.Semaphore,
        request: tuple[str, str, Any],
        retries: int,
        said: set[int],
    ) -> Any:
        """One answer. What a group of requests says of its troubles, it says once a retry: `said` holds which."""
        for attempt in range(retries + 1):
            async with open_now:
                answer, trouble = await self._try(session, *request)
            if trouble is None:
                return answer
            if attempt == retries:
                break
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
            if attempt not in said:
                said.add(attempt)
                self.num_retried += 1
                logger.warning(
                    "rollout server %s: %s; retry %d of %d in %g s", self.url, trouble, attempt + 1, retries, wait
                )
            await asyncio.sleep(wait)
        raise ConnectionError(
            f"the rollout server {self.url} gave no answer to {request[1]} ({trouble}; tried {retries + 1} times), and "
            f"no answer of this call is used: {self.way_out}"
        )

    async def _try(self, session: "ClientSession", method: str, path: str, body: Any) -> tuple[Any, str | None]:
        """An answer, or what troubles the server. ServerError where it refuses."""
        from aiohttp import ClientConnectorError, ClientError

        try:
            async with session.request(method, self.url + path, json=body) as response:
                if response.status < 400:
                    text = await response.read()
                    return (await response.json() if text else None), None
                reason = _reason(await response.text())
        except TimeoutError:
            return None, f"no answer within {self.timeout:g} s"
        except ClientConnectorError as error:
            return None, f"cannot connect: {error.strerror or error}"
        except (ClientError, OSError) as error:
            return None, f"{type(error).__name__}: {error}"
        if response.status >= 500:
            return None, f"it answered {response.status}: {reason}"
        raise ServerError(f"the rollout server {self.url} refused {path} with {response.status}: {reason}")


def _reason(text: str) -> str:
    """What an answer gives as its reason: the message of vLLM's JSON, else the text, shortened."""
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return text.strip()[:500] or "no reason given"


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run`, in a thread of its own where the caller's already runs a loop, as a notebook's does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
