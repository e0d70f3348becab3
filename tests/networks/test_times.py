"""The time that a network embeds: ADM's discrete schedules against their definitions, and the cosine time."""

import jax.numpy as jnp
import numpy as np
import pytest

from cfd.networks.times import adm_logsnr, adm_time, cosine_time, logsnr_table, network_time, respaced


def test_adm_cosine_table_telescopes() -> None:
    """ᾱ_t = f((t + 1) / 1000) / f(0) with f(s) = cos²(…), as long as no β is clipped. Only the last β is clipped."""
    f = np.cos((np.arange(1, 1000) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    table = logsnr_table("cosine")
    np.testing.assert_allclose(table[:-1], np.log(f / (1 - f)), rtol=1e-9)
    last = f[-1] * 0.001
    np.testing.assert_allclose(table[-1], np.log(last / (1 - last)), rtol=1e-9)


def test_adm_linear_table_is_the_product() -> None:
    alpha_bar = 1.0
    for t in range(1000):
        alpha_bar *= 1.0 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert logsnr_table("linear")[t] == pytest.approx(np.log(alpha_bar / (1.0 - alpha_bar)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_adm_time_and_logsnr_are_inverses(schedule: str) -> None:
    """Also between steps. λ changes by 0.005 per step, and by whole units near the ends of the cosine schedule."""
    t = jnp.linspace(0.0, 999.0, 4001)
    np.testing.assert_allclose(adm_time(adm_logsnr(t, schedule), schedule), t, atol=2e-3)
    table = logsnr_table(schedule)
    logsnr = jnp.linspace(table[-1], table[0], 4001)
    np.testing.assert_allclose(adm_logsnr(adm_time(logsnr, schedule), schedule), logsnr, atol=1e-3)
    np.testing.assert_allclose(adm_time(jnp.float32(table), schedule), np.arange(1000), atol=1e-3)
    assert (np.diff(table) < 0).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_adm_time_stays_at_the_ends_of_its_table(schedule: str) -> None:
    np.testing.assert_array_equal(adm_time(jnp.array([-30.0, 30.0]), schedule), [999.0, 0.0])
    ends = logsnr_table(schedule)[[0, -1]]
    np.testing.assert_allclose(adm_logsnr(jnp.array([-5.0, 2000.0]), schedule), ends, rtol=1e-6)


def test_cosine_time_is_the_schedules_own() -> None:
    """For the schedule without truncation, λ(u) = −2 log tan(π u / 2), and the time is 1000 u."""
    u = np.linspace(0.001, 0.999, 99)
    logsnr = jnp.float32(-2.0 * np.log(np.tan(np.pi * u / 2.0)))
    np.testing.assert_allclose(cosine_time(logsnr), 1000.0 * u, rtol=1e-4)
    np.testing.assert_array_equal(cosine_time(logsnr), network_time(logsnr, "cosine"))


def test_an_unknown_adm_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'sigmoid'"):
        logsnr_table("sigmoid")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_respaced_steps_are_adms(schedule: str) -> None:
    """The times that guided-diffusion's `space_timesteps` prints for 1000 steps, as λ, from noise to data."""
    table = logsnr_table(schedule)

    def times(steps: str | int) -> list[int]:
        grid = respaced(steps, schedule)
        found = [int(np.argmin(abs(table - logsnr))) for logsnr in grid]
        np.testing.assert_array_equal(grid, table[found])
        return found[::-1]

    assert times("250")[:6] == [0, 4, 8, 12, 16, 20] and times("250")[-3:] == [991, 995, 999]
    assert times(250) == times("250") and len(times(250)) == 250
    assert times("ddim25") == list(range(0, 1000, 40)) and times("ddim334") == list(range(0, 1000, 3))
    assert times("10") == list(range(0, 1000, 111)) and times("1") == [0]
    assert times("3,2,4") == [0, 166, 333, 334, 666, 667, 778, 888, 999]  # sections of 334, 333 and 333 steps
    assert times("1000") == times("ddim1000") == list(range(1000))
    assert times("999")[498:501] == [498, 499, 501]  # i · 999 / 998 would be rounded to 500 at i = 499


@pytest.mark.parametrize(
    ("steps", "remedy"),
    [
        ("0", "from 1 to 1000"),
        ("1001", "from 1 to 1000"),
        ("10,334,10", "from 1 to 333"),
        ("250.0", 'give "T"'),
        ("", 'give "T"'),
        ("10,", 'give "T"'),
        ("ddim300", 'give "ddimN"'),
        ("ddim", 'give "ddimN"'),
        (-250, 'give "T"'),
    ],
)
def test_steps_that_adm_does_not_have_are_refused(steps: str | int, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"steps is '{steps}', which ADM's 1000 steps do not give: .*{remedy}"):
        respaced(steps, "linear")
