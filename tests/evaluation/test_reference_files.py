"""An `.npz` as the reference: what it must hold, which remedies mend it, and files without images."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfd.evaluation import metrics, reference
from cfd.evaluation.features import FeatureNetwork, Outputs

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 4, 3), np.uint8)
GREY = IMAGES[..., :1]


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return str(path)


def check(path: str, image_shape: tuple[int, int, int] = (8, 4, 3), features: str = "classifier") -> None:
    reference.check_reference(path, image_shape, features)


@pytest.mark.parametrize(
    ("wrong", "right", "words", "number"),
    [
        (IMAGES / 255, IMAGES, "dtype float64, expected uint8", 1),
        (IMAGES.astype(np.float32) / np.float32(127.5) - np.float32(1), IMAGES, "dtype float32, expected uint8", 2),
        (IMAGES.astype(np.int64), IMAGES, "dtype int64, expected uint8", 0),
        (np.moveaxis(IMAGES, 3, 1).copy(), IMAGES, r"shape \(3, 8, 4\), but .* of shape \(8, 4, 3\), \[H, W, C\]", 0),
        (GREY[..., 0], GREY.repeat(3, axis=3), r"shape \(8, 4\), but .* of shape \(8, 4, 3\)", 0),
        (GREY, GREY.repeat(3, axis=3), r"shape \(8, 4, 1\), but .* of shape \(8, 4, 3\)", 0),
        (GREY[..., 0], GREY, r"shape \(8, 4\), but .* of shape \(8, 4, 1\)", 0),
        (np.moveaxis(GREY, 3, 1).copy(), GREY, r"shape \(1, 8, 4\), but .* of shape \(8, 4, 1\)", 0),
        (np.asfortranarray(IMAGES), IMAGES, "arr_0 is in Fortran order", 0),
    ],
)
def test_the_remedy_for_images_of_another_kind_mends_the_file(
    wrong: np.ndarray, right: np.ndarray, words: str, number: int, tmp_path: Path
) -> None:
    """The expressions in the message are evaluated; the one of this `number` gives the images."""
    shape: Any = right.shape[1:]
    path = save(tmp_path / "reference.npz", arr_0=wrong)
    with pytest.raises(ValueError, match=words) as caught:
        check(path, shape)
    remedies = re.findall(r"(?:numpy\.\w+\(|arr_0\.).*?(?= if | in its place)", str(caught.value))
    mended = eval(remedies[number], {"numpy": np, "arr_0": wrong})
    np.testing.assert_array_equal(mended, right)
    check(save(tmp_path / "reference.npz", arr_0=mended), shape)


def test_images_of_another_resolution_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "reference.npz", arr_0=IMAGES)
    for shape in ((16, 4, 3), (8, 4, 1), (4, 8, 3)):
        with pytest.raises(ValueError, match="give a reference of the config's own resolution and channels"):
            check(path, shape)


def test_more_images_than_neighbours_are_needed(tmp_path: Path) -> None:
    """With one image more than refused, precision and recall can be measured."""
    few = save(tmp_path / "few.npz", arr_0=IMAGES[:3])
    with pytest.raises(ValueError, match=r"few\.npz has 3 images, and precision and recall need at least 4"):
        check(few)
    check(save(tmp_path / "enough.npz", arr_0=IMAGES[:4]))
    rows = np.random.default_rng(0).normal(size=(4, 5))
    metrics.precision_recall(rows, rows)
    with pytest.raises(ValueError, match="need more than 3 references, and there are 3"):
        metrics.precision_recall(rows[:3], rows)


def test_a_file_that_is_no_reference_is_refused(tmp_path: Path) -> None:
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, arr_0=np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="never pickled objects"):
        check(str(pickled))
    for names in ("mu", "sigma", "mu mu_s sigma_s", "images"):
        path = save(tmp_path / "other.npz", **{name: np.zeros(3) for name in names.split()})
        with pytest.raises(
            ValueError, match=r"neither images arr_0, .* nor mu and sigma, .*: give a file that has one"
        ):
            check(path, features="inception")


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    whole = {"mu": np.zeros(2048), "sigma": np.zeros((2048, 2048))}
    broken = np.zeros(2048)
    broken[7] = np.nan
    for more, words in (
        ({"arr_0": IMAGES}, "mu_s is missing"),
        ({"arr_0": IMAGES, "mu": np.zeros(768)}, r"mu is \(768,\), expected \(2048,\)"),
        ({"sigma": np.zeros((64, 64))}, r"sigma is \(64, 64\), expected \(2048, 2048\)"),
        ({"mu": broken}, "mu holds NaN or infinity"),
    ):
        path = save(tmp_path / "reference.npz", **whole | more)
        with pytest.raises(ValueError, match=words):
            check(path, features="inception")
    path = save(tmp_path / "reference.npz", **whole)
    check(path, features="inception")
    with pytest.raises(ValueError, match=r"statistics of InceptionV3, but eval\.features is 'classifier'"):
        check(path)


def test_statistics_of_dinov2(tmp_path: Path) -> None:
    """Those of EDM2's evaluator, of 1024 features. Each network takes its own alone."""
    whole = {"mu": np.zeros(1024), "sigma": np.eye(1024)}
    path = save(tmp_path / "reference.npz", **whole)
    check(path, features="dinov2")
    with pytest.raises(ValueError, match=r"statistics of DINOv2, but eval\.features is 'classifier'"):
        check(path)
    with pytest.raises(ValueError, match=r"mu is \(1024,\), expected \(2048,\): .* statistics of OpenAI's evaluator"):
        check(path, features="inception")
    check(save(tmp_path / "reference.npz", **whole, arr_0=IMAGES), features="dinov2")
    for more, words in (
        ({"sigma": np.zeros((64, 64))}, r"sigma is \(64, 64\), expected \(1024, 1024\): .* of EDM2's evaluator"),
        ({"arr_0": IMAGES, "mu_s": np.zeros(3)}, r"mu_s is \(3,\), expected nothing"),
        ({"mu": np.zeros(2048)}, r"statistics of InceptionV3, but eval\.features is 'dinov2'"),
    ):
        path = save(tmp_path / "reference.npz", **whole | more)
        with pytest.raises(ValueError, match=words):
            check(path, features="dinov2")


def test_the_warning_about_statistics_of_dinov2_names_its_evaluator() -> None:
    """Without a word about sFID, which DINOv2 never has."""
    statistics = reference.Reference(np.zeros(2), np.eye(2))
    with pytest.warns(UserWarning, match=r"no images arr_0: KID, precision and recall.*EDM2's evaluator"):
        reference.warn_without_images("file.npz", statistics, "dinov2")


def test_a_file_without_images_gives_its_statistics_and_says_what_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of TTUR's, pytorch-fid's and EDM's files. The second call reads the cache."""
    statistics = {"mu": np.arange(5.0), "sigma": np.eye(5)}
    monkeypatch.setattr(reference, "STATISTICS", {"mu": (5,), "sigma": (5, 5), "mu_s": (3,), "sigma_s": (3, 3)})
    path = save(tmp_path / "statistics.npz", **statistics)

    def extract(images: np.ndarray) -> Outputs:
        raise AssertionError("the file has no images")

    network = FeatureNetwork("inception", "a" * 64, extract)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"no images arr_0: sFID.*mu_s.*KID, precision and recall.*pytorch-fid"):
            found = reference.open_reference(
                str(tmp_path), network, None, "b" * 64, path=path, image_shape=(8, 4, 3), num_workers=0
            )
        np.testing.assert_array_equal(found.mu, statistics["mu"])
        np.testing.assert_array_equal(found.sigma, statistics["sigma"])
        assert found.features is None and found.mu_s is None and found.sigma_s is None
    assert len(list((tmp_path / "features").iterdir())) == 1
