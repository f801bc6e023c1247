"""The trainer's end of vLLM's own weight transfer by NCCL, in the two forms that vLLM has given it.

The older one, 0.24's, has a function for each half; the newer one, 0.32's, an object that does both. What a server is
told about the packing differs too, so both sides need the same vLLM.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from importlib.util import find_spec
from threading import Thread
from typing import Any, Protocol, TypeVar

from torch import Tensor

from prism_pl.rollout import vllm_compat

Result = TypeVar("Result")


class NCCLEnd(Protocol):
    """The trainer's end of an open transfer."""

    def send_weights(self) -> None:
        """Broadcast what the source holds, while the server receives and loads it."""
        ...

    def shutdown(self) -> None:
        """Leave the group. A broadcast that is under way, in another thread, ends with it."""
        ...


def open_nccl(client: Any, source: Any, address: str, port: int, world_size: int) -> NCCLEnd:
    """Meet the server's workers in a group of NCCL, on this thread's current GPU.

    Args:
        client: has the four calls of vLLM's `VLLMWeightSyncClient`.
        source: has `shapes()`, the dtype and shape of each parameter by name, and is iterated once a sync for the
            named tensors themselves, in that order, on this process's GPU.
        address, port: where the server's workers find this process.
        world_size: the server's workers, and this process.

    ValueError where the installed vLLM has no such end, or where there is none.
    """
    installed_version()
    try:
        open_end = _form()
    except ImportError as error:
        raise _missing(error) from error
    return open_end(client, source, address, port, world_size)


def is_installed() -> bool:
    """Whether there is a vLLM on the trainer's side, broken or not: importing it takes seconds."""
    return find_spec("vllm") is not None


def installed_version() -> str:
    """The version of the trainer's vLLM. ValueError where there is none, or none that can be imported."""
    try:
        return vllm_compat.import_vllm().__version__
    except ImportError as error:
        raise _missing(error) from error


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """What `work` will return or raise, in a thread that no process waits for at its end: NCCL may keep it for ever."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _missing(error: ImportError) -> ValueError:
    return ValueError(
        f"the trainer's vLLM has no trainer's end of weight transfer by NCCL ({error}): install the same vllm, 0.24 or "
        "0.32, on both sides, or set the engine's transfer: path"
    )


def _form() -> Callable[[Any, Any, str, int, int], NCCLEnd]:
    """How the installed vLLM opens a transfer. ImportError where it has none of the two forms."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    if hasattr(NCCLWeightTransferEngine, "trainer_send_weights"):
        return partial(_OlderEnd, NCCLWeightTransferEngine)
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    def open_newer(client: Any, source: Any, address: str, port: int, world_size: int) -> NCCLEnd:
        class Source(WeightSource):
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, dtype, shape) for name, (dtype, shape) in source.shapes().items()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return iter(source)

        # Packed: many tensors a broadcast.
        info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, packed=True, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=Source())

    return open_newer


class _OlderEnd:
    """Both halves of 0.24's form: the server's stands in its call until this process has done its own."""

    def __init__(self, engine: Any, client: Any, source: Any, address: str, port: int, world_size: int) -> None:
        self.engine, self.client, self.source = engine, client, source
        group = {"master_address": address, "master_port": port, "world_size": world_size}
        theirs = in_thread(partial(client.init_weight_transfer_engine, group | {"rank_offset": 1}))
        self.group = engine.trainer_init(group)
        theirs.result()

    def send_weights(self) -> None:
        shapes = self.source.shapes()
        told = {
            "names": list(shapes),
            "dtype_names": [str(dtype).removeprefix("torch.") for dtype, _ in shapes.values()],
            "shapes": [list(shape) for _, shape in shapes.values()],
            "packed": True,  # many tensors a broadcast
        }
        self.client.start_weight_update()
        theirs = in_thread(partial(self.client.update_weights, told))
        self.engine.trainer_send_weights(iter(self.source), {"group": self.group, "packed": True})
        theirs.result()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.destroy()
