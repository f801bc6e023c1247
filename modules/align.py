"""Stage 2, adversarial on-policy alignment: PRISM's own stage (arXiv 2604.28123).

The policy answers, the discriminator compares each answer with the teacher's, expert by expert, and each player takes a
step: the discriminator to tell them apart, the policy not to be told apart. No teacher logits are needed.

Launch: python -m prism_pl fit --config align.yaml
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from prism_pl.advantages import Mixing, mixed_rewards, variance_shares
from prism_pl.aggregation import Metrics
from prism_pl.batch import SequenceBatch
from prism_pl.batch_draws import BatchDraws
from prism_pl.chat import parse
from prism_pl.checkpoints import keep_plain_hyperparameters, leave_out, put_back, source_of
from prism_pl.credit import Credit, check_credit, credited_advantages
from prism_pl.discriminator import DiscriminatorFactory, Scores, diagnostics_over_ranks, score_texts
from prism_pl.discriminator_loss import discriminator_loss
from prism_pl.governor import Governor, Plan, pair_accuracies, scaled_rate
from prism_pl.lora import whole_parameters
from prism_pl.losses import soft_clip
from prism_pl.mismatch import MismatchCorrection
from prism_pl.optim import Schedule, build_optimizer, check_finite, lr_scheduler
from prism_pl.outputs import StepOutput
from prism_pl.policy import PolicySpec, build_policy, save_policy
from prism_pl.policy_loss import PolicyLoss, ReleasedGRPO
from prism_pl.prompts import PromptBatch, PromptCollator, check_demonstration_lengths, demonstration
from prism_pl.rollout.batch import rollout_batch
from prism_pl.rollout.engine import Rollout, RolloutEngine, Sampling, check_training_sampling
from prism_pl.rollout_stage import (
    check_counts,
    check_max_norms,
    check_ranks_per_group,
    check_same_prompts,
    check_sampler,
    forget_logged,
    held_out_parts,
    held_out_rollouts,
    length_summary,
    trained_mask,
    warn_inert_kl,
)
from prism_pl.row_needs import RowNeeds, with_discriminator, with_engine
from prism_pl.strategy import (
    building,
    check_trainer,
    metrics_over_ranks,
    share,
    step_network,
    training_only,
    whole_groups,
)
from prism_pl.timing import PhaseTimer
from prism_pl.updates import KLPenalty, Numerics, kl_reward, policy_backward, warn_inert_clip


class AdversarialAlignModule(LightningModule):
    """The game between a policy and a discriminator.

    Args:
        policy: the SFT policy to align.
        discriminator: the warm-started discriminator.
        rollout: the engine that samples.
        policy_optimizer, discriminator_optimizer: optimiser classes with their options.
        sampling: of the rollouts; the whole distribution, so top_p 1 and top_k 0.
        num_rollouts: G, rollouts a prompt.
        ranks_per_group: how many neighbouring ranks share a group: 4 prompts x 16 on 8 ranks is 2, a batch_size of 1.
        advantage: `paper` mixes the experts' scores and then normalises over the group, `released` the other way round.
        alpha: weight of the perception expert.
        credit: `response` gives all tokens of a rollout the same advantage, `segment` caption tokens the perception
            expert's and the others the reasoning expert's, see `prism_pl.credit`.
        malformed_penalty: taken off the advantage of malformed responses (`released` only).
        policy_loss: how advantages become a gradient.
        mismatch: of sampler and trainer; None corrects it where the sampler runs below float32, see
            `prism_pl.mismatch`.
        kl: a pull towards the starting policy; off by default.
        discriminator_every, discriminator_steps: every how many policy steps the discriminator learns, and how often.
        governor: keeps the discriminator's accuracy in a band by skipping, adding or scaling these steps; off by
            default, as published.
        score_l2, score_clip, label_smoothing: of the discriminator's loss; the clip is soft, it always has a gradient.
        schedule, warmup: of both learning rates, in policy steps.
        max_grad_norm, discriminator_max_grad_norm: gradient clipping of each player; None only measures.
        freeze: name patterns of policy parameters that stay as they are.
        micro_batch_tokens: tokens run at once, of the policy padded ones, of the discriminator as it runs them (packed,
            a shared prompt counts once); None runs the whole batch.
        chunk_tokens: response tokens whose logits exist at once.
        export_dtype: of the exported policy.
    """

    def __init__(
        self,
        policy: PolicySpec,
        discriminator: DiscriminatorFactory,
        rollout: RolloutEngine,
        policy_optimizer: OptimizerCallable,
        discriminator_optimizer: OptimizerCallable,
        sampling: Sampling,
        num_rollouts: int = 16,
        ranks_per_group: int = 1,
        advantage: Mixing = "paper",
        alpha: float = 0.5,
        credit: Credit = "response",
        malformed_penalty: float = 1.5,
        policy_loss: PolicyLoss | None = None,
        mismatch: MismatchCorrection | None = None,
        kl: KLPenalty | None = None,
        discriminator_every: int = 1,
        discriminator_steps: int = 1,
        governor: Governor | None = None,
        score_l2: float = 0.001,
        score_clip: float | None = 10.0,
        label_smoothing: float = 0.0,
        schedule: Schedule = "constant",
        warmup: float = 0.0,
        max_grad_norm: float | None = 1.0,
        discriminator_max_grad_norm: float | None = 1.0,
        freeze: Sequence[str] = (),
        micro_batch_tokens: int | None = None,
        chunk_tokens: int = 2048,
        export_dtype: Literal["float32", "bfloat16"] = "bfloat16",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        check_training_sampling(sampling)
        check_ranks_per_group(num_rollouts, ranks_per_group)
        steps = {"discriminator_every": discriminator_every, "discriminator_steps": discriminator_steps}
        check_counts({"num_rollouts": num_rollouts, **steps})
        check_max_norms({"max_grad_norm": max_grad_norm, "discriminator_max_grad_norm": discriminator_max_grad_norm})
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}: the weight of the perception expert, give 0 to 1")
        self.spec, self.freeze_patterns = policy, freeze
        self.build_discriminator = discriminator
        self.rollout, self.sampling = rollout, sampling
        self.ranks_per_group, self.num_rollouts = ranks_per_group, num_rollouts // ranks_per_group
        self.policy_optimizer, self.discriminator_optimizer = policy_optimizer, discriminator_optimizer
        self.advantage: Mixing = advantage
        self.credit: Credit = credit
        self.alpha, self.malformed_penalty = alpha, malformed_penalty
        self.policy_loss = policy_loss or ReleasedGRPO()
        self.mismatch = mismatch or MismatchCorrection()
        warn_inert_kl(kl)
        self.kl = kl or KLPenalty()
        self.discriminator_every, self.discriminator_steps = discriminator_every, discriminator_steps
        self.governor = governor
        self.score_l2, self.score_clip, self.label_smoothing = score_l2, score_clip, label_smoothing
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.max_grad_norm, self.discriminator_max_grad_norm = max_grad_norm, discriminator_max_grad_norm
        self.export_dtype: Literal["float32", "bfloat16"] = export_dtype
        self.processor = policy.processor()
        needs = with_engine(RowNeeds(demonstration=True), rollout, sampling)
        self.row_needs = with_discriminator(needs, discriminator)
        self.numerics = Numerics(
            sampling.temperature, tuple(self.processor.banned_ids), micro_batch_tokens, chunk_tokens
        )
        self.timer = PhaseTimer()
        self.policy: Any = None
        self.discriminator: Any = None
        self.reference: Any = None
        self._reference_source: dict[str, str] | None = None
        self._engine_state: dict[str, Any] | None = None

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        with building(self, "policy"):
            self.policy = build_policy(self.spec, self.freeze_patterns)
        with building(self, "discriminator"):
            self.discriminator = self.build_discriminator()
        check_credit(self.credit, self.discriminator.experts)
        if self.kl.coefficient > 0:
            self._reference_source = source_of(self.spec.path)
            with building(self, "reference", frozen=True):
                self.reference = build_policy(self.spec).eval().requires_grad_(False)
        self.collator = PromptCollator(
            self.processor, need_demonstration=True, discriminator_processor=self.discriminator.processor
        )

    def on_fit_start(self) -> None:
        check_trainer(self.trainer)
        warn_inert_clip(self.policy_loss, num_updates=1)
        self._start_engine()

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        forget_logged(self.trainer)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        with self.timer.phase("rollout"):
            rollouts, sequences, sampler_logps_BT = self._sample(batch)
            self.rollout.sleep()
        with self.timer.phase("score"):
            # Before the discriminator's update: the policy is judged by the judge it answered to.
            scores, demonstration_scores = self._scores(batch, rollouts, training=False)
        advantages_B, rewards_PG = self._advantages(scores, sequences)
        with self.timer.phase("policy"):
            policy_loss = self._policy_backward(sequences, advantages_B, sampler_logps_BT, rollouts)
        with self.timer.phase("discriminator"):
            self._discriminator_update(batch, rollouts, self._plan(scores, demonstration_scores))
        with self.timer.phase("policy"):
            self._policy_step(batch)
        with self.timer.phase("sync"):
            self.rollout.sync(whole_parameters(self.policy))
        self._log_step(policy_loss, rollouts, scores, sequences)
        return self._output(batch, rollouts, scores, demonstration_scores, rewards_PG)

    def _sample(self, batch: PromptBatch) -> tuple[list[Rollout], SequenceBatch, Tensor]:
        """This rank's G / ranks_per_group rollouts a prompt, the trainer's tensors of them, and the sampler's
        log-probabilities, (B, T)."""
        check_same_prompts(batch.ids, self.ranks_per_group, self.device)
        # No `on_group`: of 506 ms here (tiny policy, 64 rollouts) parsing takes 0.6, the segments' tokenisation 9.
        rollouts = self.rollout.generate(batch.examples, self.num_rollouts, self.sampling)
        made = rollout_batch(self.processor, batch.prompts, rollouts, self.num_rollouts)
        return rollouts, *self.transfer_batch_to_device(made, self.device, 0)

    def _scores(self, batch: PromptBatch, rollouts: Sequence[Rollout], training: bool) -> tuple[Scores, Scores]:
        """Scores of B rollouts and of their B demonstrations (each stands once for each of its rollouts), from one
        forward pass over P demonstrations and B rollouts."""
        num_prompts, num_rollouts = len(batch), len(rollouts) // len(batch)
        prompt_of = [b // num_rollouts for b in range(len(rollouts))]
        scores = score_texts(
            self.discriminator,
            batch.discriminator_prompts,
            [*(demonstration(example) for example in batch.examples), *(parse(r.text) for r in rollouts)],
            [*range(num_prompts), *prompt_of],
            training=training,
            micro_batch_tokens=self.numerics.micro_batch_tokens,
        )
        check_demonstration_lengths(batch.examples, scores.valid_B, self.discriminator.max_segment_tokens)
        if self.score_clip is not None:
            scores.by_expert = {e: soft_clip(s, self.score_clip) for e, s in scores.by_expert.items()}
        return scores.take(range(num_prompts, num_prompts + len(rollouts))), scores.take(prompt_of)

    def _advantages(self, scores: Scores, sequences: SequenceBatch) -> tuple[Tensor, Tensor]:
        """advantages_B (by segment: advantages_BT), and for the logs the mixed reward_PG (NaN where malformed)."""
        by_expert = scores.by_expert
        if self.kl.in_reward:
            penalty_B, kl_mean = kl_reward(self.kl, self.policy, self.reference, sequences, self.numerics)
            by_expert = {expert: scores_B - penalty_B for expert, scores_B in by_expert.items()}
            self.log("align/kl", kl_mean, batch_size=1)
        shape = (-1, self.num_rollouts)
        ranks = self.ranks_per_group
        scores_PG = {expert: scores_B.view(shape) for expert, scores_B in by_expert.items()}
        groups = {expert: whole_groups(values_PG, ranks) for expert, values_PG in scores_PG.items()}
        whole_valid_PG = whole_groups(scores.valid_B.view(shape), ranks)
        shares, variance = variance_shares(groups, whole_valid_PG, self.advantage, self.alpha)
        shares = metrics_over_ranks(shares, dict.fromkeys(shares, variance))
        self.log_dict({f"align/variance_share/{e}": s for e, s in shares.items()}, batch_size=1)
        advantages, told = credited_advantages(
            groups,
            whole_valid_PG,
            sequences,
            self.processor,
            credit=self.credit,
            mixing=self.advantage,
            alpha=self.alpha,
            malformed_penalty=self.malformed_penalty,
            ranks=ranks,
        )
        self.log_dict({f"align/{k}": v.float() for k, v in told.items()}, batch_size=1, sync_dist=True, reduce_fx="sum")
        return advantages, mixed_rewards(scores_PG, self.alpha)

    def _policy_backward(
        self,
        sequences: SequenceBatch,
        advantages_B: Tensor,
        sampler_logps_BT: Tensor,
        rollouts: Sequence[Rollout],
    ) -> tuple[Tensor, Metrics]:
        mask_BT = trained_mask(self.policy_loss, sequences, rollouts)
        check_finite(advantages_B, "an advantage", sequences.ids)
        reference = self.numerics.all_logps(self.reference, sequences) if self.kl.in_loss else None
        with training_only(self, "policy"):
            return policy_backward(
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
                ref_logps_BT=reference,
                kl=self.kl,
                what="align/policy_loss",
            )

    def _plan(self, scores: Scores, demonstration_scores: Scores) -> Plan:
        """What the discriminator does in this step."""
        due = self.trainer.fit_loop.total_batch_idx % self.discriminator_every == 0
        plan = Plan(self.discriminator_steps if due else 0)
        if self.governor is None:
            return plan
        accuracies = pair_accuracies(demonstration_scores.by_expert, scores.by_expert, scores.valid_B)
        plan = self.governor.plan(accuracies, plan.steps)
        self.log_dict({f"align/{name}": value for name, value in self.governor.metrics(plan).items()}, batch_size=1)
        return plan

    def _discriminator_update(self, batch: PromptBatch, rollouts: Sequence[Rollout], plan: Plan) -> None:
        if plan.steps == 0:
            return
        # The raw optimiser: a step through Lightning's wrapper would count in trainer.global_step, and the step we
        # count, log, checkpoint and stop at is the policy's.
        optimizer = self.optimizers()[1].optimizer  # type: ignore[index]
        with training_only(self, "discriminator"):
            for _ in range(plan.steps):
                loss = self._discriminator_loss(batch, rollouts)
                check_finite(loss, "align/discriminator_loss", batch.ids)
                self.manual_backward(loss)
                with scaled_rate(optimizer, plan.rate):
                    norm = step_network(self, "discriminator", optimizer, self.discriminator_max_grad_norm, batch.ids)
        self.log("align/discriminator_loss", loss.detach(), batch_size=1, sync_dist=True)
        self.log("align/grad_norm/discriminator", norm, batch_size=1)

    def _discriminator_loss(self, batch: PromptBatch, rollouts: Sequence[Rollout]) -> Tensor:
        rolled, chosen = self._scores(batch, rollouts, training=True)
        return discriminator_loss(chosen, rolled, self.label_smoothing, self.score_l2)[0]

    def _policy_step(self, batch: PromptBatch) -> None:
        optimizer: Any = self.optimizers()[0]  # type: ignore[index]
        norm = step_network(self, "policy", optimizer, self.max_grad_norm, batch.ids)
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers:
            scheduler.step()
        self.log("align/grad_norm/policy", norm, batch_size=1)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        rollouts = held_out_rollouts(self.rollout, batch.examples, self.sampling, seed=batch_idx)
        scores, demonstration_scores = self._scores(batch, rollouts, training=False)
        for name, value in held_out_parts(rollouts, batch.examples).items():
            shown = name == "accuracy"
            self.log(f"align/val_{name}", value, batch_size=len(batch), prog_bar=shown, sync_dist=True)
        return self._output(batch, rollouts, scores, demonstration_scores)

    def configure_callbacks(self) -> list[Callback]:
        return [BatchDraws()]

    def configure_optimizers(self) -> Any:
        policy = build_optimizer(self.policy_optimizer, self.policy, "policy_optimizer")
        discriminator = build_optimizer(self.discriminator_optimizer, self.discriminator, "discriminator_optimizer")
        steps = self.trainer.estimated_stepping_batches
        schedulers = [lr_scheduler(each, self.schedule, self.warmup, steps) for each in (policy, discriminator)]
        return [policy, discriminator], schedulers

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._start_engine()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        leave_out(checkpoint, "reference", self._reference_source)
        keep_plain_hyperparameters(checkpoint)
        checkpoint["rollout"] = self.rollout.state_dict()
        if self.governor is not None:
            checkpoint["governor"] = self.governor.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.reference is not None:
            put_back(checkpoint, "reference", self.reference, self._reference_source)
        self._engine_state = checkpoint["rollout"]
        if self.governor is not None and "governor" in checkpoint:  # not in that of a run without one
            self.governor.load_state_dict(checkpoint["governor"])

    def teardown(self, stage: str) -> None:
        self.rollout.close()

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face format, and the discriminator beside it, in `<folder>-discriminator`."""
        save_policy(self.policy, self.processor, folder, self.export_dtype)
        self.discriminator.save(folder.with_name(f"{folder.name}-discriminator"), self.export_dtype)

    def _start_engine(self) -> None:
        self.rollout.start(self.policy, self.processor, rank=self.global_rank)
        if self._engine_state is not None:
            self.rollout.load_state_dict(self._engine_state)

    def _output(
        self,
        batch: PromptBatch,
        rollouts: Sequence[Rollout],
        scores: Scores,
        demonstration_scores: Scores,
        rewards_PG: Tensor | None = None,
    ) -> StepOutput:
        shape = (len(batch), -1)
        output = StepOutput(
            examples=batch.examples,
            num_rollouts=len(rollouts) // len(batch),
            rollouts=[r.text for r in rollouts],
            demonstrations=[str(example.response) for example in batch.examples],
            valid=scores.valid_B.view(shape),
            scores={e: s.detach().view(shape) for e, s in scores.by_expert.items()},
            demonstration_scores={e: s.detach().view(shape)[:, 0] for e, s in demonstration_scores.by_expert.items()},
            score_clip=self.score_clip,
            ranks_per_group=self.ranks_per_group,
        )
        if rewards_PG is not None:
            output["rewards"] = rewards_PG
        return output

    def _log_step(
        self,
        policy_loss: tuple[Tensor, Metrics],
        rollouts: Sequence[Rollout],
        scores: Scores,
        sequences: SequenceBatch,
    ) -> None:
        loss, told = policy_loss
        logged = {
            "align/policy_loss": loss,
            "align/malformed": 1 - scores.valid_B.float().mean(),
            "align/lr": self.optimizers()[0].param_groups[0]["lr"],  # type: ignore[index]
        }
        logged |= {f"align/{name}": value for name, value in length_summary(rollouts).items()}
        self.log_dict(logged, batch_size=1, sync_dist=True)
        of_tokens = {n: told[n] for n in told if n in ("entropy", "kl") or n.startswith("mismatch_")}
        measured = metrics_over_ranks(of_tokens, dict.fromkeys(of_tokens, told["num_tokens"]))
        check_sampler(measured, self.mismatch, self.rollout, self.policy)
        measured |= diagnostics_over_ranks(self.discriminator, scores)
        self.log_dict({f"align/{name}": value for name, value in measured.items()}, batch_size=1)
        self.log("align/tokens", float(sequences.num_tokens), batch_size=1, sync_dist=True, reduce_fx="sum")
        self.log_dict(self.timer.pop() | self.rollout.metrics(), batch_size=1)
