"""The network of a group `model`: what it predicts, as ε."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK

from cfd.networks import model
from cfd.networks.times import logsnr_table

FIELDS: dict[str, Any] = dict(num_classes=3, time="adm_linear")
SIZE, CHANNELS = 4, 1
LEVELS = logsnr_table("linear")[::-1]


def given(count: int = 4) -> tuple[jax.Array, ...]:
    z = jax.random.normal(jax.random.key(1), (count, SIZE, SIZE, CHANNELS))
    logsnr = jnp.asarray(LEVELS[[0, 200, 800, 998]], jnp.float32)
    return z, logsnr, jnp.arange(count, dtype=jnp.int32) % 3


class Pointwise(nn.Module):
    """A network of one product and one sum, in place of one that takes seconds to run without `jit`."""

    image_size: int
    fast: bool
    out_channels: int = CHANNELS

    @nn.compact
    def __call__(self, z: Any, logsnr: Any, labels: Any) -> Any:
        return nn.Dense(self.out_channels, name="out")(z) + 0.1 * labels[:, None, None, None]


PARAMS = {"out": {"kernel": jnp.full((1, 1), 0.3), "bias": jnp.full(1, 0.2)}}


@pytest.fixture(autouse=True)
def pointwise(monkeypatch) -> None:
    monkeypatch.setitem(model.MODULES, "adm", Pointwise)


def test_the_same_outputs_are_read_as_eps_x_v_or_the_mean() -> None:
    """ε of each in float64, with λ' from DDPM's table."""
    z, logsnr, labels = given()
    out = np.float64(model.module(FIELDS, SIZE).apply({"params": PARAMS}, z, logsnr, labels))
    z64 = np.float64(z)
    here, ahead = (LEVELS[np.array([0, 200, 800, 998]) + i][:, None, None, None] for i in (0, 1))
    (alpha, sigma), (alpha_next, _) = ((1 / np.sqrt(1 + np.exp(-s)), 1 / np.sqrt(1 + np.exp(s))) for s in (here, ahead))
    kept = np.exp(here - ahead) * alpha_next / alpha
    expected = {
        "eps": out,
        "x": (z64 - alpha * out) / sigma,
        "v": sigma * z64 + alpha * out,
        "mean": (z64 - alpha * (out - kept * z64) / (-np.expm1(here - ahead) * alpha_next)) / sigma,
    }

    @functools.partial(jax.jit, compiler_options=QUICK)
    def read(*inputs: jax.Array) -> list[jax.Array]:
        fields = [FIELDS | {"predict": predict} for predict in expected] + [FIELDS]
        return [model.build(one, SIZE, CHANNELS).apply(PARAMS, *inputs) for one in fields]

    *found, unnamed = read(z, logsnr, labels)
    for (predict, eps), one in zip(expected.items(), found, strict=True):
        np.testing.assert_allclose(one, eps, rtol=1e-3, atol=1e-3 * np.abs(eps).max(), err_msg=predict)
    np.testing.assert_array_equal(unnamed, found[0])


def test_the_mean_needs_a_table() -> None:
    with pytest.raises(ValueError, match=r"model.time is 'cosine', which has no table: set model.time to 'adm_linear'"):
        model.build(FIELDS | {"predict": "mean", "time": "cosine"}, SIZE, CHANNELS)
