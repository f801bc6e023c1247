"""Evaluation of a policy: accuracy, format, structure, drift and faithfulness, for each question family and split.

Launch: python -m prism_pl test --config evaluate.yaml --model.policy.path runs/sft/export
Output: evaluation.json (a record a prompt and all tables), TensorBoard scalars, a table on the screen.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule

import prism_pl
from prism_pl.batch import Example
from prism_pl.benchmarks.judge import Asked, JudgeModel
from prism_pl.chat import lenient_answer
from prism_pl.data.usable import check_usable
from prism_pl.drift_meter import DriftMeter, DriftRow, DriftSpec, build_embedder, drift_tables
from prism_pl.evaluation import (
    Judge,
    KnowsRightAnswers,
    PromptRecord,
    after_judge,
    gathered,
    keep_earlier,
    keep_images,
    write_json,
)
from prism_pl.evaluation_tables import ALL_FAMILIES, Tables, make_tables
from prism_pl.folders import checkpoint_name
from prism_pl.metrics.counting import DEFAULT_RULE, Rule, describe_rule
from prism_pl.metrics.scene import KnowsScenes
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.report.evaluations import FILE_NAME, read_evaluation
from prism_pl.report.screen import print_evaluation
from prism_pl.rollout.engine import Rollout, RolloutEngine, Sampling, generate_batch
from prism_pl.row_needs import RowNeeds, with_engine

GREEDY = Sampling(temperature=0.0)


class EvaluateModule(LightningModule):
    """Samples responses to the test prompts and measures them.

    Rows need answers, and have to fit into the engine: all are looked at before it is started. Where they hold a
    demonstration, it is the supervision to measure drift against; where the datamodule knows the scenes
    (`prism_pl.metrics.scene`), captions and steps of both sides are checked; where it has a rule for its answers
    (`KnowsRightAnswers`, as benchmarks have), that rule decides, and they need none.

    Args:
        policy: which policy.
        engine: what samples from it.
        sampling: greedy by default. With a seed, the batches' seeds count up from it.
        num_samples: responses a prompt.
        pass_k: for which k to estimate pass@k; at most `num_samples`.
        name: what tables call this checkpoint, and by default its folder; None takes it from the policy's path,
            `align` for `runs/align/export`.
        rule: how descriptive items and reasoning steps are counted, see `prism_pl.metrics.counting`.
        num_resamples, bootstrap_seed: of the 95% intervals over prompts.
        num_images: of how many prompts a split the images are kept, in `images/`, for a report to show.
        judge: looks at every answer after the rule and may turn its verdict either way; None leaves the rule's.
        drift: also measure likelihood of the supervision, distance of embeddings and a probe's AUC, see
            `prism_pl.drift_meter`; None leaves them out.
    """

    def __init__(
        self,
        policy: PolicySpec,
        engine: RolloutEngine,
        sampling: Sampling = GREEDY,
        num_samples: int = 1,
        pass_k: Sequence[int] = (1,),
        name: str | None = None,
        rule: Rule = DEFAULT_RULE,
        num_resamples: int = 2000,
        bootstrap_seed: int = 0,
        num_images: int = 32,
        judge: JudgeModel | None = None,
        drift: DriftSpec | None = None,
    ) -> None:
        super().__init__()
        if sampling.temperature == 0 and num_samples > 1:
            raise ValueError(
                f"num_samples is {num_samples} and sampling.temperature 0: greedy responses are all the same, so give "
                "1 sample or a temperature"
            )
        if any(not 1 <= k <= num_samples for k in pass_k):
            raise ValueError(f"pass_k is {list(pass_k)}: each k must lie in 1 ... num_samples={num_samples}")
        self.spec = policy
        self.engine = engine
        self.sampling = sampling
        self.num_samples = num_samples
        self.pass_k = list(pass_k)
        self.name = name or checkpoint_name(policy.path)
        self.rule: Rule = rule
        self.num_resamples = num_resamples
        self.bootstrap_seed = bootstrap_seed
        self.num_images = num_images
        self.judge_model = judge
        self.drift = drift
        self.processor = policy.processor()
        self.row_needs = with_engine(RowNeeds(answers=True), engine, sampling)
        self.policy: Any = None
        self.embedder: Any = None
        self.records: list[PromptRecord] = []
        self.drift_rows: list[DriftRow] = []
        self.num_seen: Counter[str] = Counter()
        self.tables: Tables = {}

    def collator(self, examples: Sequence[Example]) -> list[Example]:
        """The rows as they are: the engine encodes them."""
        return list(examples)

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = build_policy(self.spec).eval()
            if self.drift is not None:
                self.embedder = build_embedder(self.drift)

    def setup(self, stage: str) -> None:
        if not self.output_file.exists():
            return
        before = read_evaluation(self.output_file)
        same_policy = Path(before.settings["policy"]).resolve() == Path(self.spec.path).resolve()
        if before.name != self.name or not same_policy:
            raise ValueError(
                f"{self.output_file} holds the evaluation of {before.name!r} (policy {before.settings['policy']}), and "
                f"this one is of {self.name!r} (policy {self.spec.path}): give it a folder of its own with "
                "--trainer.default_root_dir, or leave that out and give it a --model.name of its own"
            )

    @property
    def output_file(self) -> Path:
        """evaluation.json in the run's folder."""
        return Path(self.trainer.default_root_dir) / FILE_NAME

    def on_test_start(self) -> None:
        # Evaluation runs under Lightning's own datamodule, or under plain data loaders, which know no scenes.
        datamodule: object = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.judge = Judge(
            self.rule,
            datamodule.scene_checker if isinstance(datamodule, KnowsScenes) else None,
            datamodule.is_right if isinstance(datamodule, KnowsRightAnswers) else None,
        )
        if self.judge_model is not None:
            self.judge_model.check()
        self._check_rows()
        self.records, self.drift_rows = [], []
        self.num_seen = Counter()
        if self.drift is not None:
            self.meter = DriftMeter(self.drift, self.policy, self.processor, self.embedder)
        self.engine.start(self.policy, self.processor, rank=self.global_rank)

    def _check_rows(self) -> None:
        loaders = self.trainer.test_dataloaders
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        ruled = isinstance(self.trainer.datamodule, KnowsRightAnswers)  # pyright: ignore[reportAttributeAccessIssue]
        needs = replace(self.row_needs, answers=False) if ruled else self.row_needs
        check_usable(loaders, self.trainer.num_test_batches, self.processor, needs, "test")

    def test_step(self, batch: list[Example], batch_idx: int) -> None:
        groups = generate_batch(self.engine, batch, self.num_samples, self.sampling, batch_idx)
        numbers = [self._number_in_split(example) for example in batch]
        records = [self._record(*each) for each in zip(batch, groups, numbers, strict=True)]
        if self.drift is not None:
            measured = [n for n, number in enumerate(numbers) if self._is_among(number, self.drift.num_prompts)]
            self._measure_drift([(batch[n], groups[n], records[n]) for n in measured])
        self.records += records if self.judge_model is None else self._judged(self.judge_model, records, batch)

    def _judged(
        self, judge: JudgeModel, records: Sequence[PromptRecord], batch: Sequence[Example]
    ) -> list[PromptRecord]:
        """The records after the judge model, all of a batch's answers at once."""
        asked = [
            Asked(e.meta.get("asked", e.question), " or ".join(e.answers), lenient_answer(response["text"]))
            for record, e in zip(records, batch, strict=True)
            for response in record["policy"]
        ]
        verdicts = iter(judge(asked))
        return [{**r, "policy": [after_judge(response, next(verdicts)) for response in r["policy"]]} for r in records]

    def _number_in_split(self, example: Example) -> int:
        """How many prompts of its split came before it on this rank."""
        split = str(example.meta.get("split", "test"))
        self.num_seen[split] += 1
        return self.num_seen[split] - 1

    def _is_among(self, number: int, limit: int | None) -> bool:
        """Whether a prompt is among the first `limit` of its split over all ranks, as nearly as ranks allow."""
        return limit is None or number < limit // self.trainer.world_size

    def _measure_drift(self, measured: Sequence[tuple[Example, Sequence[Rollout], PromptRecord]]) -> None:
        """Of those that have a demonstration to drift from."""
        known = [(e, group, r["supervision"]) for e, group, r in measured if r["supervision"] is not None]
        if not known:
            return
        examples, groups, supervision = zip(*known, strict=True)
        nll, rows = self.meter(examples, [[rollout.text for rollout in group] for group in groups])
        self.drift_rows += rows
        for response, blocks in zip(supervision, nll, strict=True):
            if blocks is not None:
                response["nll"] = blocks

    def _record(self, example: Example, rollouts: Sequence[Rollout], number: int) -> PromptRecord:
        supervision = None
        if example.response is not None:
            supervision = self.judge(example.response, example, len(self.processor.response_ids(example.response)))
        in_unit = {key: example.meta[key] for key in ("unit", "part", "scores") if key in example.meta}
        return PromptRecord(
            **in_unit,
            id=example.id,
            family=str(example.meta.get("family", "questions")),
            split=str(example.meta.get("split", "test")),
            question=example.question,
            answers=example.answers,
            policy=[self.judge(r.text, example, len(r.response_ids), r.finish_reason == "length") for r in rollouts],
            supervision=supervision,
            images=keep_images(example, self.output_file.parent) if self._is_among(number, self.num_images) else [],
        )

    def on_test_epoch_end(self) -> None:
        self.records = gathered(self.records, "test")
        self.drift_rows = gathered(self.drift_rows, "test")
        if not self.trainer.is_global_zero:
            return
        self.tables = make_tables(self.records, self.pass_k, self.num_resamples, self.bootstrap_seed)
        if self.drift is not None:
            drift = drift_tables(self.drift_rows, self.drift.num_folds, self.num_resamples, self.bootstrap_seed)
            for split, families in drift.items():
                self.tables[split][ALL_FAMILIES] |= families[ALL_FAMILIES]
        self.output_file.parent.mkdir(parents=True, exist_ok=True)
        keep_earlier(self.output_file)
        write_json(self._settings() | {"tables": self.tables, "records": self.records}, self.output_file)
        scalars = {
            f"evaluate/{split}/{family}/{metric}": entry["mean"]
            for split, families in self.tables.items()
            for family, table in families.items()
            for metric, entry in table.items()
        }
        # Not through self.log: Lightning would print several hundred rows before our own table.
        for logger in self.trainer.loggers:
            logger.log_metrics(scalars, step=0)

    def _settings(self) -> dict[str, Any]:
        from prism_pl.rewards import timeouts

        packages = ("torch", "transformers", "lightning")
        return {
            "name": self.name,
            "policy": self.spec.path,
            "command": shlex.join(sys.argv),
            "seed": torch.initial_seed(),
            "sampling": asdict(self.sampling),
            "num_samples": self.num_samples,
            "pass_k": self.pass_k,
            "rule": self.rule,
            "rule_in_words": describe_rule(self.rule),
            "num_resamples": self.num_resamples,
            "bootstrap_seed": self.bootstrap_seed,
            "drift": None if self.drift is None else asdict(self.drift),
            "comparisons_without_verdict": timeouts(),
            "judge": self.judge_model and {"url": self.judge_model.url, "model": self.judge_model.model},
            "versions": {"prism_pl": prism_pl.__version__, **{package: version(package) for package in packages}},
        }

    def teardown(self, stage: str) -> None:
        self.engine.close()
        if self.tables:  # printed here, behind the progress bar's last line
            print_evaluation(read_evaluation(self.output_file))
            print(f"written to {self.output_file}")
