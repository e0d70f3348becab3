"""`python -m cfd.measure`: identities, the numbers of a sweep, references without images, and files it refuses."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mixing
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from gcs import FakeGcs
from tiny import tiny_config

from cfd import measure
from cfd.data.batches import load_arrays
from cfd.evaluation import features, intervals, reference
from cfd.evaluation.features import FeatureNetwork, ImageClassifier, Outputs
from cfd.modes import settings, sweep
from cfd.runs import npz, results

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
]

NUMBERS = np.random.default_rng(0)
IMAGES = NUMBERS.integers(0, 256, (60, 8, 8, 1), np.uint8)
LABELS = np.arange(60) % 10
COLOUR = NUMBERS.integers(0, 256, (30, 8, 6, 3), np.uint8)
Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """`save(name, arr_0=..., ...)` writes an .npz and returns its path."""

    def write(name: str, **arrays: Any) -> str:
        path = tmp_path / f"{name}.npz"
        np.savez(path, **arrays)
        return str(path)

    return write


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A feature classifier of 8x8 grey images that was never trained."""
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8)
    shapes = jax.eval_shape(ImageClassifier(10).init, jax.random.key(0), image)["params"]
    leaves: dict[tuple[str, ...], Any] = flatten_dict(shapes)
    params = {"/".join(key): NUMBERS.normal(0, 0.1, x.shape) for key, x in leaves.items()}
    path = tmp_path_factory.mktemp("weights") / "classifier.npz"
    npz.write_npz(path, {name: x.astype(np.float32) for name, x in params.items()})
    return str(path)


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch, save: Save) -> list[str]:
    """Flags of a network named inception with few features of each layer, in place of InceptionV3."""

    def extract(images: np.ndarray) -> Outputs:
        flat = images.reshape(len(images), -1).astype(np.float32) / 255
        probs = flat[:, :4] + 0.1
        return Outputs(flat[:, :5], flat[:, 5:8], probs / probs.sum(axis=1, keepdims=True))

    network = FeatureNetwork("inception", "0" * 64, extract)
    monkeypatch.setattr(measure, "open_inception", lambda *_: network)
    monkeypatch.setattr(reference, "STATISTICS", {"mu": (5,), "sigma": (5, 5), "mu_s": (3,), "sigma_s": (3, 3)})
    return [f"--weights={save('inception', none=np.zeros(1))}"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[dict[str, Any], str]:
    """(the content of the JSON file, the output) of the command."""
    out = Path(argv[0]).parent / "result.json"
    measure.main([*argv, f"--json={out}"])
    return json.loads(out.read_text()), capsys.readouterr().out


def error_of(*argv: str) -> str:
    """The error with which the command ends."""
    with pytest.raises(SystemExit) as end:
        measure.main(argv)
    assert isinstance(end.value.code, str) and end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def test_the_reference_itself_is_perfect(save: Save, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = save("images", arr_0=IMAGES, arr_1=LABELS)
    found, text = run(capsys, path, path, "--features=classifier", f"--weights={weights}")
    measures = found["measures"]
    assert measures["fid"] < 1e-6 and measures["precision"] == measures["recall"] == 1.0
    assert measures["saturation"] == found["reference_saturation"] > 0
    assert found["fid_name"] == "FID-60" and set(found["not_measured"]) == {"sfid"}
    assert [row["class"] for row in found["classes"]] == list(range(10))
    assert {row["images"] for row in found["classes"]} == {6} and {row["precision"] for row in found["classes"]} == {1}
    mean = np.mean([row["class_accuracy"] for row in found["classes"]])
    np.testing.assert_allclose(measures["class_accuracy"], mean)
    for key, without in found["without_a_group"].items():
        assert found["intervals"][key] == list(intervals.interval(measures[key], without))
    assert "FID-60" in text and "KID, standard error" in text and "sFID is not measured" in text
    unlabelled, text = run(capsys, save("plain", arr_0=IMAGES), path, "--features=classifier", f"--weights={weights}")
    assert "class_accuracy" in unlabelled["not_measured"] and unlabelled["classes"] == []
    assert unlabelled["measures"]["is"] == measures["is"]


def test_the_numbers_are_those_of_the_sweep_that_wrote_the_samples(
    save: Save, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "network_of", lambda config: mixing.NETWORK)
    monkeypatch.setattr(settings, "open_run", mixing.opening(mixing.params()))
    config, folder = tiny_config(eval__weights=(1.0,), eval__num_samples=40), str(tmp_path / "run")
    (tmp_path / "run" / "features").mkdir(parents=True)
    shutil.copy(weights, features.classifier_path(folder))
    Path(features.record_path(folder)).write_text('{"classifier_steps": 5}')
    (row,) = sweep.sweep(config, folder, folder)
    images, labels = load_arrays(settings.open_split(config, "train"))
    found, _ = run(
        capsys,
        results.samples_path(folder, row),
        save("train", arr_0=images, arr_1=labels),
        "--features=classifier",
        f"--weights={features.classifier_path(folder)}",
    )
    for key in ("fid", "kid", "is", "precision", "recall", "class_accuracy", "saturation"):
        np.testing.assert_allclose(found["measures"][key], row[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_a_file_of_openais_evaluator_gives_all_metrics_and_statistics_alone_give_fid_alone(
    save: Save, inception: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The statistics are those of other images, and their values come from numpy."""
    samples = save("samples", arr_0=COLOUR, arr_1=np.arange(30))
    base = NUMBERS.normal(0.5, 0.3, (50, 8))
    pool, spatial = base[:, :5], base[:, 5:]
    statistics = {"mu": pool.mean(axis=0), "sigma": np.cov(pool.T)}
    layers = {"mu_s": spatial.mean(axis=0), "sigma_s": np.cov(spatial.T)}
    whole, _ = run(capsys, samples, save("openai", arr_0=COLOUR[::-1], **statistics, **layers), *inception)
    assert set(whole["not_measured"]) == {"class_accuracy"}
    assert whole["measures"]["precision"] == whole["measures"]["recall"] == 1.0
    flat = COLOUR.reshape(30, -1) / 255.0
    ours = flat[:, :5]
    product = np.linalg.eigvals(np.cov(ours.T) @ statistics["sigma"])
    fid = ((ours.mean(axis=0) - statistics["mu"]) ** 2).sum() + np.trace(np.cov(ours.T) + statistics["sigma"])
    np.testing.assert_allclose(whole["measures"]["fid"], fid - 2 * np.sqrt(product.real).sum(), rtol=1e-5)

    alone = save("ttur", **statistics)
    with pytest.warns(UserWarning, match=r"no images arr_0: sFID.*KID, precision and recall.*not measured"):
        found = measure.measure(samples, alone, "inception", inception[0].partition("=")[2])
    assert {"sfid", "kid", "precision", "recall"} <= set(found["not_measured"])
    assert found["measures"].keys() - {"saturation"} == {"fid", "is"}, "all that compares is FID"
    np.testing.assert_allclose(found["measures"]["fid"], whole["measures"]["fid"], rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        measure.main([samples, alone, *inception])
    captured = capsys.readouterr()
    assert "warning: " in captured.err and "not measured" in captured.err and "KID is not measured" in captured.out


@pytest.mark.parametrize("count", [4, 5, 21])
def test_few_images_are_measured(count: int, save: Save, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = save("few", arr_0=IMAGES[:count], arr_1=LABELS[:count])
    found, _ = run(capsys, path, save("all", arr_0=IMAGES), "--features=classifier", f"--weights={weights}")
    assert found["measures"]["precision"] == 1.0
    assert set(found["intervals"]) <= set(found["measures"])


BROKEN = COLOUR.astype(np.float32)
SAMPLES: list[tuple[dict[str, Any], str, str]] = [
    ({"arr_0": COLOUR / 255}, "dtype float64, expected uint8", "numpy.uint8(numpy.round(255 * arr_0))"),
    ({"arr_0": np.moveaxis(COLOUR, 3, 1).copy()}, "with 6 channels", "arr_0.transpose(0, 2, 3, 1).copy()"),
    ({"arr_0": np.asfortranarray(COLOUR)}, "Fortran order", "numpy.ascontiguousarray(arr_0)"),
    ({"arr_0": COLOUR[..., 0]}, "shape (30, 8, 6), expected [N, H, W, C]", "arr_0[..., None]"),
    ({"arr_0": COLOUR[..., :1]}, "grey images, and --features=inception takes RGB", "numpy.repeat(arr_0, 3, axis=-1)"),
    ({"arr_0": COLOUR[0]}, "shape (8, 6, 3), expected [N, H, W, C]: save it again with several images", ""),
    ({"arr_0": COLOUR[:3]}, "3 images, and precision and recall need at least 4", ""),
    ({"arr_0": COLOUR[:0]}, "shape (0, 8, 6, 3)", ""),
    ({"images": COLOUR}, "['images'], and no images arr_0", ""),
    ({"arr_0": COLOUR, "arr_1": np.arange(29)}, "shape (29,), expected an integer for each of 30 images", ""),
    ({"arr_0": COLOUR, "arr_1": np.zeros(30)}, "arr_1 is float64", ""),
    ({"arr_0": COLOUR, "arr_1": np.arange(30.0)[:, None]}, "shape (30, 1)", "arr_1[:, 0].astype(int)"),
    ({"arr_0": COLOUR, "arr_1": np.eye(30, dtype=int)}, "shape (30, 30)", "numpy.argmax(arr_1, axis=-1)"),
    ({"arr_0": COLOUR, "arr_1": np.arange(30) - 2}, "arr_1 holds -2", ""),
    ({"arr_0": COLOUR, "arr_1": np.array(["a"] * 30)}, "only numbers are read", ""),
]


@pytest.mark.parametrize(("arrays", "words", "remedy"), SAMPLES)
def test_samples_of_another_kind_are_refused_before_a_network_is_loaded(
    arrays: dict[str, Any], words: str, remedy: str, save: Save
) -> None:
    """No file of weights exists. A remedy that is an expression is evaluated, and the result is not refused."""
    path, base = save("samples", **arrays), save("base", arr_0=COLOUR)
    message = error_of(path, base, "--weights=nowhere.npz")
    assert words in message and remedy in message and "eval." not in message and "config" not in message
    if remedy:
        arrays = {name: eval(remedy, {"numpy": np, **arrays}) if name in remedy else x for name, x in arrays.items()}
        if arrays["arr_0"].shape[3] == 1:
            arrays["arr_0"] = arrays["arr_0"].repeat(3, axis=3)
        assert "--weights is 'nowhere.npz', which is no file" in error_of(
            save("samples", **arrays), base, "--weights=nowhere.npz"
        )


REFERENCES: list[tuple[dict[str, Any], str]] = [
    (
        {"arr_0": COLOUR[:, :4]},
        "shape (4, 6, 3), but {samples} holds images of shape (8, 6, 3), [H, W, C]: give samples",
    ),
    ({"arr_0": COLOUR.astype(np.int64)}, "dtype int64, expected uint8"),
    ({"arr_0": np.asfortranarray(COLOUR)}, "Fortran order"),
    ({"arr_0": COLOUR[:3]}, "has 3 images, and precision and recall need at least 4: give more images"),
    ({"mu": np.zeros(2048)}, "neither images arr_0"),
    ({"mu": np.zeros(2048), "sigma": np.zeros((2048, 3))}, "sigma is (2048, 3), expected (2048, 2048)"),
    ({"arr_0": COLOUR, "mu": np.zeros(64)}, "mu is (64,), expected (2048,)"),
]


@pytest.mark.parametrize(("arrays", "words"), REFERENCES)
def test_references_of_another_kind_are_refused_in_words_of_this_command(
    arrays: dict[str, Any], words: str, save: Save
) -> None:
    samples = save("samples", arr_0=COLOUR)
    message = error_of(samples, save("reference", **arrays), "--weights=nowhere.npz")
    assert words.format(samples=samples) in message and "eval." not in message and "config" not in message


def test_statistics_serve_their_own_network_alone(save: Save, weights: str) -> None:
    samples = save("samples", arr_0=IMAGES)
    base = save("statistics", mu=np.zeros(2048), sigma=np.eye(2048))
    message = error_of(samples, base, "--features=classifier", f"--weights={weights}")
    assert "--features is 'classifier': give --features=inception, or a REFERENCE with images arr_0 alone" in message
    base = save("statistics", mu=np.zeros(1024), sigma=np.eye(1024))
    message = error_of(samples, base, "--features=classifier", f"--weights={weights}")
    assert "holds statistics of DINOv2" in message and "give --features=dinov2, or a REFERENCE with" in message


def test_weights_that_do_not_fit_are_refused(save: Save, weights: str, tmp_path: Path) -> None:
    grey, colour = save("grey", arr_0=IMAGES), save("colour", arr_0=COLOUR)
    message = error_of(colour, colour, "--features=classifier", f"--weights={weights}")
    assert (
        "holds no feature classifier of images of shape (8, 6, 3)" in message and "features/classifier.npz" in message
    )
    assert "holds no feature classifier" in error_of(grey, grey, "--features=classifier", f"--weights={grey}")
    assert "does not hold InceptionV3" in error_of(colour, colour, f"--weights={grey}")
    labelled = save("labelled", arr_0=IMAGES, arr_1=LABELS + 1)
    message = error_of(labelled, grey, "--features=classifier", f"--weights={weights}")
    assert f"arr_1 holds the class 10, and the classifier {weights} has the classes 0 to 9" in message


def test_files_that_are_no_npz_are_refused(save: Save, weights: str, tmp_path: Path) -> None:
    good, flags = save("good", arr_0=IMAGES), ("--features=classifier", f"--weights={weights}")
    np.save(tmp_path / "images.npy", IMAGES)
    message = error_of(str(tmp_path / "images.npy"), good, *flags)
    expression = re.search(r"numpy\.savez\((FILE), (numpy\.load\('.*'\))\)", message)
    assert expression
    np.testing.assert_array_equal(eval(expression[2], {"numpy": np}), IMAGES)
    content = Path(good).read_bytes()
    (tmp_path / "short.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.npz").write_text("images")
    for name, words in (
        ("nowhere.npz", "which is no file"),
        ("", "which is no file"),
        ("short.npz", "is not a sound .npz file"),
        ("text.npz", "is not a sound .npz file"),
    ):
        path = os.path.join(tmp_path, name)
        assert words in error_of(path, good, *flags)
        assert words in error_of(good, path, *flags)
        assert words in error_of(good, good, flags[0], f"--weights={path}")
    assert "which is a folder" in error_of(good, good, *flags, f"--json={tmp_path}")
    assert "give another file for the numbers" in error_of(good, good, *flags, f"--json={good}")
    assert Path(good).read_bytes() == content
    assert "--weights" in error_of(good, good) and "invalid choice: 'vgg'" in error_of(good, good, "--features=vgg")


def test_an_array_of_text_beside_the_images_is_refused_with_a_remedy_that_works(
    save: Save, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--features=classifier", f"--weights={weights}")
    good, named = save("good", arr_0=IMAGES), save("named", arr_0=IMAGES, names=np.array(["a"] * len(IMAGES)))
    for pair in ((named, good), (good, named)):
        message = error_of(*pair, *flags)
        assert "names has dtype <U1" in message and "save the file again without names" in message
    with np.load(named) as arrays:
        np.savez(named, **{name: arrays[name] for name in arrays if name != "names"})
    run(capsys, named, named, *flags)


def test_samples_in_a_bucket_are_measured(
    bucket: FakeGcs, save: Save, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save("images", arr_0=IMAGES, arr_1=LABELS)
    bucket.put("made/images.npz", Path(path).read_bytes())
    flags = ("--features=classifier", f"--weights={weights}")
    there = f"{bucket.url}/made/images.npz"
    measure.main([there, there, *flags, f"--json={bucket.url}/made/result.json"])
    here, _ = run(capsys, path, path, *flags)
    found = json.loads(bucket.objects["made/result.json"].content)
    assert found["measures"] == here["measures"]
    measure.main([there, there, *flags, f"--json={bucket.url}/result.json"])
    assert bucket.objects["result.json"].content == bucket.objects["made/result.json"].content
    assert "nowhere.npz" in error_of(f"{bucket.url}/made/nowhere.npz", there, *flags)


def test_an_error_of_the_program_is_raised(save: Save, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "score", lambda *_: {}["a bug"])
    path = save("images", arr_0=IMAGES)
    with pytest.raises(KeyError, match="a bug"):
        measure.main([path, path, "--features=classifier", f"--weights={weights}"])
