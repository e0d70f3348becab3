"""The targets of students, where scores are known: mixtures, Gaussians, and two steps of DDIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recursion import jaxtyping_off

from cfd.distillation import distillation_loss, halving_loss, two_steps
from cfd.guidance import NULL_LABEL
from cfd.process import alpha_sigma, cosine, linear, per_example, x_from_eps
from cfd.sampling import ddim, grid, guided_sample

MEANS = jnp.array([-0.7, 0.0, 0.7])
SPREAD = 0.25
RANGE = (0.0, 4.0)
KEY = jax.random.key(3)
X = jnp.linspace(-0.9, 0.9, 32).reshape(32, 1)
LABELS = jnp.arange(32) % 3


def log_density(z, logsnr, label):
    """log p(z | label), or log p(z) of the three classes, of one number z = α x + σ ε."""
    alpha, sigma = alpha_sigma(logsnr)
    var = (alpha * SPREAD) ** 2 + sigma**2
    logs = -0.5 * (z - alpha * MEANS) ** 2 / var
    return jnp.where(label < 0, jax.nn.logsumexp(logs), logs[label])


def exact_eps(z, logsnr, labels):
    """ε = −σ ∇ log p, by automatic differentiation."""
    _, sigma = alpha_sigma(logsnr)
    score = jax.vmap(jax.grad(log_density))(z[:, 0], logsnr, labels)
    return -(sigma * score)[:, None]


def tilted_eps(z, logsnr, labels, w):
    """−σ ∇ log p(z | c)^{1+w} p(z)^{−w}, the score that guidance with w aims at."""
    _, sigma = alpha_sigma(logsnr)

    def log_tilted(z, logsnr, label, w):
        return (1.0 + w) * log_density(z, logsnr, label) - w * log_density(z, logsnr, NULL_LABEL)

    return -(sigma * jax.vmap(jax.grad(log_tilted))(z[:, 0], logsnr, labels, w))[:, None]


def test_the_student_of_exact_scores_is_the_score_of_the_tilted_density():
    loss = jax.jit(lambda: distillation_loss(KEY, tilted_eps, exact_eps, X, LABELS, weights=RANGE))()
    assert loss < 1e-9


@pytest.mark.parametrize("weight", [None, lambda logsnr: 2.0 + 0.0 * logsnr])
def test_an_offset_of_the_difference_costs_its_square_times_the_weight(weight):
    def student(z, logsnr, labels, w):
        return tilted_eps(z, logsnr, labels, w) + 0.5 * (0.1 + w)[:, None]

    loss = distillation_loss(KEY, student, exact_eps, X, LABELS, weights=RANGE, weight=weight)
    np.testing.assert_allclose(loss, 0.25 * (2.0 if weight else 1.0), rtol=1e-4)


def test_the_weights_and_levels_of_a_batch_are_spread_evenly_over_their_ranges():
    seen = {}

    def student(z, logsnr, labels, w):
        seen.update(w=np.sort(w), logsnr=np.sort(logsnr))
        return z

    n = 512
    x, labels = jnp.zeros((n, 1)), jnp.zeros(n, jnp.int32)
    distillation_loss(KEY, student, exact_eps, x, labels, weights=(-1.0, 3.0), schedule=linear(-20.0, 20.0))
    # 1 + w − lo is log-uniform in [1, 5].
    for values, lo, hi in ((np.log(2.0 + seen["w"]), 0.0, np.log(5.0)), (seen["logsnr"], -20.0, 20.0)):
        assert values[0] >= lo - 1e-6 and values[-1] <= hi + 1e-6
        np.testing.assert_allclose(values, lo + (hi - lo) * (np.arange(n) + 0.5) / n, atol=(hi - lo) * 4 / n)


def test_no_gradient_goes_through_the_teacher():
    def loss(scale):
        return distillation_loss(KEY, lambda z, *_: z, lambda *a: scale * exact_eps(*a), X, LABELS, weights=RANGE)

    assert jax.grad(loss)(1.0) == 0.0


def test_a_linear_student_of_gaussians_has_the_exact_solution():
    """ε(z, c) = k_c z and ε(z, ∅) = k_∅ z; the student (a + b w) z then has a = k_c and b = k_c − k_∅."""
    logsnr, stds = 0.5, np.array([0.3, 0.8])
    alpha2, sigma2 = 1 / (1 + np.exp(-logsnr)), 1 / (1 + np.exp(logsnr))
    gain, gain_null = np.sqrt(sigma2) / (alpha2 * stds**2 + sigma2), np.sqrt(sigma2) / (alpha2 * 0.5 + sigma2)
    x, labels = jax.random.normal(KEY, (256, 2)), jnp.arange(256) % 2
    gains = jnp.append(jnp.float32(gain), jnp.float32(gain_null))  # the last is that of label −1

    def teacher(z, logsnr, labels):
        return gains[labels][:, None] * z

    def loss(params):
        def student(z, logsnr, labels, w):
            a, b = params[:, labels]
            return (a + b * w)[:, None] * z

        return distillation_loss(
            KEY, student, teacher, x, labels, weights=RANGE, schedule=lambda u: jnp.full_like(u, logsnr)
        )

    start = jnp.zeros((2, 2))  # a and b of each class; the loss is quadratic, so one Newton step reaches the minimum
    hessian = jax.jit(jax.hessian(loss))(start).reshape(4, 4)
    best = -np.linalg.solve(np.float64(hessian), np.float64(jax.grad(loss)(start)).ravel()).reshape(2, 2)
    np.testing.assert_allclose(best, [gain, gain - gain_null], rtol=1e-3)  # float32, and divisors from 0.01 to 17


def linear_eps(std):
    """The exact ε of data N(0, std²), which is linear in z."""

    def eps(z, logsnr):
        alpha, sigma = alpha_sigma(per_example(logsnr, z))
        return sigma * z / (jnp.square(alpha * std) + jnp.square(sigma))

    return eps


@pytest.mark.parametrize("levels", [(-20.0, -3.0, -1.0), (-2.0, 0.3, 2.0), (1.0, 6.0, 20.0)])
def test_one_step_with_the_target_goes_where_two_steps_on_a_gaussian_go(levels):
    """In float64, from the product of the two steps' factors alone."""
    std = 0.4
    a, s = (np.sqrt(1 / (1 + np.exp(sign * np.float64(levels)))) for sign in (-1, 1))

    def factor(i, j):
        shrink = a[i] * std**2 / (a[i] ** 2 * std**2 + s[i] ** 2)  # x̂ = shrink z
        return a[j] * shrink + s[j] * (1 - a[i] * shrink) / s[i]

    expected = factor(0, 1) * factor(1, 2)
    z = jnp.array([[1.3], [-0.2]])
    x = two_steps(linear_eps(std), z, *(jnp.full(2, level) for level in levels), clip=False)
    one = a[2] * np.float64(x) + s[2] * (np.float64(z) - a[0] * np.float64(x)) / s[0]
    np.testing.assert_allclose(one, expected * np.float64(z), rtol=2e-5, atol=1e-6)


def test_the_target_of_the_last_step_is_the_second_prediction():
    z, logsnr, middle = jnp.array([[0.7]]), jnp.array([-1.0]), jnp.array([2.0])
    eps_fn = linear_eps(0.5)
    first = x_from_eps(z, eps_fn(z, logsnr), logsnr)
    z_middle, _ = ddim()(z, first, per_example(logsnr, z), per_example(middle, z))
    found = two_steps(eps_fn, z, logsnr, middle, jnp.array([jnp.inf]))
    np.testing.assert_array_equal(found, x_from_eps(z_middle, eps_fn(z_middle, middle), middle))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_every_second_level_of_the_teacher_is_a_level_of_the_student(num_steps):
    schedule = cosine(-20.0, 20.0)
    short, long = (grid(n, schedule, clean_end=False) for n in (num_steps, 2 * num_steps))
    np.testing.assert_array_equal(long[::2], short)
    assert short[0] == schedule(1.0) and len(short) == num_steps
    np.testing.assert_array_equal(grid(num_steps + 1, schedule)[:-1], short)


@pytest.mark.parametrize("num_steps", [4])
def test_a_student_with_the_exact_target_draws_the_teachers_images_in_half_the_steps(num_steps):
    schedule = cosine(-20.0, 20.0)
    short, long = (grid(n, schedule, clean_end=False) for n in (num_steps, 2 * num_steps))
    w = 1.5

    def teacher(z, logsnr, labels):
        return tilted_eps(z, logsnr, labels, jnp.full(len(z), w))

    def student(z, logsnr, labels):
        i = 2 * jnp.argmin(jnp.abs(short - logsnr[0]))
        after = jnp.append(long, jnp.inf)[i + 2]
        levels = (jnp.full(len(z), level) for level in (short[i // 2], long[i + 1], after))
        x = two_steps(lambda z, level: teacher(z, level, labels), z, *levels)
        alpha, sigma = alpha_sigma(per_example(logsnr, z))
        return (z - alpha * x) / sigma

    images = [
        guided_sample(KEY, eps_fn, LABELS, (1,), num_steps=levels, sampler=ddim())
        for eps_fn, levels in ((teacher, long), (student, short))
    ]
    # At λ = −20, rounding of ε moves x̃ by 1e-3.
    np.testing.assert_allclose(images[1], images[0], atol=5e-3)


def test_the_student_that_does_two_steps_in_one_has_no_loss():
    num_steps, levels = 4, jnp.append(grid(8, cosine(), clean_end=False), jnp.inf)

    def student(z, logsnr, labels, w):
        i = jax.vmap(lambda level: jnp.argmin(jnp.abs(levels[:-1] - level)))(logsnr)
        x = two_steps(lambda z, level: tilted_eps(z, level, labels, w), z, logsnr, levels[i + 1], levels[i + 2])
        alpha, sigma = alpha_sigma(per_example(logsnr, z))
        return (z - alpha * x) / sigma

    def loss(student_fn):
        return halving_loss(KEY, student_fn, tilted_eps, X, LABELS, num_steps=num_steps, weights=RANGE)

    assert loss(student) < 1e-6
    np.testing.assert_allclose(loss(lambda *a: student(*a) + 0.5), 0.25, rtol=1e-3)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.0), (-2.0, 1.0), (0.0, float("inf")), (0.0,), 4.0, ("0", "4")])
def test_a_range_of_weights_must_be_one(weights):
    with jaxtyping_off(), pytest.raises(ValueError, match="weights is"):
        distillation_loss(KEY, tilted_eps, exact_eps, X, LABELS, weights=weights)


def test_a_schedule_gives_a_noise_level_for_each_row():
    with pytest.raises(ValueError, match=r"schedule returned shape \(\); it must return λ for each u"):
        distillation_loss(KEY, tilted_eps, exact_eps, X, LABELS, weights=RANGE, schedule=lambda u: u[0])


def test_a_student_cannot_teach_guidance():
    def student(z, logsnr, labels, w=None):
        return z

    vars(student).update(weight_range=RANGE)
    with pytest.raises(ValueError, match="teacher_fn is a student"):
        distillation_loss(KEY, tilted_eps, student, X, LABELS, weights=RANGE)


@pytest.mark.parametrize("num_steps", [0, True])
def test_a_number_of_steps_is_a_count(num_steps):
    with pytest.raises(ValueError, match="num_steps is"):
        halving_loss(KEY, tilted_eps, tilted_eps, X, LABELS, num_steps=num_steps, weights=RANGE)
