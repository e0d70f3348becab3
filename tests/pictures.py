"""Images of noise, folders of them, files that cannot become images, and batches of a data set."""

import functools
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cfd.data.batches import batches
from cfd.data.sources import Dataset, open_dataset

FIELDS: dict[str, Any] = {
    "source": "folder", "name": "", "split": "train", "image_size": 8, "channels": 3, "num_classes": 2,
    "on_bad_image": "raise", "in_memory": False,
}  # fmt: skip


def noise(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8).squeeze()


def encoded(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def write(file: Path, content: bytes) -> Path:
    """Writes a file, and the folders that it needs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def torn(folder: Path) -> Path:
    """The folder with one more image, the fourth of bee, of which only the first 300 bytes are there."""
    write(folder / "bee" / "13b.jpg", encoded(noise(0, 32, 32), "JPEG")[:300])
    return folder


def open_folder(folder: Path | str, **changes) -> Dataset:
    return open_dataset(**{**FIELDS, "path": str(folder), **changes})


def take(dataset: Dataset, num_steps: int, **options) -> list[dict[str, np.ndarray]]:
    """The first batches of a data set, of 8 images each unless `options` says otherwise."""
    options = {"seed": 3, "batch_size": 8, "flip": True} | options
    iterator = batches(dataset, **options)
    taken = [next(iterator) for _ in range(num_steps)]
    iterator.close()
    return taken


def assert_same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]):
    """Asserts that two lists of batches are equal."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x["image"], y["image"])
        np.testing.assert_array_equal(x["label"], y["label"])


def black_png(width: int, height: int) -> bytes:
    """A PNG of width x height black grey pixels, compressed a thousandfold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@functools.cache
def bad_images() -> dict[str, bytes]:
    """Files that cannot become training images, by name."""
    png, jpeg, webp = (encoded(noise(5, 32, 32), f) for f in ("PNG", "JPEG", "WEBP"))
    transparent = np.concatenate([noise(5), noise(6, channels=1)[..., None]], -1)
    bad = {
        "empty.png": b"",
        "empty.jpg": b"",
        "empty.webp": b"",
        "text.png": b"this is text\n" * 20,
        "text.jpg": b"<html>404</html>",
        "nulls.png": bytes(4096),
        "random.jpg": noise(1, 64, 64, 1).tobytes(),
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(canary) print\n%%EOF\n",
        "gif.png": encoded(noise(1, 32, 32, 1), "GIF"),
        "bmp.jpg": encoded(noise(1, 32, 32), "BMP"),
        "tiff.webp": encoded(noise(1, 32, 32), "TIFF"),
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"/>',
        "zip.png": b"PK\x03\x04" + bytes(100),
        "pickle.jpg": b"\x80\x04\x95" + bytes(30),
        "1x1.png": encoded(noise(1, 1, 1).reshape(1, 1, 3)),
        "7x9.jpg": encoded(noise(1, 7, 9), "JPEG"),
        "thin.png": encoded(np.zeros((4000, 2, 3), np.uint8)),
        "transparent.png": encoded(transparent),
        "transparent.webp": encoded(transparent, "WEBP", lossless=True),
        "grey-transparent.png": encoded(noise(1, channels=1), transparency=int(noise(1, channels=1)[0, 0])),
        "palette-transparent.png": encoded(Image.new("P", (8, 8), 0), transparency=0),
        "deep-transparent.png": encoded(Image.fromarray(np.zeros((8, 8), np.uint16)), transparency=0),
        "bomb-100-megapixel.png": black_png(10_000, 10_000),
    }
    for declared in ((15_000, 15_000), (2**31 - 1, 2**31 - 1), (0, 8)):
        size = struct.pack(">II", *declared)
        bad[f"declares-{declared[0]}x{declared[1]}.png"] = black_png(8, 8).replace(struct.pack(">II", 8, 8), size)
    for format, whole in (("png", png), ("jpg", jpeg), ("webp", webp)):
        for part in (4, 30, len(whole) // 2, len(whole) - 40):
            bad[f"first-{part}-bytes.{format}"] = whole[:part]
    for at in (20, len(png) // 2, len(png) - 40):
        bad[f"flipped-at-{at}.png"] = png[:at] + bytes([png[at] ^ 64]) + png[at + 1 :]
    return bad
