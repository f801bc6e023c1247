"""The policy in Hugging Face format: `export/` at the end of a fit, `export-best/` at each best checkpoint. Each has a
model card."""

from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from prism_pl.checkpoint_choice import CHOICE, DRIFT, Choice
from prism_pl.lora import has_lora, save_adapters
from prism_pl.model_card import provenance, write_card
from prism_pl.policy import PolicySpec


class Exportable(Protocol):
    """A module that can write its policy to a folder, whole or not at all. All ranks call it, the first writes."""

    def export(self, folder: Path) -> None: ...


@runtime_checkable
class WithPolicy(Protocol):
    """A module that trains a policy."""

    policy: Any
    spec: PolicySpec


class Export(Callback):
    """Writes below the run's folder:

    * `export/`: the policy as the fit left it;
    * `export-best/`: the policy at the best value so far of the first ModelCheckpoint with a `monitor`. Without such a
      checkpoint there is no best, and no such folder.

    With `choice: least_drift`, `export/` holds the policy of that validation whose structure was nearest to the
    supervision's (the least `proxies/val_drift`, which `callbacks.StructuralProxies` logs; the earliest of equals),
    `export-last/` the policy as the fit left it, and `choice.json` says which step was taken and what the others had.
    It is chosen on validation rows alone; what is reported of it has to come from test rows.

    A checkpoint is written by hooks that run after every other callback's, so a new best is seen, and exported, before
    the next batch changes the weights.

    Args:
        choice: which policy `export/` holds: the `last` one, as published, or that of `least_drift`.
    """

    def __init__(self, choice: Literal["last", "least_drift"] = "last") -> None:
        self.choice = Choice() if choice == "least_drift" else None
        self._best: tuple[str, float | None] = ("", None)
        self._exported: tuple[str, float | None] | None = None  # the best of a resumed run that was exported

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run knows its best checkpoint, but its weights may be later ones: unless its checkpoint was taken
        # between finding a new best and exporting it.
        self._best = _best(trainer) if self._exported is None else self._exported

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._export_new_best(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.choice is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if DRIFT not in trainer.callback_metrics:
            raise ValueError(
                f"callbacks.Export with choice=least_drift needs {DRIFT}: add callbacks.StructuralProxies, which logs "
                "it in validations with demonstrations, or take choice=last"
            )
        if self.choice.add(trainer.global_step, float(trainer.callback_metrics[DRIFT])):
            _export(trainer, pl_module, "export")
        if trainer.is_global_zero:
            self.choice.write(Path(trainer.default_root_dir) / CHOICE)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export_new_best(trainer, pl_module)
        _export(trainer, pl_module, "export" if self.choice is None else "export-last")
        if self.choice is not None and self.choice.step is None:
            raise ValueError(
                f"callbacks.Export with choice=least_drift had nothing to choose from: no validation gave a {DRIFT} "
                "that is a number. export-last/ holds the last policy; see trainer.val_check_interval"
            )

    def state_dict(self) -> dict[str, Any]:
        chosen = None if self.choice is None else self.choice.validations
        return {"exported": self._best, "validations": chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path, score = state_dict["exported"]
        self._exported = (path, score)
        if self.choice is not None:
            self.choice = Choice(state_dict.get("validations") or [])

    def _export_new_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        best = _best(trainer)
        if best != self._best:
            self._best = best
            _export(trainer, pl_module, "export-best")


class ExportAdapters(Callback):
    """Writes `export-adapters/` below the run's folder at the end of a fit: what LoRA trained, in peft's form. `Export`
    writes it merged; both can stand in one list."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (isinstance(pl_module, WithPolicy) and has_lora(pl_module.policy)):
            raise ValueError("ExportAdapters: the policy has no adapters: set model.init_args.policy.lora")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "export-adapters"
            module = cast(WithPolicy, pl_module)
            save_adapters(module.policy, module.spec.path, folder)
            write_card(folder, _told(trainer, pl_module))


def _best(trainer: Trainer) -> tuple[str, float | None]:
    """Path and value of the best checkpoint: a fixed file name is overwritten, so the path alone would not tell."""
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    if not checkpoints or checkpoints[0].best_model_score is None:
        return "", None
    return checkpoints[0].best_model_path, float(checkpoints[0].best_model_score)


def _export(trainer: Trainer, pl_module: LightningModule, name: str) -> None:
    """Every rank comes here: a strategy may hold a share of the weights on each."""
    folder = Path(trainer.default_root_dir) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    cast(Exportable, pl_module).export(folder)
    if trainer.is_global_zero:
        beside = folder.with_name(f"{name}-discriminator")
        for written in (folder, beside) if beside.is_dir() else (folder,):
            write_card(written, _told(trainer, pl_module))
    trainer.strategy.barrier(name)


def _told(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What the card says: the run's configuration, its step, and the last validation's numbers."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/val_" in name}
    config_file = Path(trainer.default_root_dir) / "config.yaml"
    return provenance(config_file, type(pl_module).__name__, trainer.global_step, metrics)
