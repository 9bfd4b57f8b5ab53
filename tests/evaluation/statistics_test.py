"""Intervals cover what they say by simulation; the formulas agree with scipy where it has them."""

import math

import numpy as np
import pytest
from scipy import stats

from research.evaluation import statistics
from research.evaluation.statistics import Estimate

TRIALS = 400


def coverage(draw, truth: float = 0.0) -> float:
    """The share of `draw(rng)`'s intervals that hold `truth`."""
    estimates = [draw(np.random.default_rng(1000 + i)) for i in range(TRIALS)]
    return sum(e.low <= truth <= e.high for e in estimates) / TRIALS


def autoregressive(rng: np.random.Generator, length: int, rho: float) -> np.ndarray:
    noise = rng.normal(size=length + 100)
    for i in range(1, len(noise)):
        noise[i] += rho * noise[i - 1]
    return noise[100:]


def runs_that_share_data(rng: np.random.Generator) -> Estimate:
    """Two runs: a common, much larger noise of the batches, and an autocorrelated difference of mean 0.03."""
    batches, drift = rng.normal(3.0, 0.3, 300), 0.03 + 0.05 * autoregressive(rng, 300, 0.5)
    return statistics.paired_steps(batches + drift, batches)


def documents(rng: np.random.Generator) -> Estimate:
    """Documents of uneven length, their difficulty shared by both runs; the difference of a document is its own."""
    tokens = rng.integers(20, 400, 60)
    difficulty, effect = rng.normal(3.0, 0.8, 60), rng.normal(-0.02, 0.05, 60)
    return statistics.paired_documents(tokens * (difficulty + effect), tokens * difficulty, tokens)


def resampled(method: str):
    def draw(rng: np.random.Generator) -> Estimate:
        tokens = rng.integers(50, 150, 80).astype(float)
        sums = tokens * rng.gamma(9.0, 1 / 3, 80)
        return statistics.bootstrap(lambda s, n: s.sum(-1) / n.sum(-1), [sums, tokens], resamples=1000, method=method)

    return draw


COVERAGE = {
    "white steps": (lambda rng: statistics.mean_of_series(rng.normal(size=200)), 0.0),
    "autocorrelated steps": (lambda rng: statistics.mean_of_series(autoregressive(rng, 400, 0.6)), 0.0),
    "runs that share data": (runs_that_share_data, 0.03),
    "documents": (documents, -0.02),
    "seeds": (lambda rng: statistics.over_seeds(rng.normal(2.0, 0.1, 4)), 2.0),
    "bootstrap bca": (resampled("bca"), 3.0),
    "bootstrap percentile": (resampled("percentile"), 3.0),
}


@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_cover(name):
    draw, truth = COVERAGE[name]
    assert 0.93 <= coverage(draw, truth) <= 0.97


def test_ignoring_autocorrelation_or_pairs_would_not_do():
    """What the paired, autocorrelation-aware interval is for: the plain ones miss, or see nothing."""
    def plain(rng):
        return statistics.over_seeds(autoregressive(rng, 400, 0.6))

    assert coverage(plain) < 0.75
    rng = np.random.default_rng(0)
    batches, drift = rng.normal(3.0, 0.3, 300), 0.03 + 0.05 * autoregressive(rng, 300, 0.5)
    ours, base = statistics.over_seeds(batches + drift), statistics.over_seeds(rng.permutation(batches))
    assert statistics.paired_steps(batches + drift, batches).se < 0.5 * math.hypot(ours.se, base.se)


TAILS = {  # P(T > t) in closed form, by degrees of freedom
    1: lambda t: math.atan2(1, t) / math.pi,
    2: lambda t: 1 / (2 + t * t + t * math.sqrt(2 + t * t)),
}


@pytest.mark.parametrize("df", TAILS)
@pytest.mark.parametrize("t", [0.01, 1.0, 3.0, 11.0, 1e3, 1e6])
def test_a_p_value_is_right_however_small(t, df):
    values = np.random.default_rng(4).normal(0.0, 1.0, df + 1)
    values += t * values.std(ddof=1) / math.sqrt(df + 1) - values.mean()  # whose t is this one
    assert statistics.over_seeds(values).p == pytest.approx(2 * TAILS[df](t), rel=1e-6)
    probability = 1 - TAILS[df](t)
    if t < 100:
        assert statistics.student_quantile(probability, df) == pytest.approx(t, rel=1e-6)


def test_a_sure_difference_has_a_p_value_of_its_size():
    values = 40.0 + np.random.default_rng(3).normal(0.0, 1.0, 30)
    p = statistics.over_seeds(values).p
    assert 0 < p < 1e-40 and p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, rel=1e-9)


def test_seeds_and_equal_documents_are_scipys_t_tests():
    values = np.random.default_rng(3).normal(0.3, 1.0, 7)
    ours, theirs = statistics.over_seeds(values), stats.ttest_1samp(values, 0.0)
    assert ours.p == pytest.approx(theirs.pvalue) and ours.se == pytest.approx(stats.sem(values))
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
    paired = statistics.paired_documents(10 * values, np.zeros(7), np.full(7, 10))
    assert (paired.value, paired.se, paired.p) == pytest.approx((ours.value, ours.se, ours.p))


def test_the_mean_of_steps_over_a_single_cosine_by_hand():
    """8 numbers have one coefficient: the first cosine itself, whose square is all of the variance."""
    cosine = math.sqrt(2 / 8) * np.cos(math.pi * (np.arange(8) + 0.5) / 8)
    estimate = statistics.mean_of_series(5.0 + 3.0 * cosine)
    assert estimate.value == pytest.approx(5.0) and estimate.se == pytest.approx(3.0 / math.sqrt(8)) and estimate.n == 8


@pytest.mark.parametrize("method, theirs", [("bca", "BCa"), ("percentile", "percentile")])
def test_the_bootstrap_is_scipys(method, theirs):
    sample = np.random.default_rng(5).lognormal(0.0, 0.8, 40)
    ours = statistics.bootstrap(lambda x: x.mean(-1), [sample], resamples=40000, method=method)
    theirs = stats.bootstrap((sample,), np.mean, n_resamples=40000, method=theirs, rng=np.random.default_rng(1))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.08 * ours.se)
    assert ours.se == pytest.approx(theirs.standard_error, rel=0.03)
    again = statistics.bootstrap(lambda x: x.mean(-1), [sample], resamples=40000, method=method)
    other = statistics.bootstrap(lambda x: x.mean(-1), [sample], resamples=40000, method=method, seed=1)
    assert ours == again != other


@pytest.mark.parametrize("n", [2, 3, 5, 20, 200])
def test_power_is_that_of_the_noncentral_t(n):
    for effect in (0.0, 0.5, 1.5):
        shift, critical = effect * math.sqrt(n), stats.t.ppf(0.975, n - 1)
        exact = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
        assert statistics.power_of(effect, 1.0, n) == pytest.approx(exact, abs=2e-3)
    effect = statistics.minimum_detectable_effect(0.02, n, power=0.9)
    assert statistics.power_of(effect, 0.02, n) == pytest.approx(0.9, abs=1e-6)
    assert n == 2 or statistics.pairs_needed(effect, 0.02, power=0.9) == pytest.approx(n, abs=1)


def test_an_effect_of_the_minimum_is_seen_as_often_as_said():
    effect = statistics.minimum_detectable_effect(0.01, 5)
    seen = [statistics.over_seeds(np.random.default_rng(i).normal(effect, 0.01, 5)).p < 0.05 for i in range(TRIALS)]
    assert 0.75 < np.mean(seen) < 0.85


def test_corrections_by_hand_and_scipy():
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    np.testing.assert_allclose(statistics.holm(p), [0.04, 0.09, 0.09, 0.025, 0.9])
    np.testing.assert_allclose(statistics.benjamini_hochberg(p), stats.false_discovery_control(p))
    assert statistics.holm([0.2]).tolist() == [0.2] and statistics.holm([]).tolist() == []
    many = np.random.default_rng(0).random(40) ** 3
    np.testing.assert_allclose(statistics.benjamini_hochberg(many), stats.false_discovery_control(many))


def test_corrections_hold_their_error_rates():
    """20 comparisons, 10 of them without a difference: any wrong one (Holm), the share of wrong ones (BH), at 10%."""
    anywhere, shares, plain = [], [], []
    for i in range(TRIALS):
        z = np.random.default_rng(i).normal(0, 1, 20) + np.repeat([0.0, 3.0], 10)
        p = 2 * stats.norm.sf(np.abs(z))
        anywhere.append(np.any(statistics.holm(p)[:10] < 0.1))
        found = statistics.benjamini_hochberg(p) < 0.1
        shares.append(found[:10].sum() / max(found.sum(), 1))
        plain.append(np.any(p[:10] < 0.1))
    assert np.mean(anywhere) < 0.13 and np.mean(shares) < 0.1 and np.mean(plain) > 0.5


BAD = [
    (lambda: statistics.mean_of_series(np.zeros(7)), "7 steps are too few"),
    (lambda: statistics.paired_steps(np.zeros(9), np.zeros(8)), "9 steps against 8"),
    (lambda: statistics.paired_documents(np.zeros(1), np.zeros(1), np.ones(1)), "at least 2"),
    (lambda: statistics.over_seeds([1.0]), "at least 2"),
    (lambda: statistics.bootstrap(np.mean, [np.zeros(3)], method="t"), "unknown bootstrap method 't'"),
    (lambda: statistics.bootstrap(np.mean, [np.zeros(3), np.zeros(4)]), "need the same"),
    (lambda: statistics.minimum_detectable_effect(0.1, 3, power=0.01), "power 0.01 must be between"),
    (lambda: statistics.power_of(0.1, 0.0, 3), "above 0"),
    (lambda: statistics.pairs_needed(0.0, 0.1), "need an effect"),
    (lambda: statistics.holm([0.5, math.nan]), "from 0 to 1"),
    (lambda: statistics.student_quantile(1.0, 3), "no Student quantile"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
