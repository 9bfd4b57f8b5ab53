"""A fit with everything that is said of it: intervals, the optimum at a budget, outliers, the error on the largest budget."""

import numpy as np

from research.config import nearest
from research.errors import InputError
from research.scaling.laws import LAWS, Fitted, Law, optimum
from research.scaling.points import Points, budgets
from research.scaling.uncertainty import interval, leave_largest_out, outliers, predictive

HELD_OUT_RESAMPLES = 200


def analyse(points: Points, approach: str, *, bootstrap: int = 1000, seed: int = 0, budget: float | None = None) -> dict:
    """What `fit` prints, as plain data; every estimated figure is {"value", "low", "high"} (95%).

    Args:
      approach: a row of LAWS.
      bootstrap: resamples, at least 20.
      budget: FLOPs to give N_opt, D_opt and the loss at; the loss's interval holds one new run, its own noise included.

    Raises:
      InputError: an unknown approach, too few resamples, a budget that isn't positive, or runs that can't decide the law.
    """
    if approach not in LAWS:
        raise InputError("--approach", f"unknown {approach!r}", nearest(approach, tuple(LAWS)))
    if bootstrap < 20:
        raise InputError("--bootstrap", f"{bootstrap} resamples give no 95% interval", "take 1000; at least 20")
    if budget is not None and not (np.isfinite(budget) and budget > 0):
        raise InputError("--budget", f"{budget:g} is not a number of FLOPs", "e.g. --budget=1e21")
    law = LAWS[approach]
    fitted = law.fit(points, bootstrap, seed)
    answer = {
        "approach": approach, "formula": law.formula,
        "parameters": {name: interval(values_T) for name, values_T in fitted.parameters.items()},
        "points": len(points), "fitted_points": len(fitted.residual_P), "bootstrap": bootstrap, "seed": seed,
        "flops_per_param_token": points.flops_per_weight_token,
        "residual_rms": float(np.sqrt(np.mean(fitted.residual_P**2))),
        "outliers": outliers(fitted.residual_P, fitted.names),
        "notes": list(fitted.notes),
    }
    answer["leave_largest_out"], problem = _held_out(law, points, seed)
    answer["notes"] += [problem] if problem else []
    if budget is not None:
        answer["optimum"], notes = _at_budget(law, fitted, points, budget, seed)
        answer["notes"] += notes
    return answer


def _at_budget(law: Law, fitted: Fitted, points: Points, budget: float, seed: int) -> tuple[dict, list[str]]:
    best = optimum(law, fitted.parameters, budget)
    told = {"flops": budget, "N_opt": interval(best["N_opt"]), "D_opt": interval(best["D_opt"]), "loss": None}
    notes = []
    if np.isfinite(best["loss"][0]):
        told["loss"] = interval(predictive(np.log(best["loss"]), fitted.residual_P, fitted.estimated, seed))
    else:
        notes.append("no loss at the budget: L = E + K/C^gamma needs at least 4 budgets with a minimum")
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
        log_loss_SxU = law.log_loss(fitted.parameters, unseen.params_P, unseen.tokens_P, unseen.flops_P)
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
