"""The laws: Chinchilla's three approaches (Hoffmann et al. 2022) and Kaplan's power laws (Kaplan et al. 2020).

Each fit gives every figure T = 1 + R times: from all runs (entry 0) and from each of R bootstrap resamples, so that whatever is
computed from a fit has an interval. All laws end in N_opt = G C^a_opt and D_opt = H C^b_opt, C in FLOPs.
"""

import dataclasses
import itertools
import math
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import InputError
from research.scaling import fitter
from research.scaling.minima import envelope, slices, vertex, vertex_variance, with_minimum
from research.scaling.points import Points, rungs
from research.scaling.uncertainty import resamples

Parameters = dict[str, np.ndarray]  # name -> (T,)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a law's fit found."""

    parameters: Parameters
    residual_P: np.ndarray  # observed - fitted log loss
    names: tuple[str, ...]  # what each residual is of
    estimated: int  # how many numbers were fitted to those residuals
    notes: tuple[str, ...] = ()  # what was left out of the fit, and why
    minima: Parameters | None = None  # approach 2's of each of B budgets: flops, runs (B,); N_opt, D_opt, loss (T, B)


@dataclasses.dataclass(frozen=True)
class Law:
    """One row of LAWS.

    fit: (points, how many resamples, seed) -> Fitted; raises InputError where the runs can't decide the law.
    log_loss: (parameters, params_P, tokens_P, flops_P) -> log loss (T, P). Approaches 1 and 2 don't know the loss off the
      optimum: `optimal_only` laws give that of the optimum at these FLOPs, NaN where too few budgets decided it. A law with
      regressors of its own (`extra`) is also given them: (..., flops_P, *extra_P).
    """

    formula: str
    fit: Callable[[Points, int, int], Fitted]
    log_loss: Callable[..., np.ndarray]
    optimal_only: bool
    extra: tuple[str, ...] = ()


def log_loss(law: Law, parameters: Parameters, points: Points) -> np.ndarray:
    """The law's log loss at the runs, (T, P), with whatever regressors it has."""
    extra = [points.extra[name] for name in law.extra]
    return law.log_loss(parameters, points.params_P, points.tokens_P, points.flops_P, *extra)


def optimum(law: Law, parameters: Parameters, flops: float) -> Parameters:
    """N_opt, D_opt and the loss there at a budget, each (T,)."""
    params_T = np.exp(np.log(parameters["G"]) + parameters["a_opt"] * math.log(flops))
    tokens_T = np.exp(np.log(parameters["H"]) + parameters["b_opt"] * math.log(flops))
    return {"N_opt": params_T, "D_opt": tokens_T, "loss": np.exp(optimal_log_loss(law, parameters, np.array([flops]))[:, 0])}


def optimal_log_loss(law: Law, parameters: Parameters, flops_C: np.ndarray) -> np.ndarray:
    """Log loss at the optimum of each budget, (T, C). For laws without regressors of their own."""
    log_c = np.log(flops_C)
    params_TxC = np.exp(np.log(parameters["G"])[:, None] + parameters["a_opt"][:, None] * log_c)
    tokens_TxC = np.exp(np.log(parameters["H"])[:, None] + parameters["b_opt"][:, None] * log_c)
    return law.log_loss(parameters, params_TxC, tokens_TxC, flops_C)


def require_enough(points: Points, estimated: int) -> None:
    """Raises InputError where `points` can't decide so many parameters of a law in N and D."""
    need, found = estimated + 3, len(np.unique(rungs(points)))
    if found < need:
        runs = f"{len(points)} runs" if found == len(points) else f"{found} rungs ({len(points)} runs; seeds don't count)"
        raise InputError("points", f"{runs} can't decide {estimated} parameters", f"give at least {need}")
    n_P, d_P = np.log(points.params_P), np.log(points.tokens_P)
    for values_P, what in ((n_P, "sizes"), (d_P, "token counts")):
        if len(np.unique(np.round(values_P, 6))) < 3:
            raise InputError("points", f"fewer than 3 different {what}", f"a law in N and D needs at least 3 {what}")
    if np.ptp(np.log(points.loss_P)) < 1e-6:
        raise InputError("loss", f"every run has the same, {points.loss_P[0]:g}", "name the column of the final loss")
    if np.ptp(n_P + d_P) < 0.25:
        raise InputError("points", f"one budget only, of about {np.exp(np.log(points.flops_P).mean()):.3g} FLOPs",
                         "a law in N and D needs runs at several")
    if abs(np.corrcoef(n_P, d_P)[0, 1]) > 0.9999:
        raise InputError("points", "parameters and tokens always change together", "vary the tokens per parameter")


def at_optimum(p: np.ndarray, q: np.ndarray, log_a: np.ndarray, log_b: np.ndarray, k: float) -> Parameters:
    """The minimum of A/N^p + B/D^q at C = kND (Hoffmann et al. 2022, equation 4)."""
    a, b = q / (p + q), p / (p + q)
    log_ratio = (np.log(p) + log_a - np.log(q) - log_b) / (p + q)
    with np.errstate(over="ignore"):  # a resample, or runs that know no optimum
        return {"a_opt": a, "b_opt": b, "G": np.exp(log_ratio - a * math.log(k)), "H": np.exp(-log_ratio - b * math.log(k))}


def _parametric_curve(theta_K: jax.Array, x_FxP: jax.Array) -> jax.Array:
    e, a, b, log_alpha, log_beta = theta_K
    terms = (jnp.broadcast_to(e, x_FxP[0].shape), a - jnp.exp(log_alpha) * x_FxP[0], b - jnp.exp(log_beta) * x_FxP[1])
    return jax.scipy.special.logsumexp(jnp.stack(terms), axis=0)


def _parametric_loss(p: Parameters, params_P: np.ndarray, tokens_P: np.ndarray, flops_P: np.ndarray) -> np.ndarray:
    del flops_P
    column = {name: values[:, None] for name, values in p.items()}
    terms = column["A"] * params_P ** -column["alpha"] + column["B"] * tokens_P ** -column["beta"]
    return np.log(column["E"] + terms)


def parametric_problem(points: Points) -> tuple[fitter.Curve, np.ndarray, np.ndarray]:
    """(curve, x_FxP, start_SxK) of approach 3: 500 starts on centred logarithms, so the units of N, D and L don't matter. The
    curve is of log loss less its mean."""
    x_FxP = np.log(np.stack([points.params_P, points.tokens_P]))
    slopes = np.log([0.1, 0.25, 0.5, 0.8, 1.2])
    starts = [(math.log(e), math.log((1 - e) * s), math.log((1 - e) * (1 - s)), alpha, beta) for e, s, alpha, beta in
              itertools.product((0.2, 0.5, 0.7, 0.9), (0.1, 0.3, 0.5, 0.7, 0.9), slopes, slopes)]
    return _parametric_curve, x_FxP - x_FxP.mean(1, keepdims=True), np.array(starts)


def fit_parametric(points: Points, count: int, seed: int) -> Fitted:
    """Approach 3: L = E + A/N^alpha + B/D^beta."""
    require_enough(points, 5)
    curve, x_FxP, start_SxK = parametric_problem(points)
    y_P, middle_F = np.log(points.loss_P), np.log(np.stack([points.params_P, points.tokens_P])).mean(1)
    shift = y_P.mean()
    weight_TxP = np.concatenate([np.ones((1, len(points))), resamples(len(points), count, seed, rungs(points))])
    theta = fitter.fit(curve, x_FxP, np.broadcast_to(y_P - shift, weight_TxP.shape), weight_TxP, start_SxK)
    alpha, beta = np.exp(theta[:, 3]), np.exp(theta[:, 4])
    log_a, log_b = theta[:, 1] + shift + alpha * middle_F[0], theta[:, 2] + shift + beta * middle_F[1]
    found = {"E": np.exp(theta[:, 0] + shift), "A": np.exp(log_a), "B": np.exp(log_b), "alpha": alpha, "beta": beta}
    found |= at_optimum(alpha, beta, log_a, log_b, points.flops_per_weight_token)
    residual_P = y_P - _parametric_loss(found, points.params_P, points.tokens_P, points.flops_P)[0]
    return Fitted(found, residual_P, points.names, 5)


def _kaplan_curve(theta_K: jax.Array, x_FxP: jax.Array) -> jax.Array:
    u, v, log_n, log_d = theta_K
    return jnp.exp(log_d) * jnp.logaddexp(u - jnp.exp(log_n - log_d) * x_FxP[0], v - x_FxP[1])


def _kaplan_loss(p: Parameters, params_P: np.ndarray, tokens_P: np.ndarray, flops_P: np.ndarray) -> np.ndarray:
    del flops_P
    n, log_n_c, d, log_d_c = (v[:, None] for v in (p["alpha_N"], np.log(p["N_c"]), p["alpha_D"], np.log(p["D_c"])))
    return d * np.logaddexp(n / d * (log_n_c - np.log(params_P)), log_d_c - np.log(tokens_P))


def fit_kaplan(points: Points, count: int, seed: int) -> Fitted:
    """L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D (Kaplan et al. 2020, equation 1.5), to all runs at once.

    Its limits are their L(N) = (N_c/N)^alpha_N and L(D) = (D_c/D)^alpha_D, and its value at the optimum is a power law, too:
    L(C) = (C_c/C)^alpha_C with 1/alpha_C = 1/alpha_N + 1/alpha_D (they have a third term there, for the batch size).
    """
    require_enough(points, 4)
    x_FxP = np.log(np.stack([points.params_P, points.tokens_P]))
    y_P, middle_F = np.log(points.loss_P), x_FxP.mean(1)
    shift = y_P.mean()
    slopes = np.log([0.03, 0.07, 0.15, 0.3, 0.6])
    starts = [(math.log(s), math.log(1 - s), n, d) for s, n, d in
              itertools.product((0.1, 0.3, 0.5, 0.7, 0.9), slopes, slopes)]
    weight_TxP = np.concatenate([np.ones((1, len(points))), resamples(len(points), count, seed, rungs(points))])
    y_TxP = np.broadcast_to(y_P - shift, weight_TxP.shape)
    theta = fitter.fit(_kaplan_curve, x_FxP - middle_F[:, None], y_TxP, weight_TxP, np.array(starts))
    n, d = np.exp(theta[:, 2]), np.exp(theta[:, 3])
    p = n / d
    log_n_c, log_d_c = (theta[:, 0] + shift / d) / p + middle_F[0], theta[:, 1] + shift / d + middle_F[1]
    found = {"alpha_N": n, "N_c": np.exp(log_n_c), "alpha_D": d, "D_c": np.exp(log_d_c), "alpha_C": n * d / (n + d)}
    best = at_optimum(p, np.ones_like(p), p * log_n_c, log_d_c, points.flops_per_weight_token)
    # At the optimum both terms are powers of C: their logarithms at C = 1 give C_c, where the law's loss is 1.
    log_loss_T = d * np.logaddexp(p * (log_n_c - np.log(best["G"])), log_d_c - np.log(best["H"]))
    found |= {"C_c": np.exp(log_loss_T / found["alpha_C"])} | best
    residual_P = y_P - _kaplan_loss(found, points.params_P, points.tokens_P, points.flops_P)[0]
    return Fitted(found, residual_P, points.names, 4)


def _offset_curve(theta_K: jax.Array, x_FxP: jax.Array) -> jax.Array:
    return jnp.logaddexp(theta_K[0], theta_K[1] - jnp.exp(theta_K[2]) * x_FxP[0])


def _optimal_loss(p: Parameters, params_P: np.ndarray, tokens_P: np.ndarray, flops_P: np.ndarray) -> np.ndarray:
    del params_P, tokens_P
    if "gamma" not in p:
        return np.full((len(p["G"]), len(flops_P)), np.nan)
    return np.log(p["E"][:, None] + p["K"][:, None] * flops_P ** -p["gamma"][:, None])


def _fit_offset(log_flops_B: np.ndarray, log_loss_TxB: np.ndarray, weight_B: np.ndarray | float = 1.0) -> Parameters:
    """L(C) = E + K/C^gamma through the optima's losses; those that aren't finite don't count. Needs 4 budgets."""
    weight_TxB = np.isfinite(log_loss_TxB) * (np.ones_like(log_flops_B) * weight_B)
    if (weight_TxB[0] > 0).sum() < 4:
        return {}
    middle, shift = log_flops_B.mean(), log_loss_TxB[0][weight_TxB[0] > 0].mean()
    starts = [(math.log(e), math.log(1 - e), g) for e, g in
              itertools.product((0.1, 0.3, 0.5, 0.7, 0.9), np.log([0.02, 0.05, 0.1, 0.2, 0.4]))]
    y_TxB = np.where(weight_TxB > 0, log_loss_TxB - shift, 0.0)
    theta = fitter.fit(_offset_curve, (log_flops_B - middle)[None], y_TxB, weight_TxB, np.array(starts))
    gamma = np.exp(theta[:, 2])
    return {"E": np.exp(theta[:, 0] + shift), "K": np.exp(theta[:, 1] + shift + gamma * middle), "gamma": gamma}


def _power_law(log_flops_B: np.ndarray, log_value_TxB: np.ndarray, weight_B: np.ndarray | float = 1.0
               ) -> tuple[np.ndarray, np.ndarray]:
    """(coefficient, exponent), each (T,), of least squares of log value on log FLOPs, over the budgets that have a value."""
    weight_TxB = np.isfinite(log_value_TxB) * (np.ones_like(log_flops_B) * weight_B)
    y_TxB = np.where(weight_TxB > 0, log_value_TxB, 0.0)
    sum_T, count_T = weight_TxB.sum(1), (weight_TxB > 0).sum(1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # a resample may have no optimum, or an absurd one
        middle_T, mean_T = weight_TxB @ log_flops_B / sum_T, (weight_TxB * y_TxB).sum(1) / sum_T
        x_TxB = log_flops_B - middle_T[:, None]
        slope_T = (weight_TxB * x_TxB * y_TxB).sum(1) / (weight_TxB * x_TxB**2).sum(1)
        slope_T = np.where(count_T > 1, slope_T, np.nan)
        return np.exp(mean_T - slope_T * middle_T), slope_T


def fit_isoflop(points: Points, count: int, seed: int) -> Fitted:
    """Approach 2: a parabola of loss over log N (and over log D) at each budget; its minimum; power laws through the minima,
    each weighted by how well its budget decides it.

    A parabola takes 3 of a budget's few runs, so resampling runs would often leave it undecided: resampled are the residuals
    (relative, all budgets together, each divided by sqrt(1 - its leverage)), added to the fitted parabolas.
    """
    rng, all_budgets = np.random.default_rng(seed), slices(points)
    if len(all_budgets) < 2:
        raise InputError("points", f"{len(all_budgets)} budget only", "approach 2 needs at least 2 budgets, each with 3 sizes")
    kept, notes = with_minimum(all_budgets)
    sizes = sum(len(s.loss_S) for s in kept)
    if len(kept) < 2 or sizes < 3 * len(kept) + 2:
        raise InputError("points", f"{len(kept)} of {len(all_budgets)} budgets have a minimum among 3 sizes or more ({sizes} "
                         "runs)", "approach 2 needs at least 2 such budgets, and 2 runs more than 3 a budget")
    fitted = [s.smooth_S() for s in kept]
    pool = np.concatenate([(s.loss_S / smooth_S - 1) / np.sqrt(np.maximum(1 - leverage_S, 1e-3))
                           for s, (smooth_S, leverage_S) in zip(kept, fitted)])
    log_n, log_d, log_loss_TxB, spread = [], [], [], []
    for s, (smooth_S, _) in zip(kept, fitted):
        drawn = smooth_S * (1 + rng.choice(pool - pool.mean(), (count, len(smooth_S))))
        loss_TxS = np.concatenate([s.loss_S[None], drawn])
        place, value = vertex(s.log_n_S, loss_TxS)
        log_n.append(place)
        log_d.append(vertex(s.log_d_S, loss_TxS)[0])
        log_loss_TxB.append(np.log(np.where(value > 0, value, np.nan)))
        spread.append(vertex_variance(s.log_n_S, s.loss_S))
    log_flops_B = np.array([s.log_flops for s in kept])
    place_B, value_B = (1 / v_B / np.mean(1 / v_B) for v_B in np.array(spread).T)
    found = dict(zip(("G", "a_opt"), _power_law(log_flops_B, np.stack(log_n, 1), place_B)))
    found |= dict(zip(("H", "b_opt"), _power_law(log_flops_B, np.stack(log_d, 1), place_B)))
    found |= _fit_offset(log_flops_B, np.stack(log_loss_TxB, 1), value_B)
    residual_P = np.concatenate([np.log(points.loss_P[s.index] / smooth_S[s.rung]) for s, (smooth_S, _) in zip(kept, fitted)])
    names = tuple(points.names[i] for s in kept for i in s.index)
    minima = {"flops": np.exp(log_flops_B), "runs": np.array([len(s.index) for s in kept]), "N_opt": np.exp(np.stack(log_n, 1)),
              "D_opt": np.exp(np.stack(log_d, 1)), "loss": np.exp(np.stack(log_loss_TxB, 1))}
    return Fitted(found, residual_P, names, 3 * len(kept), tuple(notes), minima)


def fit_envelope(points: Points, count: int, seed: int, grid: int = 128) -> Fitted:
    """Approach 1: the lowest loss over sizes at each of `grid` budgets; power laws through their sizes and tokens.

    Needs sizes that were trained for several token counts each (or points along each run's curve).
    """
    log_flops_G = np.linspace(*np.log([points.flops_P.min(), points.flops_P.max()]), grid)
    rows = [envelope(points, log_flops_G)]
    winners = len(np.unique(rows[0][0][np.isfinite(rows[0][0])]))
    if np.isfinite(rows[0][0]).sum() < 4 or winners < 2:
        raise InputError("points", f"{len(points)} runs have no envelope: {winners} sizes win where they are neither the "
                         "smallest nor the largest",
                         "approach 1 needs at least 4 sizes, each trained at several budgets that overlap")
    counts = resamples(len(points), count, seed, rungs(points))
    rows += [envelope(points.take(weight_P > 0), log_flops_G) for weight_P in counts]
    log_n, log_d, log_loss = (np.stack(part) for part in zip(*rows))
    alone_T = np.array([len(np.unique(row[np.isfinite(row)])) < 2 for row in log_n])  # one size wins all: no slope, not 0
    log_n[alone_T], log_d[alone_T] = np.nan, np.nan
    found = dict(zip(("G", "a_opt"), _power_law(log_flops_G, log_n)))
    found |= dict(zip(("H", "b_opt"), _power_law(log_flops_G, log_d)))
    found |= _fit_offset(log_flops_G, log_loss)
    good_G = np.isfinite(log_loss[0])
    fitted_G = _optimal_loss({name: values[:1] for name, values in found.items()}, None, None, np.exp(log_flops_G))[0]
    names = tuple(f"envelope at {c:.3g} FLOPs" for c in np.exp(log_flops_G[good_G]))
    return Fitted(found, (log_loss[0] - fitted_G)[good_G], names, 3)


LAWS = {
    "1": Law("lowest loss at each budget: N_opt = G C^a_opt, D_opt = H C^b_opt, L = E + K/C^gamma", fit_envelope,
             _optimal_loss, True),
    "2": Law("isoFLOP parabolas: N_opt = G C^a_opt, D_opt = H C^b_opt, L = E + K/C^gamma", fit_isoflop, _optimal_loss, True),
    "3": Law("L = E + A/N^alpha + B/D^beta", fit_parametric, _parametric_loss, False),
    "kaplan": Law("L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D", fit_kaplan, _kaplan_loss, False),
}
