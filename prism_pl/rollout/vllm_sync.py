"""The policy's weights into a live engine of the same process: in bounded buckets, checked at both ends."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prism_pl.rollout import vllm_compat
from prism_pl.rollout.contract import StreamDigest, check_loaded, check_names, check_received

Named = tuple[str, Tensor]
Gather = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]


def buckets(named: Iterable[Named], max_bytes: int) -> Iterator[list[Named]]:
    """Cut a stream of named tensors into lists of at most `max_bytes`; a single larger tensor stands alone."""
    bucket: list[Named] = []
    size = 0
    for name, tensor in named:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def weight_stream(named: Iterable[Named], max_bytes: int, gather: Gather = lambda _: nullcontext()) -> Iterator[Named]:
    """The named tensors one after the other, whole only while their bucket is open.

    Args:
        gather: makes the tensors of a bucket whole for as long as its context lasts, where they are sharded.
    """
    for bucket in buckets(named, max_bytes):
        with gather([tensor for _, tensor in bucket]):
            for name, tensor in bucket:
                yield name, tensor.detach()


class WeightSender:
    """Sends a policy's weights to the engine that was started with it.

    Args:
        policy: names and shapes that every sync must send.
        max_bytes: of a bucket.
    """

    def __init__(self, policy: Any, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self.expected = {name: tuple(p.shape) for name, p in policy.named_parameters()}
        if policy.config.tie_word_embeddings and "lm_head.weight" in self.expected:
            raise ValueError(
                "the policy's config says tie_word_embeddings, but its lm_head has weights of its own: vLLM would take "
                "the embeddings for the head. Set tie_word_embeddings: false in config.json"
            )

    def fill(self, policy: Any, model: Any) -> None:
        """Load every parameter into a model that vLLM has just made. ValueErrors as in `send`."""
        sent = StreamDigest()
        stream = sent.watch(weight_stream(policy.named_parameters(), self.max_bytes))
        received = StreamDigest()
        loaded = model.load_weights(received.watch(stream))
        check_received(sent, received)
        check_loaded(loaded, {name for name, _ in model.named_parameters()})

    @torch.no_grad()
    def send(self, llm: Any, named_parameters: Iterable[Named], on_cpu: bool) -> None:
        """Load every parameter into a running engine. ValueError where one is missing, unknown, left out or altered."""
        named = list(named_parameters)
        check_names({name: tuple(p.shape) for name, p in named}, self.expected)
        sent = StreamDigest()
        stream = sent.watch(weight_stream(named, self.max_bytes))
        ((received, loaded, parameters),) = llm.collective_rpc(partial(receive, on_cpu=on_cpu), args=(stream,))
        check_received(sent, received)
        check_loaded(loaded, parameters)


def receive(worker: Any, stream: Iterable[Named], *, on_cpu: bool) -> tuple[StreamDigest, set[str], set[str]]:
    """In the engine's worker: what arrived, the names of what was loaded, and of all there is."""
    received = StreamDigest()
    loaded = vllm_compat.load_weights(worker, received.watch(stream), on_cpu)
    return received, loaded, {name for name, _ in worker.get_model().named_parameters()}
