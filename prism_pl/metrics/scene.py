"""What a datamodule that knows the scenes behind its images offers to the evaluation.

A datamodule with an attribute `scene_checker` gets caption faithfulness and step correctness; others do without them.
"""

from typing import Protocol, runtime_checkable

from prism_pl.batch import Example


class CaptionCheck(Protocol):
    """Items of a caption against its scene: `true` of it, `missed`, `invented`; `exact`: all said and nothing else."""

    @property
    def true(self) -> int: ...

    @property
    def missed(self) -> int: ...

    @property
    def invented(self) -> int: ...

    @property
    def exact(self) -> bool: ...


class StepsCheck(Protocol):
    """Steps of a reasoning: how many it has, how many of them hold, and how many a full derivation has."""

    @property
    def correct(self) -> int: ...

    @property
    def stated(self) -> int: ...

    @property
    def expected(self) -> int: ...


class SceneChecker(Protocol):
    """Checks the parts of valid responses. `caption` and `reasoning` are the insides of the caption and think block."""

    def check_caption(self, caption: str, example: Example) -> CaptionCheck: ...

    def check_steps(self, reasoning: str, example: Example) -> StepsCheck: ...


@runtime_checkable
class KnowsScenes(Protocol):
    """A datamodule with a checker."""

    scene_checker: SceneChecker
