"""What a difference between runs is worth: intervals, p values, and what a planned experiment could see.

Losses are in nats per token, but nothing here knows. Every interval is two-sided. Two runs that saw the same data in the
same order share most of their noise, so their difference is taken pair by pair (step by step, document by document).
"""

import dataclasses
import math
import statistics
from typing import Callable, Sequence

import numpy as np
from scipy import special

_NORMAL = statistics.NormalDist()
_AT_ONCE = 4_000_000  # resampled numbers that are held in memory together


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its interval. `se`: standard error; `p`: two-sided, of the true value being 0; `n`: pairs, seeds, ..."""

    value: float
    low: float
    high: float
    se: float
    p: float
    n: int

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def student_quantile(probability: float, df: int) -> float:
    """The t with P(T <= t) = probability.

    Raises:
      ValueError: the probability isn't inside (0, 1), or there is no degree of freedom.
    """
    if not 0 < probability < 1 or df < 1:
        raise ValueError(f"no Student quantile of {probability} with {df} degrees of freedom")
    return float(special.stdtrit(df, probability))


def _estimate(value: float, se: float, df: int, confidence: float, n: int) -> Estimate:
    reach = student_quantile((1 + confidence) / 2, df) * se
    p = 2 * float(special.stdtr(df, -abs(value) / se)) if se else float(value == 0)
    return Estimate(float(value), float(value - reach), float(value + reach), float(se), p, n)


def mean_of_series(x_T: np.ndarray, confidence: float = 0.95) -> Estimate:
    """The mean of an autocorrelated series, such as the loss differences of consecutive steps.

    The long-run variance is the average of the first K squared cosine coefficients, K = 0.41 T^(2/3), and the interval
    Student's with K degrees of freedom (Lazarus, Lewis, Stock and Watson 2018, "HAR Inference", equations 3-5). It covers
    where Newey-West's kernel with normal quantiles is too narrow. A trend widens it, which is right: the mean of a
    series that still moves is not a constant.

    Raises:
      ValueError: fewer than 8 numbers.
    """
    x_T = np.asarray(x_T, np.float64)
    count = len(x_T)
    if count < 8:
        raise ValueError(f"{count} steps are too few for an interval of an autocorrelated series, at least 8 are needed")
    terms = max(int(0.41 * count ** (2 / 3)), 1)
    phase_KxT = math.pi * np.outer(np.arange(1, terms + 1), (np.arange(count) + 0.5) / count)
    coefficients_K = math.sqrt(2 / count) * np.cos(phase_KxT) @ (x_T - x_T.mean())
    se = math.sqrt(float(np.mean(np.square(coefficients_K))) / count)
    return _estimate(x_T.mean(), se, terms, confidence, count)


def paired_steps(ours_T: np.ndarray, base_T: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean of ours - base over the same steps of two runs; aware of autocorrelation (`mean_of_series`).

    Raises:
      ValueError: the two differ in length, or are shorter than 8 steps.
    """
    if len(ours_T) != len(base_T):
        raise ValueError(f"{len(ours_T)} steps against {len(base_T)}: pairs need the same steps")
    return mean_of_series(np.asarray(ours_T, np.float64) - np.asarray(base_T, np.float64), confidence)


def paired_documents(ours_D: np.ndarray, base_D: np.ndarray, tokens_D: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Difference ours - base of the loss per token over the same documents.

    Args:
      ours_D, base_D: summed negative log likelihood of each document, nats.
      tokens_D: counted tokens of each, the same in both runs.

    The standard error is that of the ratio estimator of the differences (Cochran 1977, section 6.4): a long document
    counts more, and its tokens are not independent.

    Raises:
      ValueError: fewer than 2 documents, or arrays of different lengths.
    """
    if not len(ours_D) == len(base_D) == len(tokens_D) or len(tokens_D) < 2:
        raise ValueError(f"{len(ours_D)}, {len(base_D)} and {len(tokens_D)} documents: need the same, at least 2")
    difference_D, tokens_D = np.asarray(ours_D, np.float64) - base_D, np.asarray(tokens_D, np.float64)
    count, value = len(tokens_D), difference_D.sum() / tokens_D.sum()
    residual = np.square(difference_D - value * tokens_D).sum()
    se = math.sqrt(residual * count / (count - 1)) / tokens_D.sum()
    return _estimate(value, se, count - 1, confidence, count)


def over_seeds(values_S: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean over seeds with its standard error and Student's interval.

    Raises:
      ValueError: fewer than 2 seeds.
    """
    values = np.asarray(values_S, np.float64)
    if len(values) < 2:
        raise ValueError("a standard error over seeds needs at least 2 of them")
    return _estimate(values.mean(), values.std(ddof=1) / math.sqrt(len(values)), len(values) - 1, confidence, len(values))


def bootstrap(
    statistic: Callable[..., np.ndarray], samples: Sequence[np.ndarray], confidence: float = 0.95, resamples: int = 2000,
    seed: int = 0, method: str = "bca",
) -> Estimate:
    """An interval for any statistic of independent units (documents, seeds, prompts); units are resampled whole.

    Args:
      statistic: of arrays (..., D) -> (...,), reducing the last axis, e.g. lambda s, n: s.sum(-1) / n.sum(-1).
      samples: arrays of length D; entry i of each belongs to unit i.
      method: "percentile" or "bca" (bias-corrected and accelerated: Efron 1987; Efron and Tibshirani 1993, chapter 14).

    `se` is the standard deviation of the resampled values; `p` is twice the smaller share of them beyond 0, at least
    1 / resamples.

    Raises:
      ValueError: an unknown method, fewer than 2 units, or arrays of different lengths.
    """
    samples = [np.asarray(sample, np.float64) for sample in samples]
    count = len(samples[0])
    if method not in ("bca", "percentile"):
        raise ValueError(f"unknown bootstrap method {method!r}, choose bca or percentile")
    if count < 2 or any(len(sample) != count for sample in samples):
        raise ValueError(f"{[len(sample) for sample in samples]} units: need the same, at least 2")
    rng, drawn = np.random.default_rng(seed), []
    rows = max(1, _AT_ONCE // count)
    for begin in range(0, resamples, rows):
        index_RxD = rng.integers(0, count, (min(rows, resamples - begin), count))
        drawn.append(statistic(*[sample[index_RxD] for sample in samples]))
    values_R = np.sort(np.concatenate(drawn))
    value = float(statistic(*samples))
    levels = [(1 - confidence) / 2, (1 + confidence) / 2]
    if method == "bca":
        levels = _bca_levels(statistic, samples, values_R, value, levels)
    low, high = np.quantile(values_R, levels)
    beyond = min(float(np.mean(values_R <= 0)), float(np.mean(values_R >= 0)))
    p = min(1.0, max(2 * beyond, 1 / resamples))
    return Estimate(value, float(low), float(high), float(values_R.std(ddof=1)), p, count)


def _bca_levels(
    statistic: Callable, samples: list[np.ndarray], values_R: np.ndarray, value: float, levels: list[float],
) -> list[float]:
    """The quantiles of the resampled values that BCa reads instead of `levels`."""
    below = np.mean(values_R < value) / 2 + np.mean(values_R <= value) / 2
    if not 0 < below < 1:
        return levels
    bias = _NORMAL.inv_cdf(float(below))
    without_D = np.array([float(statistic(*[np.delete(sample, i) for sample in samples])) for i in range(len(samples[0]))])
    spread_D = without_D.mean() - without_D
    scale = np.square(spread_D).sum() ** 1.5
    acceleration = float(np.power(spread_D, 3).sum() / (6 * scale)) if scale else 0.0
    shifted = [bias + _NORMAL.inv_cdf(level) for level in levels]
    return [_NORMAL.cdf(bias + z / (1 - acceleration * z)) for z in shifted]


def power_of(effect: float, sd: float, n: int, confidence: float = 0.95) -> float:
    """The chance that a two-sided t test of n values (pairs, seeds) of standard deviation `sd` sees a mean of `effect`.

    P(|T| > t) of the noncentral t, by integration over the sample's standard deviation (Cohen 1988, chapter 2).

    Raises:
      ValueError: fewer than 2 values, or sd isn't positive.
    """
    if n < 2 or sd <= 0:
        raise ValueError(f"n={n} values of standard deviation {sd}: need at least 2, and above 0")
    df, shift = n - 1, effect / sd * math.sqrt(n)
    critical = student_quantile((1 + confidence) / 2, df)
    lowest, highest = max(0.0, 1 - 10 / math.sqrt(2 * df)), 1 + 10 / math.sqrt(2 * df)
    ratio = lowest + (highest - lowest) * (np.arange(1000) + 0.5) / 1000  # sample sd / sd, distributed as chi / sqrt(df)
    log_density = (df - 1) * np.log(ratio) - df * np.square(ratio) / 2
    density = np.exp(log_density - log_density.max())
    tail = [_NORMAL.cdf(shift - critical * s) + _NORMAL.cdf(-shift - critical * s) for s in ratio]
    return float(np.sum(density * tail) / density.sum())


def minimum_detectable_effect(sd: float, n: int, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest mean difference that n pairs (or seeds) of standard deviation `sd` show with chance `power`.

    For two groups of n runs without pairs, give sqrt(2) * sd. Ask before a run, with sd from earlier ones.

    Raises:
      ValueError: as power_of, or a power outside (1 - confidence, 1).
    """
    if not 1 - confidence < power < 1:
        raise ValueError(f"power {power} must be between {1 - confidence:.3g} and 1")
    low, high = 0.0, sd
    while power_of(high, sd, n, confidence) < power:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power_of(middle, sd, n, confidence) < power else (low, middle)
    return high


def pairs_needed(effect: float, sd: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """The fewest pairs (or seeds) of standard deviation `sd` that show a mean difference of `effect` with chance `power`.

    Raises:
      ValueError: the effect is 0, sd isn't positive, or the power isn't inside (0, 1).
    """
    if not effect or sd <= 0 or not 0 < power < 1:
        raise ValueError(f"effect {effect}, sd {sd}, power {power}: need an effect, sd above 0, power inside (0, 1)")
    low, high = 1, 2
    while power_of(effect, sd, high, confidence) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power_of(effect, sd, middle, confidence) < power else (low, middle)
    return high


def holm(p_M: Sequence[float]) -> np.ndarray:
    """Adjusted p values of M comparisons: reject those <= alpha, and any wrong rejection at all has chance <= alpha.

    Holm (1979), step-down; no assumption on how the comparisons depend on each other.
    """
    p, count = _checked(p_M), len(p_M)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * (count - np.arange(count))))
    return adjusted[np.argsort(order, kind="stable")]


def benjamini_hochberg(p_M: Sequence[float]) -> np.ndarray:
    """Adjusted p values of M comparisons: of those <= alpha, at most a share alpha is wrong on average.

    Benjamini and Hochberg (1995), for independent or positively dependent comparisons.
    """
    p, count = _checked(p_M), len(p_M)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * count / np.arange(1, count + 1)
    adjusted = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return adjusted[np.argsort(order, kind="stable")]


def _checked(p_M: Sequence[float]) -> np.ndarray:
    p = np.asarray(p_M, np.float64)
    if p.ndim != 1 or np.any(~((p >= 0) & (p <= 1))):
        raise ValueError("p values are numbers from 0 to 1")
    return p
