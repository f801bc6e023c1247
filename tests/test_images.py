"""Images that rows bring: what is read as it looks, and what is refused with the row's name."""

import io

import numpy as np
import pytest
from PIL import Image

from prism_pl.images import image_size, open_image
from prism_pl.policy import PolicySpec
from tests.conftest import make_examples


def encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, format=file_format, **options)
    return file.getvalue()


def test_transparency_is_laid_over_white():
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    drawing.putpixel((1, 1), (0, 0, 0, 255))
    for image in (drawing, encoded(drawing, "PNG"), encoded(drawing.convert("LA"), "PNG")):
        shown = open_image(image, "row")
        assert shown.mode == "RGB"
        assert shown.getpixel((0, 0)) == (255, 255, 255)
        assert shown.getpixel((1, 1)) == (0, 0, 0)


def test_cmyk_is_converted_and_a_turned_photo_is_turned_back():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixel = np.array(open_image(encoded(red, "TIFF"), "row"))[4, 4]
    assert pixel.tolist() == [255, 0, 0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for kind in ("JPEG", "PNG"):
        photo = encoded(Image.new("RGB", (8, 4)), kind, exif=exif)
        assert open_image(photo, "row").size == image_size(photo, "row") == (4, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_size_is_read_without_pixels(kind):
    half = encoded(Image.effect_noise((640, 480), 9), kind)[:9000]
    assert image_size(half, "row") == (640, 480)


def test_the_smallest_image_makes_a_prompt(blank_policy):
    processor = PolicySpec(blank_policy).processor()
    (example,) = make_examples(1)
    for mode in ("RGB", "L", "1"):
        example.images = [encoded(Image.new(mode, (1, 1)), "PNG")]
        prompt = processor.prompt(example)
        assert prompt.ids.count(processor.image_token_id) == prompt.grids_I3.prod() // 4
        assert processor.prompt_ids(prompt.text, [open_image(example.images[0], "")]) == prompt.ids


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (4, 4), "red")]}
REFUSED = {
    "animated": (lambda: encoded(Image.new("RGB", (4, 4)), "GIF", **FRAMES), "animated or has several pages"),
    "apng": (lambda: encoded(Image.new("RGB", (4, 4)), "PNG", **FRAMES), "animated or has several pages"),
    "webp": (lambda: encoded(Image.new("RGB", (4, 4)), "WEBP", **FRAMES), "animated or has several pages"),
    "huge": (lambda: encoded(Image.new("1", (20_000, 20_000)), "PNG"), r"too large \(Image size \(400000000 pixels\)"),
    "thin": (lambda: encoded(Image.new("L", (900, 4)), "PNG"), "900 x 4 pixels, one side over 200 times"),
    "deep": (lambda: encoded(Image.new("I;16", (4, 4)), "PNG"), "mode is I;16, of more than 8 bits"),
    "truncated": (lambda: encoded(Image.effect_noise((64, 64), 9), "PNG")[:900], "cannot be read"),
    "empty": (lambda: b"", "cannot be read"),
    "text": (lambda: b"<html>", "cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_shown_as_it_is_names_the_row(kind):
    make, says = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"row 'r-7': its embedded image .*{says}"):
        open_image(make(), "r-7")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"row 'r-7': the image '.*gone\.png' does not exist"):
        image_size(tmp_path / "gone.png", "r-7")
