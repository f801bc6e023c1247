"""What `data check` keeps of a row: whether a run can use it, its lengths, and keys that tell equal rows.

Two images have one key where their pixels are equal. They look alike where their brightness rises and falls alike over
a grid of 16 x 16 (a difference hash): the same picture, scaled or compressed anew. Questions are compared without case,
white space and punctuation.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prism_pl.bad_rows import BadRow, ReadsBadRows
from prism_pl.batch import Example
from prism_pl.chat import parse, plain_text, segments
from prism_pl.images import Size, image_size, open_image
from prism_pl.processor import IMAGE_MARK, Processor
from prism_pl.row_needs import Lengths, RowNeeds
from prism_pl.segments import segment_ids

if TYPE_CHECKING:
    from PIL.Image import Image

GRID = 16
FILTERED = "left out by data.max_prompt_tokens"
BAD_ROW, BAD_IMAGE = "row that cannot be read", "image that cannot be used"


@dataclass(slots=True)
class Facts:
    """A row.

    Attributes:
        unusable: why the run could not use it, in the words that rows are counted by; "" where it can.
        detail: the same, of this row.
        prompt_tokens: images expanded. 0 of a row that cannot be read.
        question: its key.
        num_images: how many it names, read or not.
        images: a key an image; empty where pixels were not read.
        looks: for each image, at which places of the grid brightness rises, as bits.
        control_tokens: whether its texts spell out control tokens (which stay text).
    """

    id: str
    unusable: str = ""
    detail: str = ""
    prompt_tokens: int = 0
    response_tokens: int = 0
    question: str = ""
    num_images: int = 0
    images: list[str] = field(default_factory=list)
    looks: list[bytes] = field(default_factory=list)
    control_tokens: bool = False

    @property
    def row_key(self) -> tuple[str, ...]:
        """Equal for rows that ask the same about the same images; empty where pixels were not read: a question alone
        does not tell rows with images apart."""
        return (self.question, *self.images) if self.question and len(self.images) == self.num_images else ()


class FactFinder(ReadsBadRows):
    """A collator from rows to what is known of them; in the loader's worker, like any.

    Args:
        processor: of the policy; None measures no lengths.
        needs: of the stage.
        pixels: whether images are decoded; else only their headers are read.
        max_prompt_tokens: rows with a longer prompt are left out by the data module itself; None leaves none out.
    """

    def __init__(
        self,
        processor: Processor | None,
        needs: RowNeeds,
        pixels: bool = True,
        max_prompt_tokens: int | None = None,
    ) -> None:
        self.processor, self.needs, self.pixels = processor, needs, pixels
        self.max_prompt_tokens = max_prompt_tokens

    def __call__(self, rows: Sequence[Example | BadRow]) -> list[Facts]:
        return [self._facts(row) for row in rows]

    def _facts(self, row: Example | BadRow) -> Facts:
        if isinstance(row, BadRow):
            return Facts(row.id, BAD_ROW, str(row))
        facts = Facts(row.id, question=question_key(row.question), num_images=len(row.images))
        texts = (row.question, row.system or "", row.response or "")
        facts.control_tokens = any(plain_text(text) != text for text in texts)
        try:
            sizes = self._images(row, facts)
        except ValueError as error:
            facts.unusable, facts.detail = BAD_IMAGE, str(error)
            return facts
        lengths = Lengths() if self.processor is None else self._lengths(self.processor, row, sizes)
        facts.prompt_tokens, facts.response_tokens = lengths.prompt, lengths.response
        filtered = self.max_prompt_tokens is not None and lengths.prompt > self.max_prompt_tokens
        facts.unusable = FILTERED if filtered else self.needs.unmet(row, lengths)
        facts.detail = f"row {row.id!r}: {facts.unusable}" if facts.unusable else ""
        return facts

    def _lengths(self, processor: Processor, row: Example, sizes: "Sequence[Image | Size]") -> Lengths:
        prompt = len(processor.prompt_ids(processor.prompt_text(row), sizes))
        if not row.response:
            return Lengths(prompt)
        response, parsed = len(processor.response_ids(row.response)), parse(row.response)
        if self.needs.max_segment is None or not parsed.valid:
            return Lengths(prompt, response)
        texts = segments(parsed, self.needs.experts).values()
        return Lengths(prompt, response, max(len(segment_ids(processor, text)) for text in texts))

    def _images(self, row: Example, facts: Facts) -> "Sequence[Image | Size]":
        """What the lengths need of the images: their sizes."""
        if not self.pixels:
            return [image_size(image, row.id) for image in row.images]
        images = [open_image(image, row.id) for image in row.images]
        facts.images = [pixel_key(image) for image in images]
        facts.looks = [looks(image) for image in images]
        return images


def question_key(question: str) -> str:
    """Equal for questions of the same words."""
    words = re.findall(r"\w+", question.replace(IMAGE_MARK, " ").casefold())
    return _key(" ".join(words).encode()) if words else _key(question.strip().encode())


def pixel_key(image: "Image") -> str:
    """Equal for images of the same pixels."""
    return _key(repr(image.size).encode() + image.tobytes())


def looks(image: "Image") -> bytes:
    """256 bits, of which few differ between images that look alike; none is set of an image of a single tone."""
    import numpy as np

    grey = np.asarray(image.convert("L").resize((GRID + 1, GRID)), dtype=np.int16)
    # An even tone is no rise, whatever compression left in it.
    return np.packbits(grey[:, 1:] > grey[:, :-1] + 2).tobytes()


def _key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
