"""The faster engine that is there."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from prism_pl.batch import Example
from prism_pl.processor import Processor
from prism_pl.rollout import vllm_compat
from prism_pl.rollout.engine import GroupDone, Rollout, RolloutEngine, Sampling
from prism_pl.rollout.transformers_engine import TransformersEngine
from prism_pl.rollout.vllm_engine import VLLMEngine


class AutoEngine:
    """vLLM where it can be imported, else transformers' `generate`. Says once, at the start, which it took.

    Each engine has options of its own: name it in YAML to set them.

    Args:
        batch_size: sequences decoded at once.
        max_images: most images in a prompt; transformers takes any number.
    """

    def __init__(self, batch_size: int = 256, max_images: int = 4) -> None:
        self.fallback = TransformersEngine(batch_size)
        self.preferred = VLLMEngine(max_num_seqs=batch_size, max_images=max_images)
        self.engine: RolloutEngine | None = None

    @property
    def max_images(self) -> int | None:
        """Most images in a prompt, as `prism_pl.row_needs.HasLimits` asks before the start: None without vLLM."""
        return self.preferred.max_images if self._expects_vllm() else None

    @property
    def max_model_len(self) -> int | None:
        """See `max_images`."""
        return self.preferred.max_model_len if self._expects_vllm() else None

    def _expects_vllm(self) -> bool:
        # Each stage asks when it is made, and importing vLLM takes seconds: one that is there and broken counts too.
        return find_spec("vllm") is not None if self.engine is None else self.engine is self.preferred

    def start(self, policy: Any, processor: Processor, *, rank: int) -> None:
        """Choose, and start what was chosen."""
        if self.engine is None:
            self.engine = self._choose()
        self.engine.start(policy, processor, rank=rank)

    def _choose(self) -> RolloutEngine:
        try:
            vllm = vllm_compat.import_vllm()
            vllm.LLM  # noqa: B018  (imported where it is named)
        except (ImportError, OSError, RuntimeError) as error:  # not installed, or its libraries do not load
            rank_zero_info(f"Rollouts by transformers' generate: vLLM cannot be imported ({error}).")
            return self.fallback
        rank_zero_info(f"Rollouts by vLLM {vllm.__version__}.")
        return self.preferred

    @property
    def chosen(self) -> RolloutEngine:
        """The engine behind this one, once it is started."""
        assert self.engine is not None, "start the engine first"
        return self.engine

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        """See `RolloutEngine`."""
        return self.chosen.generate(examples, num_samples, sampling, on_group)

    def dtype(self) -> torch.dtype:
        """See `RolloutEngine`."""
        return self.chosen.dtype()

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine`."""
        self.chosen.sync(named_parameters)

    def sleep(self) -> None:
        """See `RolloutEngine`."""
        self.chosen.sleep()

    def wake(self) -> None:
        """See `RolloutEngine`."""
        self.chosen.wake()

    def metrics(self) -> dict[str, float]:
        """See `RolloutEngine`."""
        return self.chosen.metrics()

    def state_dict(self) -> dict[str, Any]:
        """See `RolloutEngine`. Either engine goes on from the other's."""
        return self.chosen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `RolloutEngine`."""
        self.chosen.load_state_dict(state)

    def close(self) -> None:
        """See `RolloutEngine`. Nothing where it was never started."""
        if self.engine is not None:
            self.engine.close()
