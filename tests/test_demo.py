"""The demo's commands fit together."""

import shlex
from pathlib import Path

from scripts.demo import commands

ROOT = Path(__file__).parent.parent


def test_each_command_has_a_shipped_config_and_starts_from_what_an_earlier_one_wrote():
    written: set[str] = set()
    for command in commands("runs/my demo"):
        args = shlex.split(command)
        options = dict(zip(args[1::2], args[2::2], strict=True))
        assert (ROOT / options["--config"]).is_file()
        for key in ("--model.policy.path", "--model.discriminator.path"):
            path = options.get(key, "assets/base")
            assert path in written or (ROOT / path).is_dir(), f"{command}: nothing wrote {path}"
        folder = options["--trainer.default_root_dir"]
        assert folder.startswith("runs/my demo/")
        written.add(f"{folder}/export")
    assert len(written) == 10
