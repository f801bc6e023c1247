"""Stage 3, reinforcement learning with verifiable rewards: GRPO, DAPO, GSPO and their kin by options.

Launch: python -m prism_pl fit --config rlvr.yaml
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prism_pl.advantages import Scale, group_advantages, groups_with_variance
from prism_pl.aggregation import Metrics, combine_metrics
from prism_pl.batch import Example, SequenceBatch
from prism_pl.batch_draws import BatchDraws
from prism_pl.checkpoints import keep_plain_hyperparameters, leave_out, put_back, source_of
from prism_pl.groups import Group, GroupBuffer, groups_worth_training, make_groups, shuffled_minibatches
from prism_pl.lora import whole_parameters
from prism_pl.mismatch import MismatchCorrection
from prism_pl.optim import Schedule, build_optimizer, check_finite, lr_scheduler
from prism_pl.outputs import StepOutput
from prism_pl.policy import PolicySpec, build_policy, save_policy
from prism_pl.policy_loss import DrGRPO, PolicyLoss, ReleasedGRPO
from prism_pl.prompts import PromptBatch, PromptCollator
from prism_pl.rewards import AccuracyFormatReward, Reward, RewardOutput, format, timeouts
from prism_pl.rollout.batch import rollout_batch
from prism_pl.rollout.engine import Rollout, RolloutEngine, Sampling, check_training_sampling
from prism_pl.rollout.overlap import Overlap
from prism_pl.rollout_stage import (
    check_counts,
    check_max_norms,
    check_overlong,
    check_ranks_per_group,
    check_same_prompts,
    check_sampler,
    forget_logged,
    held_out_parts,
    held_out_rollouts,
    length_summary,
    total_steps,
    trained_mask,
    warn_inert_kl,
    with_overlong,
)
from prism_pl.row_needs import RowNeeds, with_engine
from prism_pl.strategy import (
    building,
    check_trainer,
    metrics_over_ranks,
    own_part,
    share,
    step_network,
    whole_groups,
    world_size,
)
from prism_pl.timing import PhaseTimer
from prism_pl.updates import KLPenalty, Numerics, kl_reward, policy_backward, rows_of, warn_inert_clip


class RLVRModule(LightningModule):
    """Reinforcement learning on answers that can be checked.

    Each batch of the data loader is one rollout batch, and TensorBoard counts these. `trainer.max_steps` and
    checkpoints count the policy's optimiser steps, of which a rollout batch takes `updates_per_batch *
    num_minibatches`; of the last batch only the steps up to `max_steps` are taken.

    With `dynamic_sampling` a batch that leaves too few groups takes no step and the next batch is its refill, so that
    Lightning's loop, resuming and the loader's order stay what they are (`prism_pl.groups.GroupBuffer`).

    Args:
        policy: the policy to train.
        rollout: the engine that samples.
        optimizer: an optimiser class with its options.
        sampling: of the rollouts; the whole distribution, so top_p 1 and top_k 0.
        reward: what a response is worth; None is `AccuracyFormatReward()`, 0.8 accuracy and 0.2 format.
        policy_loss: how advantages become a gradient.
        num_rollouts: G, rollouts a prompt, at least 2.
        ranks_per_group: how many neighbouring ranks share a group: 4 prompts x 16 on 8 ranks is 2, a batch_size of 1.
        scale: what centred rewards are divided by, see `prism_pl.advantages.group_advantages`.
        updates_per_batch: passes over a rollout batch.
        num_minibatches: optimiser steps a pass; whole groups are shuffled over them.
        dynamic_sampling: train only on groups in which some answers are right and some wrong (DAPO).
        num_prompts: groups trained on at once with dynamic sampling; None: as many as a batch has prompts.
        max_refills: further batches to fill them up; then it goes on with what it has. PRISM's 10 batches in all are 9.
        max_barren: batches in a row without one such group, at which the run stops (DAPO's max_num_gen_batches).
        overlong_buffer, overlong_penalty: DAPO's soft length punishment over the last so many tokens; None: none.
        mismatch: of sampler and trainer; None corrects it where the sampler runs below float32, see
            `prism_pl.mismatch`.
        kl: a pull towards the starting policy; off by default.
        schedule, warmup: of the learning rate, in optimiser steps.
        max_grad_norm: gradient clipping; None only measures.
        freeze: name patterns of policy parameters that stay as they are.
        micro_batch_tokens: padded tokens run at once; None runs the whole mini-batch.
        chunk_tokens: response tokens whose logits exist at once.
        export_dtype: of the exported policy.
    """

    def __init__(
        self,
        policy: PolicySpec,
        rollout: RolloutEngine,
        optimizer: OptimizerCallable,
        sampling: Sampling,
        reward: Reward | None = None,
        policy_loss: PolicyLoss | None = None,
        num_rollouts: int = 16,
        ranks_per_group: int = 1,
        scale: Scale = "group",
        updates_per_batch: int = 1,
        num_minibatches: int = 1,
        dynamic_sampling: bool = False,
        num_prompts: int | None = None,
        max_refills: int = 9,
        max_barren: int = 20,
        overlong_buffer: int | None = None,
        overlong_penalty: float = 1.0,
        mismatch: MismatchCorrection | None = None,
        kl: KLPenalty | None = None,
        schedule: Schedule = "constant",
        warmup: float = 0.0,
        max_grad_norm: float | None = 1.0,
        freeze: Sequence[str] = (),
        micro_batch_tokens: int | None = None,
        chunk_tokens: int = 2048,
        export_dtype: Literal["float32", "bfloat16"] = "bfloat16",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        check_training_sampling(sampling)
        check_counts({"updates_per_batch": updates_per_batch, "num_minibatches": num_minibatches})
        check_max_norms({"max_grad_norm": max_grad_norm})
        if num_rollouts < 2:
            raise ValueError(f"num_rollouts is {num_rollouts}: a rollout is judged against its group, give at least 2")
        check_ranks_per_group(num_rollouts, ranks_per_group)
        if num_prompts is not None:
            check_counts({"num_prompts": num_prompts})
            if not dynamic_sampling:
                raise ValueError(
                    f"num_prompts is {num_prompts}, but only dynamic sampling collects prompts: set dynamic_sampling: "
                    "true, or the data's batch_size"
                )
        if isinstance(policy_loss, DrGRPO) and scale != "none":
            rank_zero_warn(f"DrGRPO is meant for unscaled advantages, and scale is {scale!r}: set scale: none")
        if overlong_buffer is not None:
            check_overlong(sampling.max_tokens, overlong_buffer, overlong_penalty)
        self.spec, self.freeze_patterns = policy, freeze
        self.rollout, self.sampling = rollout, sampling
        self.ranks_per_group, self.num_rollouts = ranks_per_group, num_rollouts // ranks_per_group
        self.optimizer = optimizer
        self.reward: Reward = AccuracyFormatReward() if reward is None else reward
        self.policy_loss = policy_loss or ReleasedGRPO()
        self.scale: Scale = scale
        self.updates_per_batch, self.num_minibatches = updates_per_batch, num_minibatches
        self.dynamic_sampling, self.num_prompts = dynamic_sampling, num_prompts
        self.buffer = GroupBuffer(max_refills, max_barren)
        self.overlong_buffer, self.overlong_penalty = overlong_buffer, overlong_penalty
        self.mismatch = mismatch or MismatchCorrection()
        warn_inert_kl(kl)
        self.kl = kl or KLPenalty()
        self.schedule: Schedule = schedule
        self.warmup, self.max_grad_norm = warmup, max_grad_norm
        self.export_dtype: Literal["float32", "bfloat16"] = export_dtype
        self.processor = policy.processor()
        self.row_needs = with_engine(RowNeeds(answers=True), rollout, sampling)
        self.collator = PromptCollator(self.processor, need_answers=True)
        self.numerics = Numerics(
            sampling.temperature, tuple(self.processor.banned_ids), micro_batch_tokens, chunk_tokens
        )
        self.timer = PhaseTimer()
        self.policy: Any = None
        self.reference: Any = None
        self._reference_source: dict[str, str] | None = None
        self.shuffle_seed: int | None = None
        self._engine_state: dict[str, Any] | None = None

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        with building(self, "policy"):
            self.policy = build_policy(self.spec, self.freeze_patterns)
        if self.kl.coefficient > 0:
            self._reference_source = source_of(self.spec.path)
            with building(self, "reference", frozen=True):
                self.reference = build_policy(self.spec).eval().requires_grad_(False)

    def on_fit_start(self) -> None:
        check_trainer(self.trainer)
        warn_inert_clip(self.policy_loss, num_updates=self.updates_per_batch * self.num_minibatches)
        if self.shuffle_seed is None:
            self.shuffle_seed = torch.initial_seed()
        self._start_engine()

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        forget_logged(self.trainer)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        rollouts, rewarded = self._sample(batch)
        self._log_batch(rollouts, rewarded)
        groups = self._groups(batch, rollouts, rewarded)
        if groups:
            self.rollout.sleep()
            with self.timer.phase("policy"):
                self._train(groups)
            with self.timer.phase("sync"):
                self.rollout.sync(whole_parameters(self.policy))
            self.log_dict(self.rollout.metrics(), batch_size=1)
        self.log_dict(self.timer.pop(), batch_size=1)
        return self._output(batch, rollouts, rewarded)

    def _sample(self, batch: PromptBatch) -> tuple[list[Rollout], RewardOutput]:
        """Rollouts and their rewards: finished groups are rewarded while the engine goes on. `time/reward` is what is
        left of that when it has done."""
        check_same_prompts(batch.ids, self.ranks_per_group, self.device)
        before = timeouts()
        with Overlap(lambda p, group: self._reward(batch.examples[p], group)) as overlap:
            with self.timer.phase("rollout"):
                rollouts = self.rollout.generate(batch.examples, self.num_rollouts, self.sampling, overlap.submit)
            with self.timer.phase("reward"):
                size = self.num_rollouts
                rewarded = overlap.results([rollouts[i : i + size] for i in range(0, len(rollouts), size)])
        self.log("rlvr/reward_timeouts", float(timeouts() - before), batch_size=1, sync_dist=True, reduce_fx="sum")
        return rollouts, RewardOutput.joined(rewarded)

    def _reward(self, example: Example, rollouts: Sequence[Rollout]) -> RewardOutput:
        """Rewards of a prompt's rollouts with the overlong punishment in them, which is also the part `overlong`."""
        told = self.reward([r.text for r in rollouts], [example] * len(rollouts))
        check_finite(told.rewards_B, "a reward", [example.id] * len(rollouts))
        if self.overlong_buffer is None:
            return told
        return with_overlong(told, rollouts, self.sampling.max_tokens, self.overlong_buffer, self.overlong_penalty)

    def _groups(self, batch: PromptBatch, rollouts: list[Rollout], rewarded: RewardOutput) -> list[Group]:
        """The groups to train on now; none while dynamic sampling waits for the next batch, or has nothing."""
        groups = make_groups(batch.prompts, rollouts, rewarded.rewards_B)
        wanted = self.num_prompts or len(batch)
        if self.num_minibatches > wanted:
            raise ValueError(
                f"num_minibatches is {self.num_minibatches}, but only {wanted} prompts are trained at once"
            )
        if not self.dynamic_sampling:
            return groups
        whole = {name: self._whole_groups(values_B).flatten() for name, values_B in rewarded.parts.items()}
        self.buffer.add(groups_worth_training(groups, whole))
        draw = self.buffer.take(wanted, self.device)
        if draw is None:
            return []
        told = {"refills": draw.refills, "shortfall": draw.shortfall, "skipped": not draw.groups}
        self.log_dict({f"rlvr/{name}": float(value) for name, value in told.items()}, batch_size=1)
        return draw.groups

    def _train(self, groups: Sequence[Group]) -> None:
        """All updates of a rollout batch, with the log-probabilities of before the first as the old ones."""
        assert self.shuffle_seed is not None
        plan = shuffled_minibatches(
            len(groups), self.num_minibatches, self.updates_per_batch, self.shuffle_seed, self.trainer.global_step
        )
        if self.trainer.max_steps != -1:
            plan = plan[: self.trainer.max_steps - self.trainer.global_step]
        whole, _ = self._sequences(groups)
        advantages_B = self._advantages(groups, whole)
        old_BT = self.numerics.all_logps(self.policy, whole) if len(plan) > 1 else None
        ref_BT = self.numerics.all_logps(self.reference, whole) if self.kl.in_loss else None
        losses: list[Tensor] = []
        parts: list[Metrics] = []
        for chosen in plan:
            rows = [g * self.num_rollouts + i for g in chosen for i in range(self.num_rollouts)]
            loss, told = self._update([groups[g] for g in chosen], advantages_B[rows], *rows_of(rows, old_BT, ref_BT))
            losses.append(loss)
            parts.append(told)
        self.log("rlvr/policy_loss", torch.stack(losses).mean(), batch_size=1, sync_dist=True)
        measured = combine_metrics(parts)
        measured = metrics_over_ranks(measured, dict.fromkeys(measured, measured["num_tokens"]))
        check_sampler(measured, self.mismatch, self.rollout, self.policy)
        del measured["num_tokens"]
        self.log_dict({f"rlvr/{name}": value for name, value in measured.items()}, batch_size=1)
        self.log("rlvr/lr", self.optimizers().param_groups[0]["lr"], batch_size=1)  # type: ignore[union-attr]

    def _sequences(self, groups: Sequence[Group]) -> tuple[SequenceBatch, Tensor]:
        """The trainer's tensors of the rollouts, and the sampler's log-probabilities, (B, T)."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        made = rollout_batch(self.processor, [group.prompt for group in groups], rollouts, self.num_rollouts)
        return self.transfer_batch_to_device(made, self.device, 0)

    def _advantages(self, groups: Sequence[Group], sequences: SequenceBatch) -> Tensor:
        rewards_PG = torch.stack([group.rewards_G for group in groups]).to(self.device)
        if self.kl.in_reward:
            penalty_B, kl_mean = kl_reward(self.kl, self.policy, self.reference, sequences, self.numerics)
            rewards_PG = rewards_PG - penalty_B.view_as(rewards_PG)
            self.log("rlvr/kl", kl_mean, batch_size=1)
        ranks = self.ranks_per_group
        rewards_PG = whole_groups(rewards_PG, ranks)
        if self.scale == "batch" and world_size() > 1:
            all_PG: Any = self.all_gather(rewards_PG)[::ranks]  # type: ignore[index]
            advantages_PG, _ = group_advantages(all_PG.flatten(0, 1), self.scale)
            advantages_PG = advantages_PG.view_as(all_PG)[self.global_rank // ranks]
        else:
            advantages_PG, _ = group_advantages(rewards_PG, self.scale)
        advantages_PG = own_part(advantages_PG, ranks)
        check_finite(advantages_PG, "an advantage", sequences.ids)
        return advantages_PG.flatten()

    def _update(
        self, groups: Sequence[Group], advantages_B: Tensor, old_BT: Tensor | None, ref_BT: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """One optimiser step on a mini-batch: its loss, and the loss's metrics with `grad_norm`."""
        sequences, sampler_logps_BT = self._sequences(groups)
        mask_BT = trained_mask(self.policy_loss, sequences, [r for group in groups for r in group.rollouts])
        width = mask_BT.shape[1]
        loss, told = policy_backward(
            self.policy,
            sequences,
            advantages_B,
            mask_BT,
            self.policy_loss,
            denominator=share(self.policy_loss.count(mask_BT)),
            numerics=self.numerics,
            backward=self.manual_backward,
            sampler_logps_BT=sampler_logps_BT,
            mismatch=self.mismatch.resolve(self.rollout.dtype()),
            old_logps_BT=None if old_BT is None else old_BT[:, :width],
            ref_logps_BT=None if ref_BT is None else ref_BT[:, :width],
            kl=self.kl,
            what="rlvr/policy_loss",
        )
        norm = step_network(self, "policy", self.optimizers(), self.max_grad_norm, sequences.ids)
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return loss, told | {"grad_norm": norm}

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        rollouts = held_out_rollouts(self.rollout, batch.examples, self.sampling, seed=batch_idx)
        for name, value in held_out_parts(rollouts, batch.examples).items():
            shown = name == "accuracy"
            self.log(f"rlvr/val_{name}", value, batch_size=len(batch), prog_bar=shown, sync_dist=True)
        return self._output(batch, rollouts)

    def configure_callbacks(self) -> list[Callback]:
        return [BatchDraws()]

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimizer, self.policy)
        steps = total_steps(self.trainer, self.updates_per_batch * self.num_minibatches)
        return [optimizer], [lr_scheduler(optimizer, self.schedule, self.warmup, steps)]

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._start_engine()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        leave_out(checkpoint, "reference", self._reference_source)
        keep_plain_hyperparameters(checkpoint)
        checkpoint["rollout"] = self.rollout.state_dict()
        checkpoint["rlvr"] = {"buffer": self.buffer.state_dict(), "shuffle_seed": self.shuffle_seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.reference is not None:
            put_back(checkpoint, "reference", self.reference, self._reference_source)
        self._engine_state = checkpoint["rollout"]
        self.buffer.load_state_dict(checkpoint["rlvr"]["buffer"])
        self.shuffle_seed = checkpoint["rlvr"]["shuffle_seed"]

    def teardown(self, stage: str) -> None:
        self.rollout.close()

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face format."""
        save_policy(self.policy, self.processor, folder, self.export_dtype)

    def _start_engine(self) -> None:
        self.rollout.start(self.policy, self.processor, rank=self.global_rank)
        if self._engine_state is not None:
            self.rollout.load_state_dict(self._engine_state)

    def _output(
        self, batch: PromptBatch, rollouts: Sequence[Rollout], rewarded: RewardOutput | None = None
    ) -> StepOutput:
        """Of the batch that was sampled, whether it is trained on or not."""
        shape = (len(batch), -1)
        output = StepOutput(
            examples=batch.examples,
            num_rollouts=len(rollouts) // len(batch),
            rollouts=[r.text for r in rollouts],
            valid=torch.tensor([format(r.text) == 1.0 for r in rollouts]).view(shape),
        )
        responses = [example.response for example in batch.examples if example.response]
        if len(responses) == len(batch):
            output["demonstrations"] = responses
        if rewarded is not None:
            output["rewards"] = rewarded.rewards_B.view(shape)
            if "accuracy" in rewarded.parts:
                output["accuracy"] = rewarded.parts["accuracy"].view(shape)
        return output

    def _whole_groups(self, values_B: Tensor) -> Tensor:
        """Of this rank's rollouts, those of their groups, (P, G)."""
        return whole_groups(values_B.view(-1, self.num_rollouts).to(self.device), self.ranks_per_group)

    def _log_batch(self, rollouts: Sequence[Rollout], rewarded: RewardOutput) -> None:
        """What the sampled batch is like, before dynamic sampling chooses."""
        rewards = {"reward": rewarded.rewards_B, **rewarded.parts}  # in the CPU's memory, where NCCL reduces nothing
        logged = {name: float(values_B.mean()) for name, values_B in rewards.items()} | length_summary(rollouts)
        self.log_dict({f"rlvr/{name}": value for name, value in logged.items()}, batch_size=1, sync_dist=True)
        still_P = ~groups_with_variance(self._whole_groups(rewarded.rewards_B))
        num_still = still_P.sum().float() / self.ranks_per_group  # each rank of a group counts it
        self.log("rlvr/zero_std_groups", num_still, batch_size=1, sync_dist=True, reduce_fx="sum")
        tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
        self.log("rlvr/tokens", float(tokens), batch_size=1, sync_dist=True, reduce_fx="sum")
