"""Four processes of which two share each group, so that there are groups of more than one set of ranks: their parts,
their prompts and their statistics are those of one process. And one that reads weights for all four."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed
from torch.multiprocessing.spawn import start_processes

from datamodules.loading import train_loader
from prism_pl.advantages import group_advantages
from prism_pl.rollout_stage import check_same_prompts
from prism_pl.strategy import MultiEngineDeepSpeedStrategy, own_part, whole_groups
from tests.stubs import make_rlvr

POLICY = str(Path(__file__).parent.parent / "assets/sft")
NUM_RANKS, SHARING = 4, 2
# Of all ranks: four prompts, of which the first two belong to ranks 0 and 1; four rollouts each, two of each rank.
REWARDS_PG = torch.tensor([[0.0, 1, 0, 3], [2, 2, 5, 1], [1, 0, 9, 4], [7, 7, 7, 7]])


def part_of(rank: int, values_PG: torch.Tensor) -> torch.Tensor:
    """What a rank holds of the values of all, (2, 2)."""
    prompts, rollouts = 2 * (rank // SHARING), 2 * (rank % SHARING)
    return values_PG[prompts : prompts + 2, rollouts : rollouts + 2]


def rows_of(world_size: int, rank: int, sharing: int, batch_size: int) -> list[list[int]]:
    """The rows of each step of a rank, of 11."""
    module = SimpleNamespace(hparams={"ranks_per_group": sharing})
    trainer: Any = SimpleNamespace(lightning_module=module, world_size=world_size, global_rank=rank)
    rows: Any = list(range(11))
    return [list(batch) for batch in train_loader(rows, trainer, list, batch_size=batch_size, seed=3)]


def advantages_of(rank: int, own_PG: torch.Tensor) -> torch.Tensor:
    """What RLVR trains a rank's rollouts with where rewards are divided by the std of the whole batch."""
    module = make_rlvr(POLICY, [], num_rollouts=4, ranks_per_group=SHARING, scale="batch")
    module._trainer = SimpleNamespace(global_rank=rank, strategy=DDPStrategy())  # type: ignore[assignment]
    groups: Any = [SimpleNamespace(rewards_G=rewards_G) for rewards_G in own_PG]
    return module._advantages(groups, SimpleNamespace(ids=[]))  # type: ignore[arg-type]


def refused(ids: list[str]) -> bool:
    try:
        check_same_prompts(ids, SHARING, torch.device("cpu"))
    except ValueError as error:
        return "neighbouring ranks have different prompts" in str(error)
    return False


class Players(LightningModule):
    """One whose networks' weights are all `value`, and what it keeps beside them."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.policy, self.frozen = torch.nn.Linear(2, 3), torch.nn.Linear(1, 1)
        self.register_buffer("count", torch.tensor(int(value)))
        for weight in self.parameters():
            torch.nn.init.constant_(weight, value)


def loaded_from(file: str, rank: int) -> dict[str, Any]:
    """A checkpoint of one file as a rank takes it for an evaluation: what it is given, and then has."""
    strategy = MultiEngineDeepSpeedStrategy(parallel_devices=[torch.device("cpu")])
    strategy._lightning_module = module = Players(rank)
    module._trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.VALIDATING))  # type: ignore[assignment]
    checkpoint = strategy.load_checkpoint(file)
    given = sum(weight.numel() for weight in checkpoint["state_dict"].values() if not weight.is_meta)
    # What every rank reads from its own place, as a module's `on_load_checkpoint` puts it back.
    checkpoint["state_dict"].update({f"frozen.{name}": w for name, w in Players(7).frozen.state_dict().items()})
    strategy.load_model_state_dict(checkpoint)
    return {"given": given, "weights": module.state_dict(), "step": checkpoint["global_step"]}


def _run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    own_PG = part_of(rank, REWARDS_PG)
    whole_PG = whole_groups(own_PG, SHARING)
    told: dict[str, Any] = {
        "loaded": loaded_from(f"{folder}/last.ckpt", rank),
        "whole": whole_PG,
        "own": own_part(whole_PG, SHARING),
        "advantages": advantages_of(rank, own_PG),
        "rows": rows_of(NUM_RANKS, rank, SHARING, batch_size=2),
        "refused": [refused([f"row-{rank // SHARING}"]), refused([f"row-{rank if rank > 1 else 0}"])],
    }
    torch.save(told, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def told_by_rank(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four")
    weights = {name: value for name, value in Players(9).state_dict().items() if not name.startswith("frozen.")}
    torch.save({"state_dict": weights, "optimizer_states": [torch.ones(5)], "global_step": 4}, folder / "last.ckpt")
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(_run_rank, args=(str(folder),), nprocs=NUM_RANKS, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(NUM_RANKS)]


def test_groups_of_each_pair_of_four_ranks_are_those_of_one_process(told_by_rank):
    advantages_PG, _ = group_advantages(REWARDS_PG, "batch")
    one = rows_of(1, 0, 1, batch_size=4)
    for rank, told in enumerate(told_by_rank):
        pair = rank // SHARING
        assert torch.equal(told["whole"], REWARDS_PG[2 * pair : 2 * pair + 2])
        assert torch.equal(told["own"], part_of(rank, REWARDS_PG))
        assert told["advantages"].tolist() == pytest.approx(part_of(rank, advantages_PG).flatten().tolist())
        assert told["rows"] == [step[pair::2] for step in one]
        # Pairs have prompts of their own; in the second call only those of the last two ranks differ from each other.
        assert told["refused"] == [False, pair == 1]


def test_the_weights_of_a_checkpoint_are_in_one_ranks_memory_and_come_to_all(told_by_rank):
    expected = Players(9).state_dict() | {f"frozen.{name}": w for name, w in Players(7).frozen.state_dict().items()}
    for rank, told in enumerate(told_by_rank):
        loaded = told["loaded"]
        assert loaded["given"] == (10 if rank == 0 else 0)
        assert loaded["step"] == 4
        assert loaded["weights"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(loaded["weights"][name], value), name
