"""What training itself draws, dropout above all: the same in a resumed run as in the whole one."""

import random
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class BatchDraws(Callback):
    """Makes the draws of a training batch, by Python's, numpy's and torch's generators, a function of the run's seed,
    the rank and the batch's number over all epochs, as the rollout engine's are of its own count.

    The seed is torch's at the start of the run (so `seed_everything` sets it) and lies in the checkpoint. Saved
    generator states alone would not do: a sanity check, a validation or a loader's workers draw from the same
    generators, and a resumed run may have them at other times. They are saved too, for what draws between a checkpoint
    and the next batch: of every rank where a checkpoint has a part for each, of the first alone otherwise.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.rank = 0
        self._saved_rank = 0
        self._generators: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rank = trainer.global_rank
        if self.seed is None:
            self.seed = torch.initial_seed()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._generators is not None and self.rank == self._saved_rank:
            _set_generators(self._generators)
        self._generators = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.seed is not None
        # The last number tells these draws from the engine's, which start from the same seed.
        entropy = [self.seed, trainer.global_rank, trainer.fit_loop.total_batch_idx, 1]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.seed is not None
        torch.manual_seed(self.seed)  # whatever runs next in this process finds the run's seed, not the last batch's

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "rank": self.rank, "generators": _generators()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed, self._saved_rank = state_dict["seed"], state_dict["rank"]
        self._generators = state_dict["generators"]


def _generators() -> dict[str, Any]:
    """The states of the global generators, as tensors and plain values."""
    numpy_state: Any = np.random.get_state()
    _, words, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (words.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    words, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    # A run may go on with other GPUs than it had.
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
