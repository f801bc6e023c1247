"""An engine that gives scripted responses, and what a test needs to run a few steps of a rollout stage."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from datamodules.loading import train_loader
from modules.rlvr import RLVRModule
from prism_pl.batch import Example
from prism_pl.chat import render
from prism_pl.logprobs import token_logps
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.policy_loss import GRPO
from prism_pl.processor import Processor
from prism_pl.rollout.engine import GroupDone, Rollout, Sampling

RIGHT = render("- red 3", "1. 3 + 7 = 10", "10")
WRONG = render("- green 9", "1. it is 9", "9")
MALFORMED = "<caption>no end"


class ScriptedEngine:
    """Gives `texts` in turn, tokenised by the policy's own tokenizer, with the policy's own log-probabilities.

    A text that is cut at `max_tokens` ends as truncated. Held-out calls (with a seed) start the script anew.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)

    def start(self, policy: Any, processor: Processor, *, rank: int) -> None:
        self.policy, self.processor, self.num_drawn = policy, processor, 0

    @torch.no_grad()
    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        prompts = [self.processor.prompt(example) for example in examples]
        first = 0 if sampling.seed is not None else self.num_drawn
        texts = [self.texts[(first + b) % len(self.texts)] for b in range(len(prompts) * num_samples)]
        if sampling.seed is None:
            self.num_drawn += len(texts)
        responses = [self.processor.response_ids(text)[: sampling.max_tokens] for text in texts]
        prompt_of = [b // num_samples for b in range(len(texts))]
        batch = self.processor.sequences(prompts, responses, prompt_of)
        stats = token_logps(self.policy, batch, temperature=sampling.temperature, banned_ids=self.processor.banned_ids)
        return [
            Rollout(
                prompt_ids=list(prompts[p].ids),
                response_ids=ids,
                sampler_logps=stats.logps_BT[b, : len(ids)].tolist(),
                text=self.processor.decode(ids),
                finish_reason="stop" if ids[-1] == self.processor.eos_id else "length",
            )
            for b, (p, ids) in enumerate(zip(prompt_of, responses, strict=True))
        ]

    def dtype(self) -> torch.dtype:
        return torch.float32

    def sync(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_drawn = state["num_drawn"]


class Rows(L.LightningDataModule):
    """The given rows, training (in their order, or shuffled by a loader that goes on after a resume) and held out."""

    def __init__(
        self, train: list[Example], held_out: list[Example] | None = None, batch_size: int = 2, resumable: bool = False
    ):
        super().__init__()
        self.resumable = resumable
        self.train, self.held_out, self.batch_size = train, held_out or train[:2], batch_size

    def train_dataloader(self):
        if self.resumable:
            collator = self.trainer.lightning_module.collator
            return train_loader(self.train, self.trainer, collator, batch_size=self.batch_size, seed=0)
        return DataLoader(self.train, batch_size=self.batch_size, collate_fn=self.trainer.lightning_module.collator)

    def val_dataloader(self):
        return DataLoader(self.held_out, batch_size=self.batch_size, collate_fn=self.trainer.lightning_module.collator)


class Record(Callback):
    """What each training step logged, and what it returned."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.outputs: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        self.outputs.append(outputs)


def fit(module: Any, rows: Rows, folder: Path, callbacks: Sequence[Callback] = (), ckpt: Any = None, **options):
    """Run a fit on the CPU without progress bars; returns the trainer and what it recorded."""
    record = Record()
    settings = {"max_steps": 1, "logger": False, "enable_checkpointing": False, "limit_val_batches": 0} | options
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[*callbacks, record],
        **settings,
    )
    trainer.fit(module, rows, ckpt_path=ckpt, weights_only=True)
    return trainer, record


class SaveAfter(Callback):
    """Saves a checkpoint after a batch, as the shipped LastCheckpoint does."""

    def __init__(self, batch: int, file: Path) -> None:
        self.batch, self.file = batch, file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.file)


class Gradients(Callback):
    """The gradients that each step through Lightning's optimiser was about to take."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.policy.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a network's weights."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


@torch.no_grad()
def drift(module: Any, rows: Sequence[Example], texts: Sequence[str]) -> float:
    """How far a policy has moved from where it started, on these texts: mean d^2 / 2 a token."""
    processor = module.processor
    prompts = [processor.prompt(row) for row in rows]
    responses = [processor.response_ids(text) for _ in rows for text in texts]
    batch = processor.sequences(prompts, responses, [p for p in range(len(rows)) for _ in texts])
    now, start = (
        token_logps(policy, batch, banned_ids=processor.banned_ids).logps_BT
        for policy in (module.policy, build_policy(module.spec))
    )
    return float((0.5 * (now - start).square())[batch.mask_BT].mean())


@torch.no_grad()
def shake(network: torch.nn.Module, names: Sequence[str] = ("",), scale: float = 0.2) -> None:
    """Other weights, far from the old ones.

    Args:
        names: parts of the parameters' names.
        scale: of the noise, in the parameter's own standard deviations.
    """
    for name, parameter in network.named_parameters():
        if any(part in name for part in names):
            parameter.add_(torch.randn_like(parameter) * scale * parameter.std())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two copies of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def scalars(folder: Path) -> dict[str, list[float]]:
    """Every scalar tag in the event files below a folder, with its values in order."""
    found: dict[str, list[float]] = {}
    for file in sorted(Path(folder).rglob("events.out.tfevents*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return found


def make_rlvr(path: str, texts: list[str], *, lr: float = 0.1, max_tokens: int = 60, **options: Any) -> RLVRModule:
    """An RLVR module with scripted responses, plain SGD and groups of two."""
    settings: dict[str, Any] = {
        "optimizer": partial(torch.optim.SGD, lr=lr),
        "num_rollouts": 2,
        "policy_loss": GRPO(),
        "max_grad_norm": None,
    }
    sampling = Sampling(max_tokens=max_tokens)
    return RLVRModule(PolicySpec(path), ScriptedEngine(texts), sampling=sampling, **(settings | options))
