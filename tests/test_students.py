"""A network whose guidance weight is an input, in `guided_sample` and in the probability flow."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import mixture_eps

from cfd.attributes import declared
from cfd.flow import flow
from cfd.guidance import Interval, classifier_guidance, clipped, guide, without_null
from cfd.rules import apg, ramp
from cfd.sampling import Langevin, ancestral, dpm_solver, guided_sample

TEACHER: Any = mixture_eps(np.array([[-0.7, 0.2], [0.1, 0.4], [0.7, -0.5]]), np.array([0.25, 0.2, 0.3]))
LABELS = jnp.array([0, 1, 2, 2], jnp.int32)
SAMPLE: Any = functools.partial(guided_sample, jax.random.key(0), shape=(2,), num_steps=12, clip=False)


def student(z, logsnr, labels, w):
    """The exact student of the mixture: Eq. 6 of its exact scores."""
    assert w.shape == labels.shape and w.dtype == jnp.float32
    return guide(TEACHER(z, logsnr, labels), TEACHER(z, logsnr, -jnp.ones_like(labels)), w)


student.weight_range = (0.0, 4.0)  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize(
    ("w", "sampler"),
    [
        (np.array([0.0, 0.5, 1.0, 4.0], np.float32), ancestral(0.3)),
        (ramp(3.0, -4.0, 4.0), ancestral(0.3)),
        (Interval(2.0, -3.0, 5.0), dpm_solver()),
    ],
    ids=["array", "function", "interval"],
)
def test_an_exact_student_draws_the_images_of_two_passes(w, sampler):
    two = SAMPLE(TEACHER, LABELS, w=w, sampler=sampler)
    one = SAMPLE(student, LABELS, w=w, sampler=sampler)
    np.testing.assert_allclose(one, two, atol=2e-5)


def test_a_traced_weight_and_a_wrapped_student_are_the_same():
    w = jnp.array([0.1, 0.3, 1.0, 4.0])
    wrapped = functools.update_wrapper(lambda z, logsnr, labels, w: student(z, logsnr, labels, w), student)
    traced = jax.jit(lambda w: SAMPLE(jax.tree_util.Partial(without_null(wrapped)), LABELS, w=w))(w)
    np.testing.assert_allclose(traced, SAMPLE(student, LABELS, w=w), atol=1e-5)


def test_a_student_is_called_once_per_step_and_with_zero_outside_of_the_interval():
    seen = []

    def counted(z, logsnr, labels, w):
        jax.debug.callback(lambda *both: seen.append(both), logsnr[0], w[0], ordered=True)
        return 0.0 * z

    counted.weight_range = (0.0, 4.0)  # pyright: ignore[reportFunctionMemberAccess]
    jax.block_until_ready(SAMPLE(counted, LABELS, w=Interval(2.0, -3.0, 3.0)))
    jax.effects_barrier()
    logsnr, w = np.array(seen).T
    assert len(logsnr) == 12 and 0 < np.sum(w > 0) < 12
    np.testing.assert_array_equal(w, np.where(abs(logsnr) <= 3.0, 2.0, 0.0))


def test_a_corrector_gives_a_student_its_own_weight():
    corrected = [SAMPLE(fn, LABELS, w=1.0, corrector=Langevin(0.1, 1, 3.0)) for fn in (TEACHER, student)]
    np.testing.assert_allclose(corrected[1], corrected[0], atol=2e-5)


def test_the_flow_of_a_student_is_that_of_two_passes():
    z, levels = jax.random.normal(jax.random.key(1), (4, 2)), np.linspace(-6.0, 6.0, 9)
    w = Interval(2.0, -3.0, 5.0)
    one, two = (flow(fn, z, LABELS, logsnr=levels, w=w) for fn in (student, TEACHER))
    np.testing.assert_allclose(one, two, atol=2e-5)


def test_clipping_keeps_the_range():
    assert declared(clipped(student), "weight_range") == (0.0, 4.0)
    assert declared(clipped(TEACHER), "weight_range") is None


@pytest.mark.parametrize(
    "w", [-0.5, 4.5, np.float32(5.0), [0.0, 1.0, 2.0, 4.1], Interval(9.0, -3.0, 3.0), math.nan, True], ids=repr
)
def test_weights_that_a_student_did_not_learn_are_refused(w):
    with pytest.raises(ValueError, match=r"^w is ") as error:
        SAMPLE(student, LABELS, w=w if isinstance(w, Interval) else np.asarray(w))
    assert "\n" not in str(error.value)


def test_a_range_end_that_float32_rounds_is_inside():
    def narrow(z, logsnr, labels, w):
        return 0.0 * z

    narrow.weight_range = (0.1, 0.3)  # pyright: ignore[reportFunctionMemberAccess]
    for end in (0.1, jnp.float32(0.3)):
        SAMPLE(narrow, LABELS, w=end, num_steps=1)
    with pytest.raises(ValueError, match=r"w is 0 outside of its Interval, .* learned w in \[0.1, 0.3\]"):
        SAMPLE(narrow, LABELS, w=Interval(0.2, -3.0, 3.0))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"guide": TEACHER}, "guide"),
        ({"rule": apg(0.0, 2.0, 0.0)}, "rule"),
        ({"doubled": True}, "doubled"),
        ({"null": 1}, "null"),
    ],
    ids=["guide", "rule", "doubled", "null"],
)
def test_a_second_score_is_not_asked_of_a_student(given, name):
    with pytest.raises(ValueError, match=f"^{name} concerns a second score, and eps_fn is a student") as error:
        SAMPLE(student, LABELS, w=1.0, **given)
    assert "\n" not in str(error.value)


def test_a_student_is_no_guide_and_takes_no_classifier():
    with pytest.raises(ValueError, match=r"^guide is a student"):
        SAMPLE(TEACHER, LABELS, w=1.0, guide=student)
    for w in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"^eps_fn is a student"):
            classifier_guidance(student, lambda z, logsnr: z, w)
