"""Stage 2a, the discriminator's warm start: demonstrations above rollouts of the SFT policy, expert by expert.

It stops at a ceiling of held-out pair accuracy: a discriminator that always wins teaches the policy nothing.
Launch: python -m prism_pl fit --config warmup.yaml
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from prism_pl.aggregation import Metrics
from prism_pl.batch import Example
from prism_pl.batch_draws import BatchDraws
from prism_pl.checkpoints import keep_plain_hyperparameters, leave_out, put_back, source_of
from prism_pl.discriminator import Discriminator, DiscriminatorFactory, Scores, diagnostics_over_ranks, score_texts
from prism_pl.discriminator_loss import discriminator_loss
from prism_pl.losses import soft_clip
from prism_pl.optim import Schedule, build_optimizer, check_finite, lr_scheduler
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.prompts import PromptBatch, PromptCollator, check_demonstration_lengths, demonstration
from prism_pl.rollout.engine import Rollout, RolloutEngine, Sampling
from prism_pl.row_needs import RowNeeds, with_discriminator, with_engine
from prism_pl.strategy import building, check_gradients, check_trainer, global_max, metrics_over_ranks


class DiscriminatorModule(LightningModule):
    """Warm start of a discriminator by Bradley-Terry on caption pairs and on reasoning pairs.

    Args:
        policy: the SFT policy, frozen here, that samples the rejected side; rows with a `rejected` need no rollout.
            Without an engine only its processor is read.
        discriminator: which one, e.g. `DedicatedMoEDiscriminator` with `init_heads: true` on a policy's backbone.
        rollout: the engine that samples; null trains on given pairs alone: every row must have a `rejected`.
        optimizer: an optimiser class with its options.
        sampling: as in the alignment stage, so that the discriminator meets what it will judge there.
        num_rollouts: rollouts, hence pairs, for each prompt.
        schedule, warmup: of the learning rate; a warm-up below 1 is a share of the run.
        label_smoothing: share of pairs taken to be swapped; keeps the best margin finite.
        score_l2: coefficient on the mean squared score, which Bradley-Terry leaves free.
        score_clip: softly bounds scores to +- this; None: no bound.
        ceiling: held-out pair accuracy, the mean over the experts, at which the run stops. None runs to the end.
        micro_batch_tokens: tokens run at once, as the discriminator runs them (packed, a shared prompt counts once);
            None runs the whole batch.
        export_dtype: of the exported backbone.
    """

    def __init__(
        self,
        policy: PolicySpec,
        discriminator: DiscriminatorFactory,
        rollout: RolloutEngine | None,
        optimizer: OptimizerCallable,
        sampling: Sampling,
        num_rollouts: int = 1,
        schedule: Schedule = "cosine",
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
        score_l2: float = 0.0,
        score_clip: float | None = None,
        ceiling: float | None = 0.9,
        micro_batch_tokens: int | None = None,
        export_dtype: Literal["float32", "bfloat16"] = "bfloat16",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_rollouts < 1:
            raise ValueError(f"num_rollouts is {num_rollouts}: a pair needs at least 1 rollout")
        if ceiling is not None and not 0.5 < ceiling <= 1.0:
            raise ValueError(f"ceiling is {ceiling}: a pair accuracy above 0.5 and at most 1, or null for none")
        self.spec = policy
        self.build_discriminator = discriminator
        self.rollout = rollout
        self.optimizer = optimizer
        self.sampling = sampling
        self.num_rollouts = num_rollouts
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.label_smoothing = label_smoothing
        self.score_l2 = score_l2
        self.score_clip = score_clip
        self.ceiling = ceiling
        self.micro_batch_tokens = micro_batch_tokens
        self.export_dtype: Literal["float32", "bfloat16"] = export_dtype
        self.processor = policy.processor()
        needs = with_engine(RowNeeds(demonstration=True, unless_rejected=True), rollout, sampling)
        self.row_needs = with_discriminator(needs, discriminator)
        self.policy: Any = None
        self._policy_source: dict[str, str] | None = None
        self.discriminator: Any = None
        self._rows: list[str] = []
        self._held_out: dict[str, list[str]] = {}
        self._engine_state: dict[str, Any] | None = None
        self.reached_ceiling = False

    def configure_model(self) -> None:
        if self.discriminator is not None:
            return
        if self.rollout is not None:
            self._policy_source = source_of(self.spec.path)
            with building(self, "policy", frozen=True):
                self.policy = build_policy(self.spec).eval().requires_grad_(False)
        with building(self, "discriminator"):
            discriminator: Discriminator = self.build_discriminator()
        self.discriminator = discriminator
        self.collator = PromptCollator(
            self.processor, need_demonstration=True, discriminator_processor=discriminator.processor
        )
        self.held_out_accuracy: Any = nn.ModuleDict({expert: MeanMetric() for expert in discriminator.experts})

    def forward(self, batch: PromptBatch, rejected: list[list[str]], training: bool) -> tuple[Scores, Scores]:
        """Scores of n pairs: their demonstrations and their rejected responses, from one forward pass.

        Args:
            rejected: for each prompt, the texts to rank below its demonstration.
        """
        chosen = [demonstration(example) for example in batch.examples]
        pair_prompt = [p for p, texts in enumerate(rejected) for _ in texts]
        scores = score_texts(
            self.discriminator,
            batch.discriminator_prompts,
            [*chosen, *(text for texts in rejected for text in texts)],
            [*range(len(batch)), *pair_prompt],
            training=training,
            micro_batch_tokens=self.micro_batch_tokens,
        )
        check_demonstration_lengths(batch.examples, scores.valid_B, self.discriminator.max_segment_tokens)
        if self.score_clip is not None:
            scores.by_expert = {e: soft_clip(s, self.score_clip) for e, s in scores.by_expert.items()}
        return scores.take(pair_prompt), scores.take(range(len(batch), len(batch) + len(pair_prompt)))

    def on_fit_start(self) -> None:
        check_trainer(self.trainer)
        self._start_engine()
        # Started again, a warm start that its ceiling ended must not train on past it.
        self.trainer.should_stop = self.reached_ceiling

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        self._rows = batch.ids
        rejected = self._rejected(batch.examples, self.sampling)
        if self.rollout is not None:
            self.rollout.sleep()
        chosen, rolled = self(batch, rejected, training=True)
        valid_B = rolled.valid_B
        if not valid_B.any():
            rank_zero_warn(
                "Warm start: every rollout of a batch is malformed, so it holds no pair and the discriminator learns "
                "nothing from it. Where that goes on (warmup/pairs is 0), train the policy's SFT longer first."
            )
        loss, told = discriminator_loss(chosen, rolled, self.label_smoothing, self.score_l2)
        check_finite(loss, "warmup/loss", batch.ids)
        self.log("warmup/loss", loss.detach(), prog_bar=True, batch_size=1, sync_dist=True)
        self.log("warmup/pairs", valid_B.float().sum(), batch_size=1, sync_dist=True, reduce_fx="sum")
        self._log_pairs(told, rolled)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        check_gradients(self, "discriminator", self._rows)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        new = [example for example in batch.examples if example.id not in self._held_out]
        # The policy is frozen: held-out rollouts are drawn once, and accuracies of different steps compare.
        # A seed of their own, so that a resumed run has the same ones and training draws go on undisturbed.
        sampling = replace(self.sampling, seed=batch_idx)
        self._held_out.update(zip([example.id for example in new], self._rejected(new, sampling), strict=True))
        chosen, rolled = self(batch, [self._held_out[i] for i in batch.ids], training=False)
        for expert, metric in self.held_out_accuracy.items():
            margin_B = (chosen.by_expert[expert] - rolled.by_expert[expert])[rolled.valid_B]
            check_finite(margin_B, f"the margin of the expert {expert}", batch.ids)
            metric.update(0.5 * (margin_B.sign() + 1))

    def on_validation_epoch_end(self) -> None:
        accuracies = {expert: metric.compute() for expert, metric in self.held_out_accuracy.items()}
        for expert, metric in self.held_out_accuracy.items():
            metric.reset()
            self.log(f"warmup/val_pair_accuracy/{expert}", accuracies[expert], prog_bar=True, sync_dist=True)
        mean = float(torch.stack(list(accuracies.values())).mean())
        if self.ceiling is not None and mean >= self.ceiling and not self.trainer.sanity_checking:
            shown = ", ".join(f"{expert} {float(accuracy):.3f}" for expert, accuracy in accuracies.items())
            rank_zero_info(
                f"Stopping at step {self.trainer.global_step}: held-out pair accuracy {mean:.3f} ({shown}) has reached "
                f"the ceiling {self.ceiling}; beyond it the discriminator saturates and teaches the policy nothing."
            )
            self.trainer.should_stop = self.reached_ceiling = True

    def configure_callbacks(self) -> list[Callback]:
        return [BatchDraws()]

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimizer, self.discriminator)
        scheduler = lr_scheduler(optimizer, self.schedule, self.warmup, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._start_engine()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        leave_out(checkpoint, "policy", self._policy_source)
        keep_plain_hyperparameters(checkpoint)
        checkpoint["rollout"] = None if self.rollout is None else self.rollout.state_dict()
        checkpoint["reached_ceiling"] = self.reached_ceiling

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.policy is not None:
            put_back(checkpoint, "policy", self.policy, self._policy_source)
        self._engine_state = checkpoint["rollout"]
        self.reached_ceiling = checkpoint["reached_ceiling"]

    def teardown(self, stage: str) -> None:
        if self.rollout is not None:
            self.rollout.close()

    def export(self, folder: Path) -> None:
        """Write the discriminator, loadable alone."""
        self.discriminator.save(Path(folder), self.export_dtype)

    def _start_engine(self) -> None:
        if self.rollout is None:
            return
        self.rollout.start(self.policy, self.processor, rank=self.global_rank)
        if self._engine_state is not None:
            self.rollout.load_state_dict(self._engine_state)

    def _rejected(self, examples: Sequence[Example], sampling: Sampling) -> list[list[str]]:
        """For each row its own rejected response, or else rollouts of the policy."""
        unpaired = [example for example in examples if example.rejected is None]
        if unpaired and self.rollout is None:
            raise ValueError(
                f"row {unpaired[0].id!r} has no rejected response, and model.init_args.rollout is null: name the "
                "engine that samples one, or give pairs (datamodules.PairsDataModule)"
            )
        rollouts = self._sampled(unpaired, sampling) if self.rollout is not None else []
        texts = iter([rollout.text for rollout in rollouts])
        return [
            [next(texts) for _ in range(self.num_rollouts)] if example.rejected is None else [example.rejected]
            for example in examples
        ]

    def _sampled(self, examples: Sequence[Example], sampling: Sampling) -> list[Rollout]:
        """Rollouts of this rank's rows, of which there may be none: as long as one rank has any, all ranks ask, because
        an engine may be shared."""
        assert self.rollout is not None
        if not int(global_max(torch.tensor(len(examples), device=self.device))):
            return []
        return self.rollout.generate(examples, self.num_rollouts, sampling)

    def _log_pairs(self, told: dict[str, Metrics], rolled: Scores) -> None:
        """What the pairs of all ranks are like, of which each may have another number."""
        valid_B = rolled.valid_B
        pairs = {f"pair_{name}/{expert}": told[expert][name] for expert in told for name in ("accuracy", "margin")}
        counts = dict.fromkeys(pairs, valid_B.sum()) | {"malformed": torch.ones_like(valid_B).sum()}
        measured = metrics_over_ranks(pairs | {"malformed": 1 - valid_B.float().mean()}, counts)
        measured |= diagnostics_over_ranks(self.discriminator, rolled)
        self.log_dict({f"warmup/{name}": value for name, value in measured.items()}, batch_size=1)
