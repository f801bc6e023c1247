"""Universal checkpoints between ZeRO-3, which shards weights, and stages 1 and 2, which do not.

DeepSpeed's hold each parameter's weight and optimiser state whole for all stages. The rest is laid out in two ways, of
which each stage reads its own:

                            stages 1 and 2                         stage 3
    the engine's counters   mp_rank_00_model_states.pt             zero_pp_rank_0_mp_rank_00_model_states.pt
    a parameter's tensor    {"param": tensor}                      the flat tensor
    the optimiser's step    zero/<parameter>/step.pt               zero/optimizer_state.pt, "optimizer_state_dict"
    parameter groups        zero/optimizer_state.pt                the same, and in "optimizer_state_dict"
"""

from pathlib import Path
from typing import Any

import torch

WHOLE, SHARDED = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
COMMON = Path("zero") / "optimizer_state.pt"
OPTIMIZER = "optimizer_state_dict"


def change_layout(folder: Path, before: int, after: int) -> None:
    """Lay out a universal checkpoint of one engine as the stage that is to read it expects; nothing where both do.

    Args:
        before, after: the stages that wrote it, and that is to read it.
    """
    if before != 3 and after == 3:
        _to_sharded(folder)
    elif before == 3 and after != 3:
        _to_whole(folder)


def _to_sharded(folder: Path) -> None:
    (folder / WHOLE).rename(folder / SHARDED)  # a parameter's tensor is read in either form
    common = _load(folder / COMMON)
    step = _load(next((folder / "zero").glob("*/step.pt")))
    common[OPTIMIZER] = {"state": {0: {"step": step}}, "param_groups": common["param_groups"]}
    torch.save(common, folder / COMMON)


def _to_whole(folder: Path) -> None:
    import deepspeed

    (folder / SHARDED).rename(folder / WHOLE)
    common = _load(folder / COMMON)
    torch.save(common | {"ds_version": deepspeed.__version__}, folder / COMMON)
    for tensor in list((folder / "zero").glob("*/*.pt")):
        torch.save({"param": _load(tensor)}, tensor)
    for parameter in (folder / "zero").iterdir():
        if parameter.is_dir():
            torch.save(common[OPTIMIZER]["state"][0]["step"], parameter / "step.pt")


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)
