"""The policy's weights to a vLLM server: by a folder that both sides see, or by NCCL from GPU to GPU."""

import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from prism_pl.rollout import vllm_nccl
from prism_pl.rollout.bucket import Bucket, Named
from prism_pl.rollout.contract import StreamDigest, check_entries, check_loaded
from prism_pl.rollout.vllm_server_client import Server
from prism_pl.rollout.vllm_server_facts import ServerFacts
from prism_pl.rollout.vllm_server_files import write_buckets
from prism_pl.rollout.vllm_sync import checked, packed, shapes_to_send

Result = TypeVar("Result")

SECONDS_TO_LEAVE = 10.0  # a group whose other side may be gone; vLLM gives itself 5


class Transfer(Protocol):
    """A way to the server's workers."""

    def send(self, named: Iterable[Named], version: str, sent: StreamDigest) -> list[dict[str, Any]]:
        """What each worker loaded and received, as `ServerWorker` says it; `sent` adds up what left. Nothing of `named`
        is kept: merged weights exist a bucket at a time."""
        ...

    def close(self) -> None: ...


class ServerWeights:
    """Sends a policy's weights to a server, and checks what arrived there.

    Args:
        policy: names and shapes that every sync must send.
        facts: of each worker of the server.
    """

    def __init__(self, policy: Any, facts: list[ServerFacts], transfer: Transfer) -> None:
        self.expected = shapes_to_send(policy)
        self.held = [set(each.parameters) for each in facts]
        self.transfer = transfer

    @torch.no_grad()
    def send(self, named_parameters: Iterable[Named], version: str) -> None:
        """Load every parameter into the server's model. ValueError where one is missing, unknown, left out or altered.

        Args:
            version: what the server calls these weights from now on.
        """
        sent = StreamDigest()
        answers = self.transfer.send(checked(named_parameters, self.expected), version, sent)
        for answer, held in zip(answers, self.held, strict=True):
            check_entries(sent.entries(), answer["received"])
            check_loaded(set(answer["loaded"]), held)


class PathTransfer:
    """By safetensors in a folder.

    Args:
        folder: one that both machines see under this name; None makes one on this machine.
        dtype: of the server's weights.
        max_bytes: of a file.
    """

    def __init__(self, server: Server, folder: str | None, dtype: torch.dtype, max_bytes: int = 1 << 30) -> None:
        self.server, self.dtype, self.max_bytes = server, dtype, max_bytes
        parent = None if folder is None else Path(folder).expanduser().absolute()
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        self._folder = TemporaryDirectory(prefix="prism-server-", dir=parent)
        Path(self._folder.name).chmod(0o755)  # the server may be another user's

    def send(self, named: Iterable[Named], version: str, sent: StreamDigest) -> list[dict[str, Any]]:
        """See `Transfer`. The files are gone when it returns, whether they arrived or not."""
        with TemporaryDirectory(dir=self._folder.name) as parent:
            Path(parent).chmod(0o755)
            folder = Path(parent) / version
            write_buckets(packed(named, self.dtype, self.max_bytes, sent), folder)
            try:
                return self.server.rpc("prism_load", str(folder), version)
            except ValueError as error:
                if "FileNotFoundError" not in str(error):
                    raise
                raise ValueError(
                    f"{error}: set the engine's `folder` to one that both machines see under the same name"
                ) from error

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()


class NCCLTransfer:
    """By vLLM's own weight transfer over NCCL, from this process's GPU to the GPUs of the server's workers.

    NCCL waits for ever for one that does not come. So the trainer's end runs in a thread of its own, and a server that
    refuses, dies or does not answer its half of a call ends the wait. The transfer is then broken.

    Run so far with vLLM 0.24; 0.32's end with everything but NCCL itself.

    Args:
        shapes: of every parameter, by name.
        dtype: of the server's weights.
        address: where the workers find this process, "host" or "host:port"; None: the address by which this machine
            reaches the server, and a free port.
    """

    def __init__(
        self, server: Server, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, address: str | None
    ) -> None:
        self.server = server
        self.source = _Source(shapes, dtype)
        self.control = _Control(server)
        self.broken: str | None = None
        self.end: vllm_nccl.NCCLEnd | None = None
        host, port = _own_address(server.url, address)
        workers = server.get("/get_world_size")["world_size"]
        opening = partial(vllm_nccl.open_nccl, self.control, self.source, host, port, workers + 1)
        self.end = self._together(opening, lambda end: end.shutdown())

    def send(self, named: Iterable[Named], version: str, sent: StreamDigest) -> list[dict[str, Any]]:
        """See `Transfer`. The weights come in the order of `shapes`, which the server was told. ConnectionError where
        the server is lost on the way, and ever after."""
        if self.broken is not None:
            raise ConnectionError(
                f"the transfer of weights by NCCL to the rollout server {self.server.url} broke off before "
                f"({self.broken}): start the server anew, and the run again in its folder, it goes on from its last "
                "checkpoint"
            )
        assert self.end is not None, "the transfer is closed"
        self.server.rpc("prism_watch")
        self.source.named, self.source.sent = named, sent
        try:
            self._together(self.end.send_weights)
        finally:
            self.source.named = ()
        return self.server.rpc("prism_finish", version)

    def _together(self, work: Callable[[], Result], undo: Callable[[Result], Any] = lambda _: None) -> Result:
        """What `work`, a half of vLLM's own, returns; or the first failure of a call to the server, of which `work`
        may never hear. `undo` is called with what it returns after that."""
        failed = self.control.failed = Future()
        done = vllm_nccl.in_thread(_as_here(work))
        try:
            wait([failed, done], return_when=FIRST_COMPLETED)
            return failed.result() if failed.done() else done.result()
        except BaseException as error:
            self.broken = f"{type(error).__name__}: {error}".splitlines()[0]
            _fail(failed, error)  # a call to the server that is under way need not be waited for
            done.add_done_callback(lambda late: None if late.exception() else undo(late.result()))
            with suppress(Exception):  # of a group that is broken, and the reason is known
                vllm_nccl.in_thread(self.close).result(SECONDS_TO_LEAVE)
            raise

    def close(self) -> None:
        """Leave the group."""
        end, self.end = self.end, None
        if end is not None:
            end.shutdown()


def _as_here(work: Callable[[], Result]) -> Callable[[], Result]:
    """`work` on this thread's GPU, without gradients: each thread has its own of both. What this thread has asked of
    the GPU is done before, and what `work` asks of it when it returns, for vLLM takes streams of its own."""
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.current_device() if on_gpu else -1
    if on_gpu:
        torch.cuda.synchronize(device)

    def run() -> Result:
        with torch.cuda.device(device), torch.no_grad():
            result = work()
            if on_gpu:
                torch.cuda.synchronize(device)
            return result

    return run


def _fail(future: Future[Any], error: BaseException) -> None:
    """The first failure counts."""
    with suppress(InvalidStateError):
        future.set_exception(error)


class _Source:
    """What `vllm_nccl.open_nccl` reads the weights from, each cast to the server's dtype on its way."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.dtypes_and_shapes = {name: (dtype, shape) for name, shape in shapes.items()}
        self.dtype = dtype
        self.named: Iterable[Named] = ()
        self.sent = StreamDigest()

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return self.dtypes_and_shapes

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for told, (name, tensor) in zip(self.dtypes_and_shapes, self.named, strict=True):
            if name != told:
                raise ValueError(
                    f"rollout contract: a sync sends {name!r} where {told!r} is due: send the policy's parameters in "
                    "their order, by NCCL a server knows them by it"
                )
            bucket = Bucket.pack([(name, tensor)], self.dtype)
            self.sent.add(bucket)
            yield from bucket.named()


class _Control:
    """The four calls that vLLM's trainer's end makes. None is made twice: a broadcast has no second half.

    Attributes:
        failed: of the operation that is under way, holds its first failure; made anew for each.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.failed: Future[Any] = Future()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", {})  # vLLM 0.24 reads JSON here, and 0.32 nothing

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update")

    def _post(self, path: str, body: Any = None) -> None:
        """A call; it ends too where the operation has failed elsewhere: vLLM may wait for it at the process's end."""
        failed = self.failed
        if failed.done():
            failed.result()
        call = vllm_nccl.in_thread(partial(self.server.post, path, body, retry=False))
        wait([failed, call], return_when=FIRST_COMPLETED)
        if call.done() and (error := call.exception()) is not None:
            _fail(failed, error)
        if failed.done():
            failed.result()


def forget_prompts(server: Server) -> None:
    """Drop every cache that the server made with its old weights: prefixes, prepared images, image features. ValueError
    where it keeps one."""
    answer = server.post("/reset_prefix_cache") or {}
    if not answer.get("success", True):
        raise ValueError(
            f"rollout contract: the server {server.url} did not forget its prefix cache, because it is still at work: "
            "does another run use it?"
        )
    server.post("/reset_mm_cache")
    server.post("/reset_encoder_cache")


def _own_address(url: str, address: str | None) -> tuple[str, int]:
    """Where the server finds this process: host and port."""
    host, _, port = (address or "").partition(":")
    if not host:
        parts = urlsplit(url)
        default = 443 if parts.scheme == "https" else 80
        with socket.create_connection((parts.hostname or "", parts.port or default), timeout=10) as connection:
            host = connection.getsockname()[0]
    if port:
        return host, int(port)
    with socket.socket() as free:
        free.bind((host, 0))
        return host, free.getsockname()[1]
