"""Stage 1, supervised fine-tuning: likelihood of the demonstrations' tokens, and of nothing else.

Launch: python -m prism_pl fit --config sft.yaml
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from prism_pl.batch import Example, SequenceBatch, micro_batches
from prism_pl.batch_draws import BatchDraws
from prism_pl.logprobs import token_logps
from prism_pl.losses import masked_nll
from prism_pl.optim import Schedule, build_optimizer, check_finite, lr_scheduler
from prism_pl.policy import PolicySpec, build_policy, save_policy
from prism_pl.processor import Processor
from prism_pl.row_needs import RowNeeds
from prism_pl.strategy import building, check_gradients, check_trainer, share


class SFTCollator:
    """Examples with a response -> one padded batch of prompt and response tokens."""

    def __init__(self, processor: Processor, max_length: int) -> None:
        self.processor = processor
        self.max_length = max_length

    def __call__(self, examples: Sequence[Example]) -> SequenceBatch:
        prompts = [self.processor.prompt(example) for example in examples]
        responses = []
        for example, prompt in zip(examples, prompts, strict=True):
            if example.response is None:
                raise ValueError(f"row {example.id!r} has no response: SFT needs a demonstration in every row")
            response = self.processor.response_ids(example.response)
            if len(prompt.ids) + len(response) > self.max_length:
                raise ValueError(
                    f"row {example.id!r} has {len(prompt.ids)} + {len(response)} tokens, more than max_length="
                    f"{self.max_length}: raise model.init_args.max_length, scale images down with policy.max_pixels, "
                    "or filter the row out"
                )
            responses.append(response)
        return self.processor.sequences(prompts, responses, range(len(examples)))


class SFTModule(LightningModule):
    """Supervised fine-tuning of a vision-language policy.

    Args:
        policy: which policy, and how to hold it.
        optimizer: an optimiser class with its options.
        freeze: name patterns of parameters that stay as they are; by default vision tower and projectors.
        schedule, warmup: of the learning rate; a warm-up below 1 is a share of the run.
        max_length: longest sequence, prompt and response; a longer row stops the run.
        micro_batch_tokens: padded tokens that are run at once; more are recomputed piece by piece in the backward
            pass. None runs the whole batch. Gradient clipping and precision are the trainer's.
        chunk_tokens: response tokens whose logits exist at once.
        export_dtype: of the exported weights.
    """

    def __init__(
        self,
        policy: PolicySpec,
        optimizer: OptimizerCallable,
        freeze: Sequence[str] = ("model.visual.*",),
        schedule: Schedule = "cosine",
        warmup: float = 0.1,
        max_length: int = 8192,
        micro_batch_tokens: int | None = None,
        chunk_tokens: int = 2048,
        export_dtype: Literal["float32", "bfloat16"] = "bfloat16",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.spec = policy
        self.optimizer = optimizer
        self.freeze_patterns = freeze
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.micro_batch_tokens = micro_batch_tokens
        self.chunk_tokens = chunk_tokens
        self.export_dtype: Literal["float32", "bfloat16"] = export_dtype
        self.processor = policy.processor()
        self.collator = SFTCollator(self.processor, max_length)
        self.row_needs = RowNeeds(response=True, max_length=max_length)
        self.policy: Any = None
        self._rows: list[str] = []

    def configure_model(self) -> None:
        if self.policy is None:
            with building(self, "policy"):
                self.policy = build_policy(self.spec, self.freeze_patterns)

    def forward(self, batch: SequenceBatch) -> Tensor:
        """The summed negative log-likelihood of the response tokens, in nats."""
        logps_BT = token_logps(self.policy, batch, chunk_tokens=self.chunk_tokens).logps_BT
        return masked_nll(logps_BT, batch.mask_BT, denominator=1.0)[0]

    def on_fit_start(self) -> None:
        check_trainer(self.trainer)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        self._rows = batch.ids
        loss = self._nll_sum(batch) / share(batch.mask_BT.sum())
        check_finite(loss, "sft/loss", batch.ids)
        self.log("sft/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("sft/tokens", float(batch.num_tokens), sync_dist=True, reduce_fx="sum")
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        check_gradients(self, "policy", self._rows)

    def _nll_sum(self, batch: SequenceBatch) -> Tensor:
        pieces = list(micro_batches(batch, self.micro_batch_tokens))
        if len(pieces) == 1:
            return self(pieces[0][1])
        # Automatic optimisation has one backward call: recomputing each piece in it bounds the memory to one piece.
        sums = [checkpoint(self, piece, use_reentrant=False) for _, piece in pieces]
        # A piece without rows only keeps this rank in step with the others.
        return torch.stack([nll if len(rows) else 0 * nll for (rows, _), nll in zip(pieces, sums, strict=True)]).sum()

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        tokens = int(batch.mask_BT.sum())
        self.log("sft/val_loss", self(batch) / tokens, batch_size=tokens, prog_bar=True, sync_dist=True)

    def configure_callbacks(self) -> list[Callback]:
        return [BatchDraws()]

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimizer, self.policy)
        scheduler = lr_scheduler(optimizer, self.schedule, self.warmup, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def export(self, folder: Any) -> None:
        """Write the policy in Hugging Face format with its processor."""
        save_policy(self.policy, self.processor, folder, self.export_dtype)
