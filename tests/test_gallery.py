"""launch/guidance.ipynb: each number that a figure prints, against a value derived here without the package.

The references are quadrature, ODEs of quantiles, float64 NumPy and closed forms. Tolerances are about four standard
errors of the samples, plus the error of the sampler's steps. The stored outputs are checked in every run of the suite.
A slow test executes the notebook, and checks its outputs in the same way.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import norm, wasserstein_distance
from test_notebook import NOTEBOOK as COLAB
from test_notebook import cells, from_the_checkout, kernel, nbformat, pictures, printed
from tiny import ROOT

from cfd.data.digits import FILE

NOTEBOOK = ROOT / "launch" / "guidance.ipynb"
INSTALL, TOOLS, FIGURE_2, COMMUTE, SCHEDULES, AUTOGUIDANCE, DIGITS, HIGH_W, COUNTER_EXAMPLE = (
    "Install",
    "The tools",
    "Figure 2 of the paper, and its target",
    "Guidance and noise do not commute",
    "Weights that depend on the noise level",
    "Autoguidance removes outliers and keeps the spread",
    "A high w, APG and CFG++",
    "Plain guidance, APG and CFG++ at the same w",
    "The smallest counter-example",
)
FIGURES = (FIGURE_2, COMMUTE, SCHEDULES, AUTOGUIDANCE, HIGH_W, COUNTER_EXAMPLE)
PLANE = 0.6 * np.array([[0.0, 1.0], [-0.87, -0.5], [0.87, -0.5]])
LINE = np.array([[-0.7], [0.0], [0.7]])
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()


def numbers(text: str) -> dict[str, list[float]]:
    """The numbers of each printed line behind its name, which is all in front of ": "."""
    lines = (line.rpartition(": ") for line in text.splitlines())
    return {name: [float(n) for n in re.findall(r"= (-?[\d.]+)", values)] for name, _, values in lines}


def close(given: list[float], expected: Any, tolerances: Any) -> None:
    assert len(given) == len(expected)
    assert np.all(np.abs(np.subtract(given, expected)) <= tolerances), (given, expected)


# References


def alpha_variance(logsnr: float) -> tuple[float, float]:
    """α and σ²."""
    return 1 / np.sqrt(1 + np.exp(-logsnr)), 1 / (1 + np.exp(logsnr))


def flow(
    z: np.ndarray,
    means: np.ndarray,
    stds: tuple[float, float],
    asked: np.ndarray,
    away: np.ndarray,
    w: Callable[[float], float],
    *,
    num_steps: int = 600,
    noise: np.random.Generator | None = None,
) -> np.ndarray:
    """Points z [N, d] of noise after the guided probability-flow ODE, by Heun's rule, or the reverse SDE, by Euler's.

    The score that leads has the components `asked` of the mixture, with the first std, and the guide's has those of
    `away` with the second.
    """

    def score(z: np.ndarray, logsnr: float, components: np.ndarray, std: float) -> np.ndarray:
        alpha, variance = alpha_variance(logsnr)
        offset = (alpha * means[components] - z[:, None]) / ((alpha * std) ** 2 + variance)
        log_p = -0.5 * np.square(offset).sum(axis=2) * ((alpha * std) ** 2 + variance)
        return np.einsum("nk,nkd->nd", softmax(log_p, axis=1), offset)

    def velocity(z: np.ndarray, logsnr: float) -> np.ndarray:
        lead = score(z, logsnr, asked, stds[0])
        guided = lead + w(logsnr) * (lead - score(z, logsnr, away, stds[1]))
        return 0.5 * alpha_variance(logsnr)[1] * (z + (1.0 if noise is None else 2.0) * guided)

    grid = np.linspace(-14.0, 14.0, num_steps + 1)
    for a, b in itertools.pairwise(grid):
        first = velocity(z, a + 1e-9)
        if noise is None:
            z = z + 0.5 * (b - a) * (first + velocity(z + (b - a) * first, b - 1e-9))
        else:
            z = z + (b - a) * first + np.sqrt((b - a) * alpha_variance(a)[1]) * noise.normal(size=z.shape)
    return z


def moments(x: np.ndarray, p: np.ndarray) -> tuple[float, float]:
    """The spread of the points [N, 2], and the second component of their mean."""
    mean = p @ x
    return np.sqrt(p @ np.square(x - mean).mean(axis=1)), mean[1]


def on_the_line(sampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted points, and p(c | x) of the right class at each."""
    x = np.sort(sampled[:, 0])
    return x, np.exp(log_softmax(-8 * np.square(x[:, None] - LINE[:, 0]), axis=1)[:, 2])


@functools.cache
def quantiles() -> np.ndarray:
    """1000 points of equal probability of a standard normal variable."""
    return norm.ppf((np.arange(1000) + 0.5) / 1000)[:, None]


@functools.cache
def tilt_quantiles(w: float) -> np.ndarray:
    """As many of the tilt of the right class: it is p(x | c) p(c | x)^w but for a constant."""
    x = np.linspace(-1.5, 3.0, 20_001)
    density = norm.pdf(x, 0.7, 0.25) * on_the_line(x[:, None])[1] ** w
    cumulative = np.cumsum(density) / density.sum()
    return np.interp((np.arange(1000) + 0.5) / 1000, cumulative, x)


# The figures


def check_figure_2(found: dict[str, list[float]]) -> None:
    """Moments of the tilt by Gauss-Hermite quadrature of p(x|c) p(c|x)^w, and of guidance by the ODE from the nodes."""
    nodes = np.stack(np.meshgrid(NODES, NODES), axis=-1).reshape(-1, 2)
    p = np.outer(NODE_WEIGHTS, NODE_WEIGHTS).ravel()
    x = PLANE[0] + 0.3 * nodes
    log_posterior = log_softmax(-0.5 * np.square((x[:, None] - PLANE) / 0.3).sum(axis=2), axis=1)[:, 0]
    kept = p > 1e-9  # the others change no printed digit
    for w in (0.0, 1.0, 2.0, 4.0):
        tilted = p * np.exp(w * log_posterior)
        expected = moments(x, tilted / tilted.sum())
        close(found[f"w = {w:g}, tilt"], expected, 0.002)
        close(found[f"w = {w:g}, tilted_sample"], expected, [0.02, 0.045])  # four standard errors of 1000 samples
        ends = flow(nodes[kept], PLANE, (0.3, 0.3), np.array([0]), np.arange(3), lambda _, w=w: w, num_steps=200)
        close(found[f"w = {w:g}, guided"], moments(ends, p[kept] / p[kept].sum()), [0.009, 0.018])


def check_commute(found: dict[str, list[float]]) -> None:
    """W1 as the integral between distribution functions. The tilt then noised is p_λ(z|c) E[p(c|x)^w | z, c]."""
    z = np.linspace(-5.0, 6.0, 3001)
    for logsnr in (-2.0, 0.0, 2.0):
        alpha, variance = alpha_variance(logsnr)
        total = alpha**2 / 16 + variance
        densities = np.stack([norm.pdf(z, alpha * m, np.sqrt(total)) for m in LINE[:, 0]])
        mean, std = 0.7 + alpha / 16 / total * (z - 0.7 * alpha), np.sqrt(variance / 16 / total)  # of x given z and c
        x = mean[:, None] + std * NODES
        posterior = np.exp(log_softmax(-8 * np.square(x[..., None] - LINE[:, 0]), axis=2)[..., 2])
        orders = densities[2] * (posterior @ NODE_WEIGHTS), densities[2] ** 2 / densities.sum(axis=0)
        first, second = (np.cumsum(order) / order.sum() for order in orders)
        expected = np.abs(first - second).sum() * (z[1] - z[0])
        close(found[f"λ = {logsnr:g}"], [expected], 0.002)
    model = (LINE, (0.25, 0.25), np.array([2]), np.arange(3), lambda _: 1.0)
    ddim = np.abs(np.sort(flow(quantiles(), *model)[:, 0]) - tilt_quantiles(1.0)).mean()
    rng = np.random.default_rng(0)
    sde = np.sort(flow(rng.normal(size=(8000, 1)), *model, noise=rng)[:, 0])
    ancestral = wasserstein_distance(sde, tilt_quantiles(1.0))
    close(found["DDIM"], [ddim], 0.008)
    close(found["ancestral"], [ancestral], 0.012)
    assert found["tilted_sample"][0] < 0.02
    assert ddim > 0.15 and ancestral > 0.06


def check_schedules(found: dict[str, list[float]]) -> None:
    """The ODE of the quantiles, with each schedule written again."""
    between = lambda lo, hi, a, b: lambda at: a if lo <= at <= hi else b  # noqa: E731
    schedules = {
        "constant": lambda at: 0.8,
        "falling ramp": lambda at: 1.7 * min(max((4 - at) / 8, 0.0), 1.0),
        "rising ramp": lambda at: 1.5 * min(max((at + 4) / 8, 0.0), 1.0),
        "middle": lambda at: 1.5 * np.sin(np.pi * min(max((at + 2) / 6, 0.0), 1.0)) ** 2,
        "Interval": between(0.0, 4.0, 1.4, 0.0),
        "exponential": lambda at: 3.5 * np.exp(0.5 * min(at - 4, 0.0)),
        "negative window": between(-4.0, 0.0, -0.5, 1.5),
    }
    assert list(found) == list(schedules)
    assert abs(on_the_line(0.7 + 0.25 * quantiles())[1].mean() - 0.88) < 0.005  # the strength of the data in the text
    results = {}
    for name, w in schedules.items():
        x, posterior = on_the_line(flow(quantiles(), LINE, (0.25, 0.25), np.array([2]), np.arange(3), w))
        moved = np.abs(x - (0.7 + 0.25 * quantiles()[:, 0])).mean()
        results[name] = posterior.mean(), x.std() / 0.25, moved
        close(found[name], results[name], [0.002, 0.02, 0.008])
        assert abs(found[name][0] - 0.99) < 0.002  # the same strength, as the text says
    for early in ("constant", "falling ramp"):
        for late in ("Interval", "exponential", "negative window"):
            assert np.all(np.subtract(results[early], results[late])[1:] > 0.02)


def moons() -> tuple[np.ndarray, np.ndarray]:
    angle = np.pi * (np.arange(40) + 0.5) / 40
    circle, centres = np.stack([np.cos(angle), np.sin(angle)], axis=1), np.array([[-0.5, -0.2], [0.5, 0.2]])
    return np.concatenate([centres[0] + circle, centres[1] - circle]), centres


def off_the_curve(x: np.ndarray) -> tuple[float, float, float]:
    """The width, the share of outliers and the spread of samples [N, 2] of the first class."""
    z = (x - moons()[1][0]) @ np.array([1.0, 1.0j])
    z = z[z.imag > 0.1]
    off = np.abs(z) - 1
    uniform = (np.pi - 2 * np.arcsin(0.1)) / np.sqrt(12)
    return off.std(), np.mean(np.abs(off) > 0.12), np.angle(z).std() / uniform


def check_autoguidance(found: dict[str, list[float]]) -> None:
    """Exact samples of the blurred data. After autoguidance, the width is s (s / s_guide)^w: that of the data."""
    rng, curve = np.random.default_rng(1), moons()[0]
    noise = rng.normal(size=(100_000, 2))
    exact = [off_the_curve(curve[rng.integers(0, 40, len(noise))] + width * noise) for width in (0.04, 0.08)]
    close(found["the data"], exact[0], [0.0025, 0.003, 0.03])
    close(found["the model, w = 0"], exact[1], [0.005, 0.02, 0.03])
    close(found["autoguidance, w = 1"], [0.08 * (0.08 / 0.16), *exact[0][1:]], [0.0025, 0.003, 0.03])
    model = (curve, (0.08, 0.08), np.arange(40), np.arange(80), lambda _: 1.0)
    close(
        found["guidance by class, w = 1"], off_the_curve(flow(noise[:800], *model, num_steps=250)), [0.006, 0.03, 0.05]
    )


def digits_noise() -> np.ndarray:
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(5)))(jnp.arange(100))
    return np.asarray(jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), (64,)))(keys), np.float64)


def guided_digits(kind: str, w: float, num_steps: int = 64) -> tuple[float, float, float]:
    """(The share beyond ±1.5, the root mean square, the mean p(c|x)) by DDIM in float64 and precision matrices.

    CFG++ is computed as plain guidance with the weight of the text, (1 + w) / (1 − e^{−Δλ/2}) − 1, at each step.
    """
    with np.load(FILE) as arrays:
        x, digits = arrays["levels"].reshape(-1, 64) / 8.0 - 1.0, arrays["labels"]
    means = np.stack([x[digits == c].mean(axis=0) for c in range(10)])
    covariances = np.stack([np.cov(x[digits == c].T) + 0.02 * np.eye(64) for c in range(10)])
    labels = np.tile(np.arange(10), 10)
    angle = np.linspace(np.arctan(np.exp(10.0)), np.arctan(np.exp(-10.0)), num_steps)
    grid = -2 * np.log(np.tan(angle))
    largest = 1 - np.exp(-0.5 * np.diff(grid).min())

    def classes(z: np.ndarray, alpha: float, variance: float) -> tuple[np.ndarray, np.ndarray]:
        """The scores [10, N, 64], and log p(z | c) but for a constant [10, N]."""
        precisions = np.linalg.inv(alpha**2 * covariances + variance * np.eye(64))
        away = z - alpha * means[:, None]
        scores = -away @ precisions
        return scores, 0.5 * (np.einsum("cnd,cnd->cn", scores, away) + np.linalg.slogdet(precisions)[1][:, None])

    z, delta = digits_noise(), 0.0
    for i, logsnr in enumerate(grid):
        alpha, variance = alpha_variance(logsnr)
        scores, log_p = classes(z, alpha, variance)
        of_all = np.einsum("cn,cnd->nd", softmax(log_p, axis=0), scores)
        x_class, x_all = ((z + variance * s) / alpha for s in (scores[labels, np.arange(100)], of_all))
        weight = w
        if kind == "CFG++" and i + 1 < num_steps:
            weight = (1 + w) * largest / (1 - np.exp(-0.5 * (grid[i + 1] - logsnr))) - 1
        if kind == "APG":
            delta = x_class - x_all - 0.5 * delta
            length = np.linalg.norm(delta, axis=1, keepdims=True)
            short = delta * np.minimum(1, 2.0 / length)
            direction = x_class / np.linalg.norm(x_class, axis=1, keepdims=True)
            x = x_class + w * (short - np.sum(short * direction, axis=1, keepdims=True) * direction)
        else:
            x = x_class + weight * (x_class - x_all)
        after, variance_after = alpha_variance(grid[min(i + 1, num_steps - 1)])
        z = x if i + 1 == num_steps else after * x + np.sqrt(variance_after / variance) * (z - alpha * x)
    strength = np.exp(log_softmax(classes(z, 1.0, 0.0)[1], axis=0)[labels, np.arange(100)]).mean()
    return float(np.mean(np.abs(z) > 1.5)), float(np.sqrt(np.mean(np.square(z)))), float(strength)


def check_high_w(found: dict[str, list[float]]) -> None:
    cases = {"w = 0": ("plain", 0.0), **{f"{kind}, w = 8": (kind, 8.0) for kind in ("plain", "APG", "CFG++")}}
    assert list(found) == list(cases)
    for name, (kind, w) in cases.items():
        close(found[name], guided_digits(kind, w), [0.002, 0.004, 0.002])


def check_counter_example(found: dict[str, list[float]]) -> None:
    """The variance of the samplers from its ODE in λ, and of the tilt by quadrature. The printed formulas agree."""

    def end(w: float, stochastic: bool) -> float:
        def slope(logsnr: float, v: np.ndarray) -> np.ndarray:
            alpha, variance = alpha_variance(logsnr)
            pull = 1 + w - w / (1 + alpha**2)  # the guided score is −pull z
            return variance * (1 + (1 - 2 * pull) * v) if stochastic else variance * (1 - pull) * v

        return solve_ivp(slope, (-20, 20), [1.0], rtol=1e-8, atol=1e-10).y[0, -1]

    x = np.linspace(-12, 12, 4001)
    for w in range(5):
        log_tilt = (1 + w) * norm.logpdf(x) - w * norm.logpdf(x, 0, np.sqrt(2))
        tilt = np.exp(log_tilt - logsumexp(log_tilt)) @ np.square(x)
        for name, expected in (("tilt", tilt), ("ancestral", end(w, True)), ("DDIM", end(w, False))):
            measured, formula = found[f"{name}, w = {w}"]
            assert abs(formula - expected) < 6e-4
            assert abs(measured / expected - 1) < 0.05  # four standard errors, and the steps
        if w:
            assert tilt > 1.1 * end(w, True) > 1.2 * end(w, False)


CHECKS: dict[str, Callable[[dict[str, list[float]]], None]] = dict(
    zip(
        FIGURES,
        (check_figure_2, check_commute, check_schedules, check_autoguidance, check_high_w, check_counter_example),
        strict=True,
    )
)


def stored() -> Iterator[tuple[str, Any]]:
    return iter((title, cell.outputs) for title, cell in cells(NOTEBOOK).items())


@pytest.mark.parametrize("title", FIGURES)
def test_the_stored_numbers_are_right(title: str) -> None:
    CHECKS[title](numbers(printed(dict(stored())[title])))


def test_the_stored_outputs_are_complete_and_small() -> None:
    assert NOTEBOOK.stat().st_size < 1_500_000
    code = cells(NOTEBOOK)
    assert list(code) == [INSTALL, TOOLS, FIGURE_2, COMMUTE, SCHEDULES, AUTOGUIDANCE, DIGITS, HIGH_W, COUNTER_EXAMPLE]
    assert [cell.execution_count for cell in code.values()] == list(range(1, len(code) + 1))
    assert [title for title, outputs in stored() if len(pictures(outputs)) == 1] == list(FIGURES)
    text = NOTEBOOK.read_text()
    assert "/tmp/" not in text and str(Path.home()) not in text and str(ROOT) not in text and "Warning" not in text
    assert "widgets" not in nbformat.read(NOTEBOOK, as_version=4).metadata
    for title in (*FIGURES, DIGITS):
        assert len(code[title].source.splitlines()) < 45


def test_the_first_cell_is_that_of_the_other_notebook() -> None:
    """Its ways to install the package, and its messages, are tested there."""
    assert cells(NOTEBOOK)[INSTALL].source == cells(COLAB)[INSTALL].source


def test_the_tools_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last figure at a reduced size, in this process: it needs `particles`, `guided_sample` and two samplers."""
    monkeypatch.setattr(plt, "show", plt.close)
    names: dict[str, Any] = {"jax": jax}
    text = cells(NOTEBOOK)[COUNTER_EXAMPLE].source.replace("16_000", "40").replace('"num_steps": 512', '"num_steps": 8')
    with matplotlib.rc_context():
        for source in (cells(NOTEBOOK)[TOOLS].source, text):
            exec(source, names)
    assert names["y"].shape == (40, 1)


def test_figure_2_may_have_one_weight(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plt, "show", plt.close)
    text = cells(NOTEBOOK)[FIGURE_2].source.replace("(0.0, 1.0, 2.0, 4.0), 15_000, 1000", "(2.0,), 60, 10")
    names: dict[str, Any] = {"jax": jax}
    with matplotlib.rc_context():
        for source in (cells(NOTEBOOK)[TOOLS].source, text):
            exec(source, names)
    assert names["panels"].shape == (2, 1)
    assert list(numbers(capsys.readouterr().out)) == ["w = 2, tilt", "w = 2, tilted_sample", "w = 2, guided"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_cells_run_and_print_the_stored_numbers(tmp_path: Path) -> None:
    """Within 0.002, except what `tilted_sample` drew: rounding can change which particles are copied."""
    with kernel(tmp_path / "alone", PYTHONPATH=from_the_checkout()) as run:
        for title, outputs in stored():
            executed = run(cells(NOTEBOOK)[title].source)
            assert len(pictures(executed)) == len(pictures(outputs))
            if title not in FIGURES:
                printed(executed)
                continue
            found, before = numbers(printed(executed)), numbers(printed(outputs))
            CHECKS[title](found)
            assert list(found) == list(before)
            for name, values in found.items():
                weighted = "tilted_sample" in name or (title == COUNTER_EXAMPLE and name.startswith("tilt"))
                close(values, before[name], 0.05 if weighted else 0.002)
