"""PrismCLI: Lightning's fit, validate, test and predict over YAML, with a run folder that goes on by itself.

The only file of prism_pl that imports modules, datamodules and callbacks, after checking that the names are ours.
Launch: `python -m prism_pl fit --config align.yaml`.
"""

import contextlib
import importlib
import pkgutil
import sys
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from prism_pl import __version__
from prism_pl.checkpoint_files import (
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    LastCheckpoints,
    Summary,
    intact,
    read_summary,
    refuse_lost_checkpoint,
    was_finished,
)
from prism_pl.errors import Stopped, UsageError, did_you_mean
from prism_pl.explain import explain, explain_lightning, file_with_key, nested_keys, own_error
from prism_pl.folders import checkpoint_name
from prism_pl.importing import no_collections
from prism_pl.last_checkpoint import LastCheckpoint
from prism_pl.origin import SYSTEMS, check_origin
from prism_pl.run_folder import (
    SaveConfig,
    check_writable,
    default_folder,
    fresh_folder,
    held,
    hush_writer_threads,
    nameless_write_error,
    refuse_other_settings,
    remove_unused,
    say_finished,
)
from prism_pl.shipped import find_config, resolve_paths, stage_of
from prism_pl.strategy import prepare_stock
from prism_pl.strategy.weights_only import LOST, take_networks_only

HALF_WEIGHTS = ("bf16-true", "16-true")
FRESH, NETWORKS = FLAGS = ("--fresh", "--weights-only-resume")
CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


def run(args: list[str]) -> None:
    """Run one Lightning command: `["fit", "--config", "align.yaml", ...]`."""
    flags = [flag for flag in FLAGS if flag in args]
    if flags and args[0] != "fit":
        raise UsageError(f"{flags[0]} belongs to fit; {args[0]} writes nothing that it could go on with.")
    if len(flags) > 1:
        raise UsageError(f"{' and '.join(flags)} contradict each other: a run starts anew, or goes on.")
    # Of Lightning's own code, against the torch that it asks for.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
    import_systems()
    hush_writer_threads()
    PrismCLI([arg for arg in args if arg not in FLAGS], fresh=FRESH in flags, weights_only_resume=NETWORKS in flags)


def import_systems() -> None:
    """Import every file of modules/, datamodules/ and callbacks/, so that their classes go by short names too."""
    check_origin()
    with no_collections():
        for name in SYSTEMS:
            package = importlib.import_module(name)
            for found in pkgutil.walk_packages(package.__path__, prefix=f"{name}."):
                importlib.import_module(found.name)


class ConfigFile(ActionConfigFile):
    """`--config NAME`: the file in the current folder or the shipped one; an error in it names the file."""

    def __call__(self, parser: Any, cfg: Any, values: str, option_string: str | None = None) -> None:
        file = find_config(values)
        parser.config_files.append(file)
        try:
            super().__call__(parser, cfg, str(file), option_string)
        except ParseError as error:
            raise ParseError(error.message, file) from None


class ParseError(Exception):
    """jsonargparse's message, to be explained once the command's keys are at hand."""

    def __init__(self, message: str, file: Path | None = None) -> None:
        super().__init__(message)
        self.message, self.file = message, file


class PrismParser(LightningArgumentParser):
    """Raises instead of exiting with pages of usage, and makes the paths in a YAML absolute."""

    _folder: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A cut-off key is a misspelled one: with a further option it would mean another.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.config_files: list[Path] = []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse tries the alternatives of a type with parsers that raise; those need their own exception.
        if not self.exit_on_error:
            super().error(message, ex)
        raise ParseError(message) from ex

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        self._folder = Path(path).resolve().parent
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            self._folder = None

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        if self._folder is not None:
            content = resolve_paths(content, self._folder)
        return super().parse_string(content, *args, **kwargs)


def completed(parser: LightningArgumentParser, config: dict[str, Any]) -> dict[str, Any]:
    """A command's configuration, as plain values, with what it lacks at today's defaults.

    Raises:
        UsageError: it has what the code does not know, or lacks what has no default.
    """
    try:
        return yaml.safe_load(parser.dump(parser.parse_object(deepcopy(config)), skip_none=False))
    except ParseError as error:
        raise UsageError(error.message) from error


class PrismCLI(LightningCLI):
    """LightningCLI with our defaults.

    Args:
        args: the command and its options.
        fresh: start in a new folder where the run's own is taken.
        weights_only_resume: take only networks and position from the checkpoint that is gone on from.
    """

    def __init__(self, args: list[str], fresh: bool = False, weights_only_resume: bool = False) -> None:
        self.fresh, self.weights_only_resume = fresh, weights_only_resume
        self.resume_from: Path | None = None
        self.resumed = Summary(step=0, num_batches=0)
        with contextlib.ExitStack() as self._held:  # the run folder, while the command runs
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                # The modules build their optimisers from OptimizerCallable arguments: an optimiser class as a default
                # would leak its settings into the one a YAML names.
                auto_configure_optimizers=False,
                save_config_callback=SaveConfig,
                seed_everything_default=42,
                parser_class=PrismParser,
                args=args,
            )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"prism_pl=={__version__}", f"lightning.pytorch=={pl.__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ConfigFile, help="A YAML of this folder, or a shipped one by name."
        )
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # A checkpoint holds tensors and plain values: a pickle planted in one is refused.
        parser.set_defaults({"weights_only": True})
        flags = [*FLAGS, "--debug"] if subcommand == "fit" else ["--debug"]
        parser.epilog = f"Also: {', '.join(flags)} (python -m prism_pl --help says what for)."
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ParseError as error:
            command: Any = self._subcommand_parsers[args[0]]
            file = error.file or file_with_key(error.message, command.config_files)
            message = explain(error.message, nested_keys(command)).replace("COMMAND", args[0])
            raise UsageError(f"{file}: {message}" if file else message) from error

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the hyperparameters in a checkpoint override YAML and command line. Ours does not."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path.split(":")[0] not in CHECKPOINT_WORDS and "://" not in path and not Path(path).exists():
            folder = Path(path).parent
            there = [str(entry) for entry in folder.glob("*")] if folder.is_dir() else []
            raise UsageError(f"--ckpt_path {path}: there is no such checkpoint.{did_you_mean(path, there)}")

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and the checkpoint to go on from."""
        config = self.config[str(self.subcommand)]
        files = config.get("config") or []
        names = [stage_of(Path(str(file.absolute))) for file in files]
        self.stage = names[0] if names else ""
        if self.subcommand == "fit" and str(config.trainer.precision) in HALF_WEIGHTS:
            raise UsageError(
                f"trainer.precision is {config.trainer.precision}: steps of a small learning rate round to nothing on "
                "weights of 16 bits. Set bf16-mixed, which keeps them in float32."
            )
        folder = Path(
            config.trainer.default_root_dir or default_folder(str(self.subcommand), names, self._evaluated(config))
        )
        if self.fresh:
            folder = fresh_folder(folder)
        config.trainer.default_root_dir = str(folder)
        rank_zero_info(f"Run folder: {folder} (tensorboard --logdir {folder})")
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            begins = not folder.exists()
            check_writable(folder)
            if rank_zero_only.rank == 0:
                self._held.enter_context(held(folder))
                if begins:  # what stops before anything is written leaves no folder
                    self._held.callback(remove_unused, folder)
            self._go_on(folder, config)

    def _evaluated(self, config: Namespace) -> str | None:
        """What an evaluation calls its policy; None where nothing is evaluated under a name."""
        policy = config.get("model.init_args.policy.path")
        if self.subcommand != "test" or policy is None or "model.init_args.name" not in config:
            return None
        return config.model.init_args.name or checkpoint_name(policy)

    def _go_on(self, folder: Path, config: Namespace) -> None:
        """Find the checkpoint to go on from, and say so; UsageError where it cannot be or should not be."""
        if config.ckpt_path:
            if Path(config.ckpt_path).exists():
                self.resumed = read_summary(Path(config.ckpt_path))
            self._say_what_is_lost()
            return
        self.resume_from = LastCheckpoints(folder).to_go_on_from()
        if self.resume_from is None:
            refuse_lost_checkpoint(folder)
            return
        self.resumed = read_summary(self.resume_from)
        parser = self._parser("fit")
        plain = yaml.safe_load(parser.dump(config, skip_none=False))
        changes = refuse_other_settings(folder, plain, partial(completed, parser))
        changed = f" Changed since: {'; '.join(changes)}." if changes else ""
        self._say_what_is_lost()
        gone = f"{folder / LAST} is gone. " if self.resume_from.name == PREVIOUS else ""
        if not changes and was_finished(folder) and (self.resumed.step or 0) >= config.trainer.max_steps > 0:
            say_finished(folder, self.resumed.step, already=True, beside=self.stage)
            sys.exit()  # before anything is loaded
        rank_zero_info(f"{gone}Going on from {self.resume_from}{self.resumed} (--fresh starts anew).{changed}")

    def _say_what_is_lost(self) -> None:
        if self.weights_only_resume:
            rank_zero_info(f"{NETWORKS}: going on with the networks and the position in the data. {LOST}.")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a class says about its arguments in the whole configuration.
            raise own_error(error) from None
        if self.subcommand == "predict" and type(self.model).predict_step is LightningModule.predict_step:
            raise UsageError(
                f"{type(self.model).__name__} has no predict_step. What predict measures is pass rates: "
                "--config filter.yaml"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[str(self.subcommand)].trainer
        if config.logger in (None, True):
            # Empty name and version: the event files lie in the run's folder itself. What a killed run logged behind
            # its last checkpoint is logged again, and TensorBoard drops the first of the two.
            kwargs["logger"] = TensorBoardLogger(
                config.default_root_dir,
                name="",
                version="",
                purge_step=self.resumed.num_batches if self.subcommand == "fit" else None,
            )
        callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        callbacks = [callback for callback in callbacks if callback is not None]
        if config.enable_checkpointing is not False and not any(isinstance(c, LastCheckpoint) for c in callbacks):
            callbacks.append(LastCheckpoint())
        # Behind a ModelCheckpoint, so that it saves what that one has just found to be the best.
        callbacks.sort(key=lambda callback: isinstance(callback, LastCheckpoint))
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        if isinstance(trainer.strategy, DeepSpeedStrategy):  # it writes checkpoints its own way
            prepare_stock(trainer, self.model)
        elif type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin of the user's stays
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if self.weights_only_resume:
            take_networks_only(trainer)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if self.resume_from is not None:
            kwargs["ckpt_path"] = str(self.resume_from)
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except ValueError as error:
            if (told := explain_lightning(error)) is None:
                raise
            raise told from error
        except SystemExit as stop:
            # Lightning answers Ctrl+C by closing down in order and exiting.
            if self.trainer.state.status == TrainerStatus.INTERRUPTED:
                raise Stopped(self._how_to_go_on()) from stop
            raise
        except OSError as error:
            if not nameless_write_error(error):
                raise
            folder = Path(self.trainer.default_root_dir)
            raise OSError(
                f"{folder} cannot be written to ({error.strerror}): free space there or make it writable; "
                f"{intact(folder / LAST)}."
            ) from error
        if subcommand == "fit":
            already = self.resume_from is not None and not self._trained()
            say_finished(Path(self.trainer.default_root_dir), self.trainer.global_step, already, self.stage)

    def _trained(self) -> bool:
        """Whether fit took a step; a run at its max_steps returns before training starts."""
        return any(isinstance(c, LastCheckpoint) and c.started for c in self.trainer.checkpoint_callbacks)

    def _how_to_go_on(self) -> str:
        checkpoint = LastCheckpoints(Path(self.trainer.default_root_dir)).to_go_on_from()
        if checkpoint is None:
            return "Stopped before the first checkpoint was written."
        return f"Stopped. The same command goes on from {checkpoint}{read_summary(checkpoint)}."
