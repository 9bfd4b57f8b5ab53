"""Runs that diverged: what lies far above the law of the others, found before any law is fitted to them.

One run can bend a law where the law ends, at the smallest sizes, so neither its residual nor a robust loss shows it. Here a law
is fitted to the three quarters of the runs that agree best (`fitter.trimmed`), and every other run is held to it: by how far
it lies above, in standard deviations of the runs that the law was fitted to and of the law itself where that run is.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

from research.scaling import fitter
from research.scaling.extended import FORMS, problem
from research.scaling.laws import parametric_problem
from research.scaling.points import Points, check_falls, rungs
from research.scaling.uncertainty import spread

ABOVE = 0.1  # a run that ends less than that above the law hasn't diverged, however sure it is that it's above
CHANCE = 1e-5  # that a run of noise alone is called diverged
KEPT = 0.75
NEIGHBOURS = 3
WRONG_LAW = 0.5  # that much a law may be wrong by where several runs say so; what ends higher has diverged


def without_diverged(points: Points, above: float = ABOVE) -> Points:
    """The runs that didn't diverge; the others join `left_out`, with how far they are above the law of the rest.

    The law is approach 3's, or that of the further column. Where the runs can't decide it (fewer than 3 beyond its parameters)
    none is left out, nor where there are several further columns.

    Raises:
      InputError: what was named as the loss rises with compute.
    """
    check_falls(points)
    bad_P, law_P = _diverged(points, above)
    reasons = [(points.names[i], f"diverged: its loss is {points.loss_P[i]:.4g}, {math.exp(law_P[i]):.4g} by the law of the "
                f"other runs") for i in np.flatnonzero(bad_P)]
    return dataclasses.replace(points.take(~bad_P), left_out=points.left_out + tuple(reasons))


def _diverged(points: Points, above: float) -> tuple[np.ndarray, np.ndarray]:
    """(which runs, the law's log loss of each), (P,)."""
    nothing = np.zeros(len(points), bool), np.log(points.loss_P)
    if len(points.extra) > 1:
        return nothing
    form = next((form for form in FORMS.values() if form.regressor in points.extra), None)
    curve, x_FxP, start_SxK = parametric_problem(points) if form is None else problem(form, points)
    estimated = start_SxK.shape[1]
    if len(np.unique(rungs(points))) < estimated + 3:
        return nothing
    shift = np.log(points.loss_P).mean()
    y_P = np.log(points.loss_P) - shift
    least = math.log1p(above)
    keep = max(math.ceil(KEPT * len(points)), estimated + 2)
    theta_K = fitter.trimmed(curve, x_FxP, y_P, start_SxK[::4], keep)
    residual_P = y_P - fitter.tangent(curve, theta_K, x_FxP)[0]
    scale = spread(residual_P) * math.sqrt(len(points) / (len(points) - estimated))
    # To begin with, whatever may be wrong is set aside. Then the one that the others agree with best comes back, and the next,
    # until none does.
    away_P = np.abs(residual_P) > max(least, 4 * scale)
    while True:
        theta_K = fitter.refit(curve, x_FxP, y_P, theta_K, start_SxK, ~away_P)
        residual_P, leverage_P = _residuals(curve, x_FxP, y_P, theta_K, ~away_P)
        free = max(int((~away_P).sum()) - estimated, 1)
        noise_P = math.sqrt((residual_P[~away_P] ** 2).sum() / free) * np.sqrt(1 + leverage_P)
        over_P = np.where(away_P, np.abs(residual_P) / np.maximum(least, stats.t.isf(CHANCE, free) * noise_P), np.inf)
        if over_P.min() > 1:
            break
        away_P[over_P.argmin()] = False
    excused_P = _shared(x_FxP, residual_P) & (residual_P < math.log1p(WRONG_LAW))
    return away_P & (residual_P > 0) & ~excused_P, y_P - residual_P + shift


def _residuals(curve: fitter.Curve, x_FxP: np.ndarray, y_P: np.ndarray, theta_K: np.ndarray, used_P: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray]:
    """(observed - fitted, variance of the fitted over that of a run of those used), (P,). Huge where a run depends on what
    these say nothing of."""
    fitted_P, slope_PxK = fitter.tangent(curve, theta_K, x_FxP)
    information_KxK = slope_PxK[used_P].T @ slope_PxK[used_P]
    least_KxK = 1e-9 * np.trace(information_KxK) * np.eye(len(theta_K))
    return y_P - fitted_P, ((slope_PxK @ np.linalg.inv(information_KxK + least_KxK)) * slope_PxK).sum(1)


def _shared(x_FxP: np.ndarray, residual_P: np.ndarray) -> np.ndarray:
    """Which runs' neighbours (the nearest three) lie above the law, too, at least a third as far: there the law is wrong."""
    place_FxP = x_FxP / np.maximum(x_FxP.std(1, keepdims=True), 1e-9)
    distance_PxP = np.sqrt(((place_FxP[:, :, None] - place_FxP[:, None]) ** 2).sum(0))
    np.fill_diagonal(distance_PxP, np.inf)
    nearest_PxS = distance_PxP.argsort(1)[:, :NEIGHBOURS]
    return 3 * np.median(residual_P[nearest_PxS], 1) > residual_P
