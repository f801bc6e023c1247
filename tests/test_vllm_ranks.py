"""vLLM on two ranks: an engine each, and one engine for both by tensor parallelism."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

from prism_pl.logprobs import token_logps
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import Sampling, VLLMEngine, rollout_batch
from scripts.blank_policy import ROOT
from tests.conftest import make_examples
from tests.stubs import weights

pytest.importorskip("vllm")

FLAT = Sampling(temperature=2.0, max_tokens=24)
GREEDY = Sampling(temperature=0.0, max_tokens=12)


def mismatch(policy, processor, example, rollouts) -> float:
    """The largest difference of the engine's log-probabilities of one prompt's rollouts from the trainer's, in nats."""
    batch, sampler_logps_BT = rollout_batch(processor, [processor.prompt(example)], rollouts, len(rollouts))
    with torch.no_grad():
        stats = token_logps(policy, batch, temperature=FLAT.temperature, banned_ids=processor.banned_ids)
    return float((sampler_logps_BT - stats.logps_BT).abs().max())


def forced(engine: VLLMEngine, policy, example, rank: int) -> str:
    """What stops engines whose generators run in step, and an engine whose ranks' generators do not."""
    alone = engine.tensor_group.size == 1
    if alone:
        engine.draws.rank = 0
        engine.load_state_dict({"seed": 20, "num_draws": 9})
    elif rank == 1:
        engine.draws._next = lambda sampling: np.random.SeedSequence(9)
    try:
        engine.generate([example], 2, FLAT if alone else replace(FLAT, max_tokens=4))
        engine.sync(policy.named_parameters())
    except ValueError as error:
        return str(error)
    return ""


def shared_files() -> list[str]:
    """What this process has mapped to talk to other ranks, as Linux shows it: a file that is gone says "(deleted)"."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line[line.index("/dev/shm/prism_pl-") :] for line in lines if "/dev/shm/prism_pl-" in line})


def work(rank: int, folder: str) -> None:
    """Both arrangements in turn on one rank; writes down what it drew."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = PolicySpec(str(ROOT / "assets" / "sft"))
    policy, processor = build_policy(spec), spec.processor()
    first = weights(policy)
    examples = make_examples(2)
    mine = [replace(examples[rank], id=f"rank-{rank}")]
    told = {}
    for name, size in (("alone", 1), ("together", 2)):
        policy.load_state_dict(first)
        engine = VLLMEngine(tensor_parallel=size)
        # Where nothing seeds a run, each process has a seed of its own.
        torch.manual_seed(0 if size == 1 else 5 + rank)
        engine.start(policy, processor, rank=rank)
        asked = [examples[0]] if size == 1 else mine
        flat = engine.generate(asked, 2, FLAT)
        drawn = engine.state_dict()
        engine.load_state_dict({"seed": 20 + rank, "num_draws": 1 + rank})
        resumed = engine.generate(asked, 2, FLAT)
        differences = [mismatch(policy, processor, asked[0], rollouts) for rollouts in (flat, resumed)]
        few = engine.generate(mine[rank:], 1, FLAT)  # the second rank has nothing to ask for
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
        engine.sync(policy.named_parameters())
        greedy = engine.generate(mine, 1, GREEDY)
        told[name] = {
            "flat": [r.response_ids for r in flat],
            "greedy": [r.response_ids for r in greedy],
            "prompts": [r.prompt_ids == processor.prompt(mine[0]).ids for r in greedy],
            "group": engine.tensor_group.number,
            "difference": engine.metrics()["rollout/probe_difference"],
            "mismatch": differences,
            "drawn": drawn,
            "few": len(few),
            "stale": unsent(engine, policy),
            "forced": forced(engine, policy, examples[0], rank),
            "shared": shared_files(),
        }
        engine.close()
    try:
        VLLMEngine().start(policy, processor, rank=0)
    except ValueError as error:
        told["same_rank"] = str(error)
    try:
        VLLMEngine(tensor_parallel=3).start(policy, processor, rank=rank)
    except ValueError as error:
        told["uneven"] = str(error)
    torch.save(told, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def unsent(engine: VLLMEngine, policy) -> str:
    """What a sync says that sends nothing of a small step."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1e-5)
    engine.sender.send = lambda *_: None
    try:
        engine.sync(policy.named_parameters())
    except ValueError as error:
        return str(error)
    finally:
        del engine.sender.send
    return ""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # A fork server imports vLLM once for both ranks, and, unlike a fork of pytest, has no threads.
    multiprocessing.set_forkserver_preload([__name__, "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"])
    start_processes(work, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_engines_draw_different_rollouts_of_the_same_prompt(told):
    first, second = (each["alone"]["flat"] for each in told)
    assert len({tuple(ids) for ids in [*first, *second]}) == 4
    assert [each["alone"]["group"] for each in told] == [0, 1]


def test_a_tensor_parallel_engine_gives_each_rank_its_own_rows(told):
    for each in told:
        assert each["together"]["group"] == 0
        assert all(each["together"]["prompts"])
        assert each["together"]["difference"] < 1e-4
        assert each["alone"]["difference"] < 1e-4
        assert each["together"]["greedy"] == each["alone"]["greedy"]
    assert told[0]["together"]["flat"] != told[1]["together"]["flat"]


def test_a_tensor_parallel_engine_draws_by_one_seed_whatever_seeds_its_ranks_have(told):
    for each in told:
        assert each["together"]["drawn"] == {"seed": 5, "num_draws": 1}
        assert max(each["together"]["mismatch"]) < 1e-4, "from the start, and from checkpoints that differ"
        assert max(each["alone"]["mismatch"]) < 1e-4


def test_a_rank_may_have_nothing_to_ask_for(told):
    for name in ("alone", "together"):
        assert [each[name]["few"] for each in told] == [1, 0]


def test_generators_in_step_between_engines_or_out_of_step_within_one_stop_the_run(told):
    for each in told:
        assert "the engines 0 and 1 drew the same response" in each["alone"]["forced"]
        assert "the ranks of one tensor-parallel engine drew different responses" in each["together"]["forced"]


def test_a_killed_run_leaves_no_shared_memory_because_it_is_gone_from_the_start(told):
    alone, together = ([each[name]["shared"] for each in told] for name in ("alone", "together"))
    assert alone == [[], []]
    assert together[0] == together[1]  # one name for both ranks, and a file of each
    assert [file.split("_")[-1] for file in together[0]] == ["0 (deleted)", "1 (deleted)"]


def test_weights_that_did_not_arrive_are_found_in_shards_too(told):
    for each in told:
        assert "engine's 'language_model.model.embed_tokens.weight' is not the trainer's" in each["alone"]["stale"]
        assert "is not the trainer's" in each["together"]["stale"]
        assert "embed_tokens" not in each["together"]["stale"]  # half of them are on the other rank


def test_engines_that_would_repeat_each_other_and_uneven_groups_are_refused(told):
    for each in told:
        assert "the engines 0 and 1 have the same seed" in each["same_rank"]
        assert "engine tensor_parallel is 3, and the run has 2 processes" in each["uneven"]
