"""Completions as a picture and as Markdown: image, question, response, demonstration, scores, verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from prism_pl.images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

IMAGE_SIDE = 288  # pixels, as all lengths here
TEXT_WIDTH = 500
MARGIN = 18
LINE = 21
MAX_LINES = 40
INK, GREY, RULE, PAPER = "#1c1c1c", "#5c5c5c", "#d4d4d4", "#ffffff"
GOOD, BAD, NEUTRAL = "#14723b", "#a8321f", "#3c5a86"


@dataclass
class Completion:
    """One response to show. `good` colours the verdict; None is neither good nor bad. `numbers` are lines such as
    "perception 0.31, demonstration 0.80, gap +0.49"."""

    images: list[Any]
    question: str
    answers: list[str]
    response: str
    demonstration: str | None
    verdict: str
    good: bool | None
    numbers: list[str] = field(default_factory=list)


def draw_completions(completions: Sequence[Completion]) -> "Image":
    """One RGB picture, a row a completion: image and question, response, and the demonstration where there are any."""
    from PIL import Image

    rows = [_draw_row(completion, any(c.demonstration for c in completions)) for completion in completions]
    picture = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    return picture


def _draw_row(completion: Completion, with_demonstration: bool) -> "Image":
    from PIL import Image, ImageDraw

    width = MARGIN * 2 + IMAGE_SIDE + (TEXT_WIDTH + MARGIN) * (1 + with_demonstration)
    # Room for the longest column; cut to what was written at the end.
    height = (IMAGE_SIDE + MARGIN) * len(completion.images) + LINE * (MAX_LINES * 2 + 4 * len(completion.numbers) + 20)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.line([(0, 0), (canvas.width, 0)], RULE, 2)
    bottom = MARGIN
    for image in completion.images:
        shown = _fitted(open_image(image, "completion"))
        canvas.paste(shown, (MARGIN, bottom))
        bottom += shown.height + MARGIN // 2
    bottom = _paragraph(draw, completion.question, MARGIN, bottom, IMAGE_SIDE, _font("Sans-Bold"))
    if completion.answers:
        answer = f"answer: {' | '.join(completion.answers)}"
        bottom = _paragraph(draw, answer, MARGIN, bottom + 4, IMAGE_SIDE, _font("Sans"), GREY)
    bottoms = [bottom]
    left = MARGIN * 2 + IMAGE_SIDE
    colour = NEUTRAL if completion.good is None else GOOD if completion.good else BAD
    top = _heading(draw, f"response: {completion.verdict}", left, colour)
    for line in completion.numbers:
        top = _paragraph(draw, line, left, top, TEXT_WIDTH, _font("Sans"), GREY)
    bottoms.append(_paragraph(draw, completion.response or "(empty)", left, top + 6, TEXT_WIDTH, _font("SansMono")))
    if completion.demonstration is not None:
        left += TEXT_WIDTH + MARGIN
        top = _heading(draw, "demonstration", left, NEUTRAL)
        bottoms.append(_paragraph(draw, completion.demonstration, left, top + 6, TEXT_WIDTH, _font("SansMono")))
    return canvas.crop((0, 0, canvas.width, max(bottoms) + MARGIN))


def _heading(draw: "ImageDraw", text: str, left: int, colour: str) -> int:
    """A coloured bar with white text; returns where it ends."""
    lines = _wrapped(draw, text, TEXT_WIDTH - 16, _font("Sans-Bold"))[:3]
    bottom = MARGIN + LINE * len(lines) + 8
    draw.rounded_rectangle([left, MARGIN, left + TEXT_WIDTH - 1, bottom], 4, colour)
    for n, line in enumerate(lines):
        draw.text((left + 8, MARGIN + 5 + n * LINE), line, "#ffffff", _font("Sans-Bold"))
    return bottom + 6


def _paragraph(draw: "ImageDraw", text: str, left: int, top: int, width: int, font: Any, colour: str = INK) -> int:
    """Wrapped text; returns where it ends."""
    lines = _wrapped(draw, text, width, font)
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} lines more"]
    for line in lines:
        draw.text((left, top), line, colour, font)
        top += LINE
    return top


def _wrapped(draw: "ImageDraw", text: str, width: int, font: Any) -> list[str]:
    """Lines no wider than `width`, broken at spaces, or inside a word that is wider alone."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if draw.textlength(joined, font) <= width:
                line = joined
                continue
            lines += [line] if line else []
            while draw.textlength(word, font) > width:
                # No letter is narrower than 2 pixels, which bounds the search in a degenerate response.
                longest = min(len(word), width // 2)
                fitting = max(n for n in range(1, longest) if n == 1 or draw.textlength(word[:n], font) <= width)
                lines.append(word[:fitting])
                word = word[fitting:]
            line = word
        lines.append(line)
    return lines


def _fitted(image: "Image") -> "Image":
    """Scaled to IMAGE_SIDE at its longer side; small pictures keep their pixels visible."""
    from PIL import Image

    scale = IMAGE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1.5 else Image.Resampling.LANCZOS)


@lru_cache
def _font(style: str) -> Any:
    """DejaVu, which matplotlib brings: Pillow's own font has only Latin letters."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVu{style}.ttf", 15)


def completions_markdown(completions: Sequence[Completion]) -> str:
    """The same as text. Responses stand in code blocks: Markdown would swallow their tags."""
    parts = []
    for completion in completions:
        parts += [f"**{completion.question}** (answer: {' | '.join(completion.answers) or 'unknown'})", ""]
        parts += [f"Response, {completion.verdict}: {'; '.join(completion.numbers)}", "", *_block(completion.response)]
        if completion.demonstration is not None:
            parts += ["Demonstration", "", *_block(completion.demonstration)]
    return "\n".join(parts)


def _block(text: str) -> list[str]:
    return [*(f"    {line}" for line in text.splitlines()), ""]
