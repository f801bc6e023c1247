"""DeepSpeed under Lightning with one engine for each trained network, so that two players train side by side.

Lightning's own DeepSpeedStrategy wraps the whole module into one engine with one optimiser. Here the networks stay
plain attributes of the module, with their names and methods, and an engine stands behind each: it holds the optimiser's
state, reduces gradients and shards. Lightning keeps optimisers and schedulers, whose parameter groups DeepSpeed reads;
the step goes to the engine.

Named in YAML: `trainer.strategy.class_path: prism_pl.strategy.MultiEngineDeepSpeedStrategy`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from prism_pl.optim import check_finite
from prism_pl.strategy import engines as making
from prism_pl.strategy.checks import check_equal_batches
from prism_pl.strategy.engine_config import EngineOptions, check_names, engine_config
from prism_pl.strategy.folder_checkpoint import FolderCheckpoint
from prism_pl.strategy.parking import Parking
from prism_pl.strategy.sharding import load_whole_state
from prism_pl.strategy.weights_only import NetworksOnly, networks_on_first_rank


class MultiEngineDeepSpeedStrategy(DDPStrategy):
    """One DeepSpeed engine for each trained network, on GPUs (NCCL) or CPUs (gloo).

    Args:
        stage, offload_optimizer, offload_params, precision, config: of every engine, see `EngineOptions`. None for the
            precision follows trainer.precision.
        engines: what differs for a network, by its name in the module: `{policy: {stage: 3}}`.
        park_optimizer_states: keep each player's optimiser state and float32 master weights in pinned CPU memory but
            for its own step, at any stage (what `offload_optimizer` keeps there is there). Two players then need the
            GPU memory of one, at the price of a copy each way a step, and CPU memory as in `Parking`.
        timeout_minutes: how long a rank waits for the others before the run ends with an error. The longest wait is for
            the rank with the longest rollouts.
    """

    def __init__(
        self,
        stage: Literal[0, 1, 2, 3] = 2,
        offload_optimizer: bool = False,
        offload_params: bool = False,
        precision: Literal["32", "bf16"] | None = None,
        config: dict[str, Any] | None = None,
        engines: dict[str, EngineOptions] | None = None,
        park_optimizer_states: bool = False,
        timeout_minutes: int = 30,
        accelerator: Any = None,
        parallel_devices: Any = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.common = EngineOptions(stage, offload_optimizer, offload_params, precision, config or {})
        self.options = engines or {}
        self.park_optimizer_states = park_optimizer_states
        self.engines: dict[str, Any] = {}
        self.parking: dict[str, Parking] = {}
        self.saved = FolderCheckpoint(self)
        self._max_norms: dict[str, float | None] = {}
        self._norms: dict[str, Tensor] = {}
        self._ids: list[str] = []
        self._first_has_weights = False  # of the checkpoint that was read last

    def setup_environment(self) -> None:
        making.import_deepspeed(self.root_device)
        making.end_with_the_first_rank(self.local_rank)
        super().setup_environment()
        making.adopt_process_group(self.local_rank)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Nothing here: a network comes into being in `building`, and what is not one is small."""
        yield

    @contextmanager
    def building(self, name: str, frozen: bool) -> Iterator[None]:
        """Around the construction of the network `name`: sharded at ZeRO-3 where it is trained, on this rank's device
        otherwise."""
        if frozen or not self._is_fitting or self.options_of(name).stage != 3:
            with self.root_device:
                yield
            return
        with making.sharded_construction(self.config_of(name)):
            yield

    def options_of(self, name: str) -> EngineOptions:
        """The complete options of a network."""
        options = self.options.get(name, EngineOptions()).over(self.common)
        if options.precision is None:
            followed: Literal["32", "bf16"] = "bf16" if self.precision_plugin.precision == "bf16-mixed" else "32"
            options = EngineOptions(precision=followed).over(options)
        return options

    def config_of(self, name: str) -> dict[str, Any]:
        """DeepSpeed's configuration of a network's engine."""
        config = engine_config(name, self.options_of(name), on_gpu=self.root_device.type == "cuda")
        return config | {"checkpoint": {"load_universal": self.saved.recut}}

    def setup(self, trainer: Trainer) -> None:
        """Build the engines; the shards of a checkpoint that is gone on from are loaded into them."""
        assert self.accelerator is not None
        assert isinstance(self.model, LightningModule)
        self.accelerator.setup(trainer)
        networks = making.networks_of(self.model)
        check_names(self.options, list(networks))
        self.model_to_device()
        if self._is_fitting:
            making.check_clipping(trainer)
            self.setup_optimizers(trainer)
            self.engines = self._start_engines(networks)
        self.saved.load_networks(networks)
        if self.park_optimizer_states:
            here = (name for name in self.engines if not self.options_of(name).offload_optimizer)
            self.parking = {name: Parking(self.engines[name]) for name in here}
        for parking in self.parking.values():
            parking.park()
        self.barrier("engines")

    def _start_engines(self, networks: dict[str, nn.Module]) -> dict[str, Any]:
        self._optimizer_of = making.optimizer_of_each(self.optimizers, networks)
        engines = {}
        for name, network in networks.items():
            optimizer = self._optimizer_of.get(name)
            if optimizer is None:
                making.hold_frozen(network, self.config_of(name))
            else:
                engines[name] = making.start_engine(network, optimizer, self.config_of(name))
        return engines

    @property
    def _is_fitting(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.state.fn == TrainerFn.FITTING

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization:
            check_equal_batches(batch, self.root_device)
        self._ids = getattr(batch, "ids", [])

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the loss backward in the engine of the one network that can get gradients from it."""
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        making.backward(self.engines[self._trained_network()], closure_loss)
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def _trained_network(self) -> str:
        trained = [name for name, e in self.engines.items() if any(p.requires_grad for p in e.module.parameters())]
        assert len(trained) == 1, f"a backward pass belongs to one network, put training_only around it: {trained}"
        return trained[0]

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Step the engine that the optimiser belongs to. Under automatic optimisation ValueError where the gradient's
        norm is not finite; the engine has taken no step then."""
        result = closure()
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        call._call_callback_hooks(trainer, "on_before_optimizer_step", optimizer)
        call._call_lightning_module_hook(trainer, "on_before_optimizer_step", optimizer)
        name = next(name for name, each in self._optimizer_of.items() if each is optimizer)
        if module.automatic_optimization:
            self.clip(name, trainer.gradient_clip_val)
        self.step(name)
        if module.automatic_optimization:
            check_finite(self.gradient_norm(name), f"the {name}'s gradient norm", self._ids)
        return result

    def clip(self, name: str, max_norm: float | None) -> None:
        """Clip the gradients of a network to this norm in its next step; None does not."""
        self._max_norms[name] = max_norm

    def step(self, name: str) -> None:
        """Reduce what is left to reduce, clip, step, and forget the gradients. No step where the norm is not finite."""
        parking = self.parking.get(name)
        if parking is not None:
            parking.fetch()
        self._norms[name] = making.step(self.engines[name], self._max_norms.get(name))
        if parking is not None:
            parking.park()

    def gradient_norm(self, name: str) -> Tensor:
        """The norm over all ranks before clipping, of the last step; not finite where none was taken."""
        return self._norms[name]

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The engines save and load their optimisers."""
        return False

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of what is in no engine, such as metrics."""
        return self.saved.other_weights()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint folder. Every rank comes here."""
        self.saved.save(checkpoint, Path(self.broadcast(str(filepath))))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's part of a checkpoint folder; the networks' shards follow in `setup`, when there are engines.
        Outside of training, and where only the networks are wanted, all weights are in it, on the first rank."""
        path = Path(checkpoint_path)
        if isinstance(self.checkpoint_io, NetworksOnly) or not self._is_fitting:
            self._first_has_weights = True
            return networks_on_first_rank(path)
        self._first_has_weights = False
        return self.saved.load(path)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Before there are engines; what lies in their shards is not in it."""
        assert self.lightning_module is not None
        sent_on = self.root_device if self._first_has_weights else None
        load_whole_state(self.lightning_module, checkpoint["state_dict"], sent_on=sent_on)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """The engines have loaded theirs."""

    def remove_checkpoint(self, filepath: Any) -> None:
        self.saved.remove(Path(filepath))

    def teardown(self) -> None:
        """The engines stay: an export comes after this, and gathers from them."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
