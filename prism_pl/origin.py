"""Whether `modules`, `datamodules` and `callbacks` are ours.

Their names are common, and the current folder comes first on Python's path: a file of the user's that hides one would
fail far from its cause. Light: imports none of them.
"""

import importlib.util
from pathlib import Path

from prism_pl.errors import UsageError

SYSTEMS = ("modules", "datamodules", "callbacks")


def check_origin() -> None:
    """Check that the three packages lie beside prism_pl.

    Raises:
        UsageError: another file or package of one of these names is found first, or none at all.
    """
    home = Path(__file__).resolve().parent.parent
    for name in SYSTEMS:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise UsageError(f"The package {name}, which belongs beside prism_pl in {home}, is missing: install anew.")
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
        if not any(Path(place).resolve().is_relative_to(home / name) for place in places):
            raise UsageError(
                f"`import {name}` finds {places[0]} instead of {home / name}. Rename that file or folder, or "
                "start from another folder."
            )
