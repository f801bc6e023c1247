"""What a command line of fit, validate, test or predict comes to, without running it."""

from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from prism_pl.cli import PrismCLI, completed, import_systems
from prism_pl.errors import UsageError, did_you_mean


class Resolver(PrismCLI):
    """Reads command lines and runs nothing: `Resolver()(["fit", "--config", "sft.yaml"])` is its configuration."""

    def __init__(self) -> None:
        import_systems()
        # LightningCLI reads a command line while it is built; its parsers serve for all others.
        super().__init__([])

    def __call__(self, args: list[str]) -> dict[str, Any]:
        """The complete configuration of a command as plain values. UsageError where a key or a value is wrong."""
        command = args[0]
        known = sorted(self._subcommand_parsers)
        if command not in known:
            raise UsageError(f"There is no command {command!r}.{did_you_mean(command, known)}")
        self._parser(command).config_files.clear()  # pyright: ignore[reportAttributeAccessIssue]
        super().parse_arguments(self.parser, args)
        return yaml.safe_load(self._parser(command).dump(self.config[command], skip_none=False))

    def complete(self, command: str, config: dict[str, Any]) -> dict[str, Any]:
        """A command's configuration with what it lacks at today's defaults. UsageError where it cannot be read."""
        return completed(self._parser(command), config)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = Namespace(subcommand=None)

    def _parse_ckpt_path(self) -> None: ...
    def _set_seed(self) -> None: ...
    def before_instantiate_classes(self) -> None: ...
    def instantiate_classes(self) -> None: ...
