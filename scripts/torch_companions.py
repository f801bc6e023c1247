"""Makes what vLLM brings along with torch importable beside a CPU build of torch, or takes it away.

The registry's torchvision, torchaudio and torchcodec are built for CUDA, and their compiled parts do not load beside a
CPU torch.

* torchvision is needed (Qwen's video processor). Its Python part stops at `operator torchvision::nms does not exist`,
  but the transforms are plain torch: it is enough that two operators are declared before the import. This is written to
  site-packages as a module and a .pth line, so that processes which vLLM starts have it too.
* torchaudio and torchcodec are not needed, and transformers imports them where they are installed: they are removed.

Both only where the import fails. Launch: python scripts/torch_companions.py
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "torchvision_declared_ops"
MODULE = '''"""Declares torchvision's operators before its first import. Written by scripts/torch_companions.py."""

import sys


class DeclareOps:
    """A finder that finds nothing: Python asks it first, and that is the moment to declare them."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            import torch

            # The library object is kept: with it go the operators.
            cls.library = torch.library.Library("torchvision", "DEF")
            cls.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            cls.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, DeclareOps)
'''
ABSENT = "No module named"


def import_error(name: str) -> str:
    """The last line of what an import says in a process of its own; empty where it works."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def mend_torchvision() -> None:
    """Write the shim where the import fails, and leave it only where it helps."""
    error = import_error("torchvision")
    if not error or ABSENT in error:
        return
    site = Path(sysconfig.get_path("purelib"))
    module, line = site / f"{NAME}.py", site / f"{NAME}.pth"
    module.write_text(MODULE)
    line.write_text(f"import {NAME}\n")
    after = import_error("torchvision")
    if after:
        module.unlink()
        line.unlink()
        sys.exit(f"torchvision cannot be imported ({after}): install the build that goes with the installed torch")
    print(f"torchvision: {error!r} mended by {line.name}")


def remove_broken(name: str) -> None:
    """Uninstall a package that is there and cannot be imported."""
    error = import_error(name)
    if error and ABSENT not in error:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", name], check=True)
        print(f"{name}: removed, it cannot be imported beside this torch and nothing here needs it")


if __name__ == "__main__":
    mend_torchvision()
    for unneeded in ("torchaudio", "torchcodec"):
        remove_broken(unneeded)
