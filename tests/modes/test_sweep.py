"""`--mode=sweep`: its cells and their manifests, what it writes, how it resumes, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mixing
import numpy as np
import pytest
from meshes import mesh_of
from PIL import Image
from swept import pixels, sweep_again
from tiny import ROOT, read_config, tiny_config

from cfd.data.sources import Dataset
from cfd.devices import parallel, preemption
from cfd.evaluation import inception, reference
from cfd.evaluation.features import FeatureNetwork, Outputs
from cfd.modes import cells as cells_of
from cfd.modes import measuring, sampler, settings, sweep
from cfd.modes.sampler import evaluation_flops
from cfd.runs import manifest, npz, results, workdir
from cfd.runs.digest import weights_hash

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
]

GRID: dict[str, Any] = {
    "eval__weights": (0.0, 2.0),
    "eval__num_steps": (2, 3),
    "eval__v": (0.0, 1.0),
    "eval__intervals": ((), (-30.0, 0.0)),
    "eval__num_samples": 20,
}


def brightness(images: np.ndarray) -> Outputs:
    """Features without a network: the mean of each quarter of an image, and a class by its brightness."""
    quarters = images.reshape(len(images), 4, -1).mean(axis=2) / 255.0
    return Outputs(quarters, None, np.eye(10)[(images.mean(axis=(1, 2, 3)) / 25.6).astype(int)])


@pytest.fixture
def run(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run at step 7 that is swept on one device, with the features `brightness`."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    network = FeatureNetwork("classifier", "0" * 64, brightness)
    monkeypatch.setattr(sweep, "open_features", lambda *_: network)
    return mixing_run


@pytest.fixture
def on_eight_devices(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run at step 7 that is swept on eight devices, with the features `pixels`."""
    network = FeatureNetwork("classifier", "f" * 64, pixels)
    monkeypatch.setattr(sweep, "open_features", lambda *_: network)
    return mixing_run


def swept(config: Any, folder: str) -> list[results.Row]:
    """The rows of a sweep that writes to the folder of its run."""
    return sweep.sweep(config, folder, folder)


def images_of(folder: Path, row: results.Row) -> np.ndarray:
    return npz.read_npz(results.samples_path(str(folder), row))["arr_0"]


# Cells


def test_a_grid_is_resumed_at_any_cell(
    on_eight_devices: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = on_eight_devices, tiny_config(**GRID)
    traced, guided_sample = [], sampler.guided_sample

    def counting(*args: Any, **kwargs: Any) -> Any:
        traced.append(kwargs["num_steps"])
        return guided_sample(*args, **kwargs)

    monkeypatch.setattr(sampler, "guided_sample", counting)
    asked = iter([False] * 20 + [True])
    monkeypatch.setattr(preemption, "requested", lambda: next(asked, False))
    with pytest.raises(preemption.Stopped, match="Stopped in the sweep at w ="):
        swept(config, str(folder))
    before = results.read_rows(str(folder))
    assert 0 < len(before) < 16
    with open(folder / "sweep.csv", "a") as file:
        file.write("7,0.1,2,ance")
    capsys.readouterr()

    rows = swept(config, str(folder))
    assert f"{len(before)} of 16 cells are in" in capsys.readouterr().out
    cells = [(row["num_steps"], row["v"], row["interval"], row["w"]) for row in rows]
    assert cells == [(t, v, i, w) for t in (2, 3) for v in (0.0, 1.0) for i in ("", "-30:0") for w in (0.0, 2.0)]
    assert rows[: len(before)] == before == results.read_rows(str(folder))[: len(before)]
    assert traced in ([2, 2, 3], [2, 3, 3], [2, 3, 2, 3]), "each start compiles one program per T"

    images = {cell: images_of(folder, row) for cell, row in zip(cells, rows, strict=True)}
    for t, v, i, w in cells:
        same = (images[t, v, i, w] == images[t, v, "", 0.0]).all()
        assert same == (w == 0.0), "an interval changes all images except those at w = 0"
    assert len(list((folder / "samples").glob("sweep_*.png"))) == 8
    assert (folder / "sweep.png").exists()


def test_a_row_is_used_again_only_with_its_manifest(on_eight_devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = str(on_eight_devices), tiny_config(eval__weights=(2.0,), sample__num_steps=2)
    (row,) = swept(config, folder)
    assert row["fid_name"] == "FID-20" and row["labels"] == "balanced" and row["sfid"] is None
    path = on_eight_devices / "manifests" / f"{row['manifest']}.json"
    made = json.loads(path.read_text())
    assert made["weights"]["sha256"] == weights_hash(mixing.params())
    assert made["weights"]["step"] == 7 and made["weights"]["ema_decay"] == config.train.ema_decay
    sampling = {"num_steps": 2, "v": 0.3, "w": 2.0, "clip": True, "seed": 1000, "num_samples": 20, "interval": ""}
    assert sampling.items() <= made["sampling"].items()
    train = settings.open_split(config, "train")
    network = sweep.open_features(config, folder, folder, parallel.make_mesh(-1, 1), train)
    measured = reference.reference_hash(network, train, path=config.eval.reference, data=config.data.to_dict())
    assert made["reference"]["sha256"] == measured
    assert made["features"]["sha256"] == network.weights_hash
    assert made["environment"]["jax"] == jax.__version__ and "127.5" in made["images"]

    assert swept(config, folder) == [row]
    assert len(results.read_rows(folder)) == 1, "nothing was measured again"

    first = settings.open_run
    params = mixing.params()
    monkeypatch.setattr(settings, "open_run", mixing.opening(params | {"mix": 0.9 * params["mix"]}))
    (other,) = swept(config, folder)
    assert other["manifest"] != row["manifest"] and other["fid"] != row["fid"]
    assert len(results.read_rows(folder)) == 2, "other weights give another row"

    other_path = on_eight_devices / "manifests" / f"{other['manifest']}.json"
    other_path.write_text(other_path.read_text().replace('"w": 2.0', '"w": 3.0'))
    assert swept(config, folder) == [other]
    assert len(results.read_rows(folder)) == 3, "a manifest with other content is not that of the row"

    monkeypatch.setattr(settings, "open_run", first)
    monkeypatch.setattr(sweep, "measure_cells", lambda *_: pytest.fail("it was measured again"))
    assert results.latest(folder) == [other]
    assert swept(config, folder) == results.latest(folder) == [row]


def test_everything_that_a_row_is_made_from_is_in_the_name_of_its_manifest() -> None:
    network = FeatureNetwork("classifier", "f", lambda _: Outputs(*[np.zeros((1, 1))] * 3))

    def name(network: FeatureNetwork = network, changes: Any = (), **hashes: str) -> str:
        config = tiny_config(**dict(changes))
        row = sweep.rows_of_grid(config, 5)[0]
        hashes = dict(weights="w", classifier="", reference="r", data="d", held_out="h") | hashes
        return manifest.manifest_name(sweep.manifest_of(config, row, hashes, network))

    names = {name(), name(weights="x"), name(classifier="g"), name(reference="s"), name(data="e")}
    names |= {name(network=network._replace(weights_hash="h")), name(network=network._replace(name="inception"))}
    fields = dict(train__ema_decay=0.5, model__num_res_blocks=2, process__logsnr_min=-9.0, sample__clip=False)
    fields |= dict(sample__v=0.9, eval__labels="random", data__split="test")
    names |= {name(changes={field: value}) for field, value in fields.items()}
    assert len(names) == 7 + len(fields)


def test_the_ends_of_intervals_are_exact_in_the_rows() -> None:
    config = tiny_config(eval__intervals=((-1.23456789, 2.0), (-1.23457, 2.0), (-30.0, 0.0), ()))
    cells = {row["interval"]: cells_of.interval_of(row) for row in sweep.rows_of_grid(config, 1)}
    assert cells == {
        "-1.23456789:2": (-1.23456789, 2.0),
        "-1.23457:2": (-1.23457, 2.0),
        "-30:0": (-30.0, 0.0),
        "": (),
    }


def test_random_labels_come_from_the_seed(on_eight_devices: Path) -> None:
    config = tiny_config(eval__weights=(1.0,), eval__labels="random", sample__num_steps=2)
    (row,) = swept(config, str(on_eight_devices))
    labels = npz.read_npz(results.samples_path(str(on_eight_devices), row))["arr_1"]
    np.testing.assert_array_equal(labels, np.random.default_rng(1000).integers(10, size=20))
    np.testing.assert_array_equal(manifest.labels_of("random", 1000, 7, 10), labels[:7])


# Files


def test_the_rate_of_a_weight_is_of_its_own_time(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight's metrics are computed while the next weight is sampled. By this clock, 20 images take 4 s."""
    clock = [0.0]

    def features(images: np.ndarray) -> Outputs:
        clock[0] += 4.0
        return brightness(images)

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(sweep, "open_features", lambda *_: FeatureNetwork("classifier", "0" * 64, features))
    swept(tiny_config(sample__batch_size=20), str(run))
    assert capsys.readouterr().out.count("(5 images/s sampled and measured)") == 3


def test_a_sweep_leaves_rows_images_and_pictures(run: Path, capsys: pytest.CaptureFixture) -> None:
    config = tiny_config()
    rows = swept(config, str(run))
    assert [row["w"] for row in rows] == [0.0, 1.0, 3.0]
    assert {(row["step"], row["num_samples"], row["num_steps"], row["features"]) for row in rows} == {
        (7, 20, 4, "classifier")
    }
    images = []
    for row in rows:
        arrays = npz.read_npz(results.samples_path(str(run), row))
        assert arrays["arr_0"].shape == (20, 8, 8, 1) and arrays["arr_1"].tolist() == list(range(10)) * 2
        outputs = brightness(arrays["arr_0"])
        assert outputs.probs is not None
        assert row["class_accuracy"] == np.mean(outputs.probs.argmax(1) == arrays["arr_1"])
        images.append(arrays["arr_0"])
    assert not (images[0] == images[1]).all() and not (images[1] == images[2]).all()
    for name, mode in (("sweep.png", "RGBA"), ("samples/sweep.png", "RGB")):
        with Image.open(run / name) as image:
            image.load()
            assert image.format == "PNG" and image.mode == mode and min(image.size) > 200
    with Image.open(run / "samples" / "sweep.png") as grid:
        assert grid.height > 10 * 64 and grid.width > 3 * 64  # one row per image, one column per weight
    out = capsys.readouterr().out
    assert "| 3 |" in out and "images/s sampled and measured" in out
    evaluations = 20 * (4 + 8 + 8)
    flops = evaluations * evaluation_flops(mixing.NETWORK, mixing.params())
    assert f"3 cells to measure: {evaluations} network evaluations, {flops:.3g} FLOP." in out


def test_a_lost_row_is_measured_again_to_the_same_numbers(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config, path = tiny_config(), run / "sweep.csv"
    rows = swept(config, str(run))
    whole = path.read_text()
    # The last row without its newline, cut short in its first column, and missing.
    for cut in (len(whole) - 1, whole.rstrip().rfind("\n") + 4, whole.rstrip().rfind("\n") + 1):
        path.write_text(whole[:cut])
        capsys.readouterr()
        assert swept(config, str(run)) == rows
        assert "2 of 3 cells are in" in capsys.readouterr().out and path.read_text() == whole
    monkeypatch.setattr(measuring, "compile_sampler", lambda *_: pytest.fail("nothing is left to sample"))
    assert swept(config, str(run)) == rows and path.read_text() == whole


def test_a_row_that_is_measured_in_another_way_does_not_overwrite_the_images_of_the_first(run: Path) -> None:
    rows = [swept(tiny_config(sample__clip=clip, eval__weights=(1.0,)), str(run)) for clip in (True, False)]
    images = [images_of(run, row) for (row,) in rows]
    assert not (images[0] == images[1]).all()
    assert len(results.read_rows(str(run))) == 2 and len(list((run / "samples").glob("*.npz"))) == 2


@pytest.mark.parametrize("change", [{"eval__seed": 3}, {"eval__num_samples": 30}, {"sample__num_steps": 5}])
def test_other_settings_get_rows_and_files_of_their_own(run: Path, change: dict[str, Any]) -> None:
    first = swept(tiny_config(eval__weights=(1.0,)), str(run))
    other = swept(tiny_config(eval__weights=(1.0,), **change), str(run))
    one, changed = (images_of(run, row)[:20] for row in first + other)
    assert (one == changed).all() == ("eval__num_samples" in change)
    assert results.read_rows(str(run)) == first + other
    assert len(list((run / "samples").glob("*.npz"))) == len(list((run / "manifests").iterdir())) == 2
    assert swept(tiny_config(eval__weights=(1.0,)), str(run)) == first


def test_a_weight_may_be_written_as_an_integer(run: Path) -> None:
    rows = swept(tiny_config(eval__weights=(1, 0)), str(run))
    assert swept(tiny_config(eval__weights=(1.0, 0.0)), str(run)) == rows
    assert len(results.read_rows(str(run))) == 2


def test_a_sweep_is_guided_by_the_classifier_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row depends on the classifier as it does on the network."""
    rows = []
    monkeypatch.setattr(settings, "check_classifier", lambda *_: None)
    for strength in (0.0, 3.0):
        classifier = jax.tree_util.Partial(mixing.brighter, {"strength": jnp.float32(strength)})
        monkeypatch.setattr(settings, "open_run", mixing.opening(mixing.params(), classifier))
        rows += swept(tiny_config(sample__guidance="classifier", eval__weights=(0.0, 2.0)), str(run))
    images = [images_of(run, row) for row in rows]
    assert len({row["manifest"] for row in rows}) == 4
    assert (images[0] == images[1]).all() and (images[0] == images[2]).all() and (images[2] != images[3]).any()


def test_the_picture_leaves_out_the_weights_whose_images_are_lost(run: Path, capsys: pytest.CaptureFixture) -> None:
    rows = swept(tiny_config(), str(run))
    for lost, row in (("1", rows[1]), ("0, 1", rows[0]), ("0, 1, 3", rows[2])):
        Path(results.samples_path(str(run), row)).unlink()
        assert swept(tiny_config(), str(run)) == rows
        assert f"The images of w = {lost} are not in {run}/samples: sweep.png" in capsys.readouterr().out


def test_rows_of_the_other_guidance_are_compared_only_if_all_else_is_equal(tmp_path: Path) -> None:
    folder, rows = tmp_path / "run", []
    folder.mkdir()
    changes: list[dict[str, Any]] = [{}, {"sample__num_steps": 5}, {"eval__seed": 3}, {"sample__clip": False}]
    for change in changes:
        for guidance in ("classifier", "classifier-free"):
            before = len(results.read_rows(str(folder)))
            sweep_again(folder, 0.1, sample__guidance=guidance, **change)
            rows.append(results.read_rows(str(folder))[before:])
    by_classifier, free, *_, without_clipping = rows
    assert sweep.comparable_rows(str(folder), without_clipping) == rows[-2]
    assert sweep.comparable_rows(str(folder), free) == []  # the classifier's rows were then measured without clipping
    sweep_again(folder, 0.1, sample__guidance="classifier")
    comparable = sweep.comparable_rows(str(folder), free)
    assert [row["manifest"] for row in comparable] == [row["manifest"] for row in by_classifier]


# Numbers


def test_images_that_are_not_finite_are_an_error(on_eight_devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nans = jax.tree.map(lambda x: np.full_like(x, np.nan), mixing.params())
    monkeypatch.setattr(settings, "open_run", mixing.opening(nans))
    with pytest.raises(ValueError, match="16 of 16 images hold NaN or infinity, such as number 0 of seed 1000"):
        swept(tiny_config(eval__weights=(1.0,), sample__num_steps=2), str(on_eight_devices))
    assert results.read_rows(str(on_eight_devices)) == []
    assert not list((on_eight_devices / "samples").glob("*.npz*"))


def test_too_few_samples_give_a_warning_with_their_number(on_eight_devices: Path) -> None:
    with pytest.warns(UserWarning, match="20 samples of 64 features give a covariance of rank at most 19"):
        swept(tiny_config(eval__weights=(0.0,), sample__num_steps=1), str(on_eight_devices))


# Refusals


def test_a_sweep_without_weights_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.eval\.weights is \(\): give the weights to sweep"):
        swept(tiny_config(eval__weights=()), str(run))
    assert not list(run.iterdir())


def test_data_of_other_classes_is_not_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, tuple[str, ...]] = {"train": (*"012345678", "nine"), "test": (*"012345678", "nine")}
    open_split = settings.open_split

    def renamed(config: Any, split: str) -> Dataset:
        return dataclasses.replace(open_split(config, split), class_names=names[split])

    workdir.write_config(run, workdir.describe("diffusion", tiny_config().to_dict(), mixing.DIGITS))
    monkeypatch.setattr(settings, "open_split", renamed)
    with pytest.raises(ValueError, match=r"class 9 is '9' in the run .* and 'nine' in data.split 'train'"):
        swept(tiny_config(), str(run))
    names["train"] = tuple("0123456789")
    with pytest.raises(ValueError, match=r"class 9 is '9' in data.split 'train' and 'nine' in eval.test_split 'test'"):
        sweep.check(tiny_config(), str(run))
    assert [path.name for path in run.iterdir()] == [workdir.CONFIG]


def test_files_that_the_metrics_cannot_use_are_found_before_training(tmp_path: Path) -> None:
    weights, statistics = tmp_path / "inception.npz", tmp_path / "reference.npz"
    changes = dict(
        data__channels=3, model__out_channels=3, eval__features="inception", eval__inception_path=str(weights)
    )
    npz.write_npz(weights, {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="does not hold InceptionV3"):
        sweep.check(tiny_config(**changes), str(tmp_path))
    npz.write_npz(weights, {"/".join(key): np.zeros(x, np.float32) for key, x in inception.param_shapes().items()})
    arrays = {"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "mu": np.zeros(2048), "sigma": np.zeros((2048, 2048))}
    for more, words in (({}, "mu_s is missing"), ({"mu": np.zeros(768)}, r"mu is \(768,\), expected \(2048,\)")):
        npz.write_npz(statistics, arrays | more)
        with pytest.raises(ValueError, match=words):
            sweep.check(tiny_config(**changes, eval__reference=str(statistics)), str(tmp_path))


def test_a_missing_or_foreign_classifier_is_found_before_training(tmp_path: Path) -> None:
    config = tiny_config(sample__guidance="classifier")
    with pytest.raises(ValueError, match=r"classifier holds no noisy classifier.*--mode=train_classifier"):
        sweep.check(config, str(tmp_path))
    place = tmp_path / "classifier"
    for changes in (dict(data__image_size=4), dict(data__num_classes=9)):
        theirs = tiny_config(**changes).to_dict()
        workdir.write_config(place, workdir.describe("classifier", theirs, mixing.DIGITS))
        name, value, ours = ("image_size", 4, 8) if "data__image_size" in changes else ("num_classes", 9, 10)
        with pytest.raises(ValueError, match=rf"classifier was trained with data.{name} = {value}, not {ours}"):
            sweep.check(config, str(tmp_path))
    theirs = tiny_config(process__logsnr_max=5.0).to_dict()
    workdir.write_config(place, workdir.describe("classifier", theirs, mixing.DIGITS))
    with pytest.raises(ValueError, match=r"is trained on λ in \[-20, 5\], which does not cover the run's \[-20, 20\]"):
        sweep.check(config, str(tmp_path))
    theirs = tiny_config(process__logsnr_max=21.0).to_dict()
    workdir.write_config(place, workdir.describe("classifier", theirs, mixing.DIGITS))
    sweep.check(config, str(tmp_path))
    # A config file need not state the number of classes.
    stated: Any = read_config(ROOT / "configs" / "digits.py")
    stated.sample.guidance = "classifier"
    assert "num_classes" not in stated.data
    sweep.check(stated, str(tmp_path))


def test_a_run_without_an_unconditional_score_is_not_guided(tmp_path: Path) -> None:
    config = tiny_config(train__p_uncond=0.0)
    with pytest.raises(ValueError, match=r"w = 1 needs the unconditional score"):
        sweep.check(config, str(tmp_path))
    sweep.check(tiny_config(train__p_uncond=0.0, eval__weights=(0.0,)), str(tmp_path))
