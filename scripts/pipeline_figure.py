"""Draw the README's figure of the pipeline, once for light pages and once for dark ones.

Launch: python scripts/pipeline_figure.py [--out docs]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Theme:
    """Colours of a page: text, quiet text, box and panel; then one for each part of the method."""

    ink: str
    quiet: str
    box: str
    panel: str
    page: str
    policy: str
    discriminator: str
    data: str


THEMES = {
    "pipeline.png": Theme("#1f2328", "#59636e", "#ffffff", "#f3f5f8", "#ffffff", "#0b62c4", "#b4470d", "#3d7a2a"),
    "pipeline-dark.png": Theme("#e6edf3", "#9aa4af", "#151b23", "#11161d", "#0d1117", "#6cb0ff", "#f39a5c", "#86cf72"),
}


class Canvas:
    """Boxes and arrows on axes that measure the figure in its own units."""

    def __init__(self, axes: Any, theme: Theme) -> None:
        self.axes, self.theme = axes, theme

    def box(self, x: float, y: float, width: float, height: float, title: str, lines: str, colour: str) -> None:
        """A rounded box with its lower left corner at (x, y)."""
        from matplotlib.patches import FancyBboxPatch

        shape = FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            linewidth=1.6,
            edgecolor=colour,
            facecolor=self.theme.box,
        )
        self.axes.add_patch(shape)
        middle = x + width / 2
        top = y + height - (0.34 if lines else height / 2)
        self.text(middle, top, title, colour, size=11.5, weight="bold")
        if lines:
            self.axes.text(
                middle, top - 0.26, lines, ha="center", va="top", fontsize=9.2, color=self.theme.ink, linespacing=1.5
            )

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
        """An arrow; `bend` curves it."""
        style = f"arc3,rad={bend}"
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.7, "mutation_scale": 14, "connectionstyle": style}
        self.axes.annotate("", xy=end, xytext=start, arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})

    def text(self, x: float, y: float, text: str, colour: str, size: float = 9.2, **style: Any) -> None:
        """Centred text."""
        self.axes.text(x, y, text, color=colour, fontsize=size, **{"ha": "center", "va": "center", **style})


def draw_stages(canvas: Canvas) -> None:
    """The upper row: the stages in order, and what each is given."""
    theme = canvas.theme
    stages = [
        ("1  SFT", "learn the three blocks\nfrom demonstrations", "sft.yaml", theme.policy),
        ("2a  Warm start", "rank demonstrations\nabove rollouts", "warmup.yaml", theme.discriminator),
        ("2  Alignment", "policy against\ndiscriminator", "align.yaml", theme.policy),
        ("3  RLVR", "GRPO, DAPO, GSPO on\nanswers that are checked", "rlvr.yaml", theme.policy),
        ("Evaluation", "accuracy, structure,\nfaithfulness, drift", "evaluate.yaml", theme.data),
    ]
    for i, (title, lines, config, colour) in enumerate(stages):
        x = 0.2 + 2.8 * i
        canvas.box(x, 5.5, 2.3, 1.15, title, lines, colour)
        canvas.text(x + 1.15, 5.25, config, theme.quiet, size=9, family="monospace")
        if i:
            canvas.arrow((x - 0.45, 6.07), (x - 0.05, 6.07), theme.quiet)


def draw_step(canvas: Canvas) -> None:
    """The lower panel: one alignment step."""
    from matplotlib.patches import FancyBboxPatch

    theme = canvas.theme
    panel = {"boxstyle": "round,pad=0,rounding_size=0.15", "linewidth": 0, "facecolor": theme.panel}
    canvas.axes.add_patch(FancyBboxPatch((0.2, 0.1), 13.5, 4.55, **panel))
    # The stage that the panel is a picture of.
    canvas.axes.fill([6.5, 7.4, 6.95], [4.65, 4.65, 5.08], color=theme.panel, lw=0)
    canvas.text(0.45, 4.35, "One step of stage 2", theme.ink, size=11.5, weight="bold", ha="left")

    canvas.box(0.45, 2.75, 2.3, 1.2, "Policy", "image and question in,\nG rollouts out", theme.policy)
    canvas.box(0.45, 0.55, 2.3, 1.2, "Demonstration", "the teacher's response\nto the same prompt", theme.data)
    canvas.box(
        3.55, 1.53, 2.3, 1.44, "Segments", "<caption> text\n<think> + <answer> text\nmalformed: marked", theme.quiet
    )
    canvas.box(6.75, 2.75, 2.6, 1.2, "Perception expert", "image, question,\ncaption → one score", theme.discriminator)
    canvas.box(6.75, 0.55, 2.6, 1.2, "Reasoning expert", "image, question,\nreasoning → one score", theme.discriminator)
    canvas.box(
        10.35, 2.75, 3.1, 1.2, "Policy gradient", "scores within the group\nof a prompt → advantages", theme.policy
    )
    canvas.box(
        10.35,
        0.55,
        3.1,
        1.2,
        "Bradley–Terry",
        "demonstration above rollout,\nthe discriminator's own step",
        theme.discriminator,
    )

    canvas.arrow((2.8, 3.2), (3.5, 2.65), theme.policy)
    canvas.arrow((2.8, 1.3), (3.5, 1.85), theme.data)
    canvas.arrow((5.9, 2.65), (6.7, 3.2), theme.quiet)
    canvas.arrow((5.9, 1.85), (6.7, 1.3), theme.quiet)
    canvas.arrow((9.4, 3.35), (10.3, 3.35), theme.policy)
    canvas.arrow((9.4, 1.15), (10.3, 1.15), theme.discriminator)
    canvas.arrow((9.4, 1.6), (10.3, 2.9), theme.policy)
    canvas.arrow((9.4, 2.9), (10.3, 1.6), theme.discriminator)

    # Both players' updates go back to where they came from.
    route(canvas, [(11.9, 3.99), (11.9, 4.32), (2.5, 4.32)], (2.5, 4.0), theme.policy)
    canvas.text(7.2, 4.32, "updates the policy", theme.policy, backgroundcolor=theme.panel)
    route(canvas, [(11.9, 0.52), (11.9, 0.28), (8.05, 0.28)], (8.05, 0.5), theme.discriminator)
    canvas.text(10.0, 0.28, "updates the discriminator", theme.discriminator, backgroundcolor=theme.panel)


def route(canvas: Canvas, points: list[tuple[float, float]], end: tuple[float, float], colour: str) -> None:
    """A line along `points` that ends in an arrow at `end`."""
    canvas.axes.plot(*zip(*points, strict=True), color=colour, lw=1.7, solid_joinstyle="round")
    canvas.arrow(points[-1], end, colour)


def draw(path: Path, theme: Theme) -> None:
    """Write one figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(13.9, 6.9))
    axes.set(xlim=(0, 13.9), ylim=(0, 6.9))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    canvas = Canvas(axes, theme)
    draw_stages(canvas)
    draw_step(canvas)
    figure.savefig(path, dpi=110, facecolor=theme.page)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figure of the pipeline.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        draw(options.out / name, theme)


if __name__ == "__main__":
    main()
