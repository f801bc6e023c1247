"""The whole weights in DeepSpeed's files of one engine at ZeRO-1. Its own converter to float32 reads none that were
saved in bf16 at this stage, whose optimiser does not name its stage."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def merged(folder: Path, num_ranks: int) -> dict[str, Tensor]:
    """The state dict of the network: trained weights are the float32 master weights, the rest is as it was computed
    with, in float32.

    Args:
        folder: holds the files.
        num_ranks: that wrote them. FileNotFoundError where one's are missing.
    """
    model = _load(folder / "mp_rank_00_model_states.pt")
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    for rank in range(num_ranks):
        optimizer = _load(_file_of(folder, rank))["optimizer_state_dict"]
        parts = zip(optimizer["param_slice_mappings"], optimizer["single_partition_of_fp32_groups"], strict=True)
        for places, part in parts:
            for name, place in places.items():
                pieces[name].append(part[place.start : place.start + place.numel])
    weights = {name: value.float() if value.is_floating_point() else value for name, value in model["module"].items()}
    for name, of_ranks in pieces.items():
        weights[name] = torch.cat(of_ranks).reshape(weights[name].shape)
    for name, original in model["shared_params"].items():
        weights[name] = weights[original]
    return weights


def _file_of(folder: Path, rank: int) -> Path:
    """Its name begins with the precision."""
    for file in folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"):
        return file
    raise FileNotFoundError(f"{folder} has no part of rank {rank}: the checkpoint is not whole")


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
