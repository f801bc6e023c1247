"""Warm-start pairs: each demonstration beside what a policy answers to the same question.

Launch: python -m prism_pl data pairs --config pairs.yaml --model.policy.path runs/sft/export
Output: pairs.jsonl in the run's folder, in the authors' columns, for `datamodules.PairsDataModule`.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from prism_pl.batch import Example
from prism_pl.chat import Parsed, parse, render
from prism_pl.data.store import Journal, read_journals, store_images
from prism_pl.evaluation import keep_earlier, write_lines
from prism_pl.pass_rates import measured_with
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.prompts import demonstration
from prism_pl.rollout.engine import RolloutEngine, Sampling, generate_batch
from prism_pl.rollout_stage import check_counts, missing_batches
from prism_pl.row_needs import RowNeeds, with_engine

PAIRS = "pairs.jsonl"
JOURNALS = "pairs-{rank}.part.jsonl"


class PairModule(LightningModule):
    """Samples from a policy and writes pairs. The same command goes on after a kill: rows that are done are kept.

    A malformed response has no segments to compare, so it makes no pair: it is counted.

    Args:
        policy: which policy, the one whose responses the discriminator is to tell from demonstrations.
        engine: what samples from it.
        sampling: as in the alignment stage. With a seed, the batches' seeds count up from it.
        num_samples: responses, hence pairs, for each demonstration.
    """

    def __init__(self, policy: PolicySpec, engine: RolloutEngine, sampling: Sampling, num_samples: int = 1) -> None:
        super().__init__()
        check_counts({"num_samples": num_samples})
        self.spec, self.engine = policy, engine
        self.sampling, self.num_samples = sampling, num_samples
        self.processor = policy.processor()
        self.row_needs = with_engine(RowNeeds(demonstration=True), engine, sampling)
        self.policy: Any = None
        self._done: set[str] = set()
        self._missing = range(0)

    def collator(self, examples: Sequence[Example]) -> list[Example]:
        """The rows as they are: the engine encodes them. ValueError for a row without a well-formed demonstration."""
        for example in examples:
            if example.response is None:
                raise ValueError(f"row {example.id!r} has no response: a pair needs a demonstration")
            demonstration(example)
        return list(examples)

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = build_policy(self.spec).eval()

    @property
    def output_file(self) -> Path:
        """pairs.jsonl in the run's folder."""
        return Path(self.trainer.default_root_dir) / PAIRS

    def on_predict_start(self) -> None:
        folder = self.output_file.parent
        self._done = {entry["id"] for entry in self._entries()}
        self.trainer.strategy.barrier("journals read")
        self._journal = Journal(folder / JOURNALS.format(rank=self.global_rank), self._settings())
        self.engine.start(self.policy, self.processor, rank=self.global_rank)
        self._missing = missing_batches(self.trainer, self.device)

    def predict_step(self, batch: list[Example], batch_idx: int) -> list[str]:
        new = [example for example in batch if example.id not in self._done]
        groups = generate_batch(self.engine, new, self.num_samples, self.sampling, batch_idx)
        for example, group in zip(new, groups, strict=True):
            self._done.add(example.id)
            self._journal.append(self._entry(example, [rollout.text for rollout in group]))
        return [example.id for example in new]

    def _entry(self, example: Example, responses: list[str]) -> dict[str, Any]:
        parsed = [parse(response) for response in responses]
        row = {
            "question": example.question,
            "images": store_images(example, self.output_file.parent),
            "answers": example.answers,
            **({} if example.system is None else {"system": example.system}),
            **_columns("teacher", demonstration(example)),
        }
        pairs = [row | _columns("student", each) for each in parsed if each.valid]
        ids = [example.id] if len(pairs) == 1 else [f"{example.id}#{number}" for number in range(len(pairs))]
        return {
            "id": example.id,
            "pairs": [{"id": id, **pair} for id, pair in zip(ids, pairs, strict=True)],
            "malformed": [each.reason for each in parsed if not each.valid],
        }

    def on_predict_epoch_end(self) -> None:
        for batch_idx in self._missing:
            generate_batch(self.engine, [], self.num_samples, self.sampling, batch_idx)
        self.trainer.strategy.barrier("rows done")
        if not self.trainer.is_global_zero:
            return
        entries = {entry["id"]: entry for entry in self._entries()}  # a sampler repeats rows to give each rank as many
        pairs = [pair for entry in entries.values() for pair in entry["pairs"]]
        malformed = Counter(reason for entry in entries.values() for reason in entry["malformed"])
        keep_earlier(self.output_file)
        write_lines(pairs, self.output_file)
        for file in self.output_file.parent.glob(JOURNALS.format(rank="*")):
            file.unlink()
        why = "".join(f"; {count} x {reason}" for reason, count in malformed.most_common())
        rank_zero_info(f"{len(pairs)} pairs, {malformed.total()} malformed responses{why}: {self.output_file}")

    def teardown(self, stage: str) -> None:
        self.engine.close()

    def _entries(self) -> list[dict[str, Any]]:
        return list(read_journals(self.output_file.parent, JOURNALS.format(rank="*"), self._settings()))

    def _settings(self) -> dict[str, Any]:
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        return measured_with(datamodule, self.spec, self.sampling, self.num_samples)


def _columns(side: str, parsed: Parsed) -> dict[str, str]:
    """The authors' columns of one side: the caption block, and the two blocks behind it."""
    text = render(parsed.caption, parsed.reasoning, parsed.answer)
    caption, think, rest = text.partition("<think>")
    return {f"{side}_caption": caption.strip(), f"{side}_cot": think + rest}
