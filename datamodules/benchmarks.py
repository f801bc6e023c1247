"""Published benchmarks as a source of test prompts, each with its own rule.

In YAML, any number of them; their order is that of the tables:

    data:
      class_path: datamodules.BenchmarksDataModule
      init_args:
        benchmarks:
          - class_path: prism_pl.benchmarks.MathVista
          - class_path: prism_pl.benchmarks.MMMUPro
            init_args: {setting: vision, path: /data/mmmu_pro}
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from lightning import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from datamodules.loading import ordered_loader
from prism_pl.batch import Example
from prism_pl.benchmarks import Benchmark
from prism_pl.benchmarks.source import Rows


class BenchmarkDataset(Dataset[Example]):
    """A benchmark's rows as examples, made when asked for; a row that cannot be one is a ValueError that names it."""

    def __init__(self, benchmark: Benchmark, system_prompt: str | None) -> None:
        self.benchmark = benchmark
        self.system_prompt = system_prompt
        self.rows: Rows = benchmark.rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        try:
            example = self.benchmark.example(self.rows[index])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.benchmark.path}, row {index} of {self.benchmark.name} cannot be read "
                f"({type(error).__name__}: {error}): is it the published file?"
            ) from error
        example.system = self.system_prompt
        return example


class BenchmarksDataModule(LightningDataModule):
    """The rows of all benchmarks, one after the other, for `test`.

    Args:
        benchmarks: which, in the order of the tables; each under a name of its own.
        batch_size: prompts that the engine gets at once.
        limit: take only the first so many rows of each; None is all of them.
        system_prompt: None is `prism_pl.chat.SYSTEM_PROMPT`.
        num_workers: processes that read rows, and the headers of their images before the run; the engine opens images
            in the process that samples.
    """

    def __init__(
        self,
        benchmarks: list[Benchmark],
        batch_size: int = 64,
        limit: int | None = None,
        system_prompt: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        names = [benchmark.name for benchmark in benchmarks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if not names or twice:
            reason = f"benchmarks names {twice} twice: they would be one in the tables" if twice else "no benchmark"
            raise ValueError(f"{reason}; name each once, such as class_path: prism_pl.benchmarks.MathVista")
        if batch_size < 1 or (limit is not None and limit < 1):
            raise ValueError(f"batch_size is {batch_size} and limit {limit}: give at least 1 each, or limit: null")
        for benchmark in benchmarks:
            benchmark.limit = limit if benchmark.limit is None else benchmark.limit
        self.benchmarks = {benchmark.name: benchmark for benchmark in benchmarks}
        self.batch_size, self.system_prompt, self.num_workers = batch_size, system_prompt, num_workers
        self.test_rows: Sequence[Dataset[Example]] = []

    def setup(self, stage: str) -> None:
        if stage != "test":
            raise ValueError(f"benchmarks are for evaluation: python -m prism_pl test, not {stage}")
        self.test_rows = [BenchmarkDataset(each, self.system_prompt) for each in self.benchmarks.values()]

    def test_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        collator = cast("Callable[[list[Example]], Any]", self.trainer.lightning_module.collator)
        rows = ConcatDataset(self.test_rows)
        return ordered_loader(rows, collator, batch_size=self.batch_size, num_workers=self.num_workers)

    def is_right(self, answer: str, example: Example) -> bool:
        """By the rule of the example's benchmark (`prism_pl.evaluation.KnowsRightAnswers`)."""
        return self.benchmarks[example.meta["split"]].is_right(answer, example)
