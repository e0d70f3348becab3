"""FID, IS, precision and recall against closed forms, float64, and the results of torch-fidelity.

`data/torch_fidelity.npz` contains the results of torch-fidelity 0.4.0 for the features and logits of `formula.py`: FID,
precision and recall (k = 3) of 700 references "a" and 900 samples "b", and the IS of 2,000 logits in 4 splits, not
shuffled.
"""

from functools import reduce
from pathlib import Path

import formula
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import linalg
from scipy.special import softmax

from cfd.evaluation import metrics
from cfd.runs import npz

PEER = Path(__file__).parents[1] / "data" / "torch_fidelity.npz"


def peer(name: str) -> float:
    return float(npz.read_npz(PEER, [name])[name])


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return formula.features("a", 700, 48, 1.0, 1.0)


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return formula.features("b", 900, 48, 1.02, 0.95)


def statistics(features):
    return metrics.mean_and_cov(metrics.moments(features))


def test_fid_of_torch_fidelity(reference, samples):
    ours = metrics.frechet_distance(*statistics(reference), *statistics(samples))
    assert ours == pytest.approx(peer("fid"), rel=1e-3, abs=0.0)


def test_inception_score_of_torch_fidelity():
    probs = softmax(formula.logits(2000, 10).astype(np.float64), axis=1)
    assert metrics.inception_score(probs, split_size=500) == pytest.approx(peer("inception_score"), rel=1e-6)


def test_precision_and_recall_of_torch_fidelity(reference, samples):
    precision, recall = metrics.precision_recall(reference, samples, k=3)
    assert round(precision * 900) == precision * 900 and round(recall * 700) == pytest.approx(recall * 700)
    assert np.float32(precision) == np.float32(peer("precision"))
    assert np.float32(recall) == np.float32(peer("recall"))


def test_statistics_are_those_of_numpy(samples):
    mean, cov = statistics(samples)
    np.testing.assert_allclose(mean, samples.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(samples.astype(np.float64), rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int64])
def test_statistics_of_any_dtype_are_those_of_float64(dtype):
    """Sums in float16 are infinite beyond 65,504, and those of unsigned integers wrap."""
    rows = (128 * formula.uniform("rows", 900, 20)).astype(dtype)
    for ours, expected in zip(statistics(rows), statistics(rows.astype(np.float64)), strict=True):
        np.testing.assert_array_equal(ours, expected)
    for ours, expected in zip(statistics(jnp.asarray(rows)), statistics(rows), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("shards", [1, 2, 4, 60])
def test_moments_do_not_depend_on_shards_or_order(samples, shards):
    """The features are far from the origin, where sums of squares would lose the variance."""
    far = samples.astype(np.float64) + 1e6
    whole = statistics(far)
    order = np.argsort(formula.uniform("order", len(far)))
    parts = [metrics.moments(far[rows]) for rows in np.array_split(order, shards)]
    for sequence in (parts, parts[::-1]):
        merged = metrics.mean_and_cov(reduce(metrics.merge, sequence))
        for ours, expected in zip(merged, whole, strict=True):
            assert np.abs(ours - expected).max() < 1e-6 * np.abs(expected).max()


def test_frechet_distance_of_commuting_gaussians():
    """For covariances with the same eigenvectors, it is |Δμ|² + Σ (√λ1 − √λ2)²."""
    basis = np.linalg.qr(formula.uniform("basis", 30, 30) - 0.5)[0]
    first, second = formula.uniform("first", 30) * 5.0, formula.uniform("second", 30)
    first[:7], second[4:9] = 0.0, 0.0
    mu1, mu2 = formula.uniform("mu1", 30), formula.uniform("mu2", 30)
    ours = metrics.frechet_distance(mu1, (basis * first) @ basis.T, mu2, (basis * second) @ basis.T)
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert ours == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_the_matrix_root(reference, samples):
    """ADM's evaluator computes tr (Σ1 Σ2)^½ instead, by a Schur decomposition."""
    (mu1, sigma1), (mu2, sigma2) = statistics(reference), statistics(samples)
    root = np.trace(linalg.sqrtm(sigma1 @ sigma2)).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2.0 * root
    assert metrics.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_a_distance(reference, samples):
    a, b = statistics(reference), statistics(samples)
    assert metrics.frechet_distance(*a, *b) == pytest.approx(metrics.frechet_distance(*b, *a), rel=1e-9)
    assert metrics.frechet_distance(*a, *a) == pytest.approx(0.0, abs=1e-9)
    rotation = np.linalg.qr(formula.uniform("rotation", 48, 48) - 0.5)[0]
    turned = metrics.frechet_distance(*statistics(reference @ rotation), *statistics(samples @ rotation))
    assert turned == pytest.approx(metrics.frechet_distance(*a, *b), rel=1e-5)


def test_frechet_distance_of_too_few_samples(samples):
    """The rank is 9 of 48. The eigenvalues of the product would give the root an error of 1e-8 per null direction."""
    few = statistics(samples[:10])
    assert metrics.frechet_distance(*few, *few) == pytest.approx(0.0, abs=1e-9)
    with pytest.warns(
        UserWarning, match="10 samples of 48 features give a covariance of rank at most 9: .*at least 49"
    ):
        metrics.check_rank(10, 48)
    metrics.check_rank(49, 48)


def test_constant_set_warns_and_gives_a_finite_distance(reference):
    constant = metrics.moments(np.full((20, 48), 0.1, np.float32))
    with pytest.warns(UserWarning, match="all 20 feature vectors are equal"):
        mean, cov = metrics.mean_and_cov(constant)
    mu, sigma = statistics(reference)
    expected = ((mu - mean) ** 2).sum() + np.trace(sigma)
    assert metrics.frechet_distance(mean, cov, mu, sigma) == pytest.approx(expected, rel=1e-6)


def test_bad_statistics_are_refused(reference):
    mu, sigma = statistics(reference)
    broken_mu, broken_sigma = mu.copy(), sigma.copy()
    broken_mu[3], broken_sigma[2, 5] = np.nan, np.inf
    with pytest.raises(ValueError, match="a mean holds NaN"):
        metrics.frechet_distance(mu, sigma, broken_mu, sigma)
    with pytest.raises(ValueError, match="the second covariance holds NaN"):
        metrics.frechet_distance(mu, sigma, mu, broken_sigma)
    with pytest.raises(ValueError, match="the first covariance is not symmetric"):
        metrics.frechet_distance(mu, np.triu(sigma), mu, sigma)
    with pytest.raises(ValueError, match="the first covariance has the eigenvalue -"):
        metrics.frechet_distance(mu, -sigma, mu, sigma)
    with pytest.raises(ValueError, match=r"means \(48,\) and \(10,\)"):
        metrics.frechet_distance(mu, sigma, mu[:10], sigma[:10, :10])
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        metrics.mean_and_cov(metrics.moments(reference[:1]))


def test_bad_features_are_refused(reference):
    broken = reference.copy()
    broken[5, 0], broken[9, 1] = np.nan, np.inf
    for call in (metrics.moments, lambda x: metrics.precision_recall(reference, x)):
        with pytest.raises(ValueError, match=r"2 of 700 rows hold NaN or infinity; the first is row 5"):
            call(broken)
        with pytest.raises(ValueError, match=r"got shape \(0, 48\)"):
            call(broken[:0])
    with pytest.raises(ValueError, match="cannot be merged"):
        metrics.merge(metrics.moments(reference), metrics.moments(reference[:, :5]))
    with pytest.raises(ValueError, match="k = 3 neighbours need more than 3 samples, and there are 3"):
        metrics.precision_recall(reference, reference[:3])
    with pytest.raises(ValueError, match="48 reference and 5 sample features"):
        metrics.precision_recall(reference, reference[:, :5])


def test_inception_score_limits():
    """Certain and balanced predictions of c classes give c. The same prediction for every image gives 1."""
    assert metrics.inception_score(np.eye(10)[np.arange(5000) % 10]) == pytest.approx(10.0)
    assert metrics.inception_score(np.tile(softmax(np.arange(10.0)), (5000, 1))) == pytest.approx(1.0)


def test_inception_score_is_a_mean_over_splits():
    """One class in the first split and ten in the second give (1 + 10) / 2, although the second is shorter."""
    labels = np.concatenate([np.zeros(5000, int), np.arange(2000) % 10])
    with pytest.warns(UserWarning, match="7,000 images are no multiple of 5,000"):
        assert metrics.inception_score(np.eye(10)[labels]) == pytest.approx(5.5)


def test_a_smaller_last_split_is_said_with_the_numbers_that_have_none():
    """The one image of the last split scores 1 and counts as much as 5,000: (10 + 1) / 2."""
    words = r"the last split of the Inception Score, of 1, counts as much as .*use 5,000 or 10,000 images"
    with pytest.warns(UserWarning, match=words):
        assert metrics.inception_score(np.eye(10)[np.arange(5001) % 10]) == pytest.approx(5.5)
    for count in (1, 4999, 5000, 10_000):  # pytest makes a warning an error
        assert metrics.inception_score(np.eye(10)[np.arange(count) % 10]) == pytest.approx(min(count, 10), rel=1e-3)


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_a_softmax_of_low_precision_is_accepted(dtype, classes):
    """Its rows add up to 1 only within the precision of the dtype, and the score is that of float64 within it."""
    logits = jnp.asarray(4.0 * formula.logits(500, classes), dtype)
    probs = jax.nn.softmax(logits)
    assert probs.dtype == dtype
    exact = metrics.inception_score(softmax(np.asarray(logits, np.float64), axis=1))
    assert exact > 2.0
    for given in (probs, np.asarray(probs)):
        assert metrics.inception_score(given) == pytest.approx(exact, rel=4 * float(jnp.finfo(dtype).eps))
    same = np.tile(np.asarray(probs)[:1], (20, 1))
    assert metrics.inception_score(same) == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(ValueError, match="pass the softmax, not the logits"):
        metrics.inception_score(logits)
    with pytest.raises(ValueError, match="pass the softmax, not the logits"):
        metrics.inception_score(2.0 * probs)


@pytest.mark.parametrize("batch", [7, 64, 1200])
def test_score_sums_stream_in_any_order(batch):
    probs = softmax(formula.logits(1200, 10), axis=1)
    order = np.argsort(formula.uniform("order", 1200))
    parts = [
        metrics.score_sums(probs[rows], rows, 1200, split_size=500)
        for rows in (order[i : i + batch] for i in range(0, 1200, batch))
    ]
    streamed = metrics.inception_score_from_sums(reduce(metrics.merge_score_sums, parts))
    with pytest.warns(UserWarning, match="1,200 images are no multiple of 500"):
        assert streamed == pytest.approx(metrics.inception_score(probs, split_size=500), rel=1e-12)
    if len(parts) > 20:
        with pytest.raises(ValueError, match="splits without images"):
            metrics.inception_score_from_sums(metrics.score_sums(probs[:5], np.arange(5), 1200, split_size=500))


def test_bad_probabilities_are_refused():
    with pytest.raises(ValueError, match="add up to 1"):
        metrics.inception_score(formula.logits(20, 10))
    with pytest.raises(
        ValueError, match=r"float32, at least 0, and add up to 0\.99 to 0\.99: pass the softmax.* float32"
    ):
        metrics.inception_score(np.float32(0.99) * np.eye(10, dtype=np.float32))
    with pytest.raises(ValueError, match="NaN"):
        metrics.inception_score(np.full((20, 10), np.nan))
    with pytest.raises(ValueError, match=r"\[0, 20\)"):
        metrics.score_sums(np.eye(10), np.arange(15, 25), 20)
    with pytest.raises(ValueError, match="cannot be merged"):
        metrics.merge_score_sums(
            metrics.score_sums(np.eye(10), np.arange(10), 10), metrics.score_sums(np.eye(5), np.arange(5), 10)
        )


def test_precision_and_recall_limits(reference):
    assert metrics.precision_recall(reference, reference[::-1]) == (1.0, 1.0)
    assert metrics.precision_recall(reference, reference + 1e3) == (0.0, 0.0)
    # All samples come from one corner: each is near a reference, but most references are far from any sample.
    corner = reference[np.argsort(((reference - reference[0]) ** 2).sum(axis=1))[:50]]
    precision, recall = metrics.precision_recall(reference, corner)
    assert precision == 1.0 and 50 / 700 <= recall < 0.5


def test_copies_have_no_radius(reference):
    """The balls of four equal samples are points, which cover only themselves."""
    copies = np.repeat(reference[:5], 4, axis=0)
    assert metrics.precision_recall(reference, copies) == (1.0, 5 / 700)
