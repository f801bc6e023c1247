"""What `MultiEngineDeepSpeedStrategy` asks of DeepSpeed (0.19), and how."""

import contextlib
import importlib
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from prism_pl.lora import has_lora
from prism_pl.optim import clip_gradients
from prism_pl.parent import end_with_parent
from prism_pl.strategy.sharding import finer_than_bf16, is_sharded, restore_masters, whole_shape


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, for this kind of device. ValueError where it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is imported; it would look for a GPU
    try:
        import accelerate  # noqa: F401  (transformers builds sharded networks only where it is there)
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"trainer.strategy: {error.name} is not installed: pip install 'prism_pl[deepspeed]', or use --config "
            "strategy/ddp.yaml"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def adopt_process_group(local_rank: int) -> None:
    """Let DeepSpeed use the process group that Lightning has made."""
    import deepspeed

    os.environ["LOCAL_RANK"] = str(local_rank)  # it insists on it, also where Lightning did not start the process
    backend = torch.distributed.get_backend()
    if backend == "gloo":
        # It would compile an extension for collectives in shared memory that none of ours use, under a lock that a
        # killed run leaves behind: every later run would wait at it forever.
        backend_module: Any = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm.torch` is torch itself
        backend_module.build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)


def end_with_the_first_rank(local_rank: int) -> None:
    """A killed rank ends the run: Lightning's first process watches those that it started, and here they watch it."""
    if local_rank > 0:
        end_with_parent()


@contextlib.contextmanager
def sharded_construction(config: dict[str, Any]) -> Iterator[None]:
    """transformers builds and loads sharded what is built inside. The flag is the process's: it must not outlast
    this."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    kept_alive = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        del kept_alive
        unset_hf_deepspeed_config()


def networks_of(module: LightningModule) -> dict[str, nn.Module]:
    """The module's networks by name: its direct children that hold parameters. ValueError for parameters outside of
    them, or in two."""
    networks = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    if own := [name for name, _ in module.named_parameters(recurse=False)]:
        raise ValueError(f"{type(module).__name__} holds parameters of its own ({own[0]}): an engine needs a network")
    owner: dict[int, str] = {}
    for name, network in networks.items():
        for parameter in network.parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"{owner[id(parameter)]} and {name} share a parameter: two engines would step it")
    return networks


def optimizer_of_each(optimizers: Sequence[Optimizer], networks: Mapping[str, nn.Module]) -> dict[str, Optimizer]:
    """The optimiser of each trained network, by the parameters it was given. ValueError where one has parameters of
    several, or a network is trained by none or by several."""
    owner = {id(parameter): name for name, network in networks.items() for parameter in network.parameters()}
    found: dict[str, Optimizer] = {}
    for optimizer in optimizers:
        names = {owner[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
        if len(names) != 1:
            raise ValueError(
                f"an optimiser has parameters of {' and '.join(sorted(names)) or 'no network'}: give each network one "
                "of its own"
            )
        name = names.pop()
        if name in found:
            raise ValueError(f"{name} has two optimisers: an engine has one")
        found[name] = optimizer
    for name, network in networks.items():
        if name not in found and any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(f"{name} wants gradients and has no optimiser: freeze it, or give it one")
    return found


def check_clipping(trainer: Trainer) -> None:
    """ValueError for clipping that engines do not do."""
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise ValueError("trainer.gradient_clip_algorithm is 'value': DeepSpeed clips the norm, set it to 'norm'")


def start_engine(network: nn.Module, optimizer: Optimizer, config: dict[str, Any]) -> Any:
    """The engine of a trained network. Its master weights are the network's float32 ones."""
    import deepspeed

    finer = finer_than_bf16(network) if config["bf16"]["enabled"] else {}
    _prepare(network, config)
    parameters: Any = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    engine, *_ = deepspeed.initialize(
        args=_place(),
        model=network,
        optimizer=optimizer,
        model_parameters=parameters,
        config=config,
        dist_init_required=False,
    )
    if config["bf16"]["enabled"]:
        restore_masters(network, finer)  # they are made of weights that are rounded already
    if engine.zero_optimization():
        # Under automatic optimisation Lightning calls it before each backward pass. The engine forgets gradients by
        # itself, and where the optimiser is offloaded it would lose the buffer that it copies them into.
        optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    return engine


def hold_frozen(network: nn.Module, config: dict[str, Any]) -> None:
    """Get a network ready that is never trained: whole on every rank, in the precision that the others compute in."""
    if config["bf16"]["enabled"]:
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()


def _prepare(network: nn.Module, config: dict[str, Any]) -> None:
    """At stage 3: what was made outside of transformers takes the precision of the rest, which DeepSpeed expects of a
    network that it finds sharded, and a mixture's activations are taken out of its sight."""
    if config["zero_optimization"]["stage"] != 3:
        return
    if has_lora(network):
        raise ValueError("ZeRO-3 with policy.lora is not supported: adapters are small, set stage 2, or lora: null")
    _hide_activations(network)
    if config["bf16"]["enabled"]:
        for parameter in network.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.data.bfloat16()


def _hide_activations(network: nn.Module) -> None:
    """Experts are stacked in the weights of one module and are gathered around its call, by all ranks alike. But the
    module inside it, the activation, is called once for each expert that has a token, and DeepSpeed wants the same
    calls on every rank: it is called by its method, as no module of the network.

    DeepSpeed's leaf modules would leave it alone too, but they take a second call within a backward pass, as of
    sequences in several pieces, for a mistake where both calls' gradients lie in one bucket.
    """
    for module in network.modules():
        stacked = any(len(whole_shape(parameter)) == 3 for parameter in module.parameters(recurse=False))
        for name, inner in list(module.named_children()) if stacked else ():
            if not list(inner.parameters()):
                delattr(module, name)
                setattr(module, name, inner.forward)


def _place() -> Namespace:
    """Which device is this process's; DeepSpeed has numbers for CPUs too."""
    return Namespace(device_rank=torch.cuda.current_device() if torch.cuda.is_available() else 0)


def backward(engine: Any, loss: Tensor) -> None:
    """Add a loss's gradients to those that wait for the step.

    A loss is made of several calls of the network and its parts, some of them under activation checkpointing, so the
    engine's own forward never runs. What it does for the backward pass is to tell the optimiser that another one
    begins.
    """
    if engine.zero_optimization():
        engine.optimizer.clear_backward_seen_flag()
    else:
        engine.set_gradient_accumulation_boundary(False)
    engine.backward(loss)


def save_shards(engine: Any, folder: str, tag: str) -> None:
    """Write an engine's shards. Every rank comes here, and whatever stops one from writing its files is raised there
    once all are through: DeepSpeed lets ranks wait for each other between its files."""
    failures: list[Exception] = []

    def kept(act: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*args: Any, **kwargs: Any) -> Any:
            try:
                return act(*args, **kwargs)
            except Exception as error:
                failures.append(error)

        return tried

    # What touches the disk, each to be tried. The scripts that are copied along are not needed: `consolidated` reads.
    writer = engine.checkpoint_engine
    writer.save, writer.makedirs, engine._copy_recovery_script = (
        kept(writer.save),
        kept(writer.makedirs),
        lambda _: None,
    )
    try:
        engine.save_checkpoint(folder, tag=tag, save_latest=False)
    finally:
        del writer.save, writer.makedirs, engine._copy_recovery_script
    if failures:
        raise failures[0]


def step(engine: Any, max_norm: float | None) -> Tensor:
    """Clip and step. Returns the gradients' norm over all ranks, from before; no step where it is not finite."""
    if not engine.zero_optimization():
        return _step_unsharded(engine, max_norm)
    engine.optimizer.clip_grad = max_norm or 0.0
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=engine.device)


def _step_unsharded(engine: Any, max_norm: float | None) -> Tensor:
    """At stage 0 the engine reports no norm and clips after its own reading, so both are done here."""
    engine.set_gradient_accumulation_boundary(True)
    engine.allreduce_gradients()
    norm = clip_gradients(engine.module.parameters(), max_norm)
    if bool(torch.isfinite(norm)):
        engine.step()
    else:
        engine.zero_grad()
    return norm
