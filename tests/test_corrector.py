"""Langevin correctors against exact recursions in float64, annealed Langevin dynamics, and Euler-Maruyama's steps."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax_settings import jax_setting
from mixtures import gaussian_eps, mixture_eps
from recursion import (
    KEY,
    LABELS,
    MEANS,
    STDS,
    eps_line,
    exact_alpha_sigma,
    image_keys,
    jaxtyping_off,
    linear,
    network,
    noise_of_images,
)

from cfd.guidance import Interval
from cfd.process import linear as linear_schedule
from cfd.rules import Rule, apg, cfgpp
from cfd.sampling import Langevin, ancestral, ddim, dpm_solver, euler_maruyama, grid, guided_sample, hold, schedule

GRID = np.linspace(-6.0, 6.0, 7).astype(np.float32)


@functools.cache
def corrector_noise(num_steps: int, corrections: int) -> np.ndarray:
    """Correction k of step t of image i draws from fold_in(fold_in(fold_in(KEY, i), t), 1 + k): [K, T + 1, B, 3]."""

    numbers = jnp.stack(jnp.meshgrid(*map(jnp.arange, (corrections, num_steps + 1, 8)), indexing="ij"), -1)

    @jax.jit
    def draw(numbers):
        def one(number):
            k, t, i = number
            key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, i), t), 1 + k)
            return jax.random.normal(key, (3,))

        return jax.vmap(one)(numbers.reshape(-1, 3)).reshape(*numbers.shape[:-1], 3)

    return np.asarray(draw(numbers), np.float64)


def exact_images(c: float, corrections: int, w_corrector: float, w: float) -> np.ndarray:
    """DDIM on GRID in float64, with corrections before each evaluation, for the Gaussians of `linear`."""
    noise, z = corrector_noise(len(GRID), corrections), noise_of_images()[:, 0]

    def eps(z: np.ndarray, alpha: float, sigma: float, w: float) -> np.ndarray:
        (slope, offset), (slope_0, offset_0) = (eps_line(alpha, sigma, label) for label in (np.asarray(LABELS), -1))
        return (1 + w) * (slope[:, None] * z + offset) - w * (slope_0 * z + offset_0)

    for t, logsnr in enumerate(GRID.astype(np.float64), start=1):
        alpha, sigma = exact_alpha_sigma(logsnr)
        for k in range(corrections):
            z = z - c * sigma * eps(z, alpha, sigma, w_corrector) + sigma * math.sqrt(2 * c) * noise[k, t]
        e = eps(z, alpha, sigma, w)
        x = (z - sigma * e) / alpha
        if t < len(GRID):
            alpha, sigma = exact_alpha_sigma(float(GRID[t]))
            z = alpha * x + sigma * e
    return x


def sample(corrector, eps_fn=linear, **options):
    options = {"w": 1.0, "clip": False, "num_steps": GRID, "sampler": ddim()} | options
    return guided_sample(KEY, eps_fn, LABELS, (3,), corrector=corrector, **options)


# The recursion


def test_corrected_images_follow_the_exact_recursion() -> None:
    """One correction with the sampler's w, and three with their own: 0, the sampler's and larger ones."""
    np.testing.assert_allclose(jax.jit(lambda: sample(Langevin(0.05)))(), exact_images(0.05, 1, 1.0, 1.0), atol=3e-5)
    three = jax.jit(lambda c, own_w, w: sample(Langevin(c, 3, own_w), w=w))
    for c, own_w, w in ((0.4, 1.0, 1.0), (0.3, 0.0, 1.0), (0.1, 4.0, 1.0), (0.1, 3.0, 0.0)):
        np.testing.assert_allclose(three(c, own_w, w), exact_images(c, 3, own_w, w), atol=3e-5)


@pytest.mark.parametrize(("logsnr", "c"), [(2.0, 0.2), (-20.0, 1.9)])
def test_the_variance_goes_to_its_fixed_point(logsnr: float, c: float) -> None:
    """V / (1 − c σ² / (2 V)), with V = α² s² + σ²: 0.211157 for s = 0.3, λ = 2 and c = 0.2."""
    (alpha, sigma), seen = exact_alpha_sigma(logsnr), []
    variance = (0.3 * alpha) ** 2 + sigma**2
    fixed = variance / (1 - c * sigma**2 / (2 * variance))
    if (logsnr, c) == (2.0, 0.2):
        assert fixed == pytest.approx(0.211157, abs=5e-7)

    def eps_fn(z, logsnr, labels):  # of N(0.5, 0.3²)
        jax.debug.callback(lambda z: seen.append(np.float64(z)), z, ordered=True)
        return sigma / variance * (z - 0.5 * alpha)

    options = {"num_steps": [logsnr], "corrector": Langevin(c, 80), "start": jnp.zeros((4000, 3))}
    guided_sample(KEY, eps_fn, jnp.zeros(4000, jnp.int32), (3,), **options)
    jax.effects_barrier()
    assert len(seen) == 81 and not seen[0].any()
    squared = np.square(seen[-1] - 0.5 * alpha)
    assert abs(squared.mean() / fixed - 1) < 5 * math.sqrt(2 / squared.size)


def test_a_guided_corrector_diverges_above_2_over_1_plus_w() -> None:
    """A narrow class in a wide ∅: the corrections multiply a deviation by nearly 1 − c (1 + w) where σ is that of z."""
    eps_fn = gaussian_eps(np.zeros((2, 3)), np.array([0.01, 1.0]))

    def spread(c: float) -> float:
        options = {"w": 3.0, "num_steps": [4.0], "clip": False, "start": jnp.zeros((8, 3))}
        return float(jnp.abs(guided_sample(KEY, eps_fn, 0 * LABELS, (3,), corrector=Langevin(c, 60), **options)).max())

    assert spread(0.45) < 3.0
    assert spread(0.55) > 1e3


def test_annealed_langevin_dynamics_draw_from_a_mixture() -> None:
    """Held in z/α and corrected, noise becomes the three classes, with their shares, means and widths."""
    means, stds = np.array([[-0.7], [0.0], [0.7]], np.float32), np.array([0.1, 0.05, 0.15], np.float32)
    options = {"num_steps": grid(25, linear_schedule(-8.0, 7.0)), "sampler": hold(), "clip": False}
    labels, corrector = jnp.full(3000, -1, jnp.int32), Langevin(0.2, 20)
    draw = jax.jit(
        lambda key: guided_sample(key, mixture_eps(means, stds), labels, (1,), corrector=corrector, **options)
    )
    x = np.asarray(draw(KEY))[:, 0]
    nearest = np.argmin(np.abs(x[:, None] - means[:, 0]) / stds, axis=1)
    for c in range(3):
        of_class = x[nearest == c]
        assert abs(len(of_class) - 1000) < 5 * math.sqrt(1000 * 2 / 3)
        assert abs(of_class.mean() - means[c, 0]) < 0.02 and abs(of_class.std() / stds[c] - 1) < 0.15
    # Without corrections, the noise only moves: x̃ of the noise at the last λ is not in the classes.
    assert np.abs(guided_sample(KEY, mixture_eps(means, stds), labels, (1,), **options)).max() > 100.0


def test_hold_keeps_z_over_alpha_at_both_ends() -> None:
    z = jnp.array([[-1.5, 0.2, 3.0]], jnp.float32)
    for logsnr, logsnr_next in ((-20.0, -19.0), (-2.0, 3.0), (19.0, 20.0)):
        moved, std = hold()(z, 0.0 * z, jnp.float32(logsnr), jnp.float32(logsnr_next))
        (alpha, _), (alpha_next, _) = exact_alpha_sigma(logsnr), exact_alpha_sigma(logsnr_next)
        assert std is None
        np.testing.assert_allclose(moved / alpha_next, np.float64(z) / alpha, rtol=1e-6)


# Euler-Maruyama


def test_euler_maruyama_is_the_lectures_line_and_its_chain_the_exact_recursion() -> None:
    """With h σ² = 2 γ, the step is z + γ (z + 2 s) + sqrt(2 γ) n, of the score s = −ε / σ."""
    z, x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    for logsnr, h in ((-20.0, 0.3), (0.5, 0.1), (6.0, 0.01)):
        alpha, sigma = exact_alpha_sigma(np.float32(logsnr))
        mean, std = euler_maruyama()(jnp.asarray(z), jnp.asarray(x), jnp.float32(logsnr), jnp.float32(logsnr + h))
        gamma, score = 0.5 * float(np.float32(logsnr + h) - np.float32(logsnr)) * sigma**2, -(z - alpha * x) / sigma**2
        np.testing.assert_allclose(mean, z + gamma * (z + 2 * score), rtol=1e-4, atol=1e-5)
        assert std is not None and float(std) == pytest.approx(math.sqrt(2 * gamma), rel=1e-5)
    # A chain with the exact ε of N(m, s²): z' = z + h σ² (½ z − (z − α m) / V), of mean and variance.
    levels, m, s = np.linspace(-9.0, 5.0, 57), MEANS[0], STDS[0]
    mean, variance = np.zeros(3), 1.0
    for here, there in itertools.pairwise(levels):
        (alpha, sigma), h = exact_alpha_sigma(here), there - here
        slope = 1 + h * sigma**2 * (0.5 - 1 / (alpha**2 * s**2 + sigma**2))
        mean = slope * mean + h * sigma**2 * alpha * m / (alpha**2 * s**2 + sigma**2)
        variance = slope**2 * variance + h * sigma**2
    alpha, sigma = exact_alpha_sigma(levels[-1])
    v = alpha**2 * s**2 + sigma**2
    mean, std = (alpha * s**2 * mean + sigma**2 * m) / v, alpha * s**2 / v * math.sqrt(variance)
    options = {"num_steps": np.float32(levels), "sampler": euler_maruyama(), "clip": False}
    images = np.float64(guided_sample(KEY, linear, jnp.zeros(4000, jnp.int32), (3,), **options))
    assert np.all(np.abs(images.mean(0) - mean) < 5 * std / math.sqrt(4000))
    assert abs(np.square(images - mean).mean() / std**2 - 1) < 5 / math.sqrt(6000)


def test_long_steps_of_euler_maruyama_are_unstable_where_sigma_is_1() -> None:
    """For data N(0, I), a step multiplies z by 1 − h σ² / 2. The cosine grid begins with such a step."""
    z, logsnr = jnp.ones((1, 2)), jnp.float32(-20.0)
    alpha, sigma = exact_alpha_sigma(-20.0)
    for h in (2.0, 4.0, 9.8, 14.0):
        mean, _ = euler_maruyama()(z, alpha * z, logsnr, logsnr + h)
        np.testing.assert_allclose(mean, (1 - h * sigma**2 / 2) * z, rtol=1e-5, atol=1e-6)
    first, second = schedule(32)[:2]
    mean, std = euler_maruyama()(z, alpha * z, first, second)
    assert std is not None and np.hypot(mean[0, 0], std) == pytest.approx(7.0, abs=0.1)
    # Twelve steps of h = 5 where σ is near 1 multiply by 1.5 each.
    levels = grid(17, linear_schedule(-60.0, 20.0))
    assert np.abs(sample(None, num_steps=levels, sampler=euler_maruyama(), w=0.0)).max() > 100.0


def test_the_grid_of_the_ornstein_uhlenbeck_process() -> None:
    """α = e^{−t} gives λ = −log(expm1(2 t)), and a short step γ in t is one of h σ² = 2 γ."""
    t, gamma = np.linspace(0.01, 3.0, 50), 1e-5
    logsnr, logsnr_before = -np.log(np.expm1(2 * (t + gamma))), -np.log(np.expm1(2 * t))
    alpha, sigma = np.array([exact_alpha_sigma(level) for level in logsnr]).T
    np.testing.assert_allclose(alpha, np.exp(-t - gamma), rtol=1e-9)
    np.testing.assert_allclose((logsnr_before - logsnr) * sigma**2, 2 * gamma, rtol=2e-3)


# The cost of a correction, and its randomness


def scans(jaxpr, depth: int = 0) -> list[int]:
    """The depth of each loop of a program."""
    found = []
    for eqn in jaxpr.eqns:
        is_loop = eqn.primitive.name in ("scan", "while")
        found += [depth] * is_loop
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += scans(getattr(inner, "jaxpr", inner), depth + is_loop)
    return found


def test_the_corrections_are_one_loop_inside_the_loop_of_the_levels() -> None:
    for steps in (1, 7):
        closed = jax.make_jaxpr(lambda c, steps=steps: sample(Langevin(c, steps)))(0.1)
        assert scans(closed.jaxpr) == [0, 1]


@pytest.mark.parametrize(
    ("options", "corrector", "rows"),
    [
        ({"w": 0.0}, Langevin(0.1, 2), 8 * 7 * 3),
        ({"w": 0.5, "doubled": True}, Langevin(0.1, 2), 8 * 7 * 6),
        ({"w": 0.0}, Langevin(0.1, 2, 1.5), 8 * 7 * (1 + 4)),
        ({"w": 1.5, "guide": True}, Langevin(0.1, 2, 0), 8 * 7 * (2 + 2)),
        ({"w": 0.0}, Langevin(0.1, 2, Interval(1.5, -2.1, 2.1)), 8 * (7 * 3 + 3 * 2)),
    ],
)
def test_the_evaluations_of_a_corrector(options, corrector, rows) -> None:
    """T (K + 1) evaluations, each guided by its own weight. The seven levels are −6, −4, ..., 6."""
    evaluated = []

    def counting(z, logsnr, labels):
        jax.debug.callback(lambda: evaluated.append(len(z)))
        return linear(z, logsnr, labels)

    guide = {"guide": lambda *given: 0.5 * counting(*given)} if options.pop("guide", False) else {}
    sample(corrector, counting, **options, **guide).block_until_ready()
    jax.effects_barrier()
    assert sum(evaluated) == rows


def test_c_and_w_may_be_traced_and_have_gradients() -> None:
    total = lambda c, w: jnp.sum(sample(Langevin(c, 2, w)))  # noqa: E731
    at, h = np.array([0.2, 0.7]), 1e-4
    with jaxtyping_off():
        gradient = jax.jit(jax.grad(total, argnums=(0, 1)))(*at.tolist())
    exact = lambda c, w: exact_images(c, 2, w, 1.0).sum()  # noqa: E731
    expected = [(exact(*(at + h * axis)) - exact(*(at - h * axis))) / (2 * h) for axis in np.eye(2)]
    np.testing.assert_allclose(gradient, expected, rtol=2e-3)


def test_an_image_depends_on_its_key_and_not_on_its_batch() -> None:
    draw = jax.jit(
        lambda keys, labels: guided_sample(
            keys, network, labels, (3,), w=1.0, num_steps=GRID, corrector=Langevin(0.1, 2)
        )
    )
    order = np.array([5, 2, 7, 0, 1, 6, 3, 4])
    together = np.asarray(draw(image_keys(8), LABELS))
    np.testing.assert_array_equal(draw(image_keys(8)[order], LABELS[order]), together[order])


def test_a_replicated_key_in_shard_map() -> None:
    """Each device samples as it would alone, where only the corrector's w is divided over the devices."""

    @jax.jit
    def four(key, labels, w):
        corrector = Langevin(0.1, 2, w[:4])
        options = {"num_steps": GRID, "corrector": corrector, "rule": apg(0.5, 2.0, -0.3), "sampler": dpm_solver()}
        return guided_sample(key, network, labels[:4], (3,), w=0.5, **options)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    arguments, specs = (KEY, LABELS, jnp.linspace(0.0, 3.0, 8)), (P(), P(), P("data"))
    images = jax.jit(jax.shard_map(four, mesh=mesh, in_specs=specs, out_specs=P("data")))(*arguments)
    for rows in (slice(4), slice(4, 8)):
        own = [x[rows] if spec == P("data") else x for x, spec in zip(arguments, specs, strict=True)]
        np.testing.assert_allclose(images[rows], four(*own), rtol=1e-5, atol=1e-6)


def test_strict_promotion_and_float32_under_x64() -> None:
    for w in (0.5, Interval(0.5, -2.1, 2.1), lambda logsnr: 0.1 * logsnr):
        with jax.numpy_dtype_promotion("strict"):
            images = jax.eval_shape(lambda w=w: sample(Langevin(0.1, 2, w), sampler=euler_maruyama()))
        assert images.dtype == jnp.float32
    with jax_setting("jax_enable_x64", True):
        assert jax.eval_shape(lambda: sample(Langevin(0.1, 2), sampler=hold())).dtype == jnp.float32


# Rules


def test_the_state_of_a_rule_advances_once_per_step() -> None:
    seen = []

    def mix(z, eps_cond, eps_guide, logsnr, w, state):
        jax.debug.callback(lambda state: seen.append(int(state[0])), state, ordered=True)
        return z, eps_cond, state + 1.0

    sample(Langevin(0.1, 2), rule=Rule(lambda z: 0.0 * z[:, 0], mix)).block_until_ready()
    jax.effects_barrier()
    assert seen == [t for t in range(7) for _ in range(3)]


def test_a_rule_that_moves_z_is_corrected_by_the_x_that_it_implies() -> None:
    """CFG++ and Eq. 6 have the same x̃ at the same z, hence the same corrections. One level shows them alone."""
    options = {"num_steps": [1.0], "w": 0.7}
    one, other = (sample(Langevin(0.3, 5), network, rule=rule, **options) for rule in (cfgpp(), None))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# Bad arguments


@pytest.mark.parametrize(
    ("corrector", "message"),
    [
        (Langevin(0.0), "c is 0.0.*0 < c < 2, such as 0.05"),
        (Langevin(2.0), "c is 2.0.*0 < c < 2"),
        (Langevin(np.float32(math.nan)), "c is nan.*0 < c < 2"),
        (Langevin(np.array([0.1, 0.2])), r"c has shape \(2,\); it is one number: .*give one number c"),
        (Langevin(0.1, 0), "steps is 0.*give an integer steps >= 1"),
        (Langevin(0.1, 1.5), "steps is 1.5.*give an integer"),  # pyright: ignore[reportArgumentType]
        (Langevin(0.1, 1, math.inf), "w is inf.*finite"),
        (Langevin(0.1, 1, jnp.ones(3)), r"w has shape \(3,\).*\(8,\)"),
        (Langevin(0.1, 1, Interval(1.0, 0.5, 1.5)), "none of the 7 steps falls into the interval"),
        (Langevin, "corrector is Langevin, which was not called: give corrector=Langevin"),
        (0.05, "corrector is 0.05; give Langevin"),
    ],
)
def test_bad_correctors_are_refused(corrector, message) -> None:
    with jaxtyping_off(), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: sample(corrector))


@pytest.mark.parametrize("rule", [hold, euler_maruyama])
def test_step_rules_that_were_not_made_are_refused(rule) -> None:
    with (
        jaxtyping_off(),
        pytest.raises(ValueError, match=r"which was not called: give sampler=(hold|euler_maruyama)\(\)"),
    ):
        jax.eval_shape(lambda: sample(None, sampler=rule))


def test_the_corrector_works_with_the_ancestral_sampler() -> None:
    """The samples of a Gaussian keep its mean and its width, up to the error of the corrector's step."""
    options = {"num_steps": 64, "sampler": ancestral(0.0), "clip": False, "corrector": Langevin(0.05, 2)}
    images = np.float64(jax.jit(lambda: guided_sample(KEY, linear, jnp.ones(4000, jnp.int32), (3,), **options))())
    assert np.abs(images.mean(0) - MEANS[1]).max() < 0.05
    assert abs(images.std(0).mean() / STDS[1] - 1) < 0.05
