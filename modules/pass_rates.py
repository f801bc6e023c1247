"""The difficulty filter's measurement: how often a policy answers each training prompt right.

Launch: python -m prism_pl predict --config filter.yaml --model.policy.path runs/align/export
Output: pass_rates.jsonl in the run's folder: a line of what was measured, and one a prompt. The RLVR data takes it as
`pass_rates`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from prism_pl.batch import Example
from prism_pl.evaluation import gathered, keep_earlier, write_lines
from prism_pl.pass_rates import PASS_RATES, PassRate, measured_with
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rewards import AccuracyFormatReward, Reward
from prism_pl.rollout.engine import RolloutEngine, Sampling, generate_batch
from prism_pl.rollout_stage import check_counts, missing_batches
from prism_pl.row_needs import RowNeeds, with_engine


class PassRateModule(LightningModule):
    """Samples responses to the training prompts and counts the right ones. The file is written whole at the end: what a
    kill leaves behind is no half of it.

    Args:
        policy: which policy, the one RLVR will start from.
        engine: what samples from it.
        sampling: as RLVR will sample. With a seed, the batches' seeds count up from it.
        num_samples: responses a prompt.
        reward: judges them; None is `AccuracyFormatReward()`. Its part "accuracy" must be 0 or 1.
    """

    def __init__(
        self,
        policy: PolicySpec,
        engine: RolloutEngine,
        sampling: Sampling,
        num_samples: int = 8,
        reward: Reward | None = None,
    ) -> None:
        super().__init__()
        check_counts({"num_samples": num_samples})
        if sampling.temperature == 0 and num_samples > 1:
            raise ValueError(
                f"num_samples is {num_samples} and sampling.temperature 0: greedy responses are all the same, so the "
                "pass rates would be 0 or 1; give a temperature"
            )
        self.spec, self.engine = policy, engine
        self.sampling, self.num_samples = sampling, num_samples
        self.reward: Reward = AccuracyFormatReward() if reward is None else reward
        self.processor = policy.processor()
        self.row_needs = with_engine(RowNeeds(answers=True), engine, sampling)
        self.policy: Any = None
        self.pass_rates: list[PassRate] = []
        self._missing = range(0)

    def collator(self, examples: Sequence[Example]) -> list[Example]:
        """The rows as they are: the engine encodes them."""
        return list(examples)

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = build_policy(self.spec).eval()

    @property
    def output_file(self) -> Path:
        """pass_rates.jsonl in the run's folder."""
        return Path(self.trainer.default_root_dir) / PASS_RATES

    def on_predict_start(self) -> None:
        self.pass_rates = []
        self.engine.start(self.policy, self.processor, rank=self.global_rank)
        self._missing = missing_batches(self.trainer, self.device)

    def predict_step(self, batch: list[Example], batch_idx: int) -> list[PassRate]:
        groups = generate_batch(self.engine, batch, self.num_samples, self.sampling, batch_idx)
        texts = [[rollout.text for rollout in group] for group in groups]
        found = [self._pass_rate(example, group) for example, group in zip(batch, texts, strict=True)]
        self.pass_rates += found
        return found

    def _pass_rate(self, example: Example, responses: list[str]) -> PassRate:
        parts = self.reward(responses, [example] * len(responses)).parts
        if "accuracy" not in parts or not ((parts["accuracy"] == 0) | (parts["accuracy"] == 1)).all():
            raise ValueError(
                f'model.init_args.reward: {type(self.reward).__name__} gives no part "accuracy" of 0 or 1 for row '
                f"{example.id!r}, so there is no pass rate; leave it out for AccuracyFormatReward"
            )
        num_correct = int(parts["accuracy"].sum())
        return PassRate(
            id=example.id,
            pass_rate=num_correct / len(responses),
            num_samples=len(responses),
            num_correct=num_correct,
            format_rate=float(parts["format"].mean()) if "format" in parts else float("nan"),
        )

    def on_predict_epoch_end(self) -> None:
        for batch_idx in self._missing:
            generate_batch(self.engine, [], self.num_samples, self.sampling, batch_idx)
        self.pass_rates = gathered(self.pass_rates, "training")
        if not self.trainer.is_global_zero:
            return
        self.output_file.parent.mkdir(parents=True, exist_ok=True)
        keep_earlier(self.output_file)
        write_lines([{"recipe": self._recipe()}, *self.pass_rates], self.output_file)
        right = sum(row["num_correct"] for row in self.pass_rates)
        share = right / sum(row["num_samples"] for row in self.pass_rates)
        rank_zero_info(f"{len(self.pass_rates)} pass rates, {share:.1%} of all samples right: {self.output_file}")

    def _recipe(self) -> dict[str, Any]:
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        return measured_with(datamodule, self.spec, self.sampling, self.num_samples)

    def teardown(self, stage: str) -> None:
        self.engine.close()
