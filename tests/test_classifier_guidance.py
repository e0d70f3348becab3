"""Classifier guidance with an exact classifier: its identities, and ADM's two algorithms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from mixtures import log_densities, mixture_eps
from recursion import jaxtyping_off

from cfd.guidance import NULL_LABEL, Interval, class_gradient, classifier_guidance, guide, shift_mean
from cfd.process import alpha_sigma, posterior
from cfd.sampling import ancestral, ddim, dpm_solver, guided_sample, schedule

# Class-conditional Gaussians, for which the scores and the classifier are exact.

MEANS = np.array([[0.8, 0.1], [-0.5, 0.6], [-0.2, -0.7]])
STDS = np.array([0.3, 0.5, 0.2])
EPS = mixture_eps(MEANS, STDS)


def exact_classifier(z: Array, logsnr: Array) -> Array:
    """log p(z | c) + log p(c), up to a term that is the same for all classes."""
    return log_densities(z, logsnr, jnp.float32(MEANS), jnp.float32(STDS))


def unconditional(z: Array, logsnr: Array, labels: Array) -> Array:
    return EPS(z, logsnr, jnp.full_like(labels, NULL_LABEL))


@pytest.fixture
def noisy() -> tuple[Array, Array, Array]:
    """z, λ over the whole schedule, and labels."""
    key_z, key_logsnr = jax.random.split(jax.random.key(3))
    logsnr = jax.random.uniform(key_logsnr, (64,), minval=-12.0, maxval=6.0)
    return jax.random.normal(key_z, (64, 2)), logsnr, jnp.arange(64) % 3


WEIGHTS: dict[str, Any] = {
    "number": 1.5,
    "scalar": jnp.float32(-0.5),
    "one per image": jnp.linspace(-1.0, 3.0, 64),
    "function of λ": lambda logsnr: jax.nn.sigmoid(logsnr),
}


@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_exact_classifier_guidance_is_classifier_free_guidance(w, noisy) -> None:
    """−σ ∇ log p(c | z) = ε(z, c) − ε(z): the implicit classifier of the paper's Section 3.2."""
    z, logsnr, labels = noisy
    weight: Any = w(logsnr) if callable(w) else w
    free = guide(EPS(z, logsnr, labels), unconditional(z, logsnr, labels), weight)
    np.testing.assert_allclose(
        classifier_guidance(EPS, exact_classifier, w)(z, logsnr, labels), free, rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("w", [0.0, 0.7, 3.0])
def test_guiding_the_unconditional_model_with_one_more(w: float, noisy) -> None:
    """ε(z) − (w + 1) σ ∇ log p(c | z) = ε(z, c) − w σ ∇ log p(c | z): Section 3.1."""
    z, logsnr, labels = noisy
    from_unconditional = classifier_guidance(unconditional, exact_classifier, w + 1.0)(z, logsnr, labels)
    from_conditional = classifier_guidance(EPS, exact_classifier, w)(z, logsnr, labels)
    np.testing.assert_allclose(from_unconditional, from_conditional, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("sampler", [ancestral(0.3), ddim(), dpm_solver()], ids=["ancestral", "ddim", "dpm_solver"])
def test_whole_samples_are_those_of_classifier_free_guidance(sampler) -> None:
    """Both start from the same noise and use one weight per image and 32 steps, jitted."""
    labels, w = jnp.arange(48) % 3, jnp.linspace(0.0, 2.0, 48)
    options: dict[str, Any] = dict(shape=(2,), num_steps=32, sampler=sampler, clip=False)
    free = jax.jit(lambda key: guided_sample(key, EPS, labels, w=w, **options))(jax.random.key(0))
    guided = classifier_guidance(EPS, exact_classifier, w)
    by_classifier = jax.jit(lambda key: guided_sample(key, guided, labels, **options))(jax.random.key(0))
    np.testing.assert_allclose(by_classifier, free, atol=2e-4)


def test_interval_has_its_weight_inside_and_zero_outside(noisy) -> None:
    z, logsnr, labels = noisy
    logsnr = logsnr.at[:2].set(jnp.float32([-3.0, 1.0]))
    guided = classifier_guidance(EPS, exact_classifier, Interval(2.0, -3.0, 1.0))(z, logsnr, labels)
    inside = ((logsnr >= -3.0) & (logsnr <= 1.0))[:, None]
    everywhere = classifier_guidance(EPS, exact_classifier, 2.0)(z, logsnr, labels)
    np.testing.assert_allclose(guided, jnp.where(inside, everywhere, EPS(z, logsnr, labels)), rtol=1e-6)


def test_both_kinds_of_guidance_compose(noisy) -> None:
    """The classifier adds nothing for the label ∅, so the weights u of the sampler and w of the classifier combine."""
    z, logsnr, labels = noisy
    guided = classifier_guidance(EPS, exact_classifier, 0.5)
    null = jnp.full_like(labels, NULL_LABEL)
    np.testing.assert_array_equal(guided(z, logsnr, null), EPS(z, logsnr, null))
    # With the exact classifier: (1 + u) (ε + w (ε − ε₀)) − u ε₀ = ε + (u + w + u w) (ε − ε₀).
    both = guide(guided(z, logsnr, labels), guided(z, logsnr, null), 1.0)
    alone = guide(EPS(z, logsnr, labels), EPS(z, logsnr, null), 1.0 + 0.5 + 0.5)
    np.testing.assert_allclose(both, alone, rtol=1e-5, atol=5e-5)


def test_weight_zero_is_the_model_itself() -> None:
    for zero in (0, 0.0, np.float32(0), jnp.zeros(())):
        assert classifier_guidance(EPS, exact_classifier, zero) is EPS


def test_a_function_that_gives_no_number_is_refused_where_it_is_seen(noisy) -> None:
    with pytest.raises(ValueError, match="w is nan at index 0; give guidance weights that are finite"):
        classifier_guidance(EPS, exact_classifier, lambda logsnr: logsnr * jnp.nan)(*noisy)


def test_an_interval_without_any_noise_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logsnr_lo=3.*which contains no λ"):
        classifier_guidance(EPS, exact_classifier, Interval(2.0, 3.0, -3.0))


@pytest.mark.parametrize("way", ["eps", "mean"])
def test_the_classifier_is_evaluated_only_inside_the_interval(way: str) -> None:
    evaluated, labels, w = [], jnp.arange(6) % 3, Interval(1.0, -1.0, 1.0)

    def counted(z, logsnr):
        jax.debug.callback(lambda: evaluated.append(1))
        return exact_classifier(z, logsnr)

    eps_fn = classifier_guidance(EPS, counted, w) if way == "eps" else EPS
    rule = shift_mean(ancestral(0.3), counted, labels, w) if way == "mean" else ancestral(0.3)
    draw = jax.jit(lambda key: guided_sample(key, eps_fn, labels, (2,), num_steps=16, sampler=rule))
    draw(jax.random.key(0)).block_until_ready()
    jax.effects_barrier()
    inside = np.abs(np.asarray(schedule(16))) <= 1.0
    assert len(evaluated) == inside.sum() and 0 < inside.sum() < 16


def test_a_weight_of_another_shape_is_refused(noisy) -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        classifier_guidance(EPS, exact_classifier, jnp.ones(3))(*noisy)


# A class that the classifier does not have


@pytest.mark.parametrize("kind", [np.asarray, lambda c: jnp.asarray(c, jnp.int32), lambda c: jnp.asarray(c, jnp.int8)])
@pytest.mark.parametrize("bad", [3, 10, -2])
def test_a_class_that_the_classifier_lacks_is_refused(bad: int, kind, noisy) -> None:
    z, logsnr, labels = noisy
    labels = kind(np.asarray(labels.at[5].set(bad)))
    message = rf"label is {bad} at index 5; the classifier has K = 3 classes: give labels of 0 to 2, or -1 for no class"
    with jaxtyping_off():
        rule = shift_mean(ancestral(0.3), exact_classifier, labels, 2.0)
        for call in (
            lambda: class_gradient(exact_classifier, z, logsnr, labels),
            lambda: classifier_guidance(unconditional, exact_classifier, 2.0)(z, logsnr, labels),
            lambda: rule(z, z, logsnr, logsnr + 1.0),
            lambda: guided_sample(
                jax.random.key(0), classifier_guidance(EPS, exact_classifier, 2.0), labels, (2,), num_steps=2
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.parametrize("bad", [3, 10, -2])
def test_a_class_that_the_classifier_lacks_gives_nan_under_jit(bad: int, noisy) -> None:
    """All other rows keep their bits."""
    z, logsnr, labels = noisy
    wrong = labels.at[5].set(bad)
    others = np.arange(64) != 5

    @jax.jit
    def everything(labels):
        rule = shift_mean(ancestral(0.3), exact_classifier, labels, 2.0)
        gradient = class_gradient(exact_classifier, z, logsnr, labels)
        eps = classifier_guidance(unconditional, exact_classifier, 2.0)(z, logsnr, labels)
        return gradient, eps, rule(z, z, logsnr, logsnr + 1.0)[0]

    for given, expected in zip(everything(wrong), everything(labels), strict=True):
        assert np.all(np.isnan(given[5])) and np.all(np.isfinite(expected))
        np.testing.assert_array_equal(given[others], expected[others])


def test_an_image_of_a_class_that_the_classifier_lacks_is_nan() -> None:
    """The unconditional model is guided as the docstring recommends, and the label is one that data of 1 to K have."""
    guided = classifier_guidance(unconditional, exact_classifier, 2.0)
    draw = jax.jit(lambda labels: guided_sample(jax.random.key(0), guided, labels, (2,), num_steps=4))
    images = draw(jnp.array([0, 3, -1]))
    np.testing.assert_array_equal(np.isnan(images).all(axis=1), [False, True, False])
    np.testing.assert_array_equal(images[::2], draw(jnp.array([0, 1, -1]))[::2])


def test_no_class_has_no_gradient(noisy) -> None:
    z, logsnr, labels = noisy
    for gradient in (class_gradient, jax.jit(class_gradient, static_argnums=0)):
        given = gradient(exact_classifier, z, logsnr, labels.at[5].set(NULL_LABEL))
        assert np.all(given[5] == 0.0)
        np.testing.assert_array_equal(np.delete(given, 5, 0), np.delete(gradient(exact_classifier, *noisy), 5, 0))


@pytest.mark.parametrize(
    ("labels", "returned", "message"),
    [
        (jnp.zeros(64), lambda z: z, r"labels have dtype float32 and shape \(64,\).*give int32 of shape \(64,\)"),
        (jnp.zeros(64, bool), lambda z: z, "labels have dtype bool"),
        (jnp.zeros((64, 1), jnp.int32), lambda z: z, r"labels have dtype int32 and shape \(64, 1\)"),
        (jnp.zeros(64, jnp.int32), lambda z: (z, z), r"classifier_fn returned a tuple; .*logits \[B, K\].*\(64, K\)"),
        (jnp.zeros(64, jnp.int32), lambda z: {"logits": z}, "classifier_fn returned a dict"),
        (jnp.zeros(64, jnp.int32), lambda z: z[:, 0], r"classifier_fn returned shape \(64,\).*\(64, K\)"),
        (jnp.zeros(64, jnp.int32), lambda z: z[:8], r"classifier_fn returned shape \(8, 2\).*\(64, K\)"),
    ],
)
def test_labels_and_logits_of_another_kind_are_refused(labels: Array, returned, message: str, noisy) -> None:
    z, logsnr, _ = noisy
    with jaxtyping_off(), pytest.raises(ValueError, match=message):
        class_gradient(lambda z, logsnr: returned(z), z, logsnr, labels)


# ADM's two algorithms.


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("step", [0.5, 0.001])
def test_algorithm_1_and_the_eps_form_differ_by_a_known_factor(v: float, step: float, noisy) -> None:
    """Algorithm 1 shifts the mean by w Σ ∇. ε̃ shifts x by w σ²/α ∇, and thus the mean by (1 − e^{λ−λ'}) α' w σ²/α ∇.

    With Σ = (1 − e^{λ−λ'}) σ'^{2(1−v)} σ^{2v}, the second shift is the first times (α'/α) (σ/σ')^{2(1−v)}. This factor
    is α'/α at v = 1, is never below 1, and tends to 1 for small steps.
    """
    z, logsnr, labels = noisy
    logsnr_next, w = logsnr + step, 1.7
    alpha, sigma = (a[:, None] for a in alpha_sigma(logsnr))
    alpha_next, sigma_next = (a[:, None] for a in alpha_sigma(logsnr_next))
    eps = EPS(z, logsnr, labels)
    mean, _ = posterior(z, (z - sigma * eps) / alpha, logsnr, logsnr_next, v)

    guided = classifier_guidance(EPS, exact_classifier, w)(z, logsnr, labels)
    by_eps = posterior(z, (z - sigma * guided) / alpha, logsnr, logsnr_next, v)[0] - mean
    rule = shift_mean(ancestral(v), exact_classifier, labels, w)
    shifted, std = rule(z, (z - sigma * eps) / alpha, logsnr, logsnr_next)
    factor = alpha_next / alpha * (sigma / sigma_next) ** (2.0 * (1.0 - v))
    added = -np.expm1(-step)
    scale = jnp.abs(mean).max()  # each shift is a small difference of two means
    np.testing.assert_allclose(by_eps / added, factor * (shifted - mean) / added, rtol=1e-4, atol=3e-7 * scale / added)
    np.testing.assert_array_equal(std, posterior(z, z, logsnr, logsnr_next, v)[1])
    assert (factor >= 1.0).all()
    assert factor.max() < (3.0 if step == 0.5 else 1.002)


def test_algorithm_1_has_adms_mean_and_covariance(noisy) -> None:
    """x_{t−1} ~ N(μ + w Σ ∇, Σ) with Σ = β_t, which is v = 1, in float64 from β_t = 1 − ᾱ_t/ᾱ_{t−1}."""
    z, logsnr, labels = noisy
    logsnr_next, w = logsnr + 0.25, 1.3
    alpha_bar, alpha_bar_next = (1.0 / (1.0 + np.exp(-np.float64(x)))[:, None] for x in (logsnr, logsnr_next))
    beta = 1.0 - alpha_bar / alpha_bar_next
    eps = np.float64(EPS(z, logsnr, labels))
    mu = (z - beta / np.sqrt(1.0 - alpha_bar) * eps) / np.sqrt(1.0 - beta)
    gradient = np.float64(class_gradient(exact_classifier, z, logsnr, labels))
    x = (z - np.sqrt(1.0 - alpha_bar) * eps) / np.sqrt(alpha_bar)
    mean, std = shift_mean(ancestral(1.0), exact_classifier, labels, w)(z, jnp.float32(x), logsnr, logsnr_next)
    np.testing.assert_allclose(np.square(std), beta, rtol=1e-4)
    np.testing.assert_allclose(mean, mu + w * beta * gradient, rtol=1e-4, atol=1e-4)


def test_algorithm_2_is_ddim_with_the_shifted_eps(noisy) -> None:
    """x_{t−1} = √ᾱ_{t−1} (x_t − √(1 − ᾱ_t) ε̂) / √ᾱ_t + √(1 − ᾱ_{t−1}) ε̂ in float64, ε̂ = ε − w √(1 − ᾱ_t) ∇."""
    z, logsnr, labels = noisy
    logsnr_next, w = logsnr + 0.25, 1.3
    alpha_bar, alpha_bar_next = (1.0 / (1.0 + np.exp(-np.float64(x)))[:, None] for x in (logsnr, logsnr_next))
    gradient = np.float64(class_gradient(exact_classifier, z, logsnr, labels))
    eps = np.float64(EPS(z, logsnr, labels)) - w * np.sqrt(1.0 - alpha_bar) * gradient
    x = (z - np.sqrt(1.0 - alpha_bar) * eps) / np.sqrt(alpha_bar)
    expected = np.sqrt(alpha_bar_next) * x + np.sqrt(1.0 - alpha_bar_next) * eps

    guided = classifier_guidance(EPS, exact_classifier, w)(z, logsnr, labels)
    alpha, sigma = (a[:, None] for a in alpha_sigma(logsnr))
    mean, std = ddim()(z, (z - sigma * guided) / alpha, logsnr[:, None], logsnr_next[:, None])
    assert std is None
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-4)


def test_algorithm_1_samples_in_the_loop_and_needs_noise() -> None:
    """It samples the requested class from an unconditional model. Without noise, there is no Σ, which is an error."""
    labels = jnp.full(512, 1)
    options: dict[str, Any] = dict(shape=(2,), num_steps=64, clip=False)
    rule = shift_mean(ancestral(0.3), exact_classifier, labels, 1.0)
    x = jax.jit(lambda key: guided_sample(key, unconditional, labels, sampler=rule, **options))(jax.random.key(0))
    np.testing.assert_allclose(x.mean(0), MEANS[1], atol=0.1)
    with pytest.raises(ValueError, match="no noise"):
        guided_sample(
            jax.random.key(0), EPS, labels, sampler=shift_mean(ddim(), exact_classifier, labels, 1.0), **options
        )
