"""Decodes one JPEG, PNG or WebP image to a square array of pixels, cropped and shrunk."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cfd.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 2**25
"""Largest image, in pixels. A decoded image takes 4 bytes per pixel: at most 128 MiB per thread,
whatever a file declares.
"""


class BadImage(UserError):
    """An image that cannot be used; the message names it. `on_bad_image = "skip"` skips such images."""


def decode(encoded: bytes, name: str, image_size: int, channels: int) -> UInt8[np.ndarray, "s s c"]:
    """The pixels of a JPEG, PNG or WebP image, uint8 [image_size, image_size, channels].

    The image is cropped to its largest centred square, at whole pixels, and shrunk with Pillow's box filter. ImageNet
    64x64 was made in the same way (Chrabaszcz et al., arXiv:1707.08819). Grey, palette and CMYK images become RGB if
    `channels` is 3. 16-bit values are scaled to 8 bits. An opaque alpha channel is dropped. The EXIF orientation is
    not applied.

    Raises BadImage, with a message that begins with `name`, if the image cannot be decoded, has more than MAX_PIXELS
    pixels, is smaller than `image_size`, has transparent pixels, or has colour although `channels` is 1.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_size(*image.size, name, image_size)
        image.load()
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # any other exception that a decoder raises here means that the bytes are bad
        raise BadImage(f"{name} cannot be decoded as {', '.join(FORMATS)} ({error}): remove or replace it") from error
    image = _to_mode(image, name, channels)
    if image.size != (image_size, image_size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((image_size, image_size), Image.Resampling.BOX, box=box)
    pixels = np.asarray(image)
    return pixels if channels == 3 else pixels[:, :, None]


def _check_size(width: int, height: int, name: str, image_size: int) -> None:
    """Raises BadImage if an image has more than MAX_PIXELS pixels or a side shorter than `image_size`."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"{name} has {width}x{height} pixels, and the limit is {MAX_PIXELS} in all: shrink or remove it")
    if min(width, height) < image_size:
        raise BadImage(
            f"{name} has {width}x{height} pixels, fewer than data.image_size = {image_size}: "
            "lower data.image_size, or remove the image (images are never enlarged)"
        )


def _to_mode(image: Image.Image, name: str, channels: int) -> Image.Image:
    """The image in Pillow's mode "RGB" if `channels` is 3, or "L" if it is 1. Raises BadImage if it cannot be."""
    if image.mode == ("RGB" if channels == 3 else "L") and "transparency" not in image.info:
        return image
    deep = image.mode.startswith("I")
    if image.has_transparency_data and (deep or np.asarray(image.convert("RGBA"))[:, :, 3].min() < 255):
        raise BadImage(f"{name} has transparent pixels: put it on an opaque background, or remove it")
    if deep:  # Pillow's own conversion clips 16-bit grey at 255 instead of scaling it
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La")
    if channels == 1 and not grey:
        raise BadImage(
            f"{name} is a colour image (mode {image.mode}), but data.channels is 1: "
            "set data.channels = 3, or convert the images to grey"
        )
    return image.convert("L" if grey else "RGB").convert("RGB" if channels == 3 else "L")
