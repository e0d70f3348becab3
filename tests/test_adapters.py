"""Networks that predict x, v, a score or a velocity, or of another process, as an eps_fn: against exact Gaussians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from mixtures import gaussian_eps
from recursion import jaxtyping_off

from cfd.guidance import trained_range
from cfd.process import (
    alpha_sigma,
    diffuse,
    from_score,
    from_v,
    from_velocity,
    from_x,
    rescaled,
    sub_vp,
    variance_exploding,
    x_from_eps,
)
from cfd.sampling import ddim, guided_sample

LOGSNRS = np.linspace(-20.0, 20.0, 81, dtype=np.float32)
LABELS = jnp.zeros(81, jnp.int32)
EPS32 = float(np.finfo(np.float32).eps)
X, NOISE = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(0).normal(size=(2, 81, 3)) * [[[0.4]], [[1.0]]])


def row(value):
    return jnp.asarray(value, jnp.float32)[:, None]


def exact(logsnr):
    """(α, σ) in float64."""
    logsnr = np.asarray(logsnr, np.float64)
    return 1 / np.sqrt(1 + np.exp(-logsnr)), 1 / np.sqrt(1 + np.exp(logsnr))


def sub_vp_pair(logsnr):
    """(α_s, 1 − α_s²) of the sub-VP process, by bisection of α_s / (1 − α_s²) = e^{λ/2} in float64."""
    target = np.exp(0.5 * np.asarray(logsnr, np.float64))
    low, high = np.zeros_like(target), np.ones_like(target)
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = middle > target * (1 - middle) * (1 + middle)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return low, low / target


# Networks that know x and ε: what they are asked, and what the adapter makes of the answer


def check_input(given, *expected_and_scale) -> None:
    for value, (expected, scale) in zip(given, expected_and_scale, strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=4 * EPS32 * scale)


def test_predictions_become_the_noise_at_both_ends() -> None:
    """To rounding, which α x̂ / σ magnifies for a network that predicts x, up to 2e4 times at λ = 20."""
    alpha, sigma = (a[:, None] for a in exact(LOGSNRS))
    x, noise, z = np.float64(X), np.float64(NOISE), diffuse(X, NOISE, LOGSNRS)

    def velocity(y, t, c):
        check_input(
            (y, t), ((alpha * x + sigma * noise) / (alpha + sigma), 3.0), ((sigma / (alpha + sigma))[:, 0], 1.0)
        )
        return NOISE - X

    for adapter, answer, rounding in (
        (from_x, x, 8 / sigma),
        (from_v, alpha * noise - sigma * x, 8.0),
        (from_velocity, None, 8.0),
    ):
        eps_fn = adapter(velocity if answer is None else lambda z, s, c, a=answer: jnp.asarray(a, jnp.float32))
        eps = np.float64(eps_fn(z, jnp.asarray(LOGSNRS), LABELS))
        assert np.all(np.abs(eps - noise) <= EPS32 * rounding * (1 + np.abs(noise) + np.abs(x)))
        # ε gives back the data, to the rounding of z over α.
        back = np.float64(x_from_eps(z, jnp.asarray(eps, jnp.float32), LOGSNRS))
        assert np.all(np.abs(back - x) <= 12 * EPS32 / alpha * (1 + np.abs(noise) + np.abs(x)))


@pytest.mark.parametrize(("adapter", "pair"), [(variance_exploding, None), (sub_vp, sub_vp_pair)])
def test_a_network_of_another_process_sees_its_own_z(adapter, pair) -> None:
    alpha, sigma = exact(LOGSNRS)
    own_alpha, own_sigma = (np.ones(81), sigma / alpha) if pair is None else pair(LOGSNRS)
    np.testing.assert_allclose(np.log(own_alpha**2 / own_sigma**2), LOGSNRS, atol=1e-6)

    def eps_fn(y, logsnr, labels):
        expected = own_alpha[:, None] * np.float64(X) + own_sigma[:, None] * np.float64(NOISE)
        scale = own_alpha[:, None] + own_sigma[:, None]
        assert np.all(np.abs(y - expected) <= 16 * EPS32 * scale * (1 + np.abs(X) + np.abs(NOISE)))
        np.testing.assert_array_equal(logsnr, LOGSNRS)
        return NOISE

    eps = adapter(eps_fn)(diffuse(X, NOISE, LOGSNRS), jnp.asarray(LOGSNRS), LABELS)
    np.testing.assert_array_equal(eps, NOISE)


# Exact networks for x ~ N(m, s²), each in its own variables


M, S = 0.3, 0.4


def x_of(z, logsnr, c):
    """E[x | z] = m + α s² / V (z − α m), with V = α² s² + σ²."""
    alpha, sigma = exact(logsnr)
    return M + row(alpha * S**2 / (alpha**2 * S**2 + sigma**2)) * (z - row(alpha * M))


def v_of(z, logsnr, c):
    alpha, sigma = exact(logsnr)
    return row(alpha * sigma * (1 - S**2) / (alpha**2 * S**2 + sigma**2)) * (z - row(alpha * M)) - row(sigma * M)


def score_of(z, logsnr, c):
    alpha, sigma = exact(logsnr)
    return -(z - row(alpha * M)) / row(alpha**2 * S**2 + sigma**2)


def velocity_of(y, t, c):
    """E[ε − x | y] for y = (1 − t) x + t ε."""
    slope = (t - (1.0 - t) * S**2) / ((1.0 - t) ** 2 * S**2 + t**2)
    return row(slope) * (y - row((1.0 - t) * M)) - M


def velocity_to_data(y, t, c):
    """E[x − ε | y] for y = t x + (1 − t) ε."""
    slope = (t * S**2 - (1.0 - t)) / (t**2 * S**2 + (1.0 - t) ** 2)
    return row(slope) * (y - row(t * M)) + M


def denoised(y, sigma, c):
    return M + row(S**2 / (S**2 + sigma**2)) * (y - M)


def sub_vp_eps(y, logsnr, c):
    alpha, sigma = sub_vp_pair(logsnr)
    return row(sigma / (alpha**2 * S**2 + sigma**2)) * (y - row(alpha * M))


NETWORKS = {
    "x": from_x(x_of),
    "v": from_v(v_of),
    "score": from_score(score_of),
    "velocity": from_velocity(velocity_of),
    "velocity, data at 1": from_velocity(lambda y, t, c: -velocity_to_data(y, 1.0 - t, c)),
    "EDM": from_x(variance_exploding(lambda y, logsnr, c: denoised(y, jnp.exp(-0.5 * logsnr), c))),
    "VE score": variance_exploding(
        lambda y, logsnr, c: -row(jnp.exp(-0.5 * logsnr)) * (-(y - M) / row(S**2 + jnp.exp(-logsnr)))
    ),
    "sub-VP": sub_vp(sub_vp_eps),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_the_exact_network_of_every_kind_is_the_exact_noise(network) -> None:
    z, logsnr = diffuse(X, NOISE, LOGSNRS), jnp.asarray(LOGSNRS)
    alpha, sigma = (a[:, None] for a in exact(LOGSNRS))
    expected = sigma / (alpha**2 * S**2 + sigma**2) * (np.float64(z) - alpha * M)
    # The rounding of z, or of α x̂, over σ. Where a network is told 1 − t, t has the rounding of 1.
    slack = 32 * EPS32 * (1 + np.abs(np.float64(z))) * (1 + 1 / sigma)
    assert np.all(np.abs(network(z, logsnr, LABELS) - expected) <= slack)


def test_images_are_those_of_the_same_network_in_another_form() -> None:
    def x_fn(z, logsnr, labels):
        return x_from_eps(z, eps_fn(z, logsnr, labels), logsnr)

    def ve_fn(y, logsnr, labels):
        alpha, _ = alpha_sigma(logsnr)
        return eps_fn(alpha[:, None] * y, logsnr, labels)

    eps_fn = gaussian_eps(np.array([[0.2, -0.4], [-0.5, 0.1], [0.0, 0.0]]), np.array([0.3, 0.2, 0.6]))
    draw = lambda network: guided_sample(  # noqa: E731
        jax.random.key(0), network, jnp.arange(6) % 2, (2,), w=1.0, num_steps=32, sampler=ddim()
    )
    expected = draw(eps_fn)
    for network in (from_x(x_fn), variance_exploding(ve_fn), rescaled(eps_fn, jnp.ones_like)):
        np.testing.assert_allclose(draw(network), expected, atol=5e-3)


def test_adapters_keep_the_range_of_the_training_and_refuse_other_shapes() -> None:
    def network(scale, z, logsnr, labels):
        return scale * z

    network.logsnr_range = (-7.8, 9.2)  # pyright: ignore[reportFunctionMemberAccess]
    loaded = Partial(network, jnp.float32(0.5))
    adapters = (from_x, from_v, from_score, from_velocity, variance_exploding, sub_vp)
    for adapted in (*[a(loaded) for a in adapters], from_x(variance_exploding(functools.partial(network, 0.5)))):
        assert trained_range(adapted) == (-7.8, 9.2)
        with pytest.raises(ValueError, match=r"trained on λ in \[-7\.8, 9\.2\]"):
            guided_sample(jax.random.key(0), adapted, jnp.arange(2), (3,))
    z, logsnr = jnp.zeros((4, 3)), jnp.zeros(4)
    for adapter, name in ((from_x, "x_fn"), (from_v, "v_fn"), (from_score, "score_fn"), (from_velocity, "velocity_fn")):
        with jaxtyping_off(), pytest.raises(ValueError, match=rf"{name} returned shape \(4, 1\); .* \(4, 3\)"):
            adapter(lambda z, *_: z[:, :1])(z, logsnr, LABELS[:4])
        assert adapter(lambda z, *_: z.astype(jnp.bfloat16))(z, logsnr, LABELS[:4]).dtype == jnp.float32
