"""What two ranks owe each other when they generate: draws of their own, or the same ones, and as many calls."""

import math
import multiprocessing
import os
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import distributed
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader

from modules.pairs import PairModule
from modules.pass_rates import PassRateModule
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import Sampling, TransformersEngine
from prism_pl.rollout.draws import Draws
from prism_pl.rollout.ranks import TensorGroup
from prism_pl.strategy.ranks import gathered_values
from tests.conftest import make_examples
from tests.ranks import free_port
from tests.stubs import RIGHT, WRONG, Rows, ScriptedEngine, fit, make_rlvr
from tests.test_evaluate import Scripted
from tests.test_warmup import make_module

FLAT = Sampling(max_tokens=24)
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
DDP: dict[str, Any] = {"strategy": "ddp_find_unused_parameters_true", "devices": 2}


class Shared(Scripted):
    """Generates for both ranks together: a call is one that both make. Keeps how many rows each asked for."""

    def __init__(self) -> None:
        super().__init__([RIGHT], lengths=[4])
        self.asked: list[list[int]] = []

    def generate(self, examples, num_samples, sampling, on_group=None):
        self.asked.append(gathered_values(len(examples)))
        return super().generate(examples, num_samples, sampling, on_group)


class DriftedEngine(ScriptedEngine):
    """Where it drifts, it says that its tokens are 4 times less likely than they are to the trainer."""

    def __init__(self, drifts: bool) -> None:
        super().__init__([RIGHT, WRONG])
        self.drifts = drifts

    def generate(self, examples, num_samples, sampling, on_group=None):
        rollouts = super().generate(examples, num_samples, sampling)
        down = math.log(4) if self.drifts else 0.0
        return [replace(r, sampler_logps=[logp - down for logp in r.sampler_logps]) for r in rollouts]


class HalfDone(PairModule):
    """Goes on where the first row was done before."""

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._done = {"row-0"}


def error_of(act: Any) -> str:
    """What a call raises."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def synced(path: str, in_step: bool) -> str:
    """What stops a sync after flat draws for one prompt on both ranks."""
    spec = PolicySpec(path)
    engine, policy = TransformersEngine(), build_policy(spec)
    engine.start(policy, spec.processor(), rank=distributed.get_rank())
    if in_step:
        engine.draws.rank = 0
    engine.generate(make_examples(1), 2, FLAT)
    return error_of(lambda: engine.sync(policy.named_parameters()))


def shared_draws(rank: int) -> dict[str, Any]:
    """Draws of one tensor group whose ranks have seeds, and then checkpoints, of their own."""
    torch.manual_seed(7 + rank)
    group, draws = TensorGroup(2), Draws(0)
    group.share(draws)
    started = draws.state_dict()
    draws.load_state_dict({"seed": 20 + rank, "num_draws": 3 + rank})
    group.share(draws)
    same, other = {1: [[5, 6]], 0: [[rank]]}, {0: [[4]], 1: [[5, 6]]}
    return {
        "started": started,
        "resumed": draws.state_dict(),
        "same": error_of(lambda: group.check_draws(other if rank else dict(reversed(other.items())))),
        "other": error_of(lambda: group.check_draws(same)),
    }


def predicted(module_class: Any, path: str, folder: Path, num_rows: int) -> list[list[int]]:
    """How many rows each rank asked for, call by call, in a prediction a row at a time."""
    engine = Shared()
    module = module_class(PolicySpec(path), engine, Sampling(), 1)
    loader: Any = DataLoader(make_examples(num_rows), batch_size=1, collate_fn=module.collator)  # pyright: ignore[reportArgumentType]
    Trainer(default_root_dir=folder, enable_model_summary=False, **QUIET, **DDP).predict(module, loader)
    return engine.asked


def warmed_up(path: str, rank: int) -> list[list[int]]:
    """The same of a warm start's batches: one rank's rows are paired, both ranks' are, none is."""
    engine: Any = Shared()
    module = make_module(path, engine)
    bare = make_examples(2)
    paired = [replace(example, rejected=WRONG) for example in bare]
    for rows in (paired if rank else bare, paired, bare):
        module._rejected(rows, module.sampling)
    return engine.asked


def work(rank: int, folder: str, path: str, port: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    torch.manual_seed(0)
    drifted = make_rlvr(path, [])
    drifted.rollout = DriftedEngine(drifts=rank == 0)
    told = {
        "apart": synced(path, in_step=False),
        "in_step": synced(path, in_step=True),
        "draws": shared_draws(rank),
        "warmed_up": warmed_up(path, rank),
        "pass_rates": predicted(PassRateModule, path, Path(folder) / "pass_rates", 3),
        "pairs": predicted(HalfDone, path, Path(folder) / "pairs", 3),
        "drifted": error_of(lambda: fit(drifted, Rows(make_examples(2), batch_size=1), Path(folder) / "fit", **DDP)),
    }
    torch.save(told, Path(folder) / f"{rank}.pt")
    with suppress(RuntimeError):  # the other rank may be gone first
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory, random_policy):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(work, args=(str(folder), random_policy, free_port()), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_ranks_in_step_on_a_flat_distribution_stop_at_the_sync(told):
    for each in told:
        assert each["apart"] == ""
        assert "rollout contract: the engines 0 and 1 drew the same response" in each["in_step"]


def test_a_tensor_group_draws_as_its_first_rank_at_the_start_and_after_a_resume(told):
    for each in told:
        assert each["draws"]["started"] == {"seed": 7, "num_draws": 0}
        assert each["draws"]["resumed"] == {"seed": 20, "num_draws": 3}


def test_a_tensor_group_that_drew_different_tokens_stops_on_all_its_ranks(told):
    for each in told:
        assert each["draws"]["same"] == "", "prompts finish in any order"
        assert "the ranks of one tensor-parallel engine drew different responses" in each["draws"]["other"]


def test_ranks_ask_an_engine_equally_often(told):
    for each in told:
        assert each["warmed_up"] == [[2, 0], [2, 2]], "not where no rank has anything to ask for"
        assert each["pass_rates"] == [[1, 1], [1, 0]]
        assert each["pairs"] == [[0, 1], [1, 0]]


def test_a_mismatch_in_float32_on_one_rank_stops_both(told):
    for each in told:
        assert "the engine's log-probabilities of the rollouts are 0.69" in each["drifted"]
