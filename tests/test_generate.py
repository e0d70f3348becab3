"""Images that depend on nothing but seed, number, class and weight; and the files that `--mode=sample` writes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image
from tiny import tiny_config

from cfd import checkpoint, evaluation, generate, npz, parallel, preemption, workdir
from cfd.config import describe
from cfd.generate import Request, grid_request, make_draw, to_uint8
from cfd.guidance import Interval, classifier_guidance
from cfd.sampling import ancestral, ddim, dpm_solver, guided_sample

pytestmark = pytest.mark.usefixtures("compile_once")

TRACED: list[int] = []
"""A batch size for each time that the network was traced."""


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
    """In place of the U-Net one layer that mixes all pixels, the class and the noise level."""

    def eps_of_params(params: Any) -> Any:
        def eps_fn(z: Any, logsnr: Any, labels: Any) -> Any:
            TRACED.append(len(z))
            h = z.reshape(len(z), -1) @ params["mix"] + params["class"][labels] + 0.01 * logsnr[:, None]
            return jnp.tanh(h).reshape(z.shape)

        return eps_fn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "eps_of_params", lambda config: eps_of_params)
        yield


@pytest.fixture(scope="module")
def params() -> Any:
    rng = np.random.default_rng(0)
    mix, classes = rng.normal(0, 0.15, (64, 64)), rng.normal(0, 0.5, (11, 64))
    return {"mix": mix.astype(np.float32), "class": classes.astype(np.float32)}


def mesh_of(data: int, fsdp: int = 1) -> Mesh:
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def images_of(params: Any, request: Request, batch_size: int = 16, mesh: Mesh | None = None) -> np.ndarray:
    mesh = mesh or mesh_of(1)
    config = tiny_config(sample__batch_size=batch_size)
    batches = list(make_draw(config, config.sample, mesh)(parallel.replicate(mesh, params), request))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    return np.concatenate(batches)


def some(count: int) -> Request:
    index = np.arange(count, dtype=np.int32)
    return Request(np.full(count, 7, np.uint32), index, index % 10, (index % 3).astype(np.float32))


def rows(request: Request, which: Any) -> Request:
    return Request(*(column[which] for column in request))


def assert_same_images(a: np.ndarray, b: np.ndarray) -> None:
    """Equal but for the rounding of a few values: RELIABILITY allows one grey level."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max(initial=0) <= 1 and (difference > 0).mean() <= 1e-3


@pytest.fixture(scope="module")
def forty(params: Any) -> np.ndarray:
    return images_of(params, some(40))


def test_images_differ_by_seed_number_class_and_weight(params: Any, forty: np.ndarray) -> None:
    assert len(np.unique(forty.reshape(40, -1), axis=0)) == 40
    one = rows(some(1), np.zeros(4, int))
    changed = one._replace(
        seed=np.array([7, 8, 7, 7], np.uint32), label=np.array([0, 0, 1, 0]), w=np.array([0, 0, 0, 3.0], np.float32)
    )
    images = images_of(params, changed._replace(label=changed.label.astype(np.int32)))
    assert len(np.unique(images.reshape(4, -1), axis=0)) == 4
    assert_same_images(images[:1], forty[:1])


@pytest.mark.parametrize("batch_size", [8, 64])
def test_the_batch_size_does_not_matter(params: Any, forty: np.ndarray, batch_size: int) -> None:
    assert_same_images(images_of(params, some(40), batch_size), forty)


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2)])
def test_the_devices_do_not_matter(params: Any, forty: np.ndarray, mesh: tuple[int, int]) -> None:
    assert_same_images(images_of(params, some(40), mesh=mesh_of(*mesh)), forty)


def test_the_request_does_not_matter(params: Any, forty: np.ndarray) -> None:
    mixed = np.random.default_rng(1).permutation(40)[:21]
    assert_same_images(images_of(params, rows(some(40), mixed)), forty[mixed])
    np.testing.assert_array_equal(images_of(params, rows(some(40), [5])), images_of(params, rows(some(40), [5])))


def brighter(params: Any, z: Any, logsnr: Any) -> Any:
    """A noisy classifier, to which a brighter image is of a higher class."""
    return params * jnp.arange(10.0)[None] * jnp.mean(z, axis=(1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("sampler", "rule", "guided"),
    [("ancestral", ancestral(0.9), False), ("ddim", ddim(), False), ("dpm_solver", dpm_solver(), True)],
    ids=("ancestral", "ddim", "dpm_solver by a classifier"),
)
def test_images_are_those_of_the_sampler_itself(params: Any, sampler: str, rule: Any, guided: bool) -> None:
    ends: dict[str, Any] = dict(logsnr_min=-8.0, logsnr_max=9.0)
    config = tiny_config(
        sample__sampler=sampler,
        sample__v=0.9,
        sample__interval=(-3.0, 5.0),
        **{f"process__{name}": end for name, end in ends.items()},
    )
    request = some(16)
    classifier = jax.tree_util.Partial(brighter, jnp.float32(3.0)) if guided else None
    placed = parallel.replicate(mesh_of(1), (params, classifier))
    (images,) = make_draw(config, config.sample, mesh_of(1))(placed[0], request, classifier=placed[1])

    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(request.index)
    eps_fn, w = generate.eps_of_params(config)(params), Interval(jnp.asarray(request.w), -3.0, 5.0)
    if classifier is not None:
        eps_fn, w = classifier_guidance(eps_fn, classifier, w), 0.0
    x = guided_sample(keys, eps_fn, jnp.asarray(request.label), (8, 8, 1), w=w, num_steps=4, sampler=rule, **ends)
    assert_same_images(images, np.asarray(to_uint8(x)))


def test_one_program_serves_every_weight_v_interval_and_seed(params: Any) -> None:
    config = tiny_config()
    draw = make_draw(config, config.sample, mesh_of(1))
    placed = parallel.replicate(mesh_of(1), params)
    list(draw(placed, some(16)))
    TRACED.clear()
    for w in np.linspace(0.0, 4.0, 14, dtype=np.float32):
        list(draw(placed, some(20)._replace(w=np.full(20, w, np.float32)), v=float(w / 4.0)))
    list(draw(placed, some(3)._replace(seed=np.full(3, 2**32 - 1, np.uint32)), interval=(-1.0, 1.0)))
    assert TRACED == []


def test_a_class_keeps_its_image_whatever_the_other_classes_are() -> None:
    few, many = grid_request((7,), (3, 4), (0.0, 2.0)), grid_request((0, 7), (3, 4), (0.0, 2.0))
    assert [column.tolist() for column in few] == [[3, 3, 4, 4], [7] * 4, [7] * 4, [0.0, 2.0, 0.0, 2.0]]
    assert [column[4:].tolist() for column in many] == [column.tolist() for column in few]
    assert [column.dtype.name for column in few] == ["uint32", "int32", "int32", "float32"]


def test_rounding_is_to_the_nearest_level_and_is_undone_by_scaling() -> None:
    levels = np.arange(256)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(levels / 127.5 - 1.0, jnp.float32)), levels)
    x = np.random.default_rng(0).uniform(-1.5, 1.5, 10_000).astype(np.float32)
    exact = np.clip((x.astype(np.float64) + 1.0) * 127.5, 0.0, 255.0)
    assert np.abs(np.asarray(to_uint8(jnp.asarray(x)), np.float64) - exact).max() <= 0.5 + 1e-4
    ends = jnp.asarray([-np.inf, -1.0, 1.0, np.inf, -1e30, 1e30], jnp.float32)
    np.testing.assert_array_equal(to_uint8(ends), [0, 0, 255, 255, 0, 255])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, params: Any, tmp_path: Path) -> Path:
    """The folder of a run at step 7."""

    def load_run(config: Any, folder: str) -> checkpoint.Loaded:
        names = tuple(f"class {c}" for c in range(10))
        return checkpoint.Loaded(lambda *_: _[0], params, (8, 8, 1), 10, names, config.to_dict(), 7)

    monkeypatch.setattr(generate, "load_run", load_run)
    return tmp_path


def test_sample_writes_a_grid_and_openais_npz(run: Path, params: Any, capsys: pytest.CaptureFixture) -> None:
    config = tiny_config(sample__seeds=(0, 5))
    path = generate.sample(config, str(run))
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.mode == "RGB"
        assert image.height > 4 * 64 and image.width > 2 * 64  # classes and seeds, by weights, enlarged
    held = npz.read_npz(path.replace(".png", ".npz"))
    assert list(held) == ["arr_0", "arr_1"]
    assert held["arr_0"].dtype == np.uint8 and held["arr_0"].shape == (8, 8, 8, 1)
    assert held["arr_1"].tolist() == [0, 0, 0, 0, 7, 7, 7, 7]
    assert_same_images(held["arr_0"], images_of(params, grid_request((0, 7), (0, 5), (0.0, 2.0)), mesh=mesh_of(8)))
    flops = 8 * generate.evaluation_flops(config, params)
    said = capsys.readouterr().out
    assert re.search(rf"8 images, 8 network evaluations or {re.escape(f'{flops:.3g}')} FLOP .* images/s", said)


def test_a_sample_is_guided_by_the_classifier_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for scale in (0.0, 3.0):
        classifier = jax.tree_util.Partial(brighter, jnp.float32(scale))
        monkeypatch.setattr(generate, "load_guide", lambda *_, classifier=classifier: classifier)
        path = generate.sample(tiny_config(sample__guidance="classifier"), str(run))
        images.append(npz.read_npz(path.replace(".png", ".npz"))["arr_0"])
    silent, telling = images
    np.testing.assert_array_equal(silent[0::2], silent[1::2])
    np.testing.assert_array_equal(telling[0::2], silent[0::2])
    assert (telling[3] != silent[3]).any(), "class 7 at w = 2"


def test_a_stop_says_that_the_images_are_drawn_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "requested", lambda: True)
    with pytest.raises(preemption.Stopped, match="after 4 of 4 images, which are all drawn again"):
        generate.sample(tiny_config(), str(run))


def test_other_settings_do_not_overwrite(run: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"sample__w": (0.0, 3.0)}, {"sample__v": 1.0}, {"sample__seeds": (1,)}]
    paths = [generate.sample(tiny_config(**change), str(run)) for change in changes]
    assert len(set(paths)) == len(paths) and len(list((run / "samples").iterdir())) == 2 * len(paths)
    before = Path(paths[0]).read_bytes()
    assert generate.sample(tiny_config(), str(run)) == paths[0]
    assert Path(paths[0]).read_bytes() == before


def test_a_preview_is_the_same_grid(run: Path, params: Any) -> None:
    (run / "samples").mkdir()
    pixels = generate.preview(tiny_config(), mesh_of(1), str(run), tuple("0123456789"))(12, params)
    with Image.open(run / "samples" / "step_0000012.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_preview_draws_no_more_rows_than_it_shows_and_stops_between_batches(
    run: Path, params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, real = [], generate.make_draw
    monkeypatch.setattr(generate, "make_draw", lambda *args: sizes.append(args[1].batch_size) or real(*args))
    for devices, batch_size, rows in ((1, 16, 4), (8, 16, 8), (1, 2, 2)):
        generate.preview(tiny_config(sample__batch_size=batch_size), mesh_of(devices), str(run), tuple("0123456789"))
        assert sizes[-1] == rows
    monkeypatch.setattr(preemption, "requested", lambda: True)
    draw = generate.preview(tiny_config(sample__batch_size=2), mesh_of(1), str(run), tuple("0123456789"))
    assert draw(12, params) is None and not (run / "samples").exists()
    draw = generate.preview(tiny_config(), mesh_of(1), str(run), tuple("0123456789"))
    assert draw(12, params) is not None, "a picture that is whole"


def test_a_missing_or_foreign_classifier_is_noticed_beforehand(tmp_path: Path) -> None:
    config = tiny_config(sample__guidance="classifier")
    with pytest.raises(ValueError, match=r"classifier holds no noisy classifier.*--mode=train_classifier"):
        evaluation.check(config, str(tmp_path))
    theirs = tiny_config(data__image_size=4)
    workdir.write_config(tmp_path / "classifier", describe("classifier", theirs, tuple("0123456789")))
    with pytest.raises(ValueError, match=r"classifier was trained with data.image_size = 4, not 8"):
        evaluation.check(config, str(tmp_path))
    theirs = tiny_config(process__logsnr_max=5.0)
    workdir.write_config(tmp_path / "classifier", describe("classifier", theirs, tuple("0123456789")))
    evaluation.check(config, str(tmp_path))


def test_a_preview_shows_no_weight_that_the_run_does_not_train(run: Path, params: Any) -> None:
    with pytest.raises(ValueError, match="p_uncond = 0 does not train"):
        generate.preview(tiny_config(train__p_uncond=0.0), mesh_of(1), str(run), tuple("0123456789"))
    changes: list[dict[str, Any]] = [{"sample__guidance": "classifier", "train__p_uncond": 0.0}, {"sample__w": (0.0,)}]
    by_classifier, alone = (
        generate.preview(tiny_config(**change), mesh_of(1), str(run), tuple("0123456789"))(12, params)
        for change in changes
    )
    np.testing.assert_array_equal(by_classifier, alone)


def test_without_a_cpu_nothing_counts_operations(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_cpu(backend: str) -> list[Any]:
        raise RuntimeError(f"Unknown backend {backend}")

    assert generate.evaluation_flops(tiny_config(), params) > 2 * 64 * 64  # the mix of all pixels
    monkeypatch.setattr(jax, "local_devices", no_cpu)
    assert np.isnan(generate.evaluation_flops(tiny_config(), params))


def test_batches_that_devices_do_not_divide_are_refused() -> None:
    config = tiny_config(sample__batch_size=12)
    with pytest.raises(ValueError, match=r"sample\.batch_size is 12, which 8 devices do not divide"):
        make_draw(config, config.sample, mesh_of(8))


def test_a_run_of_another_config_is_not_sampled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        generate.load_run(tiny_config(), str(tmp_path))
    workdir.write_config(tmp_path, describe("diffusion", tiny_config(), tuple("0123456789")))
    with pytest.raises(ValueError, match=r"num_res_blocks: 1 there, 2 here"):
        generate.load_run(tiny_config(model__num_res_blocks=2), str(tmp_path))
    with pytest.raises(ValueError, match="has no step"):
        generate.load_run(tiny_config(sample__v=0.9), str(tmp_path))
