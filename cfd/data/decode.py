"""Decodes one JPEG, PNG or WebP image to a square array of pixels: upright, opaque, cropped and shrunk."""

import io

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image, ImageChops, UnidentifiedImageError

from cfd.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
BACKGROUNDS = ("white", "grey", "black")
"""The colours on which transparent images can be put."""
MAX_PIXELS = 2**25
"""Largest image, in pixels, by default. At 4 bytes per pixel, a decoded image takes at most 128 MiB per thread; grey
images of other formats, turned ones and transparent ones take up to 20 bytes per pixel while they are converted."""
PILLOW_MAX_PIXELS = 178_956_970
"""Largest image, in pixels, that Pillow itself decodes."""
GREY_TOLERANCE = 1
"""Largest difference of the colour channels of a grey pixel. Lossy WebP decodes grey images with differences of 1."""

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that undoes each EXIF orientation (CIPA DC-008, tag 274); Pillow rotates counter-clockwise."""


class BadImage(UserError):
    """An image that cannot be used; the message names it. `on_bad_image = "skip"` skips such images."""


def decode(
    encoded: bytes,
    name: str,
    image_size: int,
    channels: int,
    *,
    exif_orientation: bool = True,
    transparency: str = "refuse",
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "s s c"]:
    """The pixels of a JPEG, PNG or WebP image, uint8 [image_size, image_size, channels].

    With `exif_orientation`, the image is first turned and mirrored as its EXIF orientation says; orientations that
    cannot be read count as upright, as in image viewers. If `transparency` is one of BACKGROUNDS, transparent pixels
    are put on that colour. The image is then cropped to its largest centred square, at whole pixels, and shrunk with
    Pillow's box filter. ImageNet 64x64 was made in the same way (Chrabaszcz et al., arXiv:1707.08819). Palette and CMYK
    images become RGB, and grey images too if `channels` is 3. If `channels` is 1, the image must be grey: its pixels
    count, and not the format that holds them. 16-bit values are scaled to 8 bits. An opaque alpha channel is dropped.
    The first frame of an animated image is used.

    Raises BadImage, with a message that begins with `name`, if the image cannot be decoded, has more than `max_pixels`
    pixels, is smaller than `image_size`, has transparent pixels although `transparency` is "refuse", or has colour
    although `channels` is 1.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_size(*image.size, name, image_size, max_pixels)
        image.load()
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise BadImage(
            f"{name} has more than {PILLOW_MAX_PIXELS:,} pixels, the most that Pillow decodes: shrink or remove it"
        ) from None
    except Exception as error:  # any other exception that a decoder raises here means that the bytes are bad
        reason = "it is none of them" if isinstance(error, UnidentifiedImageError) else error
        raise BadImage(f"{name} cannot be decoded as {', '.join(FORMATS)} ({reason}): remove or replace it") from error
    if exif_orientation:
        image = _upright(image, name)
    image = _to_mode(_opaque(image, name, transparency), name, channels)
    if image.size != (image_size, image_size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((image_size, image_size), Image.Resampling.BOX, box=box)
    pixels = np.asarray(image)
    return pixels if channels == 3 else pixels[:, :, None]


def _check_size(width: int, height: int, name: str, image_size: int, max_pixels: int) -> None:
    """Raises BadImage if an image has more than `max_pixels` pixels or a side shorter than `image_size`."""
    if width * height > max_pixels:
        raise BadImage(
            f"{name} has {width}x{height} = {width * height:,} pixels, and data.max_pixels is {max_pixels:,}: raise "
            "data.max_pixels, for which every decoding thread needs 4 to 20 bytes per pixel, or shrink or remove the "
            "image"
        )
    if min(width, height) < image_size:
        raise BadImage(
            f"{name} has {width}x{height} pixels, fewer than data.image_size = {image_size}: "
            "lower data.image_size, or remove the image (images are never enlarged)"
        )


def _upright(image: Image.Image, name: str) -> Image.Image:
    """The image, turned and mirrored as its EXIF orientation says. The first such image of a process is logged."""
    try:
        operation = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF: Pillow's parser raises many types of exceptions, and viewers ignore them
        return image
    if operation is None:
        return image
    logging.log_first_n(
        logging.WARNING,
        "%s is turned or mirrored as its EXIF orientation says, as are all such images (data.exif_orientation).",
        1,
        name,
    )
    return image.transpose(operation)


def _opaque(image: Image.Image, name: str, transparency: str) -> Image.Image:
    """The image without transparency, and with 8 bits per channel: its transparent pixels are put on a background.

    Raises BadImage if it has any and `transparency` is "refuse".
    """
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit grey at 255 instead of scaling it
        levels = np.asarray(image).astype(np.uint32)
        clear = levels == image.info.get("transparency", -1)
        levels += 128
        levels //= 257
        image = Image.fromarray(levels.astype(np.uint8))
        if clear.any():
            alpha = Image.fromarray(np.where(clear, np.uint8(0), np.uint8(255)))
            return _on_background(Image.merge("LA", (image, alpha)), name, transparency)
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if np.asarray(alpha).min() < 255:
            return _on_background(image, name, transparency)
    return image


def _on_background(image: Image.Image, name: str, transparency: str) -> Image.Image:
    if transparency == "refuse":
        raise BadImage(
            f'{name} has transparent pixels: set data.transparency = "white", or another background of '
            f"{', '.join(BACKGROUNDS)}, or remove it"
        )
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, transparency), image).convert("RGB")


def _to_mode(image: Image.Image, name: str, channels: int) -> Image.Image:
    """An opaque image in Pillow's mode "RGB" if `channels` is 3, or "L" if it is 1. Raises BadImage if it cannot be."""
    if image.mode == ("RGB" if channels == 3 else "L"):
        return image
    grey = image.mode in ("1", "L", "LA", "La")
    if channels == 1 and not grey:
        image = image.convert("RGB")
        red, green, blue = image.split()
        differences = ImageChops.difference(red, green), ImageChops.difference(green, blue)
        if max(np.asarray(difference).max() for difference in differences) > GREY_TOLERANCE:
            raise BadImage(
                f"{name} is a colour image, but data.channels is 1: set data.channels = 3, or convert it to grey"
            )
        return image.convert("L")
    return image.convert("L" if grey else "RGB").convert("RGB" if channels == 3 else "L")
