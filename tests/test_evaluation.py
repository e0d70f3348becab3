"""What `--mode=sweep` needs and leaves behind; tests/test_grid.py has its cells, and how they are resumed."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image
from tiny import tiny_config

from cfd import checkpoint, data, evaluation, features, generate, inception, npz, parallel, results

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
    pytest.mark.usefixtures("compile_once"),
]


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"), (AxisType.Auto,) * 2)


@pytest.fixture
def digits() -> data.Dataset:
    return data.from_config(tiny_config().data, "train")


def brightness(images: np.ndarray) -> features.Outputs:
    """Features without a network: the image in four numbers, and a class by its brightness."""
    quarters = images.reshape(len(images), 4, -1).mean(axis=2) / 255.0
    return features.Outputs(quarters, None, np.eye(10)[(images.mean(axis=(1, 2, 3)) / 25.6).astype(int)])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a run at step 7, whose network is one layer, on one device."""
    rng = np.random.default_rng(0)
    params = {"mix": rng.normal(0, 0.15, (64, 64)).astype(np.float32), "class": np.eye(11, 64, dtype=np.float32)}

    def eps_of_params(params: Any) -> Any:
        def eps_fn(z: Any, logsnr: Any, labels: Any) -> Any:
            return jnp.tanh(z.reshape(len(z), -1) @ params["mix"] + params["class"][labels]).reshape(z.shape)

        return eps_fn

    def load_run(config: Any, folder: str) -> checkpoint.Loaded:
        names = tuple("0123456789")
        return checkpoint.Loaded(lambda *_: _[0], params, (8, 8, 1), 10, names, config.to_dict(), 7)

    monkeypatch.setattr(generate, "eps_of_params", lambda config: eps_of_params)
    monkeypatch.setattr(evaluation, "load_run", load_run)
    monkeypatch.setattr(parallel, "make_mesh", lambda data, fsdp: one_device())
    network = features.FeatureNetwork("classifier", "0" * 64, brightness)
    monkeypatch.setattr(evaluation, "open_features", lambda *_: network)
    return tmp_path


def test_a_row_measured_otherwise_keeps_the_images_of_the_first(run: Path) -> None:
    rows = [evaluation.sweep(tiny_config(sample__clip=clip, eval__weights=(1.0,)), str(run)) for clip in (True, False)]
    held = [npz.read_npz(evaluation.samples_path(str(run), row))["arr_0"] for (row,) in rows]
    assert not (held[0] == held[1]).all()
    assert len(results.read_rows(str(run))) == 2 and len(list((run / "samples").glob("*.npz"))) == 2


def test_a_sweep_leaves_rows_images_and_pictures(run: Path, capsys: pytest.CaptureFixture) -> None:
    config = tiny_config()
    rows = evaluation.sweep(config, str(run))
    assert [row["w"] for row in rows] == [0.0, 1.0, 3.0]
    assert {(row["step"], row["num_samples"], row["num_steps"], row["features"]) for row in rows} == {
        (7, 20, 4, "classifier")
    }
    drawn = []
    for row in rows:
        held = npz.read_npz(evaluation.samples_path(str(run), row))
        assert held["arr_0"].shape == (20, 8, 8, 1) and held["arr_1"].tolist() == list(range(10)) * 2
        outputs = brightness(held["arr_0"])
        assert row["class_accuracy"] == np.mean(outputs.probs.argmax(1) == held["arr_1"])
        drawn.append(held["arr_0"])
    assert not (drawn[0] == drawn[1]).all() and not (drawn[1] == drawn[2]).all()
    for name, colour in (("sweep.png", "RGBA"), ("samples/sweep.png", "RGB")):
        with Image.open(run / name) as image:
            image.load()
            assert image.format == "PNG" and image.mode == colour and min(image.size) > 200
    with Image.open(run / "samples" / "sweep.png") as grid:
        assert grid.height > 10 * 64 and grid.width > 3 * 64  # a row a class, a column a weight
    said = capsys.readouterr().out
    assert "| 3 |" in said and "images/s drawn and measured" in said
    evaluations = 20 * (4 + 8 + 8)
    flops = evaluations * generate.evaluation_flops(config, evaluation.load_run(config, str(run)).params)
    assert f"3 cells to measure: {evaluations} network evaluations, {flops:.3g} FLOP." in said


def test_a_row_that_is_lost_is_measured_again_to_the_same_numbers(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config, path = tiny_config(), run / "sweep.csv"
    rows = evaluation.sweep(config, str(run))
    whole = path.read_text()
    for cut in (len(whole) - 1, whole.rstrip().rfind("\n") + 4, whole.rstrip().rfind("\n") + 1):
        path.write_text(whole[:cut])  # the last row without its end, torn in its first column, and gone
        capsys.readouterr()
        assert evaluation.sweep(config, str(run)) == rows
        assert "2 of 3 cells are in" in capsys.readouterr().out and path.read_text() == whole
    monkeypatch.setattr(evaluation, "make_draw", lambda *_: pytest.fail("nothing is left to draw"))
    assert evaluation.sweep(config, str(run)) == rows and path.read_text() == whole


@pytest.mark.parametrize("change", [{"eval__seed": 3}, {"eval__num_samples": 30}, {"sample__num_steps": 5}])
def test_other_settings_get_rows_and_files_of_their_own(run: Path, change: dict[str, Any]) -> None:
    first = evaluation.sweep(tiny_config(eval__weights=(1.0,)), str(run))
    other = evaluation.sweep(tiny_config(eval__weights=(1.0,), **change), str(run))
    one, changed = (npz.read_npz(evaluation.samples_path(str(run), row))["arr_0"][:20] for row in first + other)
    assert (one == changed).all() == ("eval__num_samples" in change)
    assert results.read_rows(str(run)) == first + other
    assert len(list((run / "samples").glob("*.npz"))) == len(list((run / "manifests").iterdir())) == 2
    assert evaluation.sweep(tiny_config(eval__weights=(1.0,)), str(run)) == first


def test_a_weight_may_be_written_as_an_integer(run: Path) -> None:
    rows = evaluation.sweep(tiny_config(eval__weights=(1, 0)), str(run))
    assert evaluation.sweep(tiny_config(eval__weights=(1.0, 0.0)), str(run)) == rows
    assert len(results.read_rows(str(run))) == 2


def test_a_sweep_of_no_weight_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.eval\.weights is \(\): give the weights to sweep"):
        evaluation.sweep(tiny_config(eval__weights=()), str(run))
    assert not list(run.iterdir())


def test_a_sweep_is_guided_by_the_classifier_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which belongs to a row as the network does."""

    def brighter(params: Any, z: Any, logsnr: Any) -> Any:
        return params["scale"] * jnp.arange(10.0)[None] * jnp.mean(z, axis=(1, 2, 3))[:, None]

    rows = []
    for scale in (0.0, 3.0):
        guide = jax.tree_util.Partial(brighter, {"scale": jnp.float32(scale)})
        monkeypatch.setattr(evaluation, "check_guide", lambda *_: None)
        monkeypatch.setattr(evaluation, "load_guide", lambda *_, guide=guide: guide)
        rows += evaluation.sweep(tiny_config(sample__guidance="classifier", eval__weights=(0.0, 2.0)), str(run))
    images = [npz.read_npz(evaluation.samples_path(str(run), row))["arr_0"] for row in rows]
    assert len({row["manifest"] for row in rows}) == 4
    assert (images[0] == images[1]).all() and (images[0] == images[2]).all() and (images[2] != images[3]).any()


@pytest.mark.parametrize("damage", ["5\n", "7,0.1,x\n", "\xff\n"])
def test_a_damaged_row_is_named(run: Path, damage: str) -> None:
    evaluation.sweep(tiny_config(eval__weights=(1.0,)), str(run))
    with open(run / "sweep.csv", "a", encoding="latin-1") as file:
        file.write(damage)
    with pytest.raises(ValueError, match=r"sweep\.csv: line 3 is damaged: delete it"):
        results.read_rows(str(run))


def test_a_grid_leaves_out_the_weights_whose_images_are_lost(run: Path, capsys: pytest.CaptureFixture) -> None:
    rows = evaluation.sweep(tiny_config(), str(run))
    for lost, row in (("1", rows[1]), ("0, 1", rows[0]), ("0, 1, 3", rows[2])):
        Path(evaluation.samples_path(str(run), row)).unlink()
        assert evaluation.sweep(tiny_config(), str(run)) == rows
        assert f"The images of w = {lost} are not in {run}/samples: sweep.png" in capsys.readouterr().out


def test_data_of_other_classes_is_not_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch, digits: data.Dataset
) -> None:
    names: dict[str, tuple[str, ...]] = {"train": (*"012345678", "nine"), "test": (*"012345678", "nine")}

    def from_config(group: Any, split: str) -> data.Dataset:
        return dataclasses.replace(digits, class_names=names[split])

    monkeypatch.setattr(data, "from_config", from_config)
    with pytest.raises(ValueError, match=r"class 9 is '9' in the run .* and 'nine' in data.split 'train'"):
        evaluation.sweep(tiny_config(), str(run))
    names["train"] = tuple("0123456789")
    with pytest.raises(ValueError, match=r"class 9 is '9' in data.split 'train' and 'nine' in eval.test_split 'test'"):
        evaluation.check(tiny_config(), str(run))
    assert not list(run.iterdir())


def test_files_that_the_metrics_cannot_use_are_noticed_beforehand(tmp_path: Path) -> None:
    weights, reference = tmp_path / "inception.npz", tmp_path / "reference.npz"
    changes = dict(
        data__channels=3, model__out_channels=3, eval__features="inception", eval__inception_path=str(weights)
    )
    npz.write_npz(weights, {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="does not hold InceptionV3"):
        evaluation.check(tiny_config(**changes), str(tmp_path))
    npz.write_npz(weights, {"/".join(key): np.zeros(x, np.float32) for key, x in inception.param_shapes().items()})
    arrays = {"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "mu": np.zeros(2048), "sigma": np.zeros((2048, 2048))}
    for more, words in (({}, "mu_s is missing"), ({"mu": np.zeros(768)}, r"mu is \(768,\), expected \(2048,\)")):
        npz.write_npz(reference, arrays | more)
        with pytest.raises(ValueError, match=words):
            evaluation.check(tiny_config(**changes, eval__reference=str(reference)), str(tmp_path))
