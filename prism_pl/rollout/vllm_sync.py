"""The policy's weights into a live engine of the same process: in bounded buckets, checked at both ends."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from prism_pl.lora import whole_parameters
from prism_pl.rollout import vllm_compat
from prism_pl.rollout.bucket import Bucket, Named, cut
from prism_pl.rollout.contract import StreamDigest, check_complete, check_loaded, check_name, check_received
from prism_pl.rollout.copy_plan import CopyPlan, unpacked
from prism_pl.strategy.sharding import gathered, whole_shape

Gather = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]
Load = Callable[[Iterator[Bucket], StreamDigest], set[str]]


def packed(
    named: Iterable[Named],
    dtype: torch.dtype,
    max_bytes: int,
    sent: StreamDigest,
    gather: Gather = gathered,
) -> Iterator[Bucket]:
    """The named tensors as buckets of the engine's dtype, one at a time.

    Args:
        max_bytes: of a bucket, as it is sent.
        sent: adds up what leaves.
        gather: makes the tensors of a bucket whole for as long as its context lasts, where they are sharded. Every rank
            has the same buckets, in the same order.
    """
    for part in cut(named, max_bytes // dtype.itemsize):
        with gather([tensor for _, tensor in part]):
            bucket = Bucket.pack(part, dtype)
        del part  # merged weights, which would live on while the next are made
        sent.add(bucket)
        yield bucket


def shapes_to_send(policy: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as every sync must send them. ValueError where vLLM would not take them for what they are."""
    shapes = {name: whole_shape(parameter) for name, parameter in whole_parameters(policy)}
    if policy.config.tie_word_embeddings and "lm_head.weight" in shapes:
        raise ValueError(
            "the policy's config says tie_word_embeddings, but its lm_head has weights of its own: vLLM would take "
            "the embeddings for the head. Set tie_word_embeddings: false in config.json"
        )
    return shapes


def checked(named: Iterable[Named], expected: Mapping[str, tuple[int, ...]]) -> Iterator[Named]:
    """The stream as it is; ValueError where it is not all of `expected`, each once. It is not gathered first: merged or
    sharded weights exist one after the other."""
    sent: set[str] = set()
    for name, tensor in named:
        check_name(name, whole_shape(tensor), expected, sent)
        sent.add(name)
        yield name, tensor
    check_complete(sent, expected)


class WeightSender:
    """Sends a policy's weights to the engine that was started with it.

    Args:
        policy: names and shapes that every sync must send.
        max_bytes: of a bucket.
    """

    def __init__(self, policy: Any, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self.expected = shapes_to_send(policy)
        self.held: set[str] = set()
        self.dtype = torch.float32
        self.plan = CopyPlan()

    @torch.no_grad()
    def fill(self, policy: Any, model: Any) -> None:
        """Load every parameter into a model that vLLM has just made. ValueErrors as in `send`."""
        self.dtype = next(model.parameters()).dtype
        self.held = {name for name, _ in model.named_parameters()}
        self._transfer(
            whole_parameters(policy), lambda buckets, received: model.load_weights(unpacked(buckets, received))
        )

    @torch.no_grad()
    def send(self, llm: Any, named_parameters: Iterable[Named], on_cpu: bool) -> None:
        """Load every parameter into a running engine. ValueError where one is missing, unknown, left out or altered."""

        def load(worker: Any, buckets: Iterator[Bucket], received: StreamDigest) -> set[str]:
            if on_cpu:
                return vllm_compat.load_weights(worker, unpacked(buckets, received), on_cpu)
            return self.plan.load(worker.get_model(), buckets, received)

        self._transfer(
            checked(named_parameters, self.expected), lambda *stream: llm.collective_rpc(load, args=stream)[0]
        )

    def _transfer(self, named: Iterable[Named], load: Load) -> None:
        sent, received = StreamDigest(), StreamDigest()
        loaded = load(packed(named, self.dtype, self.max_bytes, sent), received)
        check_received(sent, received)
        check_loaded(loaded, self.held)
