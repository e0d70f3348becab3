"""The 8x8 handwritten digits that the package carries.

digits.npz holds the 1,797 images of the test set of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits (UCI Machine Learning Repository, 1998, doi:10.24432/C50P49), licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). They are in the order of scikit-learn's `load_digits`. The arrays are
`levels`, uint8 [1797, 8, 8] from 0 to 16, and `labels`, uint8 [1797]; only the file format was changed.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from cfd.data.dataset import Source
from cfd.errors import UserError

FILE = Path(__file__).with_name("digits.npz")


def open_digits(split: str, image_size: int, channels: int) -> Source:
    """The digits of one split: every sixth image belongs to "test", the others to "train".

    Raises ValueError for another split, or for a size that the digits cannot have.
    """
    if split not in ("train", "test"):
        raise UserError(
            f"data.split or eval.test_split is {split!r}; the digits have the splits 'train' and 'test': "
            "give one of the two"
        )
    if image_size > 8 and image_size % 8:
        raise UserError(f"data.image_size is {image_size}; the digits are 8x8: give 8, a multiple of 8, or less than 8")
    with np.load(FILE, allow_pickle=False) as arrays:
        levels, target = arrays["levels"], arrays["labels"]
    chosen = (np.arange(len(target)) % 6 == 5) == (split == "test")
    levels, labels = levels[chosen], target[chosen].astype(np.int32)
    pixels = np.round(levels * (255 / 16)).astype(np.uint8)
    size = (image_size, image_size)
    resized = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in pixels])
    images = np.repeat(resized[..., None], channels, axis=-1)
    return Source(
        read=lambda i: (images[i], int(labels[i])),
        read_label=lambda i: int(labels[i]),
        read_labels=lambda: labels,
        num_examples=len(labels),
        class_names=tuple(str(digit) for digit in range(10)),
        identity=hashlib.sha256(levels.tobytes() + labels.tobytes()).hexdigest(),
        described=f"the split {split!r} of the digits",
        numbered="numbered by digit",
    )
