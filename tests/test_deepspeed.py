"""Two processes under DeepSpeed train what one process trains: every stage of ZeRO, alone and mixed, and DDP."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

COUNTS = ("malformed", "num_malformed", "num_all_malformed_groups", "num_zero_std_groups", "zero_std_groups", "pairs")
COUNTS += ("tokens",)
# Of what is logged only these are not one process's: a mean of two ranks' percentiles is not the percentile of both.
# (Times and memory, which `train` leaves out, are the first rank's, and so is what a rank's own engine tells.)
PERCENTILES = ("_p05", "_p50", "_p95")
# Each rank of a group scores the demonstration, which one process scores once.
OF_SCORED_SEQUENCES = ("align/segment_logp", "align/too_long/perception", "align/too_long/reasoning")
MIXED = {"strategy": 2, "engines": {"policy": {"stage": 3}, "discriminator": {"stage": 1}}}


def assert_same_training(told, expected, losses: float, weights: float, but: tuple[str, ...] = ()) -> None:
    """Every key of every step, `but` some: counts exactly, all else within `losses`, and NaN where one process has it;
    and the weights at the end."""
    assert len(told["steps"]) == len(expected["steps"]) == 3
    for step, wanted in zip(told["steps"], expected["steps"], strict=True):
        assert step.keys() == wanted.keys()
        for key, value in wanted.items():
            if key.endswith(PERCENTILES) or key in but:
                continue
            near = 1e-6 if key.partition("/")[2] in COUNTS else losses
            assert step[key] == pytest.approx(value, rel=near, abs=near, nan_ok=True), key
    assert told["weights"].keys() == expected["weights"].keys()
    for name, wanted in expected["weights"].items():
        assert torch.allclose(told["weights"][name], wanted, rtol=0, atol=weights), name


def tolerances(optimizer: str) -> dict[str, Any]:
    # Adam divides by the gradient's size: where a gradient is all rounding, its step is too.
    return {"losses": 1e-5, "weights": 1e-5 if optimizer == "SGD" else 1e-4}


def test_mixed_stages_train_what_one_process_trains(told_of):
    # Token budgets that cut ranks into different numbers of micro-batches, clipping, schedules, a row without an image
    # on one rank, and a step with nothing but malformed rollouts on one rank.
    told = told_of(2, optimizer="AdamW", **MIXED)
    assert_same_training(told, told_of(1, optimizer="AdamW"), **tolerances("AdamW"))
    assert_exported(told["folder"], told["weights"])
    assert_built_sharded(told, ["policy"])
    held, whole = told["built"]["discriminator"]
    assert held == whole


def assert_built_sharded(told, names: list[str]) -> None:
    """Each of two ranks held half of the weights before there was an engine, but for a few heads."""
    for name in names:
        held, whole = told["built"][name]
        assert whole > 10**6
        assert held < 0.51 * whole


def assert_exported(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Whole weights, gathered from their shards, and nothing else."""
    policy = load_file(folder / "export" / "model.safetensors")
    names = {key.removeprefix("policy."): value for key, value in weights.items() if key.startswith("policy.")}
    for name, value in policy.items():
        assert torch.equal(value, names[name].bfloat16()), name
    heads = load_file(folder / "export-discriminator" / "heads.safetensors")
    for name, value in heads.items():
        assert torch.equal(value, weights[f"discriminator.heads.{name}"]), name


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3, "mixed", "ddp_find_unused_parameters_true"])
def test_every_stage_trains_what_one_process_trains(told_of, stage, optimizer):
    told = told_of(2, optimizer=optimizer, **(MIXED if stage == "mixed" else {"strategy": stage}))
    assert_same_training(told, told_of(1, optimizer=optimizer), **tolerances(optimizer))
    assert_exported(told["folder"], told["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sft", "warmup", "rlvr"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_other_stages_have_one_engine_and_train_alike(told_of, module, stage):
    told = told_of(2, stage=module, strategy=stage)
    assert_same_training(told, told_of(1, stage=module), **tolerances("SGD"))


@pytest.mark.parametrize("module", [pytest.param("sft", marks=pytest.mark.slow), "warmup"])
def test_lightnings_own_strategy_trains_the_stages_with_one_optimiser_alike(told_of, module):
    told = told_of(2, stage=module, strategy="stock-2")
    assert_same_training(told, told_of(1, stage=module), **tolerances("SGD"))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sft", "warmup"])
@pytest.mark.parametrize("stage", [1, 2])
def test_lightnings_own_strategy_trains_in_bf16(told_of, module, stage):
    told = told_of(2, stage=module, strategy=f"stock-{stage}", precision="bf16-mixed", optimizer="AdamW")
    assert_same_training(told, told_of(1, stage=module, optimizer="AdamW"), losses=3e-2, weights=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "network"), [("sft", "policy"), ("warmup", "discriminator")])
def test_lightnings_own_strategy_stops_where_a_gradient_is_not_finite(ranks, tmp_path, module, network):
    codes, screen = ranks.codes(tmp_path, 2, stage=module, strategy="stock-2", poison=(1, 1, network))
    assert codes == [1, 1]
    assert screen.count("ValueError: the gradient norm is not finite") == 2
    assert "batch of rows row-" in screen


@pytest.mark.slow
@pytest.mark.parametrize("module", ["align", "rlvr"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_group_on_two_ranks_is_the_group_of_one_process(told_of, module, stage):
    told = told_of(2, stage=module, strategy=stage, shared_group=True)
    alone = told_of(1, stage=module, shared_group=True)
    assert_same_training(told, alone, **tolerances("SGD"), but=OF_SCORED_SEQUENCES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, "ddp_find_unused_parameters_true"])
def test_ranks_refill_and_train_together(told_of, stage):
    # One prompt a rank: in the second batch one rank has a group to train on and the other none.
    told = told_of(2, stage="rlvr", strategy=stage, extra={"dynamic_sampling": True}, stop_after=3)
    # What was logged stays until it is logged anew: the second batch trained nothing.
    norms = [step["rlvr/grad_norm"] for step in told["steps"]]
    assert norms[0] == norms[1] != norms[2]
    assert [step["rlvr/refills"] for step in told["steps"]] == [0, 0, 1]
    assert [step["rlvr/shortfall"] for step in told["steps"]] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_steps_on_float32_master_weights(told_of, stage):
    told = told_of(2, strategy=stage, precision="bf16-mixed", optimizer="AdamW")
    # The sampler is in float32: the largest of all differences to it is how the processor rounds.
    worst = ("align/mismatch_max",)
    assert_same_training(told, told_of(1, optimizer="AdamW"), losses=3e-2, weights=1e-2, but=worst)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        *((stage, {"park_optimizer_states": True}) for stage in (0, 1, 2, 3)),
        *((stage, {"offload_optimizer": True}) for stage in (2, 3)),
        (2, {"park_optimizer_states": True, "offload_optimizer": True}),
        (3, {"park_optimizer_states": True, "offload_params": True}),
    ],
)
def test_states_that_lie_elsewhere_between_steps_step_alike(told_of, stage, options):
    told = told_of(2, strategy=stage, optimizer="AdamW", options=options)
    assert_same_training(told, told_of(1, optimizer="AdamW"), **tolerances("AdamW"))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sft", "warmup"])
@pytest.mark.parametrize("stage", [2, 3])
def test_automatic_optimisation_leaves_the_gradients_of_an_offloaded_optimiser_alone(told_of, module, stage):
    told = told_of(2, stage=module, strategy=stage, optimizer="AdamW", options={"offload_optimizer": True})
    assert_same_training(told, told_of(1, stage=module, optimizer="AdamW"), **tolerances("AdamW"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parked_masters_of_bf16_weights_are_stepped_and_saved_as_others_are(ranks, told_of, tmp_path, stage):
    options: dict[str, Any] = {"strategy": stage, "precision": "bf16-mixed", "optimizer": "AdamW"}
    parked = options | {"options": {"park_optimizer_states": True}, "saved": True}
    expected = told_of(2, **options)
    ranks(tmp_path, 2, **parked, stop_after=2)
    told = ranks(tmp_path, 2, **parked, ckpt="last")
    for name, wanted in expected["weights"].items():
        assert torch.equal(told["weights"][name], wanted), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_that_route_to_other_experts_train_what_one_process_trains(told_of, stage):
    told = told_of(2, strategy=stage, sparse=True)
    assert_same_training(told, told_of(1, sparse=True), **tolerances("SGD"))
    if stage == 3:
        assert_built_sharded(told, ["policy", "discriminator"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_mixture_trains_sharded_on_a_single_rank(told_of, optimizer):
    """Its sequences are several pieces, so that each expert is called more than once within a backward pass."""
    told = told_of(1, strategy=3, sparse=True, optimizer=optimizer)
    assert_same_training(told, told_of(1, sparse=True, optimizer=optimizer), **tolerances(optimizer))


def test_an_expert_may_have_no_token_on_one_rank(told_of):
    """DeepSpeed compares the calls of all modules over ranks at stage 3: an expert's activation is called by the ranks
    that have tokens for it."""
    told = told_of(2, strategy=3, sparse=True, starved=1)
    assert all(math.isfinite(step["align/discriminator_loss"]) for step in told["steps"])
    assert len(told["steps"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_with_one_sequence_to_score_keeps_step(told_of, stage):
    # In the second step all of one rank's rollouts are malformed: the demonstration is left, and pieces without a row.
    options = {"whole": True, "extra": {"micro_batch_tokens": 150}}
    told = told_of(2, strategy=stage, **options)
    assert_same_training(told, told_of(1, **options), **tolerances("SGD"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "place", "kind"), [(2, "loss", "k2"), (3, "loss", "k2"), (2, "reward", "k1")])
def test_a_reference_is_whole_on_every_rank(told_of, stage, place, kind):
    kl = {"coefficient": 0.5, "place": place, "kind": kind}
    told = told_of(2, strategy=stage, kl=kl)
    assert_same_training(told, told_of(1, kl=kl), **tolerances("SGD"))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["policy", "discriminator"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_and_names_the_rows(ranks, tmp_path, stage, network):
    codes, screen = ranks.codes(tmp_path, 2, strategy=stage, poison=(1, 1, network))
    assert codes == [1, 1]
    assert screen.count(f"ValueError: the {network}'s gradient norm is not finite") == 2
    assert "This network took no step" in screen


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_under_automatic_optimisation_too(ranks, tmp_path, stage):
    codes, screen = ranks.codes(tmp_path, 2, stage="sft", strategy=stage, poison=(1, 1, "policy"))
    assert codes == [1, 1]
    assert screen.count("ValueError: the policy's gradient norm is not finite") == 2
    assert "batch of rows row-" in screen


@pytest.mark.slow
def test_lora_at_stage_3_is_one_line(ranks, tmp_path):
    codes, screen = ranks.codes(tmp_path, 2, strategy=3, lora=True)
    assert codes == [1, 1]
    assert "ZeRO-3 with policy.lora is not supported: adapters are small, set stage 2" in screen


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_adapters_train_what_one_process_trains(told_of, stage):
    told = told_of(2, strategy=stage, lora=True)
    assert_same_training(told, told_of(1, lora=True), **tolerances("SGD"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_sample_from_the_policy_as_it_is(ranks, tmp_path, stage):
    # Each token of a sharded policy gathers its weights; ranks differ in when their rollouts end. The probe after each
    # step compares the engine with the trainer.
    extra = {"num_rollouts": 2}
    told = ranks(tmp_path, 2, strategy=stage, sampled="transformers", extra=extra)
    assert len(told["steps"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_of_vllm_on_each_rank_gets_the_weights_that_engines_of_deepspeed_train(ranks, tmp_path, stage):
    pytest.importorskip("vllm")
    told = ranks(tmp_path, 2, strategy=stage, sampled="vllm", extra={"num_rollouts": 2}, stop_after=2)
    assert len(told["steps"]) == 2
    for step in told["steps"]:
        # Sampler against trainer, after the step's weights were sent.
        assert step["rollout/probe_difference"] < 1e-3
        assert step["grad_norm/policy" if "grad_norm/policy" in step else "align/grad_norm/policy"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("module", "extra"), [("align", {}), ("rlvr", {"scale": "batch"})])
def test_two_groups_on_two_ranks_each_are_those_of_one_process(told_of, module, extra):
    told = told_of(4, stage=module, strategy=2, ranks_per_group=2, extra=extra)
    assert_same_training(told, told_of(1, stage=module, extra=extra), **tolerances("SGD"), but=OF_SCORED_SEQUENCES)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "32-true"), (1, "32-true"), (1, "bf16-mixed"), (2, "32-true")])
def test_below_stage_2_each_gradient_is_reduced_once_a_step(told_of, stage, precision):
    """However many micro-batches there are. A rank that keeps a part of the gradients has to reduce those of each."""
    told = told_of(2, strategy=stage, precision=precision)
    num_weights = sum(whole for _, whole in told["built"].values())
    times = [reduced / num_weights for reduced in told["reduced"]]
    if stage < 2:
        assert all(1 <= each < 1.01 for each in times)
    else:
        assert max(times) > 1.2


@pytest.mark.slow
def test_a_rank_with_a_row_fewer_stops_all_with_one_line(ranks, tmp_path):
    codes, screen = ranks.codes(tmp_path, 2, strategy=2, batch_sizes=[2, 1])
    assert codes == [1, 1]
    assert screen.count("ValueError: the processes of the run have batches of 1 to 2 rows in one step") == 2
