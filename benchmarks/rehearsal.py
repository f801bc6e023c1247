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
from prism_pl.rollout import Rollout, Sampling, VLLMEngine
from prism_pl.rollout.engine import GroupDone


def long_response(seed: int, num_lines: int) -> str:
    """A well-formed response of two blocks with `num_lines` lines each, about 12 tokens a line."""
    random = np.random.default_rng(seed)
    colours, places = ("red", "blue", "green", "yellow"), ("left", "right", "top", "bottom")
    caption = [f"- {random.choice(colours)} {random.integers(10)} at {random.choice(places)}" for _ in range(num_lines)]
    think = [
        f"{i + 1}. {random.integers(10)} + {random.integers(10)} = {random.integers(10)}" for i in range(num_lines)
    ]
    return render("\n".join(caption), "\n".join(think), str(random.integers(10)))


class RehearsedEngine(VLLMEngine):
    """Samples, and then says something well-formed: the policy trains on what was sampled (a random policy next to never
    ends a response), the discriminator reads what is said.

    Args:
        num_lines: of each block said.
    """

    def __init__(self, num_lines: int = 32, **options: Any) -> None:
        super().__init__(**options)
        self.num_lines = num_lines

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        rollouts = super().generate(examples, num_samples, sampling, on_group)
        return [
            replace(one, text=long_response(sum(one.response_ids), self.num_lines), finish_reason="stop")
            for one in rollouts
        ]


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
