"""Images depend on seed, number, class and weight, and on nothing else; and the cost of an image is counted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax_settings import jax_setting
from meshes import mesh_of
from mixing import NETWORK, TRACED, assert_same_images, brighter
from mixing import params as mixing_params
from tiny import tiny_config

from cfd.devices import parallel
from cfd.guidance import Interval, classifier_guidance
from cfd.modes.sampler import Network, SampleSpec, compile_sampler, evaluation_flops, evaluations, to_uint8
from cfd.modes.settings import sampling_of
from cfd.process import linear
from cfd.sampling import ancestral, ddim, dpm_solver, grid, guided_sample, schedule, sde_dpm_solver


@pytest.fixture(scope="module")
def params() -> Any:
    return mixing_params()


def images_of(params: Any, spec: SampleSpec, batch_size: int = 16, mesh: Mesh | None = None) -> np.ndarray:
    """The images of `spec`, in batches that are all full except the last."""
    mesh = mesh or mesh_of(1)
    sampler = compile_sampler(NETWORK, sampling_of(tiny_config(sample__batch_size=batch_size)), mesh)
    batches = list(sampler(parallel.replicate(mesh, params), spec))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    return np.concatenate(batches)


def some(count: int) -> SampleSpec:
    """The first images of seed 7, of all classes and of the weights 0, 1 and 2."""
    index = np.arange(count, dtype=np.int32)
    return SampleSpec(np.full(count, 7, np.uint32), index, index % 10, (index % 3).astype(np.float32))


def rows(spec: SampleSpec, which: Any) -> SampleSpec:
    return SampleSpec(*(column[which] for column in spec))


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
def test_an_image_does_not_depend_on_the_batch_size(params: Any, forty: np.ndarray, batch_size: int) -> None:
    assert_same_images(images_of(params, some(40), batch_size), forty)


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2)])
def test_an_image_does_not_depend_on_the_devices(params: Any, forty: np.ndarray, mesh: tuple[int, int]) -> None:
    assert_same_images(images_of(params, some(40), mesh=mesh_of(*mesh)), forty)


def test_an_image_does_not_depend_on_the_other_images(params: Any, forty: np.ndarray) -> None:
    mixed = np.random.default_rng(1).permutation(40)[:21]
    assert_same_images(images_of(params, rows(some(40), mixed)), forty[mixed])
    np.testing.assert_array_equal(images_of(params, rows(some(40), [5])), images_of(params, rows(some(40), [5])))


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_an_image_does_not_depend_on_jax_s_default_prng(params: Any, forty: np.ndarray, implementation: str) -> None:
    """Under `vmap`, a key of "rbg" draws numbers that depend on the row, and all keys draw those of the first."""
    backwards = np.arange(40)[::-1]
    with jax_setting("jax_default_prng_impl", implementation):
        assert_same_images(images_of(params, rows(some(40), backwards)), forty[backwards])
        assert_same_images(images_of(params, rows(some(40), [5]), batch_size=8), forty[5:6])


def test_a_setting_that_changes_the_meaning_of_seeds_is_refused(params: Any) -> None:
    sampler = compile_sampler(NETWORK, sampling_of(tiny_config()), mesh_of(1))
    on_mesh = parallel.replicate(mesh_of(1), params)
    list(sampler(on_mesh, some(16)))
    with jax_setting("jax_threefry_partitionable", False):
        with pytest.raises(ValueError, match="jax_threefry_partitionable is False"):
            compile_sampler(NETWORK, sampling_of(tiny_config()), mesh_of(1))
        with pytest.raises(ValueError, match="jax_threefry_partitionable is False"):
            list(sampler(on_mesh, some(16)))


@pytest.mark.parametrize(
    ("sampler", "rule", "guided"),
    [
        ("ancestral", ancestral(0.9), False),
        ("ddim", ddim(), False),
        ("dpm_solver", dpm_solver(), True),
        ("sde_dpm_solver", sde_dpm_solver(0.9), False),
    ],
    ids=("ancestral", "ddim", "dpm_solver by a classifier", "sde_dpm_solver"),
)
def test_images_are_those_of_guided_sample(params: Any, sampler: str, rule: Any, guided: bool) -> None:
    ends: dict[str, Any] = dict(logsnr_min=-8.0, logsnr_max=9.0)
    linear_grid = sampler == "ddim"
    config = tiny_config(
        sample__schedule="linear" if linear_grid else "",
        sample__sampler=sampler,
        sample__v=0.9,
        sample__interval=(-3.0, 5.0),
        **{f"process__{name}": end for name, end in ends.items()},
    )
    spec = some(16)
    classifier = jax.tree_util.Partial(brighter, {"strength": jnp.float32(3.0)}) if guided else None
    on_mesh = parallel.replicate(mesh_of(1), (params, classifier))
    (images,) = compile_sampler(NETWORK, sampling_of(config), mesh_of(1))(on_mesh[0], spec, classifier=on_mesh[1])

    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(spec.index)
    eps_fn, w = NETWORK.eps_of_params(params), Interval(jnp.asarray(spec.w), -3.0, 5.0)
    if classifier is not None:
        eps_fn, w = classifier_guidance(eps_fn, classifier, w), 0.0
    levels = grid(4, linear(**ends)) if linear_grid else 4
    x = guided_sample(keys, eps_fn, jnp.asarray(spec.label), (8, 8, 1), w=w, num_steps=levels, sampler=rule, **ends)
    assert_same_images(images, np.asarray(to_uint8(x)))


def test_one_program_serves_every_weight_v_interval_and_seed(params: Any) -> None:
    sampler = compile_sampler(NETWORK, sampling_of(tiny_config()), mesh_of(1))
    on_mesh = parallel.replicate(mesh_of(1), params)
    list(sampler(on_mesh, some(16)))
    TRACED.clear()
    for w in np.linspace(0.0, 4.0, 14, dtype=np.float32):
        list(sampler(on_mesh, some(20)._replace(w=np.full(20, w, np.float32)), v=float(w / 4.0)))
    list(sampler(on_mesh, some(3)._replace(seed=np.full(3, 2**32 - 1, np.uint32)), interval=(-1.0, 1.0)))
    assert TRACED == []


def test_rounding_is_to_the_nearest_level_and_is_undone_by_scaling() -> None:
    levels = np.arange(256)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(levels / 127.5 - 1.0, jnp.float32)), levels)
    x = np.random.default_rng(0).uniform(-1.5, 1.5, 10_000).astype(np.float32)
    exact = np.clip((x.astype(np.float64) + 1.0) * 127.5, 0.0, 255.0)
    assert np.abs(np.asarray(to_uint8(jnp.asarray(x)), np.float64) - exact).max() <= 0.5 + 1e-4
    ends = jnp.asarray([-np.inf, -1.0, 1.0, np.inf, -1e30, 1e30], jnp.float32)
    np.testing.assert_array_equal(to_uint8(ends), [0, 0, 255, 255, 0, 255])


@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize(
    ("rule", "interval"),
    [
        ("", (-2.0, 5.0)),
        ("interval(-2, 5)", ()),
        ("ramp(-4, 2)", ()),
        ("rescale(0.5)", (-2.0, 5.0)),
        ("cfgpp()", ()),
        ("every(4)", ()),
        ("extrapolated(2)", (-2.0, 5.0)),
    ],
)
def test_a_guide_is_evaluated_as_often_as_is_counted(w: float, rule: str, interval: tuple[float, ...]) -> None:
    """Not outside the interval, at w = 0 only for a rule that needs both scores, and at every k-th step if asked."""
    calls: list[str] = []

    def counting(name: str) -> Network:
        def eps_fn(z: jax.Array, logsnr: jax.Array, labels: jax.Array) -> jax.Array:
            jax.debug.callback(lambda: calls.append(name))
            return z

        return Network(lambda params: eps_fn, (2, 2, 1))

    sampling = sampling_of(tiny_config(sample__num_steps=9, sample__rule=rule, sample__batch_size=1))
    zero = np.zeros(1, np.int32)
    spec = SampleSpec(zero.astype(np.uint32), zero, zero, np.full(1, w, np.float32))
    list(compile_sampler(counting("network"), sampling, mesh_of(1), counting("guide"))({}, spec, interval=interval))
    jax.effects_barrier()
    inside = sum(-2.0 <= logsnr <= 5.0 for logsnr in np.asarray(schedule(9, -20.0, 20.0)))
    expected = inside if interval or rule == "interval(-2, 5)" else 9
    expected *= w != 0.0 or rule in ("rescale(0.5)", "cfgpp()")
    expected = -(-expected // {"every(4)": 4, "extrapolated(2)": 2}.get(rule, 1))
    assert (calls.count("network"), calls.count("guide")) == (9, expected)
    assert evaluations(sampling, w, interval) == 9 + expected


def test_the_other_class_of_an_image_does_not_depend_on_the_batch(params: Any, forty: np.ndarray) -> None:
    sampling = sampling_of(tiny_config(sample__rule="other_labels()"))
    on_mesh = parallel.replicate(mesh_of(1), params)
    sampler = compile_sampler(NETWORK._replace(num_classes=10), sampling, mesh_of(1))
    images = np.concatenate(list(sampler(on_mesh, some(40))))
    mixed = np.random.default_rng(1).permutation(40)[:21]
    assert_same_images(np.concatenate(list(sampler(on_mesh, rows(some(40), mixed)))), images[mixed])
    guided = some(40).w != 0
    assert_same_images(images[~guided], forty[~guided])
    assert (images[guided] != forty[guided]).any(axis=(1, 2, 3)).all()
    with pytest.raises(
        ValueError, match=r"the rule 'other_labels\(\)' needs another class .* the network has 0 classes"
    ):
        compile_sampler(NETWORK, sampling, mesh_of(1))


@pytest.mark.parametrize(("w", "interval"), [(0.0, ()), (1.0, ()), (1.0, (-2.0, 5.0)), (0.0, (-2.0, 5.0))])
def test_evaluations_are_counted_as_the_sampler_makes_them(w: float, interval: tuple[float, ...]) -> None:
    config, calls = tiny_config(sample__num_steps=9), []

    def eps_fn(z: jax.Array, logsnr: jax.Array, labels: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return z

    ends = interval if interval and w else (-jnp.inf, jnp.inf)
    weight = Interval(w, *ends) if w else 0.0
    guided_sample(jax.random.key(0), eps_fn, jnp.zeros(2, jnp.int32), (4,), w=weight, num_steps=9)
    jax.effects_barrier()
    assert evaluations(sampling_of(config), w, interval) == len(calls)


def test_operations_are_not_counted_without_a_cpu(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_cpu(backend: str) -> list[Any]:
        raise RuntimeError(f"Unknown backend {backend}")

    assert evaluation_flops(NETWORK, params) > 2 * 64 * 64  # the product that mixes all pixels
    monkeypatch.setattr(jax, "local_devices", no_cpu)
    assert np.isnan(evaluation_flops(NETWORK, params))


def test_a_batch_that_the_devices_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sample\.batch_size is 12, which 8 devices do not divide"):
        compile_sampler(NETWORK, sampling_of(tiny_config(sample__batch_size=12)), mesh_of(8))


def test_devices_that_outnumber_a_batch_draw_an_image_each(
    params: Any, forty: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = compile_sampler(NETWORK, sampling_of(tiny_config(sample__batch_size=3)), mesh_of(8))
    assert "sample.batch_size is 3, fewer images than the 8 devices: they draw 8 at a time." in capsys.readouterr().out
    batches = list(sampler(parallel.replicate(mesh_of(8), params), rows(some(40), slice(0, 20))))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert_same_images(np.concatenate(batches), forty[:20])
