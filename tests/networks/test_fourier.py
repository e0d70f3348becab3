"""Fourier features, and λ itself as the embedded time: what the networks of `build` see of z and λ."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from cfd.errors import UserError
from cfd.networks.model import build, fourier_features
from cfd.networks.times import network_time
from cfd.networks.unet import UNet

PIXELS = np.arange(256) / 127.5 - 1.0


def test_at_n_7_neighbouring_pixel_values_differ_in_the_sign_alone() -> None:
    """Over the whole range: with 2⁷ π z, without the 255/256, the phase would drift by π from one end to the other."""
    z = jnp.float32(PIXELS)[:, None]
    _, sin, cos = np.asarray(fourier_features(z, (7,)), np.float64).T
    for wave in (sin, cos):
        np.testing.assert_allclose(wave[1:], -wave[:-1], atol=2e-4)
    np.testing.assert_allclose(np.square(sin) + np.square(cos), 1.0, atol=1e-5)
    drifting = np.sin(2.0**7 * np.pi * PIXELS)
    assert np.abs(drifting[1:] + drifting[:-1]).max() > 0.01 and abs(sin[0]) == pytest.approx(abs(sin[-1]), abs=2e-4)


def test_at_n_8_all_pixel_values_have_the_same_features() -> None:
    _, sin, cos = np.asarray(fourier_features(jnp.float32(PIXELS)[:, None], (8,)), np.float64).T
    assert np.ptp(sin) < 1e-3 and np.ptp(cos) < 1e-3
    between = np.asarray(fourier_features(jnp.float32(PIXELS[:, None] + 1.0 / 255.0), (8,)))
    np.testing.assert_allclose(between[:, 1:], -np.stack([sin, cos], 1), atol=1e-3)


def test_the_channels_are_z_and_then_the_waves_of_each_exponent() -> None:
    z = jnp.linspace(-3.0, 3.0, 36).reshape(2, 3, 3, 2)
    angle = np.float64(z) * np.pi * 255.0 / 256.0
    parts = [z, np.sin(angle), np.sin(4 * angle), np.cos(angle), np.cos(4 * angle)]
    np.testing.assert_allclose(fourier_features(z, (0, 2)), np.concatenate(parts, -1), atol=1e-5)
    assert fourier_features(z, ()) is z


def network(**fields: Any) -> Any:
    """The network of the tiny config with these fields of `model`."""
    return build(dict(tiny_config().model) | fields, 8, 1)


def test_a_network_with_features_predicts_as_many_channels_as_before() -> None:
    inputs = jnp.zeros((2, 8, 8, 1)), jnp.array([0.0, 4.0]), jnp.array([3, -1])
    kernels = []
    for fields in (dict(), dict(fourier=[7]), dict(fourier=(7, 8)), dict(fourier=[7], out_channels=2)):
        model = network(**fields)
        params = jax.eval_shape(model.init, jax.random.key(0))
        kernels.append(params["conv_in"]["kernel"].shape[2])
        assert params["conv_out"]["kernel"].shape[3] == fields.get("out_channels", 1)
        assert jax.eval_shape(model.apply, params, *inputs).shape == (2, 8, 8, 1)
    assert np.subtract(kernels, kernels[0]).tolist() == [0, 2, 4, 2]
    message = r"z has shape \(2, 8, 8, 3\); this network takes \[B, H, W, 1\]"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network(fourier=[7]).apply, params, jnp.zeros((2, 8, 8, 3)), *inputs[1:])
    with pytest.raises(UserError, match=r"fourier is \(7,\), which the network 'mp' does not have"):
        tiny_config(model__fourier=(7,), model__network="mp")


def test_the_network_is_given_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(UNet, "apply", lambda self, variables, z, *_, **options: seen.append(z) or z[..., :1])
    z = jnp.linspace(-1.0, 1.0, 64).reshape(1, 8, 8, 1)
    network(fourier=[3, 4]).apply({}, z, jnp.zeros(1), jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(seen[0], fourier_features(z, (3, 4)))


def test_the_time_logsnr_is_linear_from_0_to_1000() -> None:
    logsnr = jnp.array([20.0, 13.3, 0.0, -20.0])
    np.testing.assert_allclose(network_time(logsnr, "logsnr"), [0.0, 167.5, 500.0, 1000.0], rtol=1e-6)
    # The cosine's time moves by less than one between λ = 13.3 and 20.
    assert np.ptp(network_time(logsnr[:2], "cosine")) < 1.0
    with pytest.raises(ValueError, match=r"time is 'snr': choose .*\"logsnr\""):
        network_time(logsnr, "snr")
