"""What the two stages that train on rollouts, alignment and RLVR, do alike."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prism_pl.aggregation import Metrics
from prism_pl.batch import Example, SequenceBatch
from prism_pl.mismatch import MismatchCorrection
from prism_pl.policy_loss import PolicyLoss
from prism_pl.rewards import AccuracyFormatReward, RewardOutput, overlong
from prism_pl.rollout.contract import check_mismatch
from prism_pl.rollout.engine import Rollout, RolloutEngine, Sampling
from prism_pl.rollout.inference import compute_dtype
from prism_pl.strategy import global_max, whole_groups, world_size
from prism_pl.updates import KLPenalty


def check_counts(counts: Mapping[str, int]) -> None:
    """ValueError for an option below 1, naming it."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: give at least 1")


def check_max_norms(max_norms: Mapping[str, float | None]) -> None:
    """ValueError for a gradient-clipping norm that is 0 or negative, naming it: it would stop or turn every step."""
    for name, value in max_norms.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}: give a positive norm, or null to only measure it")


def check_ranks_per_group(num_rollouts: int, ranks: int) -> None:
    """ValueError for a group that cannot be shared evenly."""
    if ranks < 1 or num_rollouts % ranks:
        raise ValueError(
            f"ranks_per_group is {ranks}, and num_rollouts {num_rollouts}: give a number that divides the rollouts"
        )


def check_same_prompts(ids: Sequence[str], ranks: int, device: torch.device) -> None:
    """ValueError where ranks that share groups were given different prompts."""
    if ranks == 1:
        return
    if world_size() % ranks:
        raise ValueError(f"ranks_per_group is {ranks}, and the run has {world_size()} processes: it must divide them")
    prints_P1 = torch.tensor([[zlib.crc32(each.encode())] for each in ids], device=device)
    if not bool((whole_groups(prints_P1, ranks) == prints_P1).all()):
        raise ValueError(
            f"ranks_per_group is {ranks}, but neighbouring ranks have different prompts (here {', '.join(ids)[:200]}): "
            "let the datamodule make its loader by datamodules.loading.train_loader, which gives them the same ones"
        )


def warn_inert_kl(kl: KLPenalty | None) -> None:
    """Say once, at the start, that a configured KL penalty has no weight."""
    if kl is not None and kl.coefficient == 0:
        rank_zero_warn(f"kl.coefficient is 0, so kl.place={kl.place!r} and kl.kind={kl.kind!r} cannot act.")


def check_sampler(measured: Metrics, mismatch: MismatchCorrection, engine: RolloutEngine, policy: Any) -> None:
    """ValueError where an engine in float32 and a trainer in float32 disagree on the rollouts, under `mismatch.kind:
    auto`, which takes them for equal. A probe is greedy and of one prompt: it does not see how the rollouts were drawn.

    Args:
        measured: over all ranks, so that all stop alike; `mismatch_p95` compares with the policy that sampled, however
            many updates a batch is used for.
    """
    if mismatch.kind == "auto" and engine.dtype() == compute_dtype(policy) == torch.float32:
        check_mismatch(float(measured["mismatch_p95"]))


def trained_mask(policy_loss: PolicyLoss, sequences: SequenceBatch, rollouts: Sequence[Rollout]) -> Tensor:
    """Response tokens that are trained, (B, T): all, or with `mask_truncated` those of finished responses."""
    if not policy_loss.mask_truncated:
        return sequences.mask_BT
    finished = [rollout.finish_reason == "stop" for rollout in rollouts]
    return sequences.mask_BT & torch.tensor(finished, device=sequences.mask_BT.device)[:, None]


def check_overlong(max_tokens: int, buffer: int, penalty: float) -> None:
    """ValueError for a buffer or penalty out of range, before anything is loaded; a warning for a penalty of 0."""
    if not 1 <= buffer <= max_tokens:
        raise ValueError(
            f"overlong_buffer is {buffer}: it is the last stretch of sampling.max_tokens, give 1 to {max_tokens}"
        )
    if not 0 <= penalty < float("inf"):
        raise ValueError(f"overlong_penalty is {penalty}: it is subtracted, give 0 or a positive number")
    if penalty == 0:
        rank_zero_warn(f"overlong_penalty is 0, so overlong_buffer={buffer} cannot act.")


def with_overlong(
    told: RewardOutput, rollouts: Sequence[Rollout], max_tokens: int, buffer: int, penalty: float
) -> RewardOutput:
    """DAPO's length punishment added to the rewards; it is also the part `overlong`, 0 or negative."""
    overlong_B = torch.tensor([overlong(len(r.response_ids), max_tokens, buffer, penalty) for r in rollouts])
    return RewardOutput(told.rewards_B + overlong_B, told.parts | {"overlong": overlong_B})


def total_steps(trainer: Trainer, steps_per_batch: int) -> float:
    """Optimiser steps of a whole run whose every batch takes `steps_per_batch`, as far as the trainer's limits tell."""
    steps = trainer.estimated_stepping_batches  # takes a batch for a step; it also loads the data, which counts them
    if trainer.max_epochs in (None, -1):
        return steps
    by_epochs = trainer.num_training_batches * int(trainer.max_epochs or 0) * steps_per_batch
    return by_epochs if trainer.max_steps == -1 else min(by_epochs, trainer.max_steps)


def missing_batches(trainer: Trainer, device: torch.device) -> range:
    """Numbers of the predict batches that other ranks have and this one has not: Lightning deals out the rows of a
    prediction as they come, so one rank may have a batch more than another, and ranks that share an engine generate
    together. For `generate_batch` without rows once the last is done, but found before the first: it is a collective.

    Raises ValueError where a run of several processes predicts without end.
    """
    if world_size() == 1:
        return range(0)
    (num_batches,) = trainer.num_predict_batches
    most = float(global_max(torch.tensor(float(num_batches), device=device)))
    if most == float("inf"):
        raise ValueError(
            "the rows to predict have no number, and several processes must generate equally often: set "
            "trainer.limit_predict_batches, or trainer.devices to 1"
        )
    return range(int(num_batches), int(most))


def forget_logged(trainer: Trainer) -> None:
    """At the start of a batch: what an earlier batch logged is not logged again. Lightning would repeat the last values
    at batches that log none (no update while dynamic sampling waits, no step of the discriminator), as if they were
    new, and a resumed run, which does not know them, would be another curve."""
    trainer.fit_loop.epoch_loop._results.reset(fx="training_step")


def held_out_rollouts(
    engine: RolloutEngine, examples: Sequence[Example], sampling: Sampling, seed: int
) -> list[Rollout]:
    """One rollout a held-out prompt, with a seed of its own: curves compare, training draws go on undisturbed."""
    return engine.generate(examples, 1, Sampling(sampling.temperature, sampling.max_tokens, seed=seed))


def held_out_parts(rollouts: Sequence[Rollout], examples: Sequence[Example]) -> dict[str, float]:
    """Mean strict `accuracy` and `format` of one rollout an example; empty where a row has no answer. Numbers, not the
    rewards' tensors, which lie in the CPU's memory: NCCL could not reduce them over ranks."""
    if not all(example.answers for example in examples):
        return {}
    told = AccuracyFormatReward()([rollout.text for rollout in rollouts], list(examples)).parts
    return {name: float(values_B.mean()) for name, values_B in told.items()}


def length_summary(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`response_length`, the mean in tokens, and `truncated`, the share cut at `max_tokens`."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    cut = [rollout.finish_reason == "length" for rollout in rollouts]
    return {"response_length": sum(lengths) / len(lengths), "truncated": sum(cut) / len(cut)}
