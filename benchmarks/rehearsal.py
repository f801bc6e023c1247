"""Parts for measuring a stage at full size with random weights, whose own responses would all be malformed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.loading import train_loader
from prism_pl.batch import Example
from prism_pl.chat import render
from prism_pl.rollout import Rollout, Sampling, TransformersEngine, VLLMEngine
from prism_pl.rollout.engine import GroupDone


def long_response(seed: int, num_lines: int, answer: str | None = None) -> str:
    """A well-formed response of two blocks with `num_lines` lines each, about 12 tokens a line; None: some digit."""
    random = np.random.default_rng(seed)
    colours, places = ("red", "blue", "green", "yellow"), ("left", "right", "top", "bottom")
    caption = [f"- {random.choice(colours)} {random.integers(10)} at {random.choice(places)}" for _ in range(num_lines)]
    digits = random.integers(10, size=(num_lines, 3))
    think = [f"{i + 1}. {a} + {b} = {c}" for i, (a, b, c) in enumerate(digits)]
    return render("\n".join(caption), "\n".join(think), answer or str(random.integers(10)))


def rehearsed(example: Example, rollouts: Sequence[Rollout], num_lines: int) -> list[Rollout]:
    """Rollouts of an example that say something well-formed, about half of them its answer: which depends on what was
    sampled alone. What the policy trains on stays what was sampled."""
    said = []
    for one in rollouts:
        seed = sum(one.response_ids)
        answer = example.answers[0] if example.answers and seed % 2 else None
        said.append(replace(one, text=long_response(seed, num_lines, answer), finish_reason="stop"))
    return said


class RehearsedEngine(VLLMEngine):
    """Samples, and then says something well-formed: the policy trains on what was sampled (a random policy next to
    never ends a response), rewards and discriminator read what is said.

    Args:
        num_lines: of each block said.
    """

    def __init__(self, num_lines: int = 32, **options: Any) -> None:
        super().__init__(**options)
        self.num_lines = num_lines

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        def told(p: int, group: list[Rollout]) -> None:
            assert on_group is not None
            on_group(p, rehearsed(examples[p], group, self.num_lines))

        rollouts = super().generate(examples, num_samples, sampling, told if on_group is not None else None)
        return _group_by_group(examples, rollouts, num_samples, self.num_lines)


class RehearsedTransformersEngine(TransformersEngine):
    """`RehearsedEngine` without vLLM, for a rehearsal at tiny size on a CPU.

    Args:
        num_lines: of each block said.
    """

    def __init__(self, num_lines: int = 4, **options: Any) -> None:
        super().__init__(**options)
        self.num_lines = num_lines

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        rollouts = super().generate(examples, num_samples, sampling, on_group)
        return _group_by_group(examples, rollouts, num_samples, self.num_lines)


def _group_by_group(examples: Sequence[Example], rollouts: list[Rollout], num: int, num_lines: int) -> list[Rollout]:
    groups = [rollouts[p * num : (p + 1) * num] for p in range(len(examples))]
    return [one for each, group in zip(examples, groups, strict=True) for one in rehearsed(each, group, num_lines)]


class NoiseImages(L.LightningDataModule):
    """Demonstrations about noise images.

    Args:
        batch_size: prompts a step and rank.
        side: of the images, in pixels; a visual token is 32 x 32 of them.
        num_lines: of each block of a demonstration.
    """

    def __init__(self, num_train: int = 512, batch_size: int = 4, side: int = 448, num_lines: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        random = np.random.default_rng(0)
        self.rows = [
            Example(
                id=f"noise-{i}",
                question="What is the sum of all digits?",
                images=[Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8))],
                response=long_response(i, num_lines),
                answers=["10"],
            )
            for i in range(num_train)
        ]

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        collator: Any = self.trainer.lightning_module.collator
        return train_loader(self.rows, self.trainer, collator, batch_size=self.batch_size, seed=0)  # type: ignore[arg-type]
