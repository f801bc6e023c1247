"""What a vLLM server's worker does for a trainer: say what it is, and take weights over.

`vllm serve --worker-extension-cls prism_pl.rollout.vllm_server_worker.ServerWorker` adds these methods to the worker of
each GPU; the trainer calls them by `/collective_rpc`. Weights are read from safetensors alone: no code comes with them.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prism_pl.rollout import vllm_compat
from prism_pl.rollout.bucket import Bucket, Named
from prism_pl.rollout.contract import StreamDigest
from prism_pl.rollout.copy_plan import unpacked
from prism_pl.rollout.vllm_server_facts import ServerFacts, architecture
from prism_pl.rollout.vllm_server_files import read_buckets


class ServerWorker:
    """A mixin for vLLM's worker. Whatever goes wrong is an answer, `{"error": reason}`: an exception would reach the
    trainer as that of a server that is ill, and be tried again."""

    if TYPE_CHECKING:  # of the worker; vLLM refuses an extension that brings a name which the worker has
        vllm_config: Any
        device: torch.device
        get_model: Callable[[], Any]

    _prism_version: str | None = None
    _prism_loaded: tuple[set[str], StreamDigest] | None = None
    _prism_finished: tuple[str, dict[str, Any]] | None = None

    def prism_facts(self) -> dict[str, Any]:
        """See `ServerFacts`."""
        import vllm

        config = self.vllm_config
        transfer = config.weight_transfer_config
        return ServerFacts(
            version=vllm.__version__,
            device=self.device.type,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            max_model_len=config.model_config.max_model_len,
            logprobs_mode=config.model_config.logprobs_mode,
            generation_config=config.model_config.generation_config,
            chunked_prefill=config.scheduler_config.enable_chunked_prefill,
            sleep_mode=config.model_config.enable_sleep_mode,
            transfer=None if transfer is None else transfer.backend,
            image_options=config.model_config.multimodal_config.mm_processor_kwargs or {},
            architecture=architecture(config.model_config.hf_config, vllm_compat.says_tied(config.model_config)),
            parameters=[name for name, _ in self.get_model().named_parameters()],
        ).as_dict()

    def prism_version(self) -> dict[str, Any]:
        """Which weights this worker holds: None for those it was started with, or half of others."""
        return {"version": self._prism_version}

    def prism_load(self, folder: str, version: str) -> dict[str, Any]:
        """Load the weights in a folder, where both sides see it.

        Args:
            folder: written by `vllm_server_files.write_buckets`.
            version: what these weights are called from now on.
        """
        self._prism_version = None
        vllm_compat.unwatch_loads(self.get_model())  # of a transfer that broke off
        received = StreamDigest()
        try:
            with torch.no_grad():
                stream = unpacked(read_buckets(Path(folder)), received)
                loaded = vllm_compat.load_weights(self, stream, on_cpu=self.device.type == "cpu")
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return self._prism_took(loaded, received, version)

    def prism_watch(self) -> dict[str, Any]:
        """Add up what vLLM's own weight transfer brings, from now until `prism_finish`."""
        self._prism_version = None
        model, received, loaded = self.get_model(), StreamDigest(), set()
        vllm_compat.watch_loads(model, lambda named: _tapped(named, received), loaded.update)
        self._prism_loaded = loaded, received
        return {}

    def prism_finish(self, version: str) -> dict[str, Any]:
        """What vLLM's own weight transfer brought since `prism_watch`; the same again where it is asked again, because
        the answer was lost on its way.

        Args:
            version: what these weights are called from now on.
        """
        if self._prism_finished is not None and self._prism_finished[0] == version:
            return self._prism_finished[1]
        if self._prism_loaded is None:
            return {"error": "prism_finish without prism_watch"}
        vllm_compat.unwatch_loads(self.get_model())
        loaded, received = self._prism_loaded
        self._prism_loaded = None
        answer = self._prism_took(loaded, received, version)
        self._prism_finished = version, answer
        return answer

    def _prism_took(self, loaded: set[str], received: StreamDigest, version: str) -> dict[str, Any]:
        self._prism_version = version
        return {"loaded": sorted(loaded), "received": received.entries()}


def _tapped(named: Iterable[Named], received: StreamDigest) -> Iterator[Named]:
    """The stream as it is, each of its tensors added up as a bucket of its own."""
    for name, tensor in named:
        received.add(Bucket.pack([(name, tensor)], tensor.dtype))
        yield name, tensor
