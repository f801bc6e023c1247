"""How figures look: PNG files on paper of their own, legible on light and dark pages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_pl.report.runs import Run

PAPER, INK, QUIET, GRID = "#fcfcfb", "#1f2328", "#59636e", "#dfe3e8"
COLOURS = ("#7a828c", "#0b62c4", "#c2410c", "#2f7d32", "#7b3fa0", "#b8860b", "#00838f", "#c2185b")
SUPERVISION = "#c9d1da"
MARKERS = "osD^vP"
DASHES = ("-", "--", ":", "-.")
WIDTH = 9.6  # inches


class Figures:
    """Writes figures into a folder and gives the Markdown that shows them.

    Args:
        folder: for the PNG files, made when the first is written.
        page: of the Markdown file, which links are relative to.
        runs: all runs of the report, so that one checkpoint or stage has one colour in every figure.
    """

    def __init__(self, folder: Path, page: Path, runs: Sequence[Run]) -> None:
        self.folder, self.page = folder, page
        names = [n for run in runs for n in run.evaluations]
        names += [stage.name for run in runs for stage in run.stages]
        self.colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
        self.order = [run.name for run in runs]

    def colour(self, name: str) -> str:
        """Of a checkpoint or stage."""
        return self.colours[name]

    def run_colour(self, run: Run) -> str:
        """Of a run, where colours tell runs apart."""
        return COLOURS[1 + self.order.index(run.name) % (len(COLOURS) - 1)]

    def dash(self, run: Run) -> Any:
        """The line style of a run."""
        return DASHES[self.order.index(run.name) % len(DASHES)]

    def marker(self, run: Run) -> str:
        """The marker of a run."""
        return MARKERS[self.order.index(run.name) % len(MARKERS)]

    def grid(self, rows: int, columns: int, height: float) -> tuple[Any, Any]:
        """A figure and its axes, (rows, columns), each row `height` inches."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        style: Any = {
            "figure.facecolor": PAPER,
            "axes.facecolor": PAPER,
            "savefig.facecolor": PAPER,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": QUIET,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.labelsize": 9,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": GRID,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
        }
        pyplot.rcParams.update(style)
        return pyplot.subplots(rows, columns, figsize=(WIDTH, height * rows), squeeze=False, layout="constrained")

    def save(self, figure: Any, name: str, caption: str) -> list[str]:
        """Write `name`.png; the lines that show it with its caption."""
        from matplotlib import pyplot

        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.png"
        figure.savefig(file, dpi=110)
        pyplot.close(figure)
        return [f"![{caption}]({self.link(file)})", "", f"*{caption}*", ""]

    def link(self, file: Path) -> str:
        """A file's path from the page, as Markdown wants it."""
        return file.relative_to(self.page.parent).as_posix().replace(" ", "%20")


def legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """One legend above all axes."""
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(len(handles), 8))
