"""Laws with a further regressor, L = E + A/N'^alpha + B/D'^beta [+ C/S^kappa], and the optimum of a model that will be served.

    repeated   unique tokens U:  N', D' of Muennighoff et al. 2023, equations 5 and 6: repetitions R_D = D/U - 1 and parameters
               beyond the best ones for U decay exponentially, D' = U + U R_D* (1 - exp(-R_D/R_D*)), N' in the same way
    moe        total parameters T: N' = N^(1-s) T^s, N active. s = 0: only the active count; s = 1: only the total does. A power
               law in T/N at fixed N, as in Clark et al. 2022 without their interaction
    precision  bits P: N' = N (1 - exp(-P/P*)) (Kumar et al. 2024, equation 3, for one precision of all of training)
    state      a recurrent state of S numbers: its own term. No published law; the same shape as the other two

All are fitted by the fitter of approach 3, on the same objective. G, H, a_opt and b_opt are those of N' = N, D' = D.
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
from research.scaling.laws import Fitted, Law, Parameters, at_optimum, require_enough
from research.scaling.points import Points, rungs
from research.scaling.uncertainty import resamples

ENDLESS = 60.0  # log R*: nothing decays
NO_DECAY = 100.0  # R* over the most that any run has: half a percent lost at most, no run can tell it from none


def _terms(theta_K: jax.Array, n_P: jax.Array, d_P: jax.Array) -> tuple[jax.Array, ...]:
    e, a, b, log_alpha, log_beta = theta_K[:5]
    return jnp.broadcast_to(e, n_P.shape), a - jnp.exp(log_alpha) * n_P, b - jnp.exp(log_beta) * d_P


def _log_sum(*terms: jax.Array) -> jax.Array:
    return jax.scipy.special.logsumexp(jnp.stack(terms), axis=0)


def _decayed(log_unique: jax.Array, log_all: jax.Array, log_star: jax.Array) -> jax.Array:
    """log(U + U R* (1 - exp(-R/R*))), R = all/U - 1."""
    repeats, star = jnp.expm1(jnp.maximum(log_all - log_unique, 0.0)), jnp.exp(log_star)
    return log_unique + jnp.log1p(-star * jnp.expm1(-repeats / star))


def _repeated_curve(theta_K: jax.Array, x_FxP: jax.Array) -> jax.Array:
    (n_P, d_P, u_P), (_, a, b, log_alpha, log_beta, log_r_d, log_r_n) = x_FxP, theta_K
    u_P = jnp.minimum(u_P, d_P)
    best_P = (log_alpha + a - log_beta - b + jnp.exp(log_beta) * u_P) / jnp.exp(log_alpha)  # the optimal log N for U
    return _log_sum(*_terms(theta_K, _decayed(jnp.minimum(best_P, n_P), n_P, log_r_n), _decayed(u_P, d_P, log_r_d)))


def _data_only_curve(theta_K: jax.Array, x_FxP: jax.Array) -> jax.Array:
    return _repeated_curve(jnp.append(theta_K, ENDLESS), x_FxP)


def _moe_curve(theta_K: jax.Array, x_FxP: jax.Array) -> jax.Array:
    n_P, d_P, total_P = x_FxP
    return _log_sum(*_terms(theta_K, n_P + theta_K[5] * (total_P - n_P), d_P))


def _precision_curve(theta_K: jax.Array, x_FxP: jax.Array) -> jax.Array:
    n_P, d_P, bits_P = x_FxP
    return _log_sum(*_terms(theta_K, n_P + jnp.log(-jnp.expm1(-jnp.exp(bits_P - theta_K[5]))), d_P))


def _state_curve(theta_K: jax.Array, x_FxP: jax.Array) -> jax.Array:
    n_P, d_P, state_P = x_FxP
    return _log_sum(*_terms(theta_K, n_P, d_P), theta_K[5] - jnp.exp(theta_K[6]) * state_P)


@dataclasses.dataclass(frozen=True)
class _Form:
    """regressor: its column. more: its parameters, and whether the fit sees their logarithm. starts: of these, (K - 5,) each.
    centre: whose mean logarithm is subtracted from the regressor's (of itself, "", nothing)."""

    regressor: str
    curve: fitter.Curve
    more: tuple[tuple[str, bool], ...]
    starts: tuple[tuple[float, ...], ...]
    centre: str


FORMS = {
    "repeated": _Form("unique_tokens", _repeated_curve, (("R_D", True), ("R_N", True)),
                      tuple(itertools.product(np.log([1.0, 5.0, 20.0]), np.log([1.0, 5.0, 20.0]))), "tokens"),
    "moe": _Form("total_params", _moe_curve, (("s", False),), ((0.0,), (0.2,), (0.5,), (0.8,)), "params"),
    "precision": _Form("bits", _precision_curve, (("P", True),), tuple((math.log(p),) for p in (0.5, 1.0, 2.0, 4.0, 8.0)), ""),
    "state": _Form("state", _state_curve, (("C", True), ("kappa", True)),
                   tuple(itertools.product(np.log([0.02, 0.1, 0.3]), np.log([0.1, 0.3, 0.8]))), "state"),
}
DATA_ONLY = dataclasses.replace(FORMS["repeated"], curve=_data_only_curve, more=(("R_D", True),),
                                starts=tuple((math.log(r),) for r in (1.0, 3.0, 10.0, 30.0)))


def _check(form: _Form, points: Points) -> None:
    """Raises InputError where the runs can't decide the regressor's parameters."""
    if form.regressor not in points.extra:
        raise InputError("--columns", f"no column for {form.regressor}", f"this law needs {form.regressor}=NAME")
    require_enough(points, 5 + len(form.more))
    values_P = points.extra[form.regressor]
    if form.regressor == "unique_tokens":
        repeating = int((points.tokens_P > 1.5 * values_P).sum())
        if repeating < 3:
            raise InputError("points", f"{repeating} runs see their unique tokens more than 1.5 times", "give at least 3")
        return
    ratio_P = values_P / points.params_P if form.regressor == "total_params" else values_P
    if form.regressor == "total_params" and (ratio_P < 0.999).any():
        i = int(ratio_P.argmin())
        raise InputError("total_params", f"{points.names[i]} has {values_P[i]:.4g}, and more active ones",
                         "params is the active count")
    need = 2 if len(form.more) < 2 else 3
    if len(np.unique(np.round(np.log(ratio_P), 3))) < need:
        what = "ratios of total to active parameters" if form.regressor == "total_params" else f"values of {form.regressor}"
        raise InputError("points", f"fewer than {need} different {what}", f"this law needs at least {need}")


def _centres(form: _Form, points: Points) -> dict[str, float]:
    """What is subtracted from the logarithms of params, tokens and the regressor."""
    columns = {"params": points.params_P, "tokens": points.tokens_P, form.regressor: points.extra[form.regressor]}
    return {name: float(np.log(values_P).mean()) for name, values_P in columns.items()} | {"": 0.0}


def problem(form: _Form, points: Points) -> tuple[fitter.Curve, np.ndarray, np.ndarray]:
    """(curve, x_FxP, start_SxK), as `laws.parametric_problem`."""
    middle = _centres(form, points)
    x_FxP = np.stack([np.log(points.params_P) - middle["params"], np.log(points.tokens_P) - middle["tokens"],
                      np.log(points.extra[form.regressor]) - middle[form.centre]])
    slopes = np.log([0.2, 0.4, 0.8])
    starts = [(math.log(e), math.log((1 - e) * s), math.log((1 - e) * (1 - s)), alpha, beta, *more) for e, s, alpha, beta, more
              in itertools.product((0.4, 0.7), (0.2, 0.5, 0.8), slopes, slopes, form.starts)]
    return form.curve, x_FxP, np.array(starts)


def _fit(form: _Form, points: Points, count: int, seed: int) -> Parameters:
    _check(form, points)
    curve, x_FxP, start_SxK = problem(form, points)
    middle, y_P = _centres(form, points), np.log(points.loss_P)
    shift = y_P.mean()
    weight_TxP = np.concatenate([np.ones((1, len(points))), resamples(len(points), count, seed, rungs(points))])
    theta = fitter.fit(curve, x_FxP, np.broadcast_to(y_P - shift, weight_TxP.shape), weight_TxP, start_SxK)
    alpha, beta = np.exp(theta[:, 3]), np.exp(theta[:, 4])
    log_a, log_b = theta[:, 1] + shift + alpha * middle["params"], theta[:, 2] + shift + beta * middle["tokens"]
    found = {"E": np.exp(theta[:, 0] + shift), "A": np.exp(log_a), "B": np.exp(log_b), "alpha": alpha, "beta": beta}
    found |= {name: np.exp(theta[:, 5 + i]) if log else theta[:, 5 + i] for i, (name, log) in enumerate(form.more)}
    if form.regressor == "state":
        found["C"] = np.exp(theta[:, 5] + shift + found["kappa"] * middle["state"])
    return found | at_optimum(alpha, beta, log_a, log_b, points.flops_per_weight_token)


def _log_loss(form: _Form) -> Callable[..., np.ndarray]:
    def log_loss(p: Parameters, params_P: np.ndarray, tokens_P: np.ndarray, flops_P: np.ndarray,
                 extra_P: np.ndarray) -> np.ndarray:
        del flops_P
        p = {"R_N": np.full_like(p["E"], math.exp(ENDLESS))} | p
        theta_TxK = np.stack([np.log(p[name]) for name in ("E", "A", "B", "alpha", "beta")]
                             + [np.log(p[name]) if log else p[name] for name, log in form.more], 1)
        with jax.enable_x64(True):
            return np.asarray(jax.vmap(form.curve, (0, None))(theta_TxK, np.log(np.stack([params_P, tokens_P, extra_P]))))
    return log_loss


def _undecided(found: Parameters, points: Points) -> tuple[str, ...]:
    """What the runs don't say of repetition."""
    p = {key: float(values_T[0]) for key, values_T in found.items()}
    unique_P = np.minimum(points.extra["unique_tokens"], points.tokens_P)
    best_P = (p["alpha"] * p["A"] / p["beta"] / p["B"] * unique_P ** p["beta"]) ** (1 / p["alpha"])
    excess, notes = int((points.params_P > 1.5 * best_P).sum()), []
    if excess < 3:
        notes.append(f"no R_N: {excess} runs have more than 1.5 times the best parameters for their unique tokens; N' = N")
    elif p["R_N"] > NO_DECAY * (points.params_P / best_P).max():
        notes.append(f"no R_N: undecided, as nothing is lost by parameters beyond the best ({excess} runs); N' = N")
    if p["R_D"] > NO_DECAY * (points.tokens_P / unique_P).max():
        notes.append("R_D is undecided, whatever its figure says: nothing is lost by repeating")
    return tuple(notes)


def _fit_law(name: str) -> Callable[[Points, int, int], Fitted]:
    form, log_loss = FORMS[name], _log_loss(FORMS[name])

    def fit(points: Points, count: int, seed: int) -> Fitted:
        notes = _undecided(_fit(form, points, 0, seed), points) if name == "repeated" else ()
        fitted = DATA_ONLY if any(note.startswith("no R_N") for note in notes) else form
        found, estimated = _fit(fitted, points, count, seed), 5 + len(fitted.more)
        told = log_loss(found, points.params_P, points.tokens_P, points.flops_P, points.extra[form.regressor])
        return Fitted(found, np.log(points.loss_P) - told[0], points.names, estimated, notes)
    return fit


EXTENDED = {
    "repeated": Law("L = E + A/N'^alpha + B/D'^beta, N' and D' decaying with repetition (R_N, R_D)", _fit_law("repeated"),
                    _log_loss(FORMS["repeated"]), False, ("unique_tokens",)),
    "moe": Law("L = E + A/(N^(1-s) T^s)^alpha + B/D^beta, N active, T total", _fit_law("moe"), _log_loss(FORMS["moe"]), False,
               ("total_params",)),
    "precision": Law("L = E + A/(N (1 - exp(-bits/P)))^alpha + B/D^beta", _fit_law("precision"),
                     _log_loss(FORMS["precision"]), False, ("bits",)),
    "state": Law("L = E + A/N^alpha + B/D^beta + C/state^kappa", _fit_law("state"), _log_loss(FORMS["state"]), False,
                 ("state",)),
}


def optimum_at(law: Law, parameters: Parameters, flops: float, k: float, value: float, grid: int = 801) -> Parameters:
    """N_opt, D_opt and the loss there, each (T,), at a budget of C = kND and one value of the law's regressor (for `moe`: total
    over active parameters). The lowest of a grid over log N, which then is interpolated; NaN at the grid's ends."""
    log_best_T = np.log(parameters["G"]) + parameters["a_opt"] * math.log(flops)
    low, high = np.nanquantile(log_best_T, [0.02, 0.98]) + np.array([-1, 1]) * math.log(1e3)
    n_P = np.exp(np.linspace(low, high, grid))
    extra_P = value * n_P if law.extra == ("total_params",) else np.full(grid, value)
    loss_TxP = np.exp(law.log_loss(parameters, n_P, flops / k / n_P, np.full(grid, flops), extra_P))
    middle_T = np.clip(loss_TxP.argmin(1), 1, grid - 2)
    left, here, right = (loss_TxP[np.arange(len(loss_TxP)), middle_T + step] for step in (-1, 0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        move_T = 0.5 * (left - right) / (left - 2 * here + right)
    log_n_T = np.where(np.abs(move_T) <= 1, low + (middle_T + move_T) * (high - low) / (grid - 1), np.nan)
    return {"N_opt": np.exp(log_n_T), "D_opt": flops / k * np.exp(-log_n_T), "loss": np.where(np.isnan(log_n_T), np.nan, here)}


def inference_optimum(parameters: Parameters, loss_T: np.ndarray, served_tokens: float, k: float = 6.0) -> Parameters:
    """The cheapest model of a given loss, when it will also serve `served_tokens` (Sardana et al. 2023, equation 3).

    Minimises k N D + (k/3) N served_tokens over N and D with E + A/N^alpha + B/D^beta = loss: fewer parameters, more tokens.

    Returns:
      N_opt, D_opt, flops (training and serving) and saved (the share of FLOPs, against the model that is cheapest to train),
      each (T,); NaN where the law never reaches the loss.
    """
    p = {name: parameters[name][:, None] for name in ("E", "A", "B", "alpha", "beta")}
    with np.errstate(invalid="ignore"):
        gap_Tx1 = np.where(loss_T[:, None] > p["E"], loss_T[:, None] - p["E"], np.nan)
    first = p["beta"] / (p["alpha"] + p["beta"])  # A/N^alpha's share of the gap, where training alone is cheapest
    share_TxP = 1 - (1 - first) * np.geomspace(1, 1e-6, 4001)
    n_TxP = (p["A"] / (share_TxP * gap_Tx1)) ** (1 / p["alpha"])
    d_TxP = (p["B"] / ((1 - share_TxP) * gap_Tx1)) ** (1 / p["beta"])
    flops_TxP = k * n_TxP * (d_TxP + served_tokens / 3)
    best_T = np.where(np.isnan(flops_TxP[:, 0]), 0, np.nan_to_num(flops_TxP, nan=np.inf).argmin(1))
    pick = lambda a_TxP: a_TxP[np.arange(len(a_TxP)), best_T]
    least_T = pick(flops_TxP)
    return {"N_opt": pick(n_TxP), "D_opt": pick(d_TxP), "flops": least_T, "saved": 1 - least_T / flops_TxP[:, 0]}
