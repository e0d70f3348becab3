"""A network that returns (ε, v): the samplers that use v, those that ignore it, and ADM's steps in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from recursion import KEY, LABELS, network, noise_of_images
from tiny import QUICK

from cfd import flow, likelihood, rules
from cfd.guidance import Interval, classifier_guidance, clipped, shift_mean, without_null
from cfd.losses import eps_loss, variance_loss
from cfd.networks.times import respaced
from cfd.process import linear, posterior, step_divergence, x_from_eps
from cfd.sampling import SecondOrder, ancestral, ddim, dpm_solver, grid, guided_sample
from cfd.tilt import tilted_sample


def with_v(v: Any, eps_fn: Any = network) -> Any:
    """A network that returns (ε, v) with the v of `v(z, labels)`, or the number v for every pixel."""

    def pair(z: Array, logsnr: Array, labels: Array) -> tuple[Array, Array]:
        value = v(z, labels) if callable(v) else v
        return eps_fn(z, logsnr, labels), jnp.broadcast_to(jnp.asarray(value, jnp.float32), z.shape)

    return pair


def sample(eps_fn: Any, sampler: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"w": 1.5, "num_steps": 5} | options
    draw = jax.jit(
        lambda: guided_sample(KEY, eps_fn, LABELS, (3,), sampler=sampler, **settings), compiler_options=QUICK
    )
    return draw()


# Which v is used

OPTIONS: dict[str, dict[str, Any]] = {
    "unguided": dict(w=0.0),
    "guided": dict(),
    "doubled": dict(doubled=True),
    "an interval": dict(w=Interval(1.0, -2.0, 2.0)),
    "a rule": dict(rule=rules.apg(eta=0.0, norm=2.0, momentum=-0.5)),
    "another guide": dict(guide=with_v(0.9, lambda z, logsnr, labels: 0.5 * z)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_constant_v_of_the_network_is_ancestral_v(options: dict[str, Any]) -> None:
    """Up to the rounding of another program. The network has another v for ∅, which is not used."""
    v = with_v(lambda z, labels: jnp.where(labels >= 0, 0.25, 0.9)[:, None])
    given, expected = sample(v, ancestral(None), **options), sample(network, ancestral(0.25), **options)
    np.testing.assert_allclose(given, expected, atol=3e-6)


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_a_constant_v_of_the_network_is_ancestral_v_to_the_bit(v: float) -> None:
    given = sample(with_v(v), SecondOrder(ancestral(None)))
    np.testing.assert_array_equal(given, sample(network, SecondOrder(ancestral(v))))
    z, x = jax.random.normal(KEY, (2, 8, 3))
    at: Any = z, x, jnp.linspace(-9.0, 8.0, 8), jnp.linspace(-8.0, 11.0, 8)
    rule: Any = ancestral(None).rule
    both: Any = rule(*at, jnp.full(z.shape, v)), ancestral(v)(*at)
    for learned, fixed in zip(*both, strict=True):
        np.testing.assert_array_equal(learned, jnp.broadcast_to(fixed, z.shape))


def test_v_is_not_bounded() -> None:
    """ADM does not clip it: log Σ goes on linearly in v."""
    z = jax.random.normal(KEY, (8, 3))
    at: Any = z, z, jnp.linspace(-9.0, 8.0, 8), jnp.linspace(-8.0, 11.0, 8)
    rule: Any = ancestral(None).rule
    stds: Any = [rule(*at, jnp.full(z.shape, v))[1] for v in (0.0, 1.0, 1.7)]
    low, high, beyond = 2.0 * np.log(stds)
    np.testing.assert_allclose(beyond, low + 1.7 * (high - low), rtol=1e-5, atol=1e-5)


def test_functions_that_need_no_v_make_the_same_program_of_such_a_network() -> None:
    x, levels = jnp.zeros((8, 3)), jnp.linspace(-4.0, 4.0, 5)
    options: dict[str, Any] = dict(w=1.5, num_steps=5)
    for function in (
        lambda f: guided_sample(KEY, f, LABELS, (3,), sampler=ancestral(0.3), **options),
        lambda f: guided_sample(KEY, f, LABELS, (3,), sampler=ddim(0.5), **options),
        lambda f: guided_sample(KEY, f, LABELS, (3,), sampler=dpm_solver(), **options),
        lambda f: guided_sample(KEY, network, LABELS, (3,), sampler=ddim(), guide=f, **options),
        lambda f: eps_loss(KEY, f, x, LABELS),
        lambda f: flow.flow(f, x, LABELS, logsnr=levels, w=1.0),
        lambda f: likelihood.bound(KEY, f, x, LABELS, logsnr=levels, decoder=likelihood.gaussian_decoder(1.0)),
        lambda f: tilted_sample(KEY, f, 1, (3,), w=1.0, num_particles=8, num_steps=4),
    ):
        with_and_without = (lambda *a: (network(*a), a[0])), network
        programs = [str(jax.make_jaxpr(lambda function=function, f=f: function(f))()) for f in with_and_without]
        assert programs[0] == programs[1]


def test_a_network_without_v_is_refused() -> None:
    for sampler in (
        ancestral(None),
        SecondOrder(ancestral(None)),
        shift_mean(ancestral(None), classifier, LABELS, 1.0),
    ):
        with pytest.raises(
            ValueError, match=r"v=None.*eps_fn returned ε alone: give ancestral\(v\) with v in \[0, 1\]"
        ):
            sample(network, sampler)
    with pytest.raises(ValueError, match="eps_fn returned ε alone; there is no variance to train"):
        variance_loss(KEY, network, jnp.zeros((8, 3)), LABELS, logsnr=respaced("10", "linear"))  # pyright: ignore


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (lambda z: z[:, 0], r"eps_fn returned shape \(8,\); it must return v, the second of its pair, .*\(8, 3\)"),
        (lambda z: z > 0, "eps_fn returned dtype bool; it must return v"),
        (lambda z: 0.5, "eps_fn returned a float; it must return v"),
    ],
)
def test_a_v_of_another_kind_is_refused(v: Any, message: str) -> None:
    for sampler in (ancestral(None), ddim()):
        with pytest.raises(ValueError, match=message):
            sample(lambda z, logsnr, labels: (z, v(z)), sampler)


# ADM's p_sample and ddim_sample, from β of the respaced steps, in float64. ALPHA_BAR[i] is ᾱ of step i, and has the
# least noise at i = 0.

TIMES = 111 * np.arange(10)  # "10": round(i · 999 / 9)
ALPHA_BAR = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[TIMES]
SLOPES = np.array([[0.9, -0.4, 0.2, 0.5], [-0.3, 0.8, -0.6, 0.1], [0.4, 0.2, 0.7, -0.9]])
SCALE = 1.7


def pair(z: Any, logsnr: Any, labels: Any) -> tuple[Any, Any]:
    """ε and (o + 1) / 2, with outputs o beyond [−1, 1]. A function of NumPy arrays as of JAX's."""
    xp: Any = np if isinstance(z, np.ndarray) else jnp
    o = 1.6 * xp.sin(3.0 * z + labels[:, None])
    return 0.4 * z + 0.5 * xp.cos(2.0 * z + 0.3 * logsnr[:, None]), 0.5 * (o + 1.0)


def classifier(z: Array, logsnr: Array) -> Array:
    return z @ jnp.float32(SLOPES)


def gradient(z: np.ndarray) -> np.ndarray:
    """∇_z of log softmax(z · SLOPES) at the label."""
    logits = z @ SLOPES
    p = np.exp(logits - logits.max(1, keepdims=True))
    return (np.eye(4)[LABELS] - p / p.sum(1, keepdims=True)) @ SLOPES.T


def adm_step(z: np.ndarray, i: int, noise: np.ndarray, way: str, guided: bool) -> np.ndarray:
    """Step i of ADM's chain, to step i − 1: its p_sample or ddim_sample, with clip_denoised."""
    now, before = ALPHA_BAR[i], ALPHA_BAR[i - 1] if i else 1.0
    eps, v = pair(z, np.full(8, np.log(now / (1.0 - now))), np.asarray(LABELS))
    x = np.clip((z - np.sqrt(1.0 - now) * eps) / np.sqrt(now), -1.0, 1.0)
    beta = 1.0 - now / before
    if way == "ddim":
        eps = (z - np.sqrt(now) * x) / np.sqrt(1.0 - now) - guided * np.sqrt(1.0 - now) * SCALE * gradient(z)
        x = (z - np.sqrt(1.0 - now) * eps) / np.sqrt(now)
        return np.sqrt(before) * x + np.sqrt(1.0 - before) * eps
    mean = np.sqrt(before) * beta / (1.0 - now) * x + np.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - now) * z
    if i == 0:
        return mean
    variance = np.exp(v * np.log(beta) + (1.0 - v) * np.log(beta * (1.0 - before) / (1.0 - now)))
    return mean + guided * variance * SCALE * gradient(z) + np.sqrt(variance) * noise


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("way", ["ancestral", "ddim"])
def test_a_chain_of_adms_steps(way: str, guided: bool) -> None:
    """Algorithm 1 with the learned Σ, and Algorithm 2 with x̂ clipped before the shift, of arXiv:2105.05233."""
    noise = noise_of_images(8, 11)
    z = noise[:, 0]
    for t in range(1, 11):
        z = adm_step(z, 10 - t, noise[:, t], way, guided)
    sampler, eps_fn, clip = (ddim() if way == "ddim" else ancestral(None)), pair, True
    if guided and way == "ddim":
        eps_fn, clip = classifier_guidance(clipped(pair), classifier, SCALE), False
    elif guided:
        sampler = shift_mean(sampler, classifier, LABELS, SCALE)
    images = sample(eps_fn, sampler, w=0.0, num_steps=respaced("10", "linear"), clip=clip)
    np.testing.assert_allclose(images, z, atol=2e-5)


def test_classifier_guidance_keeps_v_and_guarding_does_too() -> None:
    z, logsnr = jax.random.normal(KEY, (8, 3)), jnp.linspace(-4.0, 4.0, 8)
    eps, v = classifier_guidance(pair, classifier, SCALE)(z, logsnr, LABELS)
    np.testing.assert_array_equal(
        eps, classifier_guidance(lambda *a: pair(*a)[0], classifier, SCALE)(z, logsnr, LABELS)
    )
    np.testing.assert_array_equal(v, pair(z, logsnr, LABELS)[1])
    eps, v = jax.jit(without_null(pair))(z, logsnr, LABELS.at[2].set(-1))
    assert np.isnan(eps[2]).all() and np.isnan(v[2]).all() and np.isfinite(np.delete(v, 2, 0)).all()


def test_clipped_clips_the_prediction_and_nothing_else() -> None:
    z, logsnr = jax.random.normal(KEY, (8, 3)), jnp.linspace(-4.0, 4.0, 8)
    x, clip = (x_from_eps(z, f(z, logsnr, LABELS)[0], logsnr) for f in (pair, clipped(pair)))
    np.testing.assert_allclose(clip, np.clip(x, -1.0, 1.0), atol=3e-6)
    assert (np.abs(x) > 1.0).any() and (np.abs(x) < 1.0).any()
    # Without guidance, the order of clipping does not matter. Not through a weight of 0 either.
    guided = classifier_guidance(clipped(pair), classifier, 0.0)
    near: dict[str, Any] = dict(w=0.0, logsnr_min=-6.0, logsnr_max=6.0)
    given, expected = sample(guided, ddim(), clip=False, **near), sample(pair, ddim(), **near)
    np.testing.assert_allclose(given, expected, atol=2e-5)
    network.logsnr_range = (-3.0, 3.0)
    try:
        assert clipped(network).logsnr_range == (-3.0, 3.0)
    finally:
        del network.logsnr_range


# Training a variance


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_the_divergence_is_that_of_two_gaussians(v: float) -> None:
    """KL(N(a, p) ‖ N(b, q)) = ½ (log q/p + (p + (a − b)²) / q − 1), of the steps of x and of x̂, in float64."""
    logsnr, logsnr_next = jnp.float32([-8.0, -1.0, 3.0, 9.0]), jnp.float32([-6.5, -0.9, 5.0, 10.0])
    z, x, x_hat = jax.random.normal(KEY, (3, 4, 5))
    a, p = map(np.float64, posterior(z, x, logsnr, logsnr_next, 0.0))
    b, q = map(np.float64, posterior(z, x_hat, logsnr, logsnr_next, v))
    expected = 0.5 * (2.0 * np.log(q / p) + (p**2 + (a - b) ** 2) / q**2 - 1.0)
    given = step_divergence(jnp.square(x - x_hat), logsnr, logsnr_next, jnp.full(z.shape, v))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=2e-5)


def test_the_loss_is_both_terms_and_its_variance_learns_what_the_error_is() -> None:
    """With x = ±s and a network whose x̂ is 0, the best v of a step has r = 1 / (1 + rise · s²), in closed form.

    There, the derivative of ½ (r − 1 − log r) + ½ r · rise · s² is 0, and that of the loss too. The gradient of ε is
    that of L_simple alone.
    """
    levels, s = jnp.float32([-1.0, 0.5]), 0.5
    x = s * jnp.sign(jax.random.normal(KEY, (64, 7)))
    labels = jnp.zeros(64, jnp.int32)
    rise = np.exp(0.5) - np.exp(-1.0)
    sigmoid = [1.0 / (1.0 + np.exp(level)) for level in (-1.0, 0.5)]
    best = np.log1p(rise * s**2) / (np.log(sigmoid[0]) - np.log(sigmoid[1]))

    def loss(scale: Array, v: Array, weight: Array) -> Array:
        def eps_fn(z: Array, logsnr: Array, labels: Array) -> tuple[Array, Array]:
            x_hat = 0.0 * z * scale
            sigma, alpha = (jnp.sqrt(jax.nn.sigmoid(sign * logsnr))[:, None] for sign in (-1.0, 1.0))
            return scale * (z - alpha * x_hat) / sigma, jnp.full(z.shape, v)

        return variance_loss(KEY, eps_fn, x, labels, logsnr=levels, p_uncond=0.0, weight=weight)

    both = jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=QUICK)

    def at(v: float, weight: float) -> Any:
        return both(jnp.float32(1.0), jnp.float32(v), jnp.float32(weight))

    by_v = [at(best + shift, 1.0)[1][1] for shift in (-0.05, 0.0, 0.05)]
    assert by_v[0] < -1e-3 and abs(by_v[1]) < 1e-5 and by_v[2] > 1e-3
    # The second term is T times the mean of the divergence in bits, over rows of which those at the last level have 0.
    r = (sigmoid[1] / sigmoid[0]) ** 0.3
    kl = 0.5 * r * rise * s**2 + 0.5 * (r - 1.0 - np.log(r))
    (simple, (by_eps, _)), (hybrid, (by_eps_too, _)) = at(0.3, 0.0), at(0.3, 1.0)
    rows = 64 * float(hybrid - simple) / (2.0 * kl / np.log(2.0))
    assert abs(rows - round(rows)) < 1e-3 and 16 <= round(rows) <= 48
    assert by_eps == by_eps_too and by_eps > 0.0


def test_the_first_term_is_eps_loss_at_the_levels() -> None:
    """ε̂ = 0 has E ‖ε‖² = 1, and an exact ε̂ has 0 and a divergence of 0 at v = 0."""
    x, labels, levels = jnp.zeros((256, 16)), jnp.zeros(256, jnp.int32), grid(8, linear(-4.0, 4.0))

    def exact(z: Array, logsnr: Array, labels: Array) -> tuple[Array, Array]:
        return z / jnp.sqrt(jax.nn.sigmoid(-logsnr))[:, None], jnp.zeros(z.shape)

    def nothing(z: Array, logsnr: Array, labels: Array) -> tuple[Array, Array]:
        return jnp.zeros(z.shape), jnp.zeros(z.shape)

    assert variance_loss(KEY, exact, x, labels, logsnr=levels) < 1e-10
    assert variance_loss(KEY, nothing, x, labels, logsnr=levels, weight=0.0) == pytest.approx(1.0, abs=0.1)
