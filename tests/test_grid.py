"""The grid of a sweep: its cells, their manifests, what a kill leaves, and numbers that no batch or device changes."""

import copy
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from tiny import tiny_config

from cfd import checkpoint, data, evaluation, features, generate, metrics, npz, parallel, preemption, reference, results
from cfd.guidance import Interval
from cfd.sampling import guided_sample
from cfd.unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning")

GRID: dict[str, Any] = {
    "eval__weights": (0.0, 2.0),
    "eval__num_steps": (2, 3),
    "eval__v": (0.0, 1.0),
    "eval__intervals": ((), (-30.0, 0.0)),
    "eval__num_samples": 20,
}


def random_params(config: Any) -> Any:
    """Parameters of the U-Net of which none is zero, so that guidance does something."""
    size = config.data.image_size
    shapes = jax.eval_shape(
        UNet(**config.model).init,
        jax.random.key(0),
        jnp.zeros((1, size, size, config.data.channels)),
        jnp.zeros(1),
        jnp.zeros(1, jnp.int32),
    )["params"]
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(numbers.normal(0, 0.1, x.shape), jnp.float32), shapes)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """`tmp_path` as the folder of a run at step 7 of a network without layers; its weights are the list's one entry."""
    params = [{"a": jnp.float32(0.9), "b": jnp.float32(0.1)}]

    def eps_of_params(config: Any) -> Any:
        return lambda params: (
            lambda z, logsnr, labels: jnp.tanh(
                params["a"] * z + params["b"] * labels[:, None, None, None].astype(jnp.float32)
            )
        )

    def extract(images: np.ndarray) -> features.Outputs:
        pool = images.reshape(len(images), 64) / 255
        return features.Outputs(pool, None, np.exp(pool[:, :10]) / np.exp(pool[:, :10]).sum(axis=1, keepdims=True))

    network = features.FeatureNetwork("classifier", "f" * 64, extract)
    monkeypatch.setattr(evaluation, "open_features", lambda *_: network)
    monkeypatch.setattr(generate, "eps_of_params", eps_of_params)

    def load_run(config: Any, folder: str) -> checkpoint.Loaded:
        names = tuple("0123456789")
        return checkpoint.Loaded(lambda *_: _[0], params[0], (8, 8, 1), 10, names, config.to_dict(), 7)

    monkeypatch.setattr(evaluation, "load_run", load_run)
    yield params


def save_classifier(folder: Path) -> None:
    """A feature classifier that was never trained."""
    net = features.ImageClassifier(10)
    held = net.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1), jnp.uint8))["params"]
    (folder / "features").mkdir()
    (folder / "features" / "classifier.json").write_text('{"classifier_steps": 5}')
    arrays = {"/".join(key): np.asarray(x) for key, x in features.flatten_dict(held).items()}
    npz.write_npz(folder / "features" / "classifier.npz", arrays)


def test_a_grid_is_resumed_at_any_cell(
    untrained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(**GRID)
    traced = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        traced.append(kwargs["num_steps"])
        return guided_sample(*args, **kwargs)

    monkeypatch.setattr(generate, "guided_sample", counting)
    asked = iter([False] * 20 + [True])
    monkeypatch.setattr(preemption, "requested", lambda: next(asked, False))
    with pytest.raises(preemption.Stopped, match="Stopped in the sweep at w ="):
        evaluation.sweep(config, str(tmp_path))
    before = results.read_rows(str(tmp_path))
    assert 0 < len(before) < 16
    with open(tmp_path / "sweep.csv", "a") as file:
        file.write("7,0.1,2,ance")
    capsys.readouterr()

    rows = evaluation.sweep(config, str(tmp_path))
    assert f"{len(before)} of 16 cells are in" in capsys.readouterr().out
    settings = [(row["num_steps"], row["v"], row["interval"], row["w"]) for row in rows]
    assert settings == [(t, v, i, w) for t in (2, 3) for v in (0.0, 1.0) for i in ("", "-30:0") for w in (0.0, 2.0)]
    assert rows[: len(before)] == before == results.read_rows(str(tmp_path))[: len(before)]
    assert traced in ([2, 2, 3], [2, 3, 3], [2, 3, 2, 3]), "one program a T and a start, whatever w, v and interval are"

    by_setting = dict(zip(settings, rows, strict=True))
    images = {
        key: npz.read_npz(evaluation.samples_path(str(tmp_path), row))["arr_0"] for key, row in by_setting.items()
    }
    for t, v, i, w in settings:
        same = (images[t, v, i, w] == images[t, v, "", 0.0]).all()
        assert same == (w == 0.0), "only w = 0 is the same inside and outside of an interval"
    assert len(list((tmp_path / "samples").glob("sweep_*.png"))) == 8
    assert (tmp_path / "sweep.png").exists()


def test_a_row_is_used_again_only_with_its_manifest(
    untrained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(eval__weights=(2.0,), sample__num_steps=2)
    (row,) = evaluation.sweep(config, str(tmp_path))
    assert row["fid_name"] == "FID-20" and row["labels"] == "balanced" and row["sfid"] is None
    path = tmp_path / "manifests" / f"{row['manifest']}.json"
    manifest = json.loads(path.read_text())
    assert manifest["weights"]["sha256"] == evaluation.weights_hash(untrained[0])
    assert manifest["weights"]["step"] == 7 and manifest["weights"]["ema_decay"] == config.train.ema_decay
    sampling = {"num_steps": 2, "v": 0.3, "w": 2.0, "clip": True, "seed": 1000, "num_samples": 20, "interval": ""}
    assert sampling.items() <= manifest["sampling"].items()
    train = data.from_config(config.data, "train")
    network = evaluation.open_features(config, str(tmp_path), parallel.make_mesh(-1, 1), train)
    assert manifest["reference"]["sha256"] == reference.reference_hash(config, network, train)
    assert manifest["features"]["sha256"] == network.weights_hash
    assert manifest["environment"]["jax"] == jax.__version__ and "127.5" in manifest["images"]

    assert evaluation.sweep(config, str(tmp_path)) == [row]
    assert len(results.read_rows(str(tmp_path))) == 1, "nothing was measured again"

    first = untrained[0]
    untrained[0] = first | {"a": jnp.float32(0.8)}
    (other,) = evaluation.sweep(config, str(tmp_path))
    assert other["manifest"] != row["manifest"] and other["fid"] != row["fid"]
    assert len(results.read_rows(str(tmp_path))) == 2, "other weights are another row"

    other_path = tmp_path / "manifests" / f"{other['manifest']}.json"
    other_path.write_text(other_path.read_text().replace('"w": 2.0', '"w": 3.0'))
    assert evaluation.sweep(config, str(tmp_path)) == [other]
    assert len(results.read_rows(str(tmp_path))) == 3, "a manifest that says something else is not this row's"

    untrained[0] = first
    monkeypatch.setattr(evaluation, "measure_cells", lambda *_: pytest.fail("it was measured again"))
    assert results.latest(str(tmp_path)) == [other]
    assert evaluation.sweep(config, str(tmp_path)) == results.latest(str(tmp_path)) == [row]


def test_random_labels_are_drawn_from_the_seed(untrained: list[Any], tmp_path: Path) -> None:
    config = tiny_config(eval__weights=(1.0,), eval__labels="random", sample__num_steps=2)
    (row,) = evaluation.sweep(config, str(tmp_path))
    labels = npz.read_npz(evaluation.samples_path(str(tmp_path), row))["arr_1"]
    np.testing.assert_array_equal(labels, np.random.default_rng(1000).integers(10, size=20))
    np.testing.assert_array_equal(evaluation.labels_of("random", 1000, 7, 10), labels[:7])


def test_all_that_a_row_is_made_from_is_in_the_name_of_its_manifest() -> None:
    network = features.FeatureNetwork("classifier", "f", lambda _: features.Outputs(*[np.zeros((1, 1))] * 3))

    def name(network: features.FeatureNetwork = network, changes: Any = (), **given: str) -> str:
        config = tiny_config(**dict(changes))
        hashes = dict(weights="w", guide_weights="", reference="r") | given
        cell = evaluation.grid(config, 5)[0]
        return results.manifest_name(evaluation.manifest_of(config, cell, features=network, **hashes))

    names = {name(), name(weights="x"), name(guide_weights="g"), name(reference="s")}
    names |= {name(network=network._replace(weights_hash="h")), name(network=network._replace(name="inception"))}
    fields = dict(train__ema_decay=0.5, model__num_res_blocks=2, process__logsnr_min=-9.0, sample__clip=False)
    fields |= dict(sample__v=0.9, eval__labels="random", data__split="test")
    names |= {name(changes={field: value}) for field, value in fields.items()}
    assert len(names) == 6 + len(fields)


def test_scores_are_of_the_right_set_features_and_split() -> None:
    """With more images than a split of the Inception Score has."""
    numbers = np.random.default_rng(0)
    images, others = (
        numbers.integers(0, 256, (90, 2, 2, 1), np.uint8),
        numbers.integers(0, 200, (5100, 2, 2, 1), np.uint8),
    )

    def extract(block: np.ndarray) -> features.Outputs:
        flat = block.reshape(len(block), 4) / 255
        return features.Outputs(flat[:, :2], flat[:, 1:], (flat + 0.1) / (flat + 0.1).sum(axis=1, keepdims=True))

    network = features.FeatureNetwork("inception", "f" * 64, extract)
    base = reference.measure([images], 90, network)
    batches = ((others[i : i + 700], np.zeros(700, np.int32)[: 5100 - i]) for i in range(0, 5100, 700))
    found = evaluation.measure(batches, 5100, network, base)
    drawn, held = extract(others), extract(images)
    for key, layer in (("fid", "pool"), ("sfid", "spatial")):
        a, b = getattr(held, layer), getattr(drawn, layer)
        distance = metrics.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert found[key] == pytest.approx(distance, rel=1e-9)
    assert found["is"] == pytest.approx(metrics.inception_score(drawn.probs), rel=1e-12)
    assert (found["precision"], found["recall"]) == metrics.precision_recall(held.pool, drawn.pool)
    assert found["precision"] != found["recall"]
    assert found["class_accuracy"] is None, "Inception's classes are not the data set's"


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_neither_batches_nor_devices_change_the_numbers(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two convolutions for the network, and slowly with the U-Net."""
    save_classifier(tmp_path)
    config = tiny_config()
    numbers = np.random.default_rng(0)
    params = (
        random_params(config)
        if whole
        else {"in": numbers.normal(0, 0.3, (3, 3, 2, 8)), "out": numbers.normal(0, 0.3, (3, 3, 8, 1))}
    )
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)

    def eps_of_params(config: Any) -> Any:
        def eps(params: Any, z: jax.Array, logsnr: jax.Array, labels: jax.Array) -> jax.Array:
            classes = jnp.broadcast_to(labels[:, None, None, None] / 10, z.shape)
            h = jnp.concatenate([z, classes.astype(jnp.float32)], axis=-1)
            for kernel in (params["in"], params["out"]):
                h = jax.lax.conv_general_dilated(
                    jnp.tanh(h), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            return h

        return lambda params: lambda *inputs: eps(params, *inputs)

    if not whole:
        monkeypatch.setattr(generate, "eps_of_params", eps_of_params)
    cell = evaluation.grid(tiny_config(eval__weights=(1.0,), eval__num_samples=150), 7)[0]
    train = data.from_config(config.data, "train")
    measured = []
    for batch_size, devices in ((7, 1), (64, 8)):
        mesh = Mesh(np.array(jax.devices()[:devices]).reshape(-1, 1), ("data", "fsdp"), (AxisType.Auto,) * 2)
        network = features.open_classifier(str(tmp_path), mesh, train, train, num_steps=5, flip=False, seed=0)
        name = f"{devices} devices"
        base = reference.open_reference(config, str(tmp_path), network, train, name)
        draw = generate.make_draw(config, tiny_config(sample__batch_size=batch_size).sample, mesh)
        images = evaluation.drawn(
            config, draw, parallel.replicate(mesh, params), None, cell | {"manifest": "0"}, str(tmp_path / name)
        )
        measured.append(evaluation.measure(images, 150, network, base))
    one, eight = measured
    assert one["fid"] and one["fid"] > 0.1
    for key in ("fid", "is", "precision", "recall", "class_accuracy"):
        assert abs(one[key] - eight[key]) < 0.005, key


def test_images_that_are_not_finite_are_an_error(untrained: list[Any], tmp_path: Path) -> None:
    untrained[0] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), untrained[0])
    with pytest.raises(ValueError, match="16 of 16 images hold NaN or infinity, such as number 0 of seed 1000"):
        evaluation.sweep(tiny_config(eval__weights=(1.0,), sample__num_steps=2), str(tmp_path))
    assert results.read_rows(str(tmp_path)) == [] and not list((tmp_path / "samples").glob("*.npz*"))


def test_too_few_samples_are_said_with_the_number(untrained: list[Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="20 samples give a covariance of rank 19 at most, of 64 features"):
        evaluation.sweep(tiny_config(eval__weights=(0.0,), sample__num_steps=1), str(tmp_path))


@pytest.mark.parametrize(("w", "interval"), [(0.0, ()), (1.0, ()), (1.0, (-2.0, 5.0)), (0.0, (-2.0, 5.0))])
def test_evaluations_are_counted_as_the_sampler_makes_them(w: float, interval: tuple[float, ...]) -> None:
    config, calls = tiny_config(), []

    def eps_fn(z: jax.Array, logsnr: jax.Array, labels: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return z

    ends = interval if interval and w else (-jnp.inf, jnp.inf)
    weight = Interval(w, *ends) if w else 0.0
    guided_sample(jax.random.key(0), eps_fn, jnp.zeros(2, jnp.int32), (4,), w=weight, num_steps=9, **config.process)
    jax.effects_barrier()
    assert generate.evaluations(config, 9, w, interval) == len(calls)


def test_a_run_without_an_unconditional_score_is_not_guided(tmp_path: Path) -> None:
    config = tiny_config(train__p_uncond=0.0)
    with pytest.raises(ValueError, match=r"w = 1 needs the unconditional score"):
        evaluation.check(config, str(tmp_path))
    evaluation.check(tiny_config(train__p_uncond=0.0, eval__weights=(0.0,)), str(tmp_path))
    generate.check_weights(config, (0.0,))
    with pytest.raises(ValueError, match=r"w = 2 needs the unconditional score.*p_uncond = 0"):
        generate.check_weights(config, (0.0, 2.0))
    generate.check_weights(tiny_config(train__p_uncond=0.0, sample__guidance="classifier"), (0.0, 2.0))


def test_a_run_without_a_conditional_score_is_sampled_at_minus_one_alone() -> None:
    generate.check_weights(tiny_config(train__p_uncond=1.0), (-1.0,))
    for guidance, weights in (("classifier-free", (-1.0, 0.0)), ("classifier", (-1.0,))):
        with pytest.raises(ValueError, match=r"needs the conditional score.*p_uncond = 1"):
            generate.check_weights(tiny_config(train__p_uncond=1.0, sample__guidance=guidance), weights)


def swept(folder: Path, p_uncond: float, features_hash: str = "f") -> Path:
    """The folder of a run that has been swept at step 3, and again at step 5."""
    folder.mkdir()
    return swept_again(folder, p_uncond, features_hash)


def swept_again(folder: Path, p_uncond: float, features_hash: str = "f", **changes: Any) -> Path:
    config = tiny_config(**dict(train__p_uncond=p_uncond, eval__weights=(0.0, 4.0)) | changes)
    network = features.FeatureNetwork("classifier", features_hash, lambda _: features.Outputs(*[np.zeros((1, 1))] * 3))
    for cell in evaluation.grid(config, 3) + evaluation.grid(config, 5):
        manifest = evaluation.manifest_of(config, cell, "weights", "", "reference", network)
        fid = 10 * p_uncond + cell["w"] + 50 * (cell["step"] == 3)
        measured = dict.fromkeys(results.MEASURED, 0.5) | {"fid": fid, "is": 20 - cell["w"]}
        name = results.manifest_name(manifest)
        results.write_manifest(str(folder), manifest)
        if name not in {row["manifest"] for row in results.latest(str(folder))}:  # as a sweep does
            results.append_row(str(folder), cell | measured | {"manifest": name})
    return folder


def test_runs_are_put_side_by_side_as_in_the_paper(tmp_path: Path) -> None:
    half, tenth = swept(tmp_path / "half", 0.5), swept(tmp_path / "tenth", 0.1)
    text = evaluation.compare(tiny_config(), str(half), [str(tenth)])
    assert text.splitlines() == [
        "| w | FID-20 p_uncond = 0.1 / 0.5 | IS p_uncond = 0.1 / 0.5 |",
        "|---|---|---|",
        "| 0 | 1.00 / 5.00 | 20.00 / 20.00 |",
        "| 4 | 5.00 / 9.00 | 16.00 / 16.00 |",
    ]
    assert (half / "compare.md").read_text() == text + "\n" and (half / "compare.png").exists()

    with pytest.raises(ValueError, match="nothing tells them apart"):
        evaluation.compare(tiny_config(), str(half), [str(swept(tmp_path / "again", 0.5))])
    with pytest.raises(ValueError, match="different references or feature networks"):
        evaluation.compare(tiny_config(), str(half), [str(swept(tmp_path / "fifth", 0.2, features_hash="g"))])
    with pytest.raises(ValueError, match="has no sweep"):
        evaluation.compare(tiny_config(), str(half), [str(tmp_path)])
    swept_again(half, 0.5, features_hash="g")
    with pytest.raises(ValueError, match="different references or feature networks"):
        evaluation.compare(tiny_config(), str(half), [str(tenth)])
    swept_again(half, 0.5)  # the remedy
    assert evaluation.compare(tiny_config(), str(half), [str(tenth)]) == text
    last = results.latest(str(half))[-1]
    manifest = half / "manifests" / f"{last['manifest']}.json"
    for damaged in (b"{}", b"[1]", b"null", b"\xff\xfe"):
        manifest.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"{manifest.name} is not there, or is damaged: sweep .* again at w = {last['w']:g}"
        ):
            evaluation.compare(tiny_config(), str(half), [str(tenth)])
    swept_again(half, 0.5)  # the remedy
    assert evaluation.compare(tiny_config(), str(half), [str(tenth)]) == text


def test_a_curve_is_of_one_reference(tmp_path: Path) -> None:
    """A weight that is swept with another takes the place of all that was swept before, not of one point of it."""
    folder = swept(tmp_path / "run", 0.1)
    rows = results.latest(str(folder))
    assert [(row["step"], row["w"]) for row in rows] == [(3, 0.0), (3, 4.0), (5, 0.0), (5, 4.0)]
    swept_again(folder, 0.1, eval__weights=(1.0,))  # one more of the same
    assert [row["w"] for row in results.latest(str(folder)) if row["step"] == 5] == [0.0, 4.0, 1.0]
    swept_again(folder, 0.1, features_hash="g", eval__weights=(1.0,))
    assert [row["w"] for row in results.latest(str(folder))] == [1.0, 1.0]
    assert len(results.read_rows(str(folder))) == 8
    swept_again(folder, 0.1, eval__weights=(1.0, 2.0))  # what was swept at first is back
    assert sorted(row["w"] for row in results.latest(str(folder)) if row["step"] == 5) == [0.0, 1.0, 2.0, 4.0]


def test_rows_of_the_other_guidance_are_shown_beside_only_where_all_else_is_equal(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    rows = []
    changes: list[dict[str, Any]] = [{}, {"sample__num_steps": 5}, {"eval__seed": 3}, {"sample__clip": False}]
    for change in changes:
        for guidance in ("classifier", "classifier-free"):
            before = len(results.read_rows(str(tmp_path / "run")))
            swept_again(tmp_path / "run", 0.1, sample__guidance=guidance, **change)
            rows.append(results.read_rows(str(tmp_path / "run"))[before:])
    by_classifier, free, *_, without_clipping = rows
    assert evaluation.beside(str(tmp_path / "run"), without_clipping) == rows[-2]
    assert evaluation.beside(str(tmp_path / "run"), free) == []  # the classifier's were measured again otherwise
    swept_again(tmp_path / "run", 0.1, sample__guidance="classifier")
    assert [row["manifest"] for row in evaluation.beside(str(tmp_path / "run"), free)] == [
        row["manifest"] for row in by_classifier
    ]


def test_the_ends_of_intervals_are_kept_whole() -> None:
    config = tiny_config(eval__intervals=((-1.23456789, 2.0), (-1.23457, 2.0), (-30.0, 0.0), ()))
    cells = {cell["interval"]: evaluation.ends(cell) for cell in evaluation.grid(config, 1)}
    assert cells == {
        "-1.23456789:2": (-1.23456789, 2.0),
        "-1.23457:2": (-1.23457, 2.0),
        "-30:0": (-30.0, 0.0),
        "": (),
    }


def test_a_row_that_is_measured_again_takes_the_place_of_the_old_one() -> None:
    old, other = (cell | {"fid": 1.0} for cell in evaluation.grid(tiny_config(eval__weights=(0.0, 1.0)), 5))
    new = old | {"fid": 2.0}
    assert list(results.curves([old, other, new]).values()) == [[new, other]]


def test_a_sweep_of_other_columns_is_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "sweep.csv").write_text("w,fid\n0.0,3.0\n")
    with pytest.raises(ValueError, match="has other columns than this version writes"):
        results.read_rows(str(tmp_path))


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    row = copy.copy(evaluation.grid(tiny_config(), 3)[1]) | dict.fromkeys(results.MEASURED) | {"manifest": "00e1"}
    row |= {"fid": 1 / 3, "is": 2.0}
    results.append_row(str(tmp_path), row)
    assert results.read_rows(str(tmp_path)) == [row]
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert next(csv.reader(file)) == list(results.COLUMNS)
    assert results.fid_name(49_999) == "FID-49999" and results.fid_name(50_000) == "FID"
