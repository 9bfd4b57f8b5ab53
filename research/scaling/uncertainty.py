"""What a fit is worth: resamples of its runs, intervals, runs that don't belong, and the error on a budget it didn't see."""

from typing import Callable, Mapping

import numpy as np

from research.scaling.points import Points, budgets

Figure = dict[str, float]  # {"value", "low", "high"}

MOST = 1e300  # what JSON can hold


def resamples(points: int, count: int, seed: int = 0, rung_P: np.ndarray | None = None) -> np.ndarray:
    """How often each of `points` runs counts in each of `count` bootstrap resamples: (R, P).

    Runs of one rung (`rung_P`: the seeds of one size and token count) are drawn together: they share the law's error there, so
    they aren't independent. Without, every run is a rung, and rows sum to P.
    """
    rung_P = np.arange(points) if rung_P is None else rung_P
    rungs = int(rung_P.max()) + 1
    return np.random.default_rng(seed).multinomial(rungs, np.full(rungs, 1 / rungs), count)[:, rung_P]


def interval(values_S: np.ndarray, confidence: float = 0.95) -> Figure:
    """The figure of entry 0 (all the data) with the percentile interval of the others (bootstrap resamples).

    A resample without a value (an optimum that doesn't exist) counts as beyond both ends, half of them each.

    Raises:
      ValueError: no resamples: nothing is said without an interval; or no value, of which nothing can be said.
    """
    values_S = np.asarray(values_S, np.float64)
    if len(values_S) < 2:
        raise ValueError("an interval needs bootstrap resamples")
    if np.isnan(values_S[0]):
        raise ValueError("there is no value to give an interval of")
    missing = np.flatnonzero(np.isnan(values_S[1:])) + 1
    drawn_R = values_S.copy()
    drawn_R[missing[::2]], drawn_R[missing[1::2]] = -np.inf, np.inf
    levels = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(np.clip(drawn_R[1:], -MOST, MOST), levels, method="nearest" if len(missing) else "linear")
    return {"value": float(np.clip(values_S[0], -MOST, MOST)), "low": float(low), "high": float(high)}


def interval_or_none(values_S: np.ndarray) -> Figure | None:
    """`interval`, or None where all the data give no value."""
    return None if np.isnan(values_S[0]) else interval(values_S)


def predictive(log_loss_S: np.ndarray, residual_P: np.ndarray, parameters: int, seed: int = 0) -> np.ndarray:
    """Losses of one new run: each resample's law times a residual drawn at random; entry 0 stays the law's own.

    Residuals of a fit with K parameters are too small by sqrt((P - K) / P), which is put back.
    """
    count = len(residual_P)
    noise_S = np.random.default_rng(seed).choice(residual_P, len(log_loss_S)) * np.sqrt(count / max(count - parameters, 1))
    noise_S[0] = 0
    return np.exp(log_loss_S + noise_S)


def spread(residual_P: np.ndarray) -> float:
    """A standard deviation that a few outliers don't change."""
    return 1.4826 * float(np.median(np.abs(residual_P - np.median(residual_P))))


def outliers(residual_P: np.ndarray, names: tuple[str, ...], limit: float = 5.0) -> list[dict]:
    """Runs more than `limit` robust standard deviations (1.4826 MAD) from the median residual. They stay in the fit."""
    z_P = (residual_P - np.median(residual_P)) / max(spread(residual_P), 1e-9)
    return [{"run": names[i], "residual": float(residual_P[i]), "z": float(z_P[i])}
            for i in np.argsort(-np.abs(z_P)) if abs(z_P[i]) > limit]


def leave_largest_out(points: Points, predict: Callable[[Points, Points], Mapping]) -> dict:
    """The error on the largest budget of a law that was fitted without it.

    Args:
      predict: (seen runs, unseen runs) -> {"log_loss_SxU": law and resamples at U unseen runs, "residual_P", "parameters",
        "observed_U": their log losses}.

    Returns:
      flops, runs, relative_error (predicted / observed - 1, mean over the runs, with its interval) and covered: the share of
      the runs inside their own 95% prediction interval.
    """
    *smaller, largest = budgets(points)
    seen, unseen = points.take(np.concatenate(smaller)), points.take(largest)
    told = predict(seen, unseen)
    log_loss_SxU, observed_U = told["log_loss_SxU"], told["observed_U"]
    inside = []
    for u, observed in enumerate(observed_U):
        band = interval(predictive(log_loss_SxU[:, u], told["residual_P"], told["parameters"], seed=u))
        inside.append(band["low"] <= np.exp(observed) <= band["high"])
    return {"flops": float(np.exp(np.log(unseen.flops_P).mean())), "runs": len(observed_U),
            "relative_error": interval(np.expm1(log_loss_SxU - observed_U).mean(1)), "covered": float(np.mean(inside))}
