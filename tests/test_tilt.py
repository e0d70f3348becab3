"""The samples of `cfd.tilt` against quadrature, closed forms and exact rejection sampling, and its arguments."""

import functools
import subprocess
import sys
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import jax_setting
from mixtures import gaussian_eps, mixture_eps
from recursion import KEY, jaxtyping_off
from scipy.special import log_softmax, logsumexp
from scipy.stats import wasserstein_distance
from tiny import DEFAULTS

from cfd.process import posterior
from cfd.sampling import ancestral, ddim, guided_sample
from cfd.tilt import _churned, _systematic, tilted_sample

LINE, STD = np.array([[-0.7], [0.0], [0.7]]), 0.25  # three classes on a line, the toy of GUIDANCE.md
TRIANGLE = 0.6 * np.array([[1.0, 0.0], [-0.5, 0.866], [-0.5, -0.866]])
line_eps, triangle_eps = mixture_eps(LINE, np.full(3, STD)), mixture_eps(TRIANGLE, np.full(3, 0.35))


def sampler_of(eps_fn, dimensions, *, num_particles=2000, num_steps=512):
    """One compiled program: (keys [R], label, w, ess_fraction) -> R independent populations."""

    def draw(key, label, w, ess_fraction):
        counts = {"num_particles": num_particles, "num_steps": num_steps}
        return tilted_sample(key, eps_fn, label, (dimensions,), w=w, ess_fraction=ess_fraction, **counts)

    program = jax.jit(jax.vmap(draw, (0, None, None, None)), compiler_options=DEFAULTS)  # it runs for seconds
    return lambda keys, label, w, ess_fraction=0.5: program(keys, label, w, ess_fraction)


PAIR = np.array([[0.4, -0.2], [-0.1, 0.3]])  # the last is ∅
two_gaussians = sampler_of(gaussian_eps(PAIR, np.full(2, 0.5)), 2, num_particles=1000)
on_the_line, in_the_plane = sampler_of(line_eps, 1), sampler_of(triangle_eps, 2)
RUNS = jax.random.split(KEY, 4)


def quadrature(means, std, label, w, reach=3.0, points=4001):
    """(points of a grid [G, d], their probabilities, log ∫ p(x|c)^{1+w} p(x)^{−w} dx) in float64; label −1 is ∅."""
    axis = np.linspace(-reach, reach, points)
    x = np.stack(np.meshgrid(*[axis] * means.shape[1], indexing="ij"), axis=-1).reshape(-1, means.shape[1])
    of_classes = (
        -0.5 * np.square((x[:, None] - means) / std).sum(axis=-1) - np.log(std * np.sqrt(2 * np.pi)) * x.shape[1]
    )
    unconditional = logsumexp(of_classes, axis=1) - np.log(len(means))
    log_tilt = (1 + w) * (unconditional if label < 0 else of_classes[:, label]) - w * unconditional
    total = logsumexp(log_tilt)
    return x, np.exp(log_tilt - total), total + x.shape[1] * np.log(axis[1] - axis[0])


def sliced(x, x_weights, y, y_weights=None):
    """W1 between two weighted samples, averaged over directions. In one dimension, it is W1 itself."""
    angles = np.random.default_rng(3).normal(size=(x.shape[1], 1 if x.shape[1] == 1 else 8))
    angles /= np.linalg.norm(angles, axis=0)
    return np.mean([wasserstein_distance(x @ a, y @ a, x_weights, y_weights) for a in angles.T])


def distances(tilted, y, y_weights=None):
    shares = np.asarray(jax.nn.softmax(tilted.log_weights, axis=-1), np.float64)
    samples = np.asarray(tilted.samples, np.float64)
    return [sliced(*population, y, y_weights) for population in zip(samples, shares, strict=True)]


def noise_floor(x, shares, count=2000, draws=8):
    """The mean distance of `count` exact samples from their own distribution."""
    rng = np.random.default_rng(4)
    return np.mean([sliced(rng.choice(x, count, p=shares), None, x, shares) for _ in range(draws)])


def log_normalizers(tilted):
    return logsumexp(np.asarray(tilted.log_weights, np.float64), axis=-1) - np.log(tilted.log_weights.shape[-1])


# The density


@pytest.mark.parametrize("w", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("label", [0, 1], ids=["outer class", "middle class"])
def test_samples_on_a_line_follow_the_tilt(label, w):
    """W1 to the quadrature is at most twice that of as many exact samples, and the weights estimate its integral."""
    x, shares, log_integral = quadrature(LINE, STD, label, w)
    tilted = on_the_line(RUNS[:2], label, w)
    assert np.mean(distances(tilted, x, shares)) < 2 * noise_floor(x, shares)
    np.testing.assert_allclose(np.mean(log_normalizers(tilted)), log_integral, atol=0.03 + 0.03 * w)


@pytest.mark.parametrize("w", [0.5, 1.0, 3.0])
def test_samples_in_the_plane_follow_the_tilt(w):
    x, shares, log_integral = quadrature(TRIANGLE, 0.35, 1, w, points=101)
    tilted = in_the_plane(RUNS[:2], 1, w)
    assert np.mean(distances(tilted, x, shares)) < 2 * noise_floor(x, shares)
    np.testing.assert_allclose(np.mean(log_normalizers(tilted)), log_integral, atol=0.03 + 0.03 * w)


@functools.cache
def digits():
    """(means [10, 64], eigenvalues [10, 64], eigenvectors [10, 64, 64], eps_fn) of ten full-covariance Gaussians."""
    with np.load(str(files("cfd.data") / "digits.npz")) as data:
        x, labels = data["levels"].reshape(-1, 64) / 8.0 - 1.0, data["labels"]
    means = np.stack([x[labels == c].mean(axis=0) for c in range(10)])
    # 0.02 on the diagonal: some pixels are constant.
    variances, axes = np.linalg.eigh([np.cov(x[labels == c].T) + 0.02 * np.eye(64) for c in range(10)])
    m, v, u = (jnp.asarray(a, jnp.float32) for a in (np.einsum("cd,cdk->ck", means, axes), variances, axes))

    def eps_fn(z, logsnr, labels):
        alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(sign * logsnr))[:, None, None] for sign in (1.0, -1.0))
        variance = jnp.square(alpha) * v[None] + jnp.square(sigma)
        y = jnp.einsum("nd,cdk->nck", z, u) - alpha * m[None]
        log_density = -0.5 * jnp.sum(jnp.square(y) / variance + jnp.log(variance), axis=-1)
        classes = jnp.where(labels[:, None] < 0, jax.nn.softmax(log_density), labels[:, None] == jnp.arange(10)[None])
        return jnp.einsum("nck,cdk->nd", sigma * classes[:, :, None] * y / variance, u)

    return means, variances, axes, eps_fn


def log_posteriors(x):
    """log p(c | x) of every class under the mixture of `digits`, [N, 10], in float64."""
    means, variances, axes, _ = digits()
    y = np.moveaxis((x - means[:, None]) @ axes, 0, 1)
    return log_softmax(-0.5 * np.sum(np.square(y) / variances + np.log(variances), axis=-1), axis=1)


def exact_digits(label, w, count):
    """(Samples [count, 64], the log-integral) of the tilt by rejection: it is p(x|c) p(c|x)^w but for a constant."""
    rng, (means, variances, axes, _) = np.random.default_rng(5), digits()
    x = means[label] + (rng.normal(size=(3 * count, 64)) * np.sqrt(variances[label])) @ axes[label].T
    accepted = np.exp(w * log_posteriors(x)[:, label])
    samples = x[rng.random(len(x)) < accepted]
    assert len(samples) >= count
    return samples[:count], w * np.log(10) + np.log(accepted.mean())


@functools.cache
def of_the_digits():
    eps_fn = digits()[-1]
    plain = lambda w: guided_sample(KEY, eps_fn, jnp.full(400, 8), (64,), w=w, num_steps=128, clip=False)  # noqa: E731
    return sampler_of(eps_fn, 64, num_particles=400), jax.jit(plain)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_samples_in_64_dimensions_follow_the_tilt(w):
    """The mixture fitted to the digits. Plain guidance is farther from its tilt."""
    draw, plain = of_the_digits()
    samples, log_integral = exact_digits(8, w, 6000)
    exact, parts = samples[:4400], samples[4400:].reshape(4, 400, 64)
    floor = np.mean([sliced(part, None, exact) for part in parts])
    tilted = draw(RUNS[:2], 8, w)
    reached = np.mean(distances(tilted, exact))
    assert reached < 2 * floor
    np.testing.assert_allclose(np.mean(log_normalizers(tilted)), log_integral, atol=0.1 + 0.2 * w)
    assert sliced(np.asarray(plain(w), np.float64), None, exact) > 1.4 * reached


def test_plain_guidance_misses_the_tilt():
    """At w = 1 and for the outer class, W1 is 0.170 for DDIM and 0.073 for the ancestral sampler."""
    x, shares, _ = quadrature(LINE, STD, 0, 1.0)
    for sampler, expected in ((ddim(), 0.170), (ancestral(0.0), 0.073)):
        labels = jnp.zeros(8000, jnp.int32)
        draw = jax.jit(
            lambda labels, sampler=sampler: guided_sample(
                KEY, line_eps, labels, (1,), w=1.0, sampler=sampler, clip=False
            )
        )
        np.testing.assert_allclose(sliced(np.asarray(draw(labels), np.float64), None, x, shares), expected, atol=0.012)
    assert np.mean(distances(on_the_line(RUNS[:2], 0, 1.0), x, shares)) < 0.02


@pytest.mark.parametrize("w", [-0.5, 0.5, 2.0])
def test_the_weights_of_two_gaussians_are_the_closed_form(w):
    """With equal variances, ‖ε_c − ε_u‖ does not depend on z: all weights are exp(w (1 + w) ‖m_c − m_u‖² / (2 s²))."""
    means, std = PAIR, 0.5
    tilted = two_gaussians(RUNS, 0, w)
    expected = w * (1 + w) * np.square(means[0] - means[1]).sum() / (2 * std**2)
    np.testing.assert_allclose(tilted.log_weights, np.full((4, 1000), expected), rtol=2e-4)
    np.testing.assert_allclose(tilted.ess, np.full((4, 512), 1000.0), rtol=1e-4)
    x, mean = np.asarray(tilted.samples, np.float64).reshape(-1, 2), means[0] + w * (means[0] - means[1])
    np.testing.assert_allclose(x.mean(axis=0), mean, atol=5 * std / np.sqrt(4000))
    np.testing.assert_allclose(np.square(x - mean).mean(), std**2, rtol=0.05 + 5 / np.sqrt(4000))


@pytest.mark.parametrize(("w", "label"), [(0.0, 0), (-1.0, -1)])
def test_w_0_is_the_conditional_and_minus_1_the_unconditional_density(w, label):
    tilted = on_the_line(RUNS[:2], 0, w)
    np.testing.assert_array_equal(tilted.log_weights, np.zeros((2, 2000)))
    np.testing.assert_allclose(tilted.ess, np.full((2, 512), 2000.0), rtol=1e-5)
    x, shares, log_integral = quadrature(LINE, STD, label, 0.0)
    assert np.mean(distances(tilted, x, shares)) < 2 * noise_floor(x, shares) and abs(log_integral) < 1e-9


def test_a_network_that_ignores_the_label_gives_no_weights():
    draw = sampler_of(lambda z, logsnr, labels: line_eps(z, logsnr, 0 * labels), 1, num_steps=8)
    np.testing.assert_allclose(draw(RUNS, 0, 3.0).log_weights, np.zeros((4, 2000)), atol=1e-9)


# The step and the resampling


def test_a_step_keeps_the_noise_of_its_level_whatever_the_churn():
    """z ~ N(α x, σ²) becomes z' ~ N(α' x, σ'²). κ = 1 is the posterior of Eqs. 3 and 4, and κ = 0 is DDIM."""
    z, x = jnp.float32([[0.3], [-1.2]]), jnp.float32([[0.7], [0.1]])
    for logsnr, logsnr_next in ((-20.0, -7.0), (-1.0, -0.9), (2.0, 5.0), (9.0, 20.0)):
        (alpha, sigma), (alpha_next, sigma_next) = (
            (np.sqrt(1 / (1 + np.exp(-at))), np.sqrt(1 / (1 + np.exp(at)))) for at in (logsnr, logsnr_next)
        )
        for churn in (0.1, 1.0, 4.0, 50.0):
            step = functools.partial(_churned, logsnr=jnp.float32(logsnr), logsnr_next=jnp.float32(logsnr_next))
            (mean, std), (at_mean, _) = step(z, x, churn=churn), step(alpha * x, x, churn=churn)
            np.testing.assert_allclose(at_mean, alpha_next * x, rtol=2e-5)
            kept = (mean - at_mean) / (z - alpha * x)
            np.testing.assert_allclose(
                np.square(kept * sigma) + np.square(std), np.full((2, 1), sigma_next**2), rtol=2e-3
            )
            if churn == 1.0:
                for value, expected in zip((mean, std), posterior(z, x, logsnr, logsnr_next, 0.0), strict=True):
                    np.testing.assert_allclose(value, expected, rtol=2e-5)
        deterministic, std = step(z, x, churn=0.0)
        np.testing.assert_allclose(
            deterministic, ddim()(z, x, jnp.float32(logsnr), jnp.float32(logsnr_next))[0], rtol=1e-3, atol=1e-6
        )
        assert std == 0.0


def test_each_particle_is_copied_in_proportion_to_its_share():
    """Each number of copies is N share_i, rounded down or up, and N share_i on average."""
    shares = np.random.default_rng(6).dirichlet(np.full(200, 0.3))
    parents = jax.jit(jax.vmap(_systematic, (0, None)))(jax.random.split(KEY, 500), jnp.float32(shares))
    copies = np.stack([np.bincount(row, minlength=200) for row in np.asarray(parents)])
    assert np.all(np.abs(copies - 200 * shares) < 1 + 1e-3)
    np.testing.assert_allclose(copies.mean(axis=0), 200 * shares, atol=5 * 0.5 / np.sqrt(500))


def test_the_fraction_of_the_effective_sample_size():
    """0 never resamples, 1 always does, and one half lets the effective sample size fall only once below it."""
    never, half, always = (
        jax.tree.map(np.asarray, on_the_line(RUNS[:2], 1, 3.0, fraction)) for fraction in (0.0, 0.5, 1.0)
    )
    shares = jax.nn.softmax(never.log_weights, axis=-1)
    np.testing.assert_allclose(never.ess[:, -1], 1 / np.square(shares).sum(axis=-1), rtol=1e-3)
    assert np.all(never.ess.min(axis=1) < 1000) and len(np.unique(never.samples[0])) == 2000
    low = half.ess < 1000
    assert np.any(low) and np.all(half.ess[:, 1:][low[:, :-1]] > 1000)
    assert np.all(always.log_weights == always.log_weights[:, :1]) and np.all(always.ess[:, 1:] > 0.8 * 2000)


# Transformations and arguments


def test_the_sampler_is_one_loop_with_two_evaluations_per_step():
    seen = []

    def eps_fn(z, logsnr, labels):
        seen.append((z.shape, logsnr.shape, labels.shape))
        return line_eps(z, logsnr, labels)

    draw = lambda w: tilted_sample(KEY, eps_fn, 0, (1,), w=w, num_particles=5, num_steps=64)  # noqa: E731
    closed = jax.make_jaxpr(draw)(1.0)
    assert seen == [((5, 1), (5,), (5,))] * 2
    assert [eqn.primitive.name for eqn in closed.eqns].count("scan") == 1
    tilted = jax.eval_shape(draw, 1.0)
    assert [leaf.shape for leaf in tilted] == [(5, 1), (5,), (64,)] and all(
        leaf.dtype == jnp.float32 for leaf in tilted
    )


def test_a_key_determines_the_population_in_every_transformation():
    draw = functools.partial(tilted_sample, eps_fn=triangle_eps, shape=(2,), num_particles=50, num_steps=16)
    jitted = jax.jit(draw, static_argnames=("eps_fn", "shape", "num_particles", "num_steps"))
    many = jax.jit(jax.vmap(lambda key, label, w: draw(key, label=label, w=w)))(
        RUNS, jnp.arange(4) % 3, jnp.arange(4.0)
    )
    for i, key in enumerate(RUNS):
        for given in (key, jax.random.key_data(key)):
            alone = jitted(given, label=np.int32(i % 3), w=float(i))
            for one, several in zip(alone, many, strict=True):
                np.testing.assert_allclose(one, several[i], rtol=1e-3, atol=1e-4)
    assert len(np.unique(np.asarray(many.samples)[:, 0, 0])) == 4


def test_float64_does_not_change_the_samples():
    draw = jax.jit(lambda: tilted_sample(KEY, triangle_eps, 1, (2,), w=2.0, num_particles=50, num_steps=16))
    expected = draw()
    with jax_setting("jax_enable_x64", True):
        for given, same in zip(draw(), expected, strict=True):
            assert given.dtype == jnp.float32
            np.testing.assert_allclose(given, same, rtol=1e-3, atol=1e-3)


def test_labels_may_be_embeddings_and_null_another_class():
    def eps_fn(z, logsnr, text):
        return triangle_eps(z, logsnr, text["class"][:, 0].astype(jnp.int32))

    draw = functools.partial(tilted_sample, KEY, shape=(2,), w=1.0, num_particles=50, num_steps=16)
    draw = jax.jit(draw, static_argnames="eps_fn")
    text, null = {"class": jnp.float32([2.0])}, {"class": jnp.float32([1.0])}
    given, expected = draw(eps_fn=eps_fn, label=text, null=null), draw(eps_fn=triangle_eps, label=2, null=1)
    np.testing.assert_allclose(given.samples, expected.samples, rtol=1e-4, atol=1e-5)


def student(z, logsnr, labels, w):
    return z


student.weight_range = (0.0, 4.0)  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": np.nan}, r"w is nan; give guidance weights that are finite"),
        ({"w": np.ones(3)}, r"w is .*; the density has one exponent: give one number"),
        ({"w": lambda logsnr: 1.0}, r"w is <function.*; the density has one exponent: give one number"),
        ({"num_particles": 0}, r"num_particles is 0; it is a count: give an integer num_particles >= 1"),
        ({"num_particles": 10.0}, r"num_particles is 10\.0; it is a count"),
        ({"num_steps": 2}, r"num_steps is 2; it is a count: give an integer num_steps >= 3"),
        ({"num_steps": True}, r"num_steps is True; it is a count"),
        ({"shape": (-1,)}, r"shape is \(-1,\); it is that of one image"),
        ({"shape": (1.0,)}, r"shape is \(1\.0,\); it is that of one image"),
        ({"ess_fraction": 1.5}, r"ess_fraction is 1\.5; it is a share of N"),
        ({"churn": 0.0}, r"churn is 0\.0; it multiplies a variance"),
        ({"churn": np.inf}, r"churn is inf; it multiplies a variance"),
        ({"logsnr_min": 20.0}, r"give logsnr_min < logsnr_max"),
        ({"null": jnp.zeros(2)}, r"null has shape \(2,\); it must be that of one label, \(\)"),
        ({"null": 0.5}, r"null is 0\.5, which labels of dtype int32 cannot represent"),
        ({"key": RUNS}, r"key has batch shape \(4,\); give one key"),
        ({"key": 3}, r"key is 3; give a PRNG key"),
        ({"eps_fn": student}, "eps_fn is a student, which has no unconditional score: give the network"),
        ({"eps_fn": lambda z, *_: z[:, 0]}, r"eps_fn returned shape \(5,\); it must return the noise of z"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    valid = {"key": KEY, "eps_fn": line_eps, "label": 0, "shape": (1,), "w": 1.0, "num_particles": 5, "num_steps": 4}
    with jaxtyping_off(), pytest.raises(ValueError, match=message):
        tilted_sample(**valid | arguments)


def test_a_network_is_not_asked_outside_the_noise_levels_of_its_training():
    def eps_fn(z, logsnr, labels):
        return line_eps(z, logsnr, labels)

    eps_fn.logsnr_range = (-10.0, 9.0)  # pyright: ignore[reportFunctionMemberAccess]
    draw = functools.partial(tilted_sample, KEY, eps_fn, 0, (1,), w=1.0, num_particles=5, num_steps=4)
    with pytest.raises(
        ValueError, match=r"trained on λ in \[-10\.0, 9\.0\]: give logsnr_min=-10\.0 and logsnr_max=9\.0"
    ):
        draw()
    assert draw(logsnr_min=-10.0, logsnr_max=9.0).samples.shape == (5, 1)


def test_the_import_is_light():
    heavy = ("tensorflow", "orbax", "grain", "tensorflow_datasets", "flax", "optax", "matplotlib", "sklearn")
    code = f"import sys, cfd.tilt; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
