"""How one image is cut, shrunk and converted, and how an image that cannot be used is refused."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from pictures import bad_images, black_png, encoded, noise, write
from PIL import Image

from cfd.checks import accepts
from cfd.data.decode import PILLOW_MAX_PIXELS, BadImage, decode
from cfd.fields import FIELDS


@pytest.mark.parametrize("height, width", [(24, 24), (24, 41), (38, 24)])
def test_centre_square_and_box_mean(height: int, width: int):
    """The image agrees with the mean of 3x3 blocks in float64 to one grey level: Pillow rounds after each axis."""
    image = noise(1, height, width)
    top, left = (height - 24) // 2, (width - 24) // 2
    square = image[top : top + 24, left : left + 24].astype(np.float64)
    expected = square.reshape(8, 3, 8, 3, 3).mean((1, 3))
    out = decode(encoded(image), "x", 8, 3)
    assert out.dtype == np.uint8 and np.abs(out - expected).max() <= 1.0
    np.testing.assert_array_equal(decode(encoded(image[:24, :24]), "x", 24, 3), image[:24, :24])


def test_modes_are_converted_without_loss():
    grey = noise(2, channels=1)
    three = grey[..., None].repeat(3, -1)
    np.testing.assert_array_equal(decode(encoded(grey), "x", 8, 3), three)
    np.testing.assert_array_equal(decode(encoded(grey), "x", 8, 1), grey[..., None])
    levels = np.arange(2**16).reshape(256, 256)
    nearest = decode(encoded(Image.fromarray(levels.astype(np.uint16))), "x", 256, 1)[..., 0]
    np.testing.assert_array_equal(nearest, np.round(levels / 257))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode(encoded(deep), "x", 8, 3), three)
    np.testing.assert_array_equal(decode(encoded(deep), "x", 8, 1), grey[..., None])
    opaque = np.concatenate([three, np.full((8, 8, 1), 255, np.uint8)], -1)
    np.testing.assert_array_equal(decode(encoded(opaque), "x", 8, 3), three)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey).convert("P")), "x", 8, 3), three)
    bits = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(decode(encoded(bits), "x", 8, 1)[..., 0], (grey > 127) * np.uint8(255))
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(decode(encoded(red, "JPEG", quality=95), "x", 8, 3)[0, 0], [255, 0, 0], atol=3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_bad_image_is_named_with_a_remedy():
    for file, content in bad_images().items():
        with pytest.raises(BadImage, match=rf"^{file} .*(remove|shrink|lower|background)"):
            decode(content, file, 8, 3)


DECODE_ALL = """
import resource, sys, warnings
from cfd.data.decode import BadImage, decode
warnings.simplefilter("ignore")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for file in sys.argv[1:]:
    try:
        decode(open(file, "rb").read(), file, 8, 3)
    except BadImage:
        continue
    raise SystemExit(f"{file} was decoded")
print((peak() - before) * (1 if sys.platform == "darwin" else 1024))
"""


def test_bad_images_take_little_memory(tmp_path: Path):
    files = [str(write(tmp_path / file, content)) for file, content in bad_images().items()]
    grown = subprocess.run([sys.executable, "-c", DECODE_ALL, *files], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 200e6, grown.stdout


def test_messages_show_no_objects_of_python():
    for content in (b"", b"text", encoded(noise(1, 32, 32, 1), "GIF")):
        with pytest.raises(
            BadImage, match=r"x\.png cannot be decoded as JPEG, PNG, WEBP \(it is none of them\): remove"
        ):
            decode(content, "x.png", 8, 3)


# Orientation

UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
"""The upright image of a stored one, by its EXIF orientation, which says where row 0 and column 0 belong."""


def with_orientation(image: np.ndarray, orientation: int, format: str = "PNG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, format, exif=exif, **options)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_exif_orientation_is_followed(orientation: int):
    """Cropping and shrinking come after, as if the file held the upright image; not only for squares."""
    image = noise(3, 24, 41)
    upright = decode(encoded(np.ascontiguousarray(UPRIGHT[orientation](image))), "x", 8, 3)
    stored = decode(encoded(image), "x", 8, 3)
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        turned = with_orientation(image, orientation, format, **options)
        np.testing.assert_array_equal(decode(turned, "x", 8, 3), upright)
        np.testing.assert_array_equal(decode(turned, "x", 8, 3, exif_orientation=False), stored)
    square = with_orientation(image[:, :24], orientation, "JPEG", quality=90)
    as_stored = decode(square, "x", 24, 3, exif_orientation=False)
    np.testing.assert_array_equal(decode(square, "x", 24, 3), UPRIGHT[orientation](as_stored))


def test_a_photograph_on_its_side_is_turned():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:32] = 255
    x = decode(with_orientation(image, 6, "JPEG"), "x", 8, 3)
    assert (x[0, 0, 0], x[0, -1, 0], x[-1, 0, 0], x[-1, -1, 0]) == (0, 255, 0, 255)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0" + bytes(range(99))])
def test_damaged_exif_counts_as_upright(exif: bytes):
    image = noise(1)
    np.testing.assert_array_equal(decode(encoded(image, exif=exif), "x", 8, 3), image)
    for orientation in (0, 9, 65535):
        np.testing.assert_array_equal(decode(with_orientation(image, orientation), "x", 8, 3), image)


def test_palettes_and_grey_images_are_turned_too():
    grey = noise(2, channels=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("L", "P", "LA", "1"):
        image = Image.fromarray(grey).convert(mode)
        expected = np.rot90(np.asarray(image.convert("L")), -1)
        np.testing.assert_array_equal(decode(encoded(image, exif=exif), "x", 8, 1)[..., 0], expected)


def test_the_first_turned_image_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging, "_log_counter_per_token", {})
    decode(encoded(noise(1)), "plain.png", 8, 3)
    assert not caplog.messages
    for name in ("first.png", "second.png"):
        decode(with_orientation(noise(1), 3), name, 8, 3)
    (message,) = caplog.messages
    assert message.startswith("first.png is turned or mirrored as its EXIF orientation says")


# Transparency


@pytest.mark.parametrize("background, level", [("white", 255), ("grey", 128), ("black", 0)])
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparent_pixels_are_put_on_the_background(background: str, level: int, format: str):
    """The composite is α x + (1 − α) b, to one grey level, before shrinking."""
    colour, alpha = noise(1), noise(2, channels=1)
    alpha[:2] = [[0], [255]]
    encoded_image = encoded(
        np.dstack([colour, alpha]), format, **({"lossless": True, "exact": True} if format == "WEBP" else {})
    )
    with pytest.raises(BadImage, match=r'x has transparent pixels: set data\.transparency = "white", or another'):
        decode(encoded_image, "x", 8, 3)
    out = decode(encoded_image, "x", 8, 3, transparency=background)
    share = alpha[..., None] / 255.0
    assert np.abs(out - (share * colour + (1 - share) * level)).max() <= 1.0
    np.testing.assert_array_equal(out[0], np.full((8, 3), level))
    np.testing.assert_array_equal(out[1], colour[1])


def test_transparent_grey_and_16_bit_levels_are_put_on_the_background():
    grey = noise(3, channels=1)
    level = int(grey[0, 0])
    expected = np.where(grey == level, 255, grey)[..., None]
    for content in (
        encoded(grey, transparency=level),
        encoded(Image.fromarray(grey.astype(np.uint16) * 257), transparency=level * 257),
    ):
        np.testing.assert_array_equal(decode(content, "x", 8, 1, transparency="white"), expected)
    absent = encoded(Image.fromarray(grey.astype(np.uint16) * 257), transparency=257 * level + 1)
    np.testing.assert_array_equal(decode(absent, "x", 8, 1), grey[..., None])


# Grey


def test_grey_is_decided_by_the_pixels():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(grey)
    for content in (
        encoded(image, "WEBP", lossless=True),
        encoded(image.convert("P")),
        encoded(image.convert("RGB")),
        encoded(image.convert("RGBA")),
    ):
        np.testing.assert_array_equal(decode(content, "x", 16, 1)[..., 0], grey)
    jpeg = encoded(image, "JPEG"), encoded(image.convert("RGB"), "JPEG")
    np.testing.assert_allclose(decode(jpeg[1], "x", 16, 1), decode(jpeg[0], "x", 16, 1), atol=1)
    lossy = decode(encoded(image, "WEBP", quality=80), "x", 16, 1)[..., 0]
    assert np.abs(lossy.astype(int) - grey).max() < 20


def test_colour_where_the_config_says_grey():
    for content in (encoded(noise(0)), encoded(noise(0), "WEBP"), encoded(Image.fromarray(noise(0)).convert("P"))):
        with pytest.raises(BadImage, match=r"x\.png is a colour image, but data\.channels is 1: set .* or convert"):
            decode(content, "x.png", 8, 1)
    one = np.zeros((8, 8, 3), np.uint8)
    one[3, 3, 0] = 2  # a single pixel has colour
    with pytest.raises(BadImage, match="is a colour image"):
        decode(encoded(one), "x.png", 8, 1)
    converted = Image.fromarray(noise(0)).convert("L")  # "or convert it to grey"
    assert decode(encoded(converted), "x.png", 8, 1).shape == (8, 8, 1)


# Size


def test_a_larger_limit_admits_a_larger_image():
    content = encoded(noise(1, 16, 24))
    with pytest.raises(
        BadImage, match=r"x has 24x16 = 384 pixels, and data\.max_pixels is 383: raise data\.max_pixels"
    ):
        decode(content, "x", 8, 3, max_pixels=383)
    decode(content, "x", 8, 3, max_pixels=384)


def test_the_limit_of_pillow_is_the_largest_that_can_be_set():
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) == PILLOW_MAX_PIXELS
    assert not accepts(FIELDS["data.max_pixels"].check, PILLOW_MAX_PIXELS + 1)
    assert accepts(FIELDS["data.max_pixels"].check, PILLOW_MAX_PIXELS)
    png, header = black_png(8, 8), b"IHDR" + struct.pack(">IIBBBBB", 15_000, 15_000, 8, 0, 0, 0, 0)
    declared = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    with pytest.raises(BadImage, match=r"more than 178,956,970 pixels, the most that Pillow decodes: shrink or remove"):
        decode(declared, "x", 8, 3, max_pixels=PILLOW_MAX_PIXELS)
