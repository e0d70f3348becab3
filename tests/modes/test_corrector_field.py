"""The corrector of the config's `sample`: its images, its cost, and what it cannot be combined with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from mixing import NETWORK, eps_of_params, params
from tiny import tiny_config

from cfd.devices import parallel
from cfd.modes import rules
from cfd.modes.cells import STEPS, rows_of_grid
from cfd.modes.sampler import Network, SampleSpec, compile_sampler, evaluations, to_uint8
from cfd.modes.settings import sampling_of
from cfd.sampling import Langevin, ancestral, guided_sample

LANGEVIN: dict[str, Any] = dict(sample__corrector=0.2, sample__corrector_steps=2)


@pytest.mark.parametrize("predictor_guided", [True, False])
def test_images_are_those_of_guided_sample(predictor_guided: bool) -> None:
    config = tiny_config(**LANGEVIN, sample__predictor_guided=predictor_guided, sample__batch_size=8)
    rules.check(config)
    index, w = np.arange(8, dtype=np.int32), np.full(8, 1.5, np.float32)
    spec = SampleSpec(np.full(8, 7, np.uint32), index, index, w)
    sampler = compile_sampler(NETWORK, sampling_of(config), mesh_of(1))
    (images,) = sampler(parallel.replicate(mesh_of(1), params()), spec)

    @jax.jit
    def expected(given: Any) -> Any:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(index)
        own_w = 1.5 if predictor_guided else 0.0
        return guided_sample(
            keys,
            eps_of_params(given),
            jnp.asarray(index),
            (8, 8, 1),
            w=own_w,
            num_steps=4,
            sampler=ancestral(0.3),
            corrector=Langevin(0.2, 2, 1.5),
        )

    found = np.asarray(to_uint8(expected(jax.tree.map(jnp.asarray, params()))))
    assert np.abs(images.astype(int) - found).max() <= 1 and (images == found).mean() > 0.98


@pytest.mark.parametrize("predictor_guided", [True, False])
@pytest.mark.parametrize(("w", "interval"), [(0.0, ()), (1.0, ()), (1.0, (-5.0, 1.0))])
def test_evaluations_are_counted(w: float, interval: tuple[float, ...], predictor_guided: bool) -> None:
    """Each call of the network at a level is counted where it happens."""
    calls: list[int] = []

    def eps_of(params: Any) -> Any:
        def eps_fn(z: Any, logsnr: Any, labels: Any) -> Any:
            jax.debug.callback(lambda: calls.append(1), ordered=True)
            return 0.1 * z + 0.01 * labels[:, None, None, None]

        return eps_fn

    config = tiny_config(**LANGEVIN, sample__predictor_guided=predictor_guided, sample__num_steps=5)
    sampling = sampling_of(config)._replace(batch_size=1)
    sampler = compile_sampler(Network(eps_of, (2, 2, 1)), sampling, mesh_of(1))
    spec = SampleSpec(*(np.zeros(1, kind) for kind in (np.uint32, np.int32, np.int32, np.float32)))
    list(sampler({}, spec._replace(w=np.array([w], np.float32)), interval=interval))
    jax.effects_barrier()
    assert evaluations(sampling, w, interval) == len(calls)
    plain = sampling._replace(corrector=None, predictor_guided=True)
    own = 5 if not predictor_guided else evaluations(plain, w, interval)
    assert len(calls) == own + 2 * evaluations(plain, w, interval)


def test_the_corrector_alone_needs_a_corrector_and_plain_guidance() -> None:
    for changes in (
        {"sample__corrector": 0.0},
        {"sample__rule": "apg(0.0, 5.0, -0.5)"},
        {"eval__rules": ("", "apg(0.0, 5.0, -0.5)")},
        {"sample__guidance": "classifier"},
    ):
        config = tiny_config(**LANGEVIN | {"sample__predictor_guided": False} | changes)
        with pytest.raises(ValueError, match=r"sample\.predictor_guided is False.*set it to True, or set"):
            rules.check(config)
        config = tiny_config(**LANGEVIN | changes)
        rules.check(config)
    with pytest.raises(ValueError, match=r"sample\.corrector is 2\.5; expected a number >= 0 and <= 1\.9"):
        tiny_config(sample__corrector=2.5)


def test_manifests_record_it() -> None:
    assert {"corrector", "corrector_steps", "predictor_guided"} <= set(STEPS)
    assert rows_of_grid(tiny_config(**LANGEVIN), 7) == rows_of_grid(tiny_config(), 7)
