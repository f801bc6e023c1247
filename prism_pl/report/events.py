"""The scalars of a stage from its TensorBoard event files."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

EVENT_FILES = "events.out.tfevents*"


class Curve(NamedTuple):
    """A tag's values by step, in order. `times` are the wall-clock times (seconds) they were written at."""

    steps: list[int]
    values: list[float]
    times: list[float]

    def finite(self) -> "Curve":
        """Without NaN values: a step with nothing to measure has none."""
        kept = [i for i, value in enumerate(self.values) if value == value]
        return Curve([self.steps[i] for i in kept], [self.values[i] for i in kept], [self.times[i] for i in kept])


Curves = Mapping[str, Curve]


def read_curves(folder: Path) -> dict[str, Curve]:
    """Tag -> curve, from all event files of a folder. A run that went on has several, and repeats the steps since its
    last checkpoint: the file of the later start counts, whatever copying made of the files' own times. A file that was
    cut short gives what it has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: dict[str, dict[int, tuple[float, float]]] = {}
    # Pictures are what is large in these files; one of each tag is the least that can be asked for.
    sizes = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    read = [EventAccumulator(str(file), size_guidance=sizes).Reload() for file in sorted(folder.glob(EVENT_FILES))]
    for events in sorted(
        (one for one in read if one.Tags()["scalars"]), key=lambda one: one.FirstEventTimestamp() or 0.0
    ):
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                points.setdefault(tag, {})[event.step] = (event.value, event.wall_time)
    curves = {}
    for tag, by_step in points.items():
        steps = sorted(by_step)
        curves[tag] = Curve(steps, [by_step[s][0] for s in steps], [by_step[s][1] for s in steps])
    return curves
