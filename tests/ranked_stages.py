"""What `tests.ranks` trains: each stage for a few steps on replayed rollouts, the same data for any number of ranks.

Over a run come a row without an image, which only one of two ranks has in its step, ranks with longer responses than
others, and a step in which all of one rank's rollouts are malformed.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

from datamodules.loading import train_loader
from modules.align import AdversarialAlignModule
from modules.rlvr import RLVRModule
from modules.sft import SFTModule
from modules.warmup import DiscriminatorModule
from prism_pl.chat import render
from prism_pl.checkpoint_files import LastCheckpoints
from prism_pl.discriminator import DedicatedMoEDiscriminator, DenseDiscriminator, SparseMoEDiscriminator
from prism_pl.last_checkpoint import LastCheckpoint
from prism_pl.lora import LoraSpec
from prism_pl.policy import PolicySpec
from prism_pl.policy_loss import GRPO
from prism_pl.rollout import TransformersEngine, VLLMEngine
from prism_pl.rollout.engine import Sampling
from prism_pl.strategy import EngineOptions, MultiEngineDeepSpeedStrategy, gathered, prepare_stock
from prism_pl.strategy.sharding import is_sharded, whole_numel
from prism_pl.strategy.weights_only import take_networks_only
from prism_pl.updates import KLPenalty
from tests.conftest import make_examples
from tests.stock_deepspeed import stock_on_cpu
from tests.stubs import MALFORMED, RIGHT, WRONG, Record, ScriptedEngine

ROOT = Path(__file__).parent.parent
POLICY, DISCRIMINATOR = str(ROOT / "assets/sft"), str(ROOT / "assets/discriminator")
LONG = render("- red 3 at top left\n- blue 7 at centre", "1. 3 + 7 = 10\n2. so it is 10", "10")
# Eight rollouts a step: four of each of two prompts.
SCRIPT = [
    *(RIGHT, WRONG, MALFORMED, LONG, WRONG, RIGHT, WRONG, WRONG),
    *(LONG, WRONG, RIGHT, RIGHT, MALFORMED, MALFORMED, MALFORMED, MALFORMED),
    *(WRONG, WRONG, LONG, RIGHT, RIGHT, WRONG, MALFORMED, LONG),
]
NUM_STEPS = 3
SAMPLING = Sampling(max_tokens=60)
ON_ROLLOUTS: dict[str, Any] = {
    "num_rollouts": 4,
    "micro_batch_tokens": 300,
    "chunk_tokens": 16,
    "max_grad_norm": 0.5,
    "schedule": "linear",
    "warmup": 1,
}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01),
    "still": partial(torch.optim.SGD, lr=0.0),
}


SAMPLERS: dict[str, Any] = {"transformers": TransformersEngine, "vllm": VLLMEngine}
# Of each network, once it is built and has no engine yet: how many weights this rank holds, and how many there are.
BUILT: dict[str, list[int]] = {}


class Replayed(ScriptedEngine):
    """Goes on in the same step with another number of ranks, each of which has fewer or more of its rollouts."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__(texts)
        self.share = len(texts) // NUM_STEPS

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.num_drawn // self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_drawn = state["steps"] * self.share


class Steps(L.LightningDataModule):
    """`per_step` rows a step, this rank's share of them."""

    def __init__(self, per_step: int, batch_size: int) -> None:
        super().__init__()
        self.rows = make_examples(per_step * NUM_STEPS)
        self.rows[-1] = replace(self.rows[-1], images=[])
        self.batch_size = batch_size

    def train_dataloader(self):
        collator = self.trainer.lightning_module.collator
        return train_loader(self.rows, self.trainer, collator, batch_size=self.batch_size, seed=0)


class KillAt(Callback):
    """Ends one rank in the middle of its work, at the start of a batch."""

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and batch_idx == self.batch:
            (Path(trainer.default_root_dir) / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Poison(Callback):
    """Makes the gradients of one of a network's weights NaN, on one rank from a batch on."""

    def __init__(self, rank: int, batch: int, network: str) -> None:
        self.rank, self.batch, self.network = rank, batch, network

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and batch_idx == self.batch:
            norm = getattr(pl_module, self.network).model.language_model.norm
            norm.register_full_backward_hook(lambda module, grads, outs: tuple(g * float("nan") for g in grads))


def starve_last_expert() -> None:
    """In this process the last expert of each mixture gets no token: those for it go to the one before."""
    route = Qwen3VLMoeTextTopKRouter.forward

    def rerouted(router: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, chosen = route(router, hidden_states)
        return logits, weights, chosen.clamp_max(router.num_experts - 2)

    Qwen3VLMoeTextTopKRouter.forward = rerouted  # type: ignore[method-assign]


def fill_disk(part: str) -> None:
    """Let this process write no file whose name has this part."""
    save = torch.save

    def failing(state: Any, file: Any, *args: Any, **options: Any) -> None:
        if part in str(getattr(file, "name", file)):
            raise OSError(28, "No space left on device")
        save(state, file, *args, **options)

    torch.save = failing


class Sparse(SparseMoEDiscriminator):
    """Upcycled with the same random numbers, however they were drawn before."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(POLICY, init_heads=True, dropout=0.0, balance_weight=0.1)

    def _heads(self, path, init_heads):
        torch.manual_seed(6)
        return super()._heads(path, init_heads)


class Whole(DenseDiscriminator):
    """With the same heads, however numbers were drawn before."""

    def __init__(self) -> None:
        super().__init__(POLICY, init_heads=True, segments="whole", dropout=0.0)

    def _heads(self, path, init_heads):
        torch.manual_seed(6)
        return super()._heads(path, init_heads)


class StopAfter(Callback):
    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx + 1 == self.num_steps


class Reduced(Callback):
    """How many numbers this process gave to reductions over ranks in each step."""

    def __init__(self) -> None:
        self.steps = [0]
        for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter"):
            setattr(torch.distributed, name, self._counted(getattr(torch.distributed, name)))

    def _counted(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            given = signature(reduce).bind(*args, **options).arguments
            tensors = given.get("input_list") or [given["input"] if "input" in given else given["tensor"]]
            self.steps[-1] += sum(tensor.numel() for tensor in tensors)
            return reduce(*args, **options)

        return counting

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps[-1] = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(0)


class Keep(Callback):
    """The whole weights of the trained networks, once training is done."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_end(self, trainer, pl_module):
        for name in self.names:
            for key, parameter in getattr(pl_module, name).named_parameters():
                with gathered([parameter]):
                    self.weights[f"{name}.{key}"] = parameter.detach().float().clone()


def strategy_of(kind: Any, engines: dict[str, Any] | None, **options: Any) -> Any:
    """`auto`, `ddp_find_unused_parameters_true`, `stock-2` for Lightning's own at ZeRO-2, or the ZeRO stage of all
    engines."""
    if isinstance(kind, str):
        return stock_on_cpu(int(kind[-1])) if kind.startswith("stock") else kind
    chosen = {name: EngineOptions(**each) for name, each in (engines or {}).items()}
    strategy: Any = MultiEngineDeepSpeedStrategy(stage=kind, engines=chosen, **options)
    setup = strategy.setup

    def noting(trainer: L.Trainer) -> None:
        for name, network in strategy.model.named_children():
            weights: list[Any] = list(network.parameters())
            held = sum(p.ds_tensor.numel() if is_sharded(p) else p.numel() for p in weights)
            BUILT[name] = [held, sum(map(whole_numel, weights))]
        setup(trainer)

    strategy.setup = noting
    return strategy


def train(
    rank: int,
    num_ranks: int,
    folder: Path,
    stage: str = "align",
    strategy: Any = "auto",
    engines: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    optimizer: str = "SGD",
    precision: str = "32-true",
    shared_group: bool = False,
    ranks_per_group: int | None = None,
    sampled: Literal["transformers", "vllm"] | None = None,
    extra: dict[str, Any] | None = None,
    saved: bool = False,
    kill: tuple[int, int] | None = None,
    ckpt: str | None = None,
    weights_only: bool = False,
    poison: tuple[int, int, str] | None = None,
    full_disk: tuple[int, str] | None = None,
    sparse: bool = False,
    starved: int | None = None,
    whole: bool = False,
    lora: bool = False,
    kl: dict[str, Any] | None = None,
    stop_after: int | None = None,
    dropout: float = 0.0,
    seed: int = 1,
    batch_sizes: list[int] | None = None,
) -> None:
    """Train a stage, and leave `told.pt`: what each step logged, the weights at the end, and under engines what was
    `built`; how many numbers each step `reduced` over ranks.

    Args:
        shared_group: one prompt a step, of all ranks; else two.
        ranks_per_group: of two prompts, where it is more than one rank.
        options: of `MultiEngineDeepSpeedStrategy`.
        sampled: rollouts of the live policy by an engine in place of replayed ones.
        extra: of the module.
        saved: keep the last checkpoints, of every step.
        kill: the rank to kill, and at which batch.
        poison: the rank and the batch at which a network's gradients become NaN, and the network.
        full_disk: the rank that cannot write files with this in their names.
        sparse: the release's discriminator, with a router.
        starved: the rank on which no token goes to the last expert.
        whole: GAD's, which reads a response in one pass.
        lora: train adapters of the policy.
        kl: `KLPenalty`.
        stop_after: so many steps of a run that was meant to be longer.
        dropout: of the discriminator that is not `sparse` or `whole`.
        seed: of the run; a checkpoint's goes over it.
        batch_sizes: of each rank, where they are not as they should be.
        ckpt: a checkpoint to go on from; `last` the newest in the folder.
        weights_only: as `--weights-only-resume`.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if full_disk and full_disk[0] == rank:
        fill_disk(full_disk[1])
    if starved == rank:
        starve_last_expert()
    per_step = 1 if shared_group else 2
    script = SCRIPT if not shared_group else SCRIPT[:4] + SCRIPT[8:12] + SCRIPT[16:20]
    size = 4 * per_step
    share = size // num_ranks
    mine = [script[s * size + rank * share + i] for s in range(NUM_STEPS) for i in range(share)]
    engine = SAMPLERS[sampled]() if sampled else Replayed(mine)
    ranks_per_group = ranks_per_group or (num_ranks if shared_group else 1)
    extra = (extra or {}) | ({"kl": KLPenalty(**kl)} if kl else {})
    policy = PolicySpec(POLICY, lora=LoraSpec(rank=4) if lora else None)
    judge: Any = Sparse if sparse else partial(DedicatedMoEDiscriminator, DISCRIMINATOR, dropout=dropout)
    if whole:
        judge = Whole
    module, names = STAGES[stage](policy, judge, engine, OPTIMIZERS[optimizer], ranks_per_group, extra)
    record, keep, reduced = Record(), Keep(*names), Reduced()
    events: list[Callback] = [StopAfter(stop_after)] if stop_after else []
    events += [KillAt(*kill)] if kill else []
    events += [Poison(*poison)] if poison else []
    torch.manual_seed(seed)
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=num_ranks,
        strategy=strategy_of(strategy, engines, **(options or {})),
        precision=precision,  # type: ignore[arg-type]
        max_steps=NUM_STEPS,
        gradient_clip_val=0.5 if module.automatic_optimization else None,
        callbacks=[record, keep, reduced, *([LastCheckpoint(1)] if saved else []), *events],
        logger=False,
        enable_checkpointing=saved,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    if str(strategy).startswith("stock"):
        prepare_stock(trainer, module)
    if weights_only:
        take_networks_only(trainer)
    ckpt = str(LastCheckpoints(folder).to_go_on_from()) if ckpt == "last" else ckpt
    batch_size = batch_sizes[rank] if batch_sizes else per_step // (num_ranks // ranks_per_group)
    trainer.fit(module, Steps(per_step, batch_size), ckpt_path=ckpt, weights_only=True)
    module.export(folder / "export")
    if rank == 0:
        steps = [{key: value for key, value in step.items() if "time/" not in key} for step in record.steps]
        told = {"steps": steps, "weights": keep.weights, "built": BUILT, "reduced": reduced.steps[:-1]}
        torch.save(told, folder / "told.pt")


def _align(policy: Any, judge: Any, engine: Any, optimizer: Any, ranks_per_group: int, extra: dict[str, Any]) -> Any:
    settings = ON_ROLLOUTS | {"ranks_per_group": ranks_per_group, "discriminator_max_grad_norm": 0.5} | extra
    module = AdversarialAlignModule(policy, judge, engine, optimizer, optimizer, SAMPLING, **settings)
    return module, ("policy", "discriminator")


def _rlvr(policy: Any, judge: Any, engine: Any, optimizer: Any, ranks_per_group: int, extra: dict[str, Any]) -> Any:
    settings = ON_ROLLOUTS | {"ranks_per_group": ranks_per_group, "policy_loss": GRPO()} | extra
    return RLVRModule(policy, engine, optimizer, SAMPLING, **settings), ("policy",)


def _sft(policy: Any, judge: Any, engine: Any, optimizer: Any, ranks_per_group: int, extra: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {"micro_batch_tokens": 150, "chunk_tokens": 16, "schedule": "linear", "freeze": ()}
    return SFTModule(policy, optimizer, **(settings | extra)), ("policy",)


def _warmup(policy: Any, judge: Any, engine: Any, optimizer: Any, ranks_per_group: int, extra: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {"num_rollouts": 4, "micro_batch_tokens": 300, "ceiling": None, "schedule": "linear"}
    return DiscriminatorModule(policy, judge, engine, optimizer, SAMPLING, **(settings | extra)), ("discriminator",)


STAGES = {"align": _align, "rlvr": _rlvr, "sft": _sft, "warmup": _warmup}
