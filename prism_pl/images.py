"""Images as rows name them, opened as RGB pixels: what every reader of an image in this project goes through.

An image that cannot be taken as it is (missing, broken, animated, too large, of more than 8 bits a channel) is a
ValueError that names the row. Transparency is laid over white, as a viewer shows it, and a photo is turned as its EXIF
data says. CMYK and other colour spaces are converted.
"""

import base64
import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from PIL.Image import Image

MAX_ASPECT = 200  # Qwen2-VL's image processor refuses a longer side of more than 200 times the shorter one
_ORIENTATION = 0x0112  # EXIF tag
_TURNED = (5, 6, 7, 8)  # its values at which width and height change places


class Size(NamedTuple):
    """Pixels of an image that was not decoded: all that its visual tokens depend on."""

    width: int
    height: int


def open_image(image: "Image | Path | str | bytes", where: str) -> "Image":
    """Open a PIL image, a path or encoded bytes as RGB.

    Args:
        where: the row's id, for the message.

    Raises:
        ValueError: the image is missing, broken, animated or too large, or has more than 8 bits a channel.
    """
    from PIL import ImageOps

    with _opened(image, where) as opened:
        return _rgb(ImageOps.exif_transpose(opened))


def image_size(image: "Image | Path | str | bytes", where: str) -> Size:
    """Width and height, from the header alone. Raises as `open_image` does, save for broken pixels. A PNG whose EXIF
    data stand behind its pixels is told as it lies: turned, it has as many visual tokens."""
    with _opened(image, where) as opened:
        width, height = opened.size
        # Pillow decodes a PNG to look for EXIF data behind its pixels.
        known = opened.format != "PNG" or "exif" in opened.info
        turned = known and opened.getexif().get(_ORIENTATION) in _TURNED
        return Size(height, width) if turned else Size(width, height)


@contextmanager
def _opened(image: "Image | Path | str | bytes", where: str) -> "Iterator[Image]":
    from PIL import Image

    if isinstance(image, Image.Image):
        name = "its image"
    else:
        name = "its embedded image" if isinstance(image, bytes) else f"the image {str(image)!r}"
    try:
        if isinstance(image, Image.Image):
            _check(image)
            yield image
        else:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                _check(opened)
                yield opened
    except FileNotFoundError:
        raise ValueError(f"row {where!r}: {name} does not exist") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"row {where!r}: {name} is too large ({error}): scale it down") from None
    # Pillow's decoders let these through for files that are damaged.
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(f"row {where!r}: {name} cannot be read ({error})") from None


def _check(image: "Image") -> None:
    """ValueError where turning the image into RGB would change what it shows, or it cannot be cut into patches."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its mode is {image.mode}, of more than 8 bits a channel: convert it to RGB")
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"it has {width} x {height} pixels, one side over {MAX_ASPECT} times the other")
    if image.format != "MPO" and _has_second_frame(image):  # a phone's MPO holds one photo and its previews
        raise ValueError("it is animated or has several pages: give the one that is meant")


def _has_second_frame(image: "Image") -> bool:
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def image_part(image: "Image") -> dict[str, Any]:
    """An image as part of a chat request: PNG, which keeps every pixel as it is."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _rgb(image: "Image") -> "Image":
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    pixels = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
