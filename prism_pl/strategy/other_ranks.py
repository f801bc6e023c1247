"""Going on with another number of ranks or other stages of ZeRO: DeepSpeed's universal checkpoints.

Its shards are cut for one number of ranks. Converted, each parameter's weight and optimiser state lies whole in files
of its own, of which every rank then takes its part.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_pl.checkpoint_files import remove
from prism_pl.strategy.other_stages import change_layout


def convert(source: Path, target: Path, stages: Mapping[str, tuple[int, int]], tag: str) -> None:
    """Write universal checkpoints of engines' shards, `source/<name>/<tag>`, to `target/<name>/<tag>`. One process
    does; it takes as much room again as the shards.

    Args:
        stages: of each engine, the one that wrote the shards and the one that is to read them.
    """
    from deepspeed.checkpoint import ds_to_universal

    remove(target)
    for name, (before, after) in stages.items():
        ds_to_universal.main(
            Namespace(
                input_folder=str(source / name / tag),
                output_folder=str(target / name / tag),
                num_extract_workers=1,  # in this process
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
        change_layout(target / name / tag, before, after)


def forget_held_back(state: dict[str, Any]) -> bool:
    """Empty dynamic sampling's buffer in Lightning's state of one rank: each rank held back groups of its own, and
    other ranks have no place for them. Returns whether the buffer was being filled."""
    if "rlvr" not in state:
        return False
    buffer = state["rlvr"]["buffer"]
    waited = buffer["refills"] > 0
    buffer |= {"groups": [], "refills": 0}
    return waited
