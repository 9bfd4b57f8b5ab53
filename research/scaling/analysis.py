"""A fit with everything that is said of it: intervals, the optimum at a budget, outliers, the error on the largest budget; and
which of two families' laws promises the lower loss at which budget."""

import math
from typing import Mapping

import numpy as np

from research.config import nearest
from research.errors import InputError
from research.scaling.divergence import without_diverged
from research.scaling.extended import EXTENDED, inference_optimum, optimum_at
from research.scaling.laws import LAWS, Fitted, Law, log_loss, optimal_log_loss, optimum
from research.scaling.points import Points, budgets, rungs
from research.scaling.uncertainty import MOST, interval, interval_or_none, leave_largest_out, outliers, predictive, spread

APPROACHES = LAWS | EXTENDED
HELD_OUT_RESAMPLES = 200
PERPLEXITY = 12.0  # nats: a uniform guess over 160,000 tokens. Of runs worth a fit, no tenth ends above that
USUAL_FLOPS = 1.0, 100.0  # of C/(ND), which is 6 without attention and 8 where activations are computed twice
FEW = 1e3  # parameters or tokens that no run has
USUAL_RATIO = 1e-3, 1e6  # of tokens a parameter
AT = {"total_params": "expansion"}  # a regressor -> what a budget is asked at, where that isn't itself


def analyse(points: Points, approach: str, *, bootstrap: int = 1000, seed: int = 0, budget: float | None = None,
            at: tuple[str, float] | None = None, served_tokens: float | None = None) -> dict:
    """What `fit` prints, as plain data; every estimated figure is {"value", "low", "high"} (95%).

    Args:
      approach: a row of LAWS or EXTENDED.
      bootstrap: resamples, at least 20.
      budget: FLOPs to give N_opt, D_opt and the loss at; the loss's interval holds one new run, its own noise included.
      at: the regressor of a law of EXTENDED and its value at the budget: unique_tokens, expansion (total over active
        parameters), bits or state.
      served_tokens: also the cheapest model of the budget's loss, when it will serve so many (approach 3).

    Raises:
      InputError: an unknown approach, too few resamples, a budget or value that isn't positive, `at` or `served_tokens` with
        a law that has no use for it, or runs that can't decide the law.
    """
    if approach not in APPROACHES:
        raise InputError("--approach", f"unknown {approach!r}", nearest(approach, tuple(APPROACHES)))
    if bootstrap < 20:
        raise InputError("--bootstrap", f"{bootstrap} resamples give no 95% interval", "take 1000; at least 20")
    law = APPROACHES[approach]
    _check_budget(law, approach, budget, at, served_tokens)
    points = without_diverged(points)
    fitted = law.fit(points, bootstrap, seed)
    answer = {
        "approach": approach, "formula": law.formula,
        "parameters": {name: interval(values_T) for name, values_T in fitted.parameters.items()},
        "points": len(points), "rungs": len(np.unique(rungs(points))), "fitted_points": len(fitted.residual_P),
        "left_out": [{"run": run, "reason": reason} for run, reason in points.left_out],
        "bootstrap": bootstrap, "seed": seed,
        "flops_per_param_token": points.flops_per_weight_token,
        "residual_rms": float(np.sqrt(np.mean(fitted.residual_P**2))),
        "outliers": outliers(fitted.residual_P, fitted.names),
        "notes": list(fitted.notes),
    }
    if fitted.minima is not None:
        answer["budgets"] = _minima(fitted.minima)
    answer["notes"] += _units(points) + _undecided(fitted, points)
    answer["leave_largest_out"], problem = _held_out(law, points, seed)
    answer["notes"] += [problem] if problem else []
    if budget is not None:
        answer["optimum"], notes = _at_budget(law, fitted, points, budget, at, served_tokens, seed)
        answer["notes"] += notes
    return answer


def _minima(minima: Mapping[str, np.ndarray]) -> list[dict]:
    """A row a budget that has a minimum, each figure with its interval."""
    return [{"flops": float(minima["flops"][b]), "runs": int(minima["runs"][b])}
            | {name: interval(minima[name][:, b]) for name in ("N_opt", "D_opt", "loss")} for b in range(len(minima["flops"]))]


def _units(points: Points) -> list[str]:
    """What looks like numbers in other units than the law's, or than each other's."""
    notes, high, k = [], float(np.quantile(points.loss_P, 0.9)), points.flops_per_weight_token
    if high > PERPLEXITY:
        notes.append(f"a tenth of the losses are above {high:.3g}: perplexities? These laws are of log-losses")
    if not USUAL_FLOPS[0] < k < USUAL_FLOPS[1]:
        notes.append(f"FLOPs are {k:.3g} times parameters times tokens, 6 as a rule: are they in units of their own?")
    for what, values_P in (("parameters", points.params_P), ("tokens", points.tokens_P)):
        middle = float(np.median(values_P))
        if middle < FEW:
            unit = "billions" if middle < 10 else "millions or billions"
            notes.append(f"there are {middle:.3g} {what} (median): probably {unit}? Then all that has {what} in it is in that "
                         "unit, too, and FLOPs by 6ND aren't FLOPs")
    ratio = float(np.median(points.tokens_P / points.params_P))
    if not USUAL_RATIO[0] < ratio < USUAL_RATIO[1]:
        notes.append(f"there are {ratio:.3g} tokens a parameter (median): are they in other units, or parameters and FLOPs?")
    return notes


def _undecided(fitted: Fitted, points: Points) -> list[str]:
    """Of approach 3 and its extensions: which term changes so little among the runs that its parameters mean nothing, against
    what most runs are off the law (an outlier says nothing of that)."""
    notes, count = [], len(fitted.residual_P)
    off = spread(fitted.residual_P) * math.sqrt(count / max(count - fitted.estimated, 1))
    terms = (("A", "alpha", points.params_P, "parameters"), ("B", "beta", points.tokens_P, "tokens"))
    for scale, exponent, values_P, what in terms:
        if exponent in fitted.parameters:
            term_P = fitted.parameters[scale][0] * values_P ** -fitted.parameters[exponent][0]
            share = float(np.ptp(term_P) / points.loss_P.mean())
            if share < max(3 * off, 1e-3):
                notes.append(f"over all {what} the law changes by {share:.2g} of the loss; runs are {off:.2g} off it: "
                             f"{scale}, {exponent} and the optimum aren't decided, whatever their intervals say")
    return notes


def _check_budget(law: Law, approach: str, budget: float | None, at: tuple[str, float] | None, served: float | None) -> None:
    for flag, value, what in (("--budget", budget, "FLOPs"), ("--at", at[1] if at else None, at[0] if at else ""),
                              ("--served_tokens", served, "tokens")):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise InputError(flag, f"{value:g} is not a number of {what}", "give a positive number, e.g. 1e21")
    wanted = "".join(AT[name] if name in AT else name for name in law.extra)
    cure = f"give --budget and --at={wanted}=NUMBER" if wanted else "leave it out"
    if at is not None and budget is None:
        raise InputError("--at", "says nothing without a budget", cure)
    if at is not None and at[0] != wanted:
        raise InputError("--at", f"{at[0]} isn't what approach {approach} is asked at", cure)
    if budget is not None and at is None and wanted:
        raise InputError("--at", f"approach {approach} at a budget needs its {wanted}", cure)
    if served is not None and (approach != "3" or budget is None):
        raise InputError("--served_tokens", "needs --approach=3 and a --budget", "the loss that is served is the budget's")


def _at_budget(law: Law, fitted: Fitted, points: Points, budget: float, at: tuple[str, float] | None, served: float | None,
               seed: int) -> tuple[dict, list[str]]:
    k = points.flops_per_weight_token
    best = optimum(law, fitted.parameters, budget) if at is None else optimum_at(law, fitted.parameters, budget, k, at[1])
    told = {"flops": budget, "N_opt": interval_or_none(best["N_opt"]), "D_opt": interval_or_none(best["D_opt"]), "loss": None}
    told |= {at[0]: at[1]} if at else {}
    notes = []
    if np.isfinite(best["loss"][0]):
        told["loss"] = interval(predictive(np.log(best["loss"]), fitted.residual_P, fitted.estimated, seed))
    elif at is not None:
        notes.append(f"no optimum at the budget: the law's loss has no minimum over sizes there, with {at[0]}={at[1]:g}")
    else:
        notes.append("no loss at the budget: L = E + K/C^gamma needs at least 4 budgets with a minimum")
    if served is not None:
        cheapest = inference_optimum(fitted.parameters, best["loss"], served, k)
        told["served"] = {"tokens": served} | {name: interval_or_none(values_T) for name, values_T in cheapest.items()}
    ratio = budget / points.flops_P.max()
    if ratio > 1:
        notes.append(f"the budget is {ratio:.3g} times the largest in the data: an extrapolation")
    return told, notes


def _held_out(law: Law, points: Points, seed: int) -> tuple[dict | None, str]:
    """leave_largest_out, or nothing and why. Laws of the optimum alone are held to the largest budget's best run."""

    def predict(seen: Points, unseen: Points) -> dict:
        fitted = law.fit(seen, HELD_OUT_RESAMPLES, seed)
        if law.optimal_only:
            unseen = unseen.take(np.array([unseen.loss_P.argmin()]))
        log_loss_SxU = log_loss(law, fitted.parameters, unseen)
        if not np.isfinite(log_loss_SxU[0]).all():
            raise InputError("points", "fewer than 4 smaller budgets have a minimum", "add budgets")
        return {"log_loss_SxU": log_loss_SxU, "residual_P": fitted.residual_P, "parameters": fitted.estimated,
                "observed_U": np.log(unseen.loss_P)}

    if len(budgets(points)) < 2:
        return None, "the largest budget can't be left out: there is no other"
    try:
        return leave_largest_out(points, predict), ""
    except InputError as error:
        return None, f"the largest budget can't be left out: without it, {error.problem}"


def crossing(first: tuple[str, Law, Fitted], second: tuple[str, Law, Fitted], low: float, high: float, beyond: float = 1.0,
             shown: int = 9) -> dict:
    """Which of two families' laws promises the lower loss at which budget, and where that changes.

    Args:
      first, second: a family's name, its law (of LAWS) and its fit. Their losses must be of the same text in the same unit.
      low, high: the range of FLOPs in which both families were measured.
      beyond: how far outside of it the laws are followed, a factor to each side.
      shown: at how many budgets the preference is spelled out, from `low` to `high`, or to ten times that if `beyond` allows.

    Returns:
      families: the names. measured: low, high. crossings: {flops, to (the family that is lower above), share (of the resamples
      that turn to it), extrapolated (is it outside of the measured range?)} of each, [] where the laws don't cross; an
      interval's end of 0 or 1e300 is outside of what was searched. crossing_share: of the resamples, how many cross anywhere.
      at: {flops, difference (first - second, of losses), prefers (None if the interval holds 0), first_share (of the resamples
      that prefer the first)} of each budget shown.

    Raises:
      InputError: not 0 < low < high, or a law that knows no loss at the optimum.
      ValueError: fits without resamples, or of different numbers of them.
    """
    if not 0 < low < high < math.inf:
        raise InputError("budgets", f"{low:g} to {high:g} FLOPs is no range", "give 0 < low < high")
    names, flops_C = (first[0], second[0]), np.geomspace(low / beyond, high * beyond, 801)
    gap_TxC = _gap(first, second, flops_C)
    crossings, crossed_T = [], np.zeros(len(gap_TxC), bool)
    for sign, family in ((1, second[0]), (-1, first[0])):
        place_T = _turn(np.log(flops_C), sign * gap_TxC)
        crossed_T |= np.isfinite(place_T)
        if np.isnan(place_T[0]):
            continue
        # A resample that never turns so would turn below the low end if it prefers this family at the high one, else beyond it.
        flops_T = np.where(np.isfinite(place_T), np.exp(place_T), np.where(sign * gap_TxC[:, -1] > 0, 0.0, MOST))
        flops_T[np.isnan(gap_TxC).any(1)] = np.nan
        crossings.append({"flops": interval(flops_T), "to": family, "share": float(np.mean(np.isfinite(place_T[1:]))),
                          "extrapolated": not low <= flops_T[0] <= high})
    at, shown_C = [], np.geomspace(low, high * min(beyond, 10.0), shown)
    for flops, gap_T in zip(shown_C, _gap(first, second, shown_C).T):
        figure = interval(gap_T)
        sure = figure["low"] > 0 or figure["high"] < 0
        at.append({"flops": float(flops), "difference": figure, "prefers": names[int(figure["low"] > 0)] if sure else None,
                   "first_share": float(np.mean(gap_T[1:] < 0))})
    return {"families": list(names), "measured": [float(low), float(high)],
            "crossings": sorted(crossings, key=lambda found: found["flops"]["value"]),
            "crossing_share": float(np.mean(crossed_T[1:])), "at": at}


def _gap(first: tuple[str, Law, Fitted], second: tuple[str, Law, Fitted], flops_C: np.ndarray) -> np.ndarray:
    """First - second, of the losses at the optimum of each budget, (T, C)."""
    losses = []
    for name, law, fitted in (first, second):
        losses.append(np.exp(optimal_log_loss(law, fitted.parameters, flops_C)))
        if not np.isfinite(losses[-1][0]).all():
            raise InputError("points", f"{name}: fewer than 4 budgets have a minimum", "add budgets, or take --approach=3")
    if losses[0].shape != losses[1].shape or len(losses[0]) < 2:
        raise ValueError("the two fits need the same number of resamples, at least 1")
    resamples = len(losses[0]) - 1  # two fits of one seed drew the same rungs: what is compared must be independent
    order = np.concatenate([[0], 1 + np.roll(np.arange(resamples), (resamples + 1) // 2)])
    return losses[0] - losses[1][order]


def _turn(x_C: np.ndarray, gap_TxC: np.ndarray) -> np.ndarray:
    """Where each gap turns from below 0 to above, (T,), by a line between two x: the last such place, NaN without one."""
    turns_TxC = (gap_TxC[:, :-1] < 0) & (gap_TxC[:, 1:] >= 0)  # false for NaN
    i_T = turns_TxC.shape[1] - 1 - turns_TxC[:, ::-1].argmax(1)
    left_T, right_T = (gap_TxC[np.arange(len(gap_TxC)), i_T + step] for step in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        place_T = x_C[i_T] + (x_C[i_T + 1] - x_C[i_T]) * left_T / (left_T - right_T)
    return np.where(turns_TxC.any(1), place_T, np.nan)
