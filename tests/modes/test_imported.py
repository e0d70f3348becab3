"""An imported network of ADM as a run: sampled and swept like any other, without the images of its training."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adm_formula import printed
from dinov2_formula import SMALL, dinov2_state
from inception_formula import inception_state
from meshes import mesh_of
from mixing import assert_same_images
from tiny import QUICK, ROOT

from cfd.config import complete
from cfd.convert.adm import _write_run
from cfd.convert.adm_network import Network
from cfd.convert.dinov2 import dinov2_params_from_torch
from cfd.convert.inception import inception_params_from_torch
from cfd.devices import parallel, xla
from cfd.errors import UserError
from cfd.evaluation import dinov2, inception
from cfd.evaluation.features import FeatureNetwork, Outputs, open_dinov2
from cfd.guidance import classifier_guidance, shift_mean
from cfd.loading import load, load_classifier
from cfd.modes import settings, sweep
from cfd.modes.report import report
from cfd.modes.sample import sample
from cfd.modes.sampler import to_uint8
from cfd.networks.times import respaced
from cfd.runs import manifest, npz, results, workdir
from cfd.sampling import ancestral, guided_sample

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
]

SIZE, CLASSES = 8, 4


def imported(folder: Path, kind: str = "diffusion", classes: int = CLASSES) -> str:
    """The folder of a run as `cfd.convert adm --keep-variance` writes it, for a small network of random weights."""
    fields: dict[str, Any] = dict(num_classes=classes, base_channels=32, channel_mult=(1,), num_res_blocks=1)
    fields |= dict(attention_resolutions=(), head_channels=32, num_heads=0, resblock_updown=True)
    fields |= dict(scale_shift_norm=True, dropout=0.0, time="adm_cosine", dtype="float32", remat=False)
    if kind == "diffusion":
        fields["out_channels"] = 6
    network = Network(kind, fields, SIZE, "new", "cosine")
    module, z, one = network.module(), jnp.zeros((1, SIZE, SIZE, 3)), jnp.zeros(1)
    inputs = (z, one, jnp.zeros(1, jnp.int32)) if kind == "diffusion" else (z, one)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    numbers, scale = np.random.default_rng(0), {"diffusion": 0.1, "classifier": 0.5}[kind]
    params = jax.tree.map(lambda x: jnp.asarray(numbers.normal(0, scale, x.shape), jnp.float32), shapes)
    _write_run(folder, network, params, 3)
    return str(folder)


def config_of(folder: str, **changes: Any) -> Any:
    """The config that `--config=RUN` gives, with small numbers and `changes`: `eval__weights=(0.0,)`."""
    config = settings.config_of_run(folder)
    small = dict(sample__num_steps=3, sample__batch_size=8, sample__w=(0.0,), eval__weights=(0.0,), eval__num_samples=8)
    for name, value in (small | changes).items():
        group, _, field = name.partition("__")
        config[group][field] = value
    return complete(config)


def halves(images: np.ndarray) -> Outputs:
    """Features of two numbers, in place of Inception's."""
    return Outputs(images.reshape(len(images), 2, -1).mean(axis=2), None, np.full((len(images), 2), 0.5))


@pytest.fixture
def without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The fields of `eval` for Inception and a reference file. One device, and no data set that could be opened."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    monkeypatch.setattr(xla, "compiler_options", lambda: QUICK)
    monkeypatch.setattr(sweep, "open_inception", lambda *_: FeatureNetwork("inception", "i" * 64, halves))
    monkeypatch.setattr(inception, "load_params", lambda _: {})
    monkeypatch.setattr(settings, "open_dataset", lambda **_: pytest.fail("a data set was opened"))
    weights, file = tmp_path / "inception.npz", tmp_path / "reference.npz"
    weights.touch()
    npz.write_npz(file, {"arr_0": np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), np.uint8)})
    return dict(eval__features="inception", eval__inception_path=str(weights), eval__reference=str(file))


def sampled(folder: str, seed: int, index: list[int], labels: list[int], w: float = 0.0) -> np.ndarray:
    """Images by `guided_sample` itself, from what `load` and `load_classifier` give."""
    run = load(folder)
    eps_fn = run.eps_fn if run.num_classes else lambda z, logsnr, labels: run.eps_fn(z, logsnr, 0 * labels - 1)
    if w:
        eps_fn = classifier_guidance(eps_fn, load_classifier(f"{folder}/classifier"), w)
    key = jax.random.key(seed, impl="threefry2x32")
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.array(index))
    options: dict[str, Any] = dict(num_steps=3, sampler=ancestral(0.3), **run.process)

    def draw(keys: Any, labels: Any) -> Any:
        return to_uint8(guided_sample(keys, eps_fn, labels, run.image_shape, **options))

    return np.asarray(jax.jit(draw, compiler_options=QUICK)(keys, jnp.array(labels)))


def test_an_imported_network_is_swept_without_data(tmp_path: Path, without_data: dict[str, Any]) -> None:
    folder = imported(tmp_path / "run")
    (row,) = sweep.sweep(config_of(folder, **without_data), folder, folder)
    assert (row["step"], row["p_uncond"], row["labels"], row["class_accuracy"]) == (0, 0.0, "balanced", None)
    arrays = npz.read_npz(results.samples_path(folder, row))
    assert arrays["arr_1"].tolist() == [0, 1, 2, 3] * 2
    assert_same_images(arrays["arr_0"], sampled(folder, 1000, list(range(8)), [0, 1, 2, 3] * 2))
    made = manifest.read_manifest(folder, row["manifest"])
    assert made is not None and made["data"]["source"] == "adm" and made["reference"]["source"] == "reference.npz"
    assert "adm, 8x8, 4 classes" in Path(report(folder, folder)).read_text()

    with pytest.raises(UserError, match=r"w = 1 needs the unconditional score"):
        sweep.sweep(config_of(folder, **without_data, eval__weights=(1.0,)), folder, folder)
    with pytest.raises(UserError, match=r"has no step 5; its steps are \[0\]"):
        sweep.sweep(config_of(folder, **without_data, eval__steps=(0, 5)), folder, folder)


def test_a_sweep_with_dinov2(
    tmp_path: Path, without_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """The distance is that of the features of the images that it leaves. There is no Inception Score and no sFID."""
    monkeypatch.setattr(dinov2, "VIT_L", SMALL)
    folder, weights, statistics = imported(tmp_path / "run"), tmp_path / "dinov2.npz", tmp_path / "statistics.npz"
    evaluate = without_data | {"eval__features": "dinov2", "eval__dinov2_path": str(weights)}
    with pytest.raises(UserError, match=r"eval.dinov2_path is .*, which is no file; make it with `python -m cfd.conv"):
        sweep.check(config_of(folder, **evaluate), folder)
    npz.write_npz(weights, {"pos_embed": np.zeros((26, 128), np.float32)})
    with pytest.raises(UserError, match=r"does not hold DINOv2's ViT-L/14.*`python -m cfd.convert dinov2 FILE OUT`"):
        sweep.check(config_of(folder, **evaluate), folder)
    dinov2.save_params(weights, dinov2_params_from_torch(dinov2_state()))
    npz.write_npz(statistics, {"mu": np.zeros(2048), "sigma": np.eye(2048)})
    with pytest.raises(UserError, match=r"holds statistics of InceptionV3, but eval.features is 'dinov2'"):
        sweep.check(config_of(folder, **evaluate | {"eval__reference": str(statistics)}), folder)
    npz.write_npz(statistics, {"mu": np.zeros(1024), "sigma": np.eye(1024)})
    sweep.check(config_of(folder, **evaluate | {"eval__reference": str(statistics)}), folder)

    (row,) = sweep.sweep(config_of(folder, **evaluate), folder, folder)
    assert (row["features"], row["fid_name"], row["is"], row["sfid"]) == ("dinov2", "FD-DINOv2-8", None, None)
    extract = open_dinov2(str(weights), mesh_of(1)).extract
    paths = (results.samples_path(folder, row), evaluate["eval__reference"])
    ours, theirs = (extract(npz.read_npz(path)["arr_0"]).pool.astype(np.float64) for path in paths)
    roots = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (ours, theirs)]
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()  # tr (S T)^{1/2}, of S = A'A and T = B'B
    expected = ((ours.mean(axis=0) - theirs.mean(axis=0)) ** 2).sum() + sum((x**2).sum() for x in roots) - 2 * overlap
    assert expected > 1e-3
    np.testing.assert_allclose(row["fid"], expected, rtol=1e-4)
    assert not [w for w in recwarn if "Inception Score" in str(w.message)]


def test_what_needs_the_images_of_the_training_says_where_to_give_them(tmp_path: Path) -> None:
    folder = imported(tmp_path / "run")
    for changes in ({}, {"eval__features": "inception", "eval__inception_path": "no.npz"}):
        with pytest.raises(UserError, match=r"data.source is 'adm'.*set data.source.*eval.reference|Set data.source"):
            sweep.check(config_of(folder, **changes), folder)


def test_a_classifier_guides_an_imported_network(tmp_path: Path, without_data: dict[str, Any]) -> None:
    folder = imported(tmp_path / "run")
    by_classifier = dict(sample__guidance="classifier", eval__weights=(0.0, 3.0), **without_data)
    with pytest.raises(UserError, match=r"run/classifier holds no noisy classifier"):
        sweep.check(config_of(folder, **by_classifier), folder)
    imported(tmp_path / "run" / "classifier", "classifier")
    rows = sweep.sweep(config_of(folder, **by_classifier), folder, folder)
    unguided, guided = (npz.read_npz(results.samples_path(folder, row))["arr_0"] for row in rows)
    assert_same_images(guided, sampled(folder, 1000, list(range(8)), [0, 1, 2, 3] * 2, 3.0))
    assert (unguided != guided).any()


def test_a_learned_variance_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    """The same outputs are ε alone with a fixed variance. `load` names the sampler that its network can have."""
    folder = imported(tmp_path / "run")
    given = jnp.zeros((2, SIZE, SIZE, 3)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    shapes = {}
    for variance in ("fixed", "learned"):
        model = settings.open_run(config_of(folder, sample__variance=variance), folder).model_at(-1)
        shapes[variance] = jax.tree.map(lambda x: x.shape, jax.eval_shape(model.eps_fn, *given))
    assert shapes == {"fixed": given[0].shape, "learned": (given[0].shape, given[0].shape)}


@pytest.mark.slow
def test_adms_published_sampler_is_a_few_fields(tmp_path: Path, without_data: dict[str, Any]) -> None:
    """Its respaced steps, the network's variance, classes at random and Algorithm 1, as `guided_sample` does them."""
    folder = imported(tmp_path / "run")
    imported(tmp_path / "run" / "classifier", "classifier")
    adm = dict(sample__respacing="3", sample__variance="learned", sample__guidance="classifier-mean")
    (row,) = sweep.sweep(
        config_of(folder, **adm, eval__labels="random", eval__weights=(3.0,), **without_data), folder, folder
    )
    arrays = npz.read_npz(results.samples_path(folder, row))
    made = manifest.read_manifest(folder, row["manifest"])
    assert made is not None and made["sampling"]["variance"] == "learned" and made["sampling"]["respacing"] == "3"
    run, labels = load(folder, variance=True), jnp.asarray(arrays["arr_1"], jnp.int32)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1000, impl="threefry2x32"), i))(jnp.arange(8))

    def draw(keys: Any) -> Any:
        rule = shift_mean(ancestral(None), load_classifier(f"{folder}/classifier"), labels, 3.0)
        levels = respaced("3", "cosine")
        return to_uint8(guided_sample(keys, run.eps_fn, labels, run.image_shape, num_steps=levels, sampler=rule))

    assert_same_images(arrays["arr_0"], np.asarray(jax.jit(draw, compiler_options=QUICK)(keys)))


def test_an_unconditional_network_has_no_classes_but_those_of_its_classifier(
    tmp_path: Path, without_data: dict[str, Any]
) -> None:
    folder = imported(tmp_path / "run", classes=0)
    (row,) = sweep.sweep(config_of(folder, **without_data), folder, folder)
    arrays = npz.read_npz(results.samples_path(folder, row))
    assert arrays["arr_1"].tolist() == [-1] * 8
    assert_same_images(arrays["arr_0"], sampled(folder, 1000, list(range(8)), [-1] * 8))
    path = sample(config_of(folder, sample__seeds=(1000, 4)), folder, folder)
    images = npz.read_npz(path.replace(".png", ".npz"))["arr_0"]
    assert_same_images(images[:1], arrays["arr_0"][:1])  # number 0 of seed 1000
    assert (images[1] != images[0]).any() and "0 classes" in Path(report(folder, folder)).read_text()
    with pytest.raises(UserError, match=r"sample.classes is \(2,\), and the network has no classes: set it to \(\)"):
        sample(config_of(folder, sample__classes=(2,)), folder, folder)

    imported(tmp_path / "run" / "classifier", "classifier")
    guided = dict(sample__guidance="classifier", sample__seeds=(1000,), sample__w=(0.0, 3.0))
    path = sample(config_of(folder, **guided, sample__classes=(2,)), folder, folder)
    guided_arrays = npz.read_npz(path.replace(".png", ".npz"))
    assert guided_arrays["arr_1"].tolist() == [2, 2]
    assert_same_images(guided_arrays["arr_0"][:1], arrays["arr_0"][2:3])  # number 2 of seed 1000
    assert (guided_arrays["arr_0"][1] != guided_arrays["arr_0"][0]).any()
    with pytest.raises(UserError, match=r"sample.classes has 4; classes are 0 to 3"):
        sample(config_of(folder, **guided, sample__classes=(4,)), folder, folder)


def test_a_copy_of_the_training_images_can_be_anywhere(tmp_path: Path) -> None:
    folder = imported(tmp_path / "run")
    elsewhere = dict(data__source="folder", data__path="copy", data__flip=True, train__batch_size=7, seed=3)
    changes = {name: value for name, value in elsewhere.items() if name != "seed"}
    assert settings.open_run(config_of(folder, **changes), folder).model_at(-1).step == 0
    for name, value in (("data__image_size", 16), ("process__logsnr_min", -20.0), ("train__p_uncond", 0.5)):
        field = name.replace("__", ".")
        with pytest.raises(
            UserError, match=rf"is another run's: {field}: .* there, {value} here.*--config={folder} is"
        ):
            settings.open_run(config_of(folder, **{name: value}), folder)
    settings.check_class_names(folder, ("ant", "bee", "cat", "dog"), "train")
    with pytest.raises(UserError, match=r"has 4 classes, and data.split 'train' has 3"):
        settings.check_class_names(folder, ("ant", "bee", "cat"), "train")


@pytest.mark.parametrize("size", [64, 128])
def test_the_config_of_a_published_network_is_whole(size: int, tmp_path: Path) -> None:
    """The default noisy classifier has attention at heights that a network for 128x128 images does not have."""
    attention = dict(attention_resolutions=[32, 16, 8], head_channels=64, num_heads=0)
    model: dict[str, Any] = dict(
        channel_mult=[1, 2, 3, 4] if size == 64 else [1, 1, 2, 3, 4], time="adm_cosine", **attention
    )
    model |= dict(num_classes=1000, base_channels=192, out_channels=6)
    data = dict(source="adm", name="", image_size=size, channels=3, num_classes=1000)
    config = dict(data=data, model=model, process=dict(logsnr_min=-19.0, logsnr_max=9.0), train=dict(p_uncond=0.0))
    workdir.write_config(tmp_path, workdir.describe("diffusion", config, [str(c) for c in range(1000)]))
    whole = complete(settings.config_of_run(str(tmp_path)))
    assert whole.model.channel_mult == tuple(model["channel_mult"]) == whole.classifier.channel_mult
    assert (whole.process.logsnr_min, whole.train.p_uncond, whole.sample.num_steps) == (-19.0, 0.0, 256)


def command(*arguments: str) -> str:
    """The output of `python -m cfd.main`, which must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "cfd.main", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_imported_network_is_sampled_by_the_command(tmp_path: Path) -> None:
    folder = imported(tmp_path / "run")
    small = ["--config.sample.num_steps=3", "--config.sample.batch_size=4", "--config.sample.w=(0.0,)"]
    said = command(f"--config={folder}/config.json", "--mode=sample", "--config.sample.classes=(3, 1)", *small)
    written = said.split("Wrote ")[1].split(".png")[0]
    assert written.startswith(f"{folder}/samples/sample_step_0000000_")
    arrays = npz.read_npz(f"{written}.npz")
    assert arrays["arr_1"].tolist() == [3, 1]
    assert_same_images(arrays["arr_0"], sampled(folder, 0, [3, 1], [3, 1]))


@pytest.mark.slow
def test_adms_weights_and_adms_metrics_in_one_command(tmp_path: Path) -> None:
    """The command of configs/README.md with InceptionV3, its weights by formula, and a reference of images."""
    ours, folder, weights = printed("small"), tmp_path / "run", tmp_path / "inception.npz"
    _write_run(folder, ours.network, ours.params, 3)
    classifier = printed("classifier_small")
    _write_run(folder / "classifier", classifier.network, classifier.params, 3)
    inception.save_params(weights, inception_params_from_torch(inception_state()))
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    npz.write_npz(tmp_path / "reference.npz", {"arr_0": images})
    evaluate = dict(features="inception", inception_path=weights, reference=tmp_path / "reference.npz")
    fields = [
        f"--config.eval.{name}={value}" for name, value in (evaluate | dict(weights=(0.5,), num_samples=8)).items()
    ]
    small = ["--config.sample.num_steps=2", "--config.sample.batch_size=8"]
    adm = ["--config.sample.variance=learned", "--config.sample.respacing=2", "--config.eval.labels=random"]
    adm += ["--config.sample.guidance=classifier-mean"]
    said = command(f"--config={folder}", "--mode=sweep", *fields, *small, *adm)
    (row,) = results.read_rows(str(folder))
    assert row["step"] == 0 and row["sfid"] is not None and f"| 0.5 | {row['fid']:.2f} ± " in said
