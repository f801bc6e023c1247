"""The policy's weights to a vLLM server: by a folder that both sides see, or by NCCL from GPU to GPU (experimental)."""

import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from prism_pl.rollout import vllm_compat
from prism_pl.rollout.bucket import Bucket, Named
from prism_pl.rollout.contract import StreamDigest, check_entries, check_loaded
from prism_pl.rollout.vllm_server_client import Server
from prism_pl.rollout.vllm_server_facts import ServerFacts
from prism_pl.rollout.vllm_server_files import write_buckets
from prism_pl.rollout.vllm_sync import checked, packed, shapes_to_send


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

    Experimental: written after vLLM 0.32, which the trainer's side needs, and not run yet with NCCL.

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
        host, port = _own_address(server.url, address)
        workers = server.get("/get_world_size")["world_size"]
        self.end = vllm_compat.open_nccl(_Control(server), self.source, host, port, workers + 1)

    def send(self, named: Iterable[Named], version: str, sent: StreamDigest) -> list[dict[str, Any]]:
        """See `Transfer`. The weights come in the order of `shapes`, which the server was told."""
        self.server.rpc("prism_watch")
        self.source.named, self.source.sent = named, sent
        try:
            self.end.send_weights()
        finally:
            self.source.named = ()
        return self.server.rpc("prism_finish", version)

    def close(self) -> None:
        """Leave the group."""
        self.end.shutdown()


class _Source:
    """What `vllm_compat.open_nccl` reads the weights from, each cast to the server's dtype on its way."""

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
    """The four calls that vLLM's trainer's end makes. None is made twice: a broadcast has no second half."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.server.post("/init_weight_transfer_engine", {"init_info": init_info}, retry=False)

    def start_weight_update(self) -> None:
        self.server.post("/start_weight_update", retry=False)

    def update_weights(self, update_info: Any) -> None:
        self.server.post("/update_weights", {"update_info": update_info}, retry=False)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.server.post("/finish_weight_update", retry=False)


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
