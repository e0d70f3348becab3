"""The digits that the package carries: scikit-learn's, split once for all."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from pictures import FIELDS
from tiny import ROOT

from cfd.data.batches import load_arrays
from cfd.data.digits import FILE
from cfd.data.sources import open_dataset

DIGITS = {**FIELDS, "source": "digits", "path": "", "channels": 1, "num_classes": 10}


def test_the_file_holds_the_digits_of_scikit_learn():
    """The SHA-256 is that of scikit-learn 1.9.1's `load_digits`: its images and labels as bytes."""
    with np.load(FILE, allow_pickle=False) as arrays:
        levels, labels = arrays["levels"], arrays["labels"]
    digest = hashlib.sha256(levels.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    assert FILE.stat().st_size < 60_000 and levels.dtype == labels.dtype == np.uint8


def test_the_file_is_load_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, target = datasets.load_digits(return_X_y=True)
    with np.load(FILE, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["levels"].reshape(-1, 64), pixels)
        np.testing.assert_array_equal(arrays["labels"], target)


def test_every_sixth_digit_is_a_test_image_and_sizes_are_means():
    train, test = (open_dataset(**{**DIGITS, "split": split}) for split in ("train", "test"))
    with np.load(FILE, allow_pickle=False) as arrays:
        levels, labels = arrays["levels"], arrays["labels"]
    assert len(train) + len(test) == len(labels) == 1797 and len(test) == 1797 // 6
    image, label = load_arrays(test)
    np.testing.assert_array_equal(label, labels[5::6])
    np.testing.assert_array_equal(np.round(image[..., 0] / 255 * 16), levels[5::6])
    assert image.min() == 0 and image.max() == 255 and train.class_names == tuple("0123456789")
    assert [test.read_label(i) for i in range(5)] == test.labels[:5].tolist()
    assert train.identity != test.identity

    doubled = load_arrays(open_dataset(**{**DIGITS, "split": "test", "image_size": 16, "channels": 3}))[0]
    np.testing.assert_array_equal(doubled, image.repeat(2, 1).repeat(2, 2).repeat(3, 3))
    halved = load_arrays(open_dataset(**{**DIGITS, "split": "test", "image_size": 4}))[0]
    assert np.abs(halved - image.reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))).max() <= 1.0


@pytest.mark.parametrize(
    "change, remedy", [({"split": "validation"}, "'train' and 'test'"), ({"image_size": 12}, "multiple of 8")]
)
def test_digits_that_do_not_exist_are_refused(change: dict, remedy: str):
    with pytest.raises(ValueError, match=remedy):
        open_dataset(**{**DIGITS, **change})


def test_training_on_digits_imports_neither_scikit_learn_nor_tfds():
    code = (
        "import sys, cfd.main, cfd.data.sources as s\n"
        f"s.open_dataset(**{DIGITS!r})[0]\n"
        "print(sorted({'sklearn', 'tensorflow_datasets', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
