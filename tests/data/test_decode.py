"""How one image is cut, shrunk and converted, and how an image that cannot be used is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import bad_images, encoded, noise, write
from PIL import Image

from cfd.data.decode import BadImage, decode


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


def test_colour_where_the_config_says_grey():
    with pytest.raises(BadImage, match=r"x\.png is a colour image .* data\.channels is 1: set"):
        decode(encoded(noise(0)), "x.png", 8, 1)
