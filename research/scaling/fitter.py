"""A robust curve fit, many at once: every start and every bootstrap resample is one row of a batch.

The objective is Chinchilla's (Hoffmann et al. 2022, equation 3): the Huber loss, delta 1e-3, of predicted - observed log loss.
They minimise it by L-BFGS. With at most five parameters the normal equations are cheaper and need no line search: damped
Gauss-Newton steps (Levenberg-Marquardt) on the Huber loss's own quadratic bound (iteratively reweighted least squares,
Holland and Welsch 1977), which never raise the objective.
"""

import functools
import math
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

Curve = Callable[[jax.Array, jax.Array], jax.Array]  # (theta_K, x_FxP) -> log loss_P

DELTA = 1e-3
_BATCH = 64  # rows at once: their Jacobians stay in the cache
_LONGEST = 2.0  # of a step in any parameter; all are logarithms


def huber(residual: jax.Array, delta: float = DELTA) -> jax.Array:
    """r^2 / 2 within delta, linear beyond."""
    size = jnp.abs(residual)
    return jnp.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _minimise_batch(curve: Curve, x_FxP: jax.Array, y_SxP: jax.Array, start_SxK: jax.Array, weight_SxP: jax.Array, steps: int):
    """(theta_SxK, objective_S) of one batch."""

    def one(start_K, weight_P, y_P):
        residual = lambda theta_K: curve(theta_K, x_FxP) - y_P
        objective = lambda r_P: jnp.sum(weight_P * huber(r_P))

        def step(carry):
            theta_K, r_P, value, damping, quiet, count = carry
            jacobian_PxK = jax.jacfwd(residual)(theta_K)
            bound_P = weight_P * jnp.minimum(1.0, DELTA / jnp.maximum(jnp.abs(r_P), 1e-30))
            normal_KxK = (jacobian_PxK * bound_P[:, None]).T @ jacobian_PxK
            scale_K = jnp.diag(normal_KxK) + 1e-12 * jnp.trace(normal_KxK) + 1e-30
            move_K = -jnp.linalg.solve(normal_KxK + damping * jnp.diag(scale_K), jacobian_PxK.T @ (bound_P * r_P))
            move_K = move_K * jnp.minimum(1.0, _LONGEST / jnp.maximum(jnp.max(jnp.abs(move_K)), 1e-30))
            tried_K = theta_K + move_K
            tried_P = residual(tried_K)
            tried = objective(tried_P)
            better = tried < value  # false for NaN
            gain = jnp.where(better, value - tried, 0.0)
            quiet = jnp.where(gain > 1e-11 * value, 0, quiet + 1)
            damping = jnp.clip(jnp.where(better, damping / 5, damping * 4), 1e-12, 1e12)
            pick = lambda new, old: jnp.where(better, new, old)
            return pick(tried_K, theta_K), pick(tried_P, r_P), pick(tried, value), damping, quiet, count + 1

        r_P = residual(start_K)
        carry = (start_K, r_P, objective(r_P), jnp.asarray(1e-3, y_P.dtype), jnp.asarray(0), jnp.asarray(0))
        theta_K, _, value, *_ = jax.lax.while_loop(lambda c: (c[4] < 8) & (c[5] < steps) & (c[2] > 1e-28), step, carry)
        return theta_K, jnp.where(jnp.isfinite(value), value, jnp.inf)

    return jax.vmap(one)(start_SxK, weight_SxP, y_SxP)


def _minimise(curve: Curve, x_FxP: np.ndarray, y_SxP: np.ndarray, start_SxK: np.ndarray, weight_SxP: np.ndarray, steps: int):
    """The same for any number of rows; whole batches, so that one compiled program serves starts and resamples."""
    rows = len(start_SxK)
    found = []
    for begin in range(0, rows, _BATCH):
        index = np.minimum(np.arange(begin, begin + _BATCH), rows - 1)
        found.append(_minimise_batch(curve, x_FxP, y_SxP[index], start_SxK[index], weight_SxP[index], steps))
    theta_SxK, value_S = (np.concatenate(part)[:rows] for part in zip(*jax.device_get(found)))
    return theta_SxK, value_S


def fit(curve: Curve, x_FxP: np.ndarray, y_TxP: np.ndarray, weight_TxP: np.ndarray, start_SxK: np.ndarray, best: int = 3,
        steps: int = 400) -> np.ndarray:
    """Parameters that minimise the sum of weight * Huber(curve - y), for all the data (row 0) and each resample (the others).

    All starts see the full data; the `best` different optima, of those at most twice as bad as the first, are then the starts
    of every resample.

    Args:
      curve: hashable; its parameters should be logarithms, or of that size.
      x_FxP: what the curve is a function of.
      y_TxP: observed log loss; a resample may have its own.
      weight_TxP: how often each point counts; 0 leaves it out.
      start_SxK: starts.

    Returns:
      theta_TxK.
    """
    starts, (rows, _) = len(start_SxK), y_TxP.shape
    with jax.enable_x64(True):
        full = [np.broadcast_to(a_TxP[0], (starts, a_TxP.shape[1])) for a_TxP in (y_TxP, weight_TxP)]
        theta_SxK, value_S = _minimise(curve, x_FxP, full[0], start_SxK, full[1], steps)
        chosen: list[int] = []
        for s in np.argsort(value_S):
            near = value_S[s] <= 2 * value_S.min()  # no resample of the same runs makes up for more
            if near and len(chosen) < best and all(np.abs(theta_SxK[s] - theta_SxK[c]).max() > 1e-2 for c in chosen):
                chosen.append(s)
        if rows == 1:
            return theta_SxK[chosen[:1]]
        count = len(chosen)
        again = [np.repeat(np.asarray(a_TxP[1:], np.float64), count, axis=0) for a_TxP in (y_TxP, weight_TxP)]
        start = np.tile(theta_SxK[chosen], (rows - 1, 1))
        theta, value = _minimise(curve, x_FxP, again[0], start, again[1], steps)
    pick_R = value.reshape(rows - 1, count).argmin(1)
    return np.concatenate([theta_SxK[chosen[:1]], theta.reshape(rows - 1, count, -1)[np.arange(rows - 1), pick_R]])


@functools.partial(jax.jit, static_argnums=0)
def _curves(curve: Curve, theta_SxK: jax.Array, x_FxP: jax.Array) -> jax.Array:
    return jax.vmap(curve, (0, None))(theta_SxK, x_FxP)


@functools.partial(jax.jit, static_argnums=0)
def _tangent(curve: Curve, theta_K: jax.Array, x_FxP: jax.Array) -> tuple[jax.Array, jax.Array]:
    return curve(theta_K, x_FxP), jax.jacfwd(curve)(theta_K, x_FxP)


def tangent(curve: Curve, theta_K: np.ndarray, x_FxP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the curve_P, its derivatives by the parameters_PxK)."""
    with jax.enable_x64(True):
        return jax.device_get(_tangent(curve, theta_K, x_FxP))


def refit(curve: Curve, x_FxP: np.ndarray, y_P: np.ndarray, theta_K: np.ndarray, start_SxK: np.ndarray, used_P: np.ndarray
          ) -> np.ndarray:
    """The best optimum for the points where a mask is true, theta_K, from an old one and as many starts as make a batch."""
    start_SxK = np.concatenate([theta_K[None], start_SxK[::math.ceil(len(start_SxK) / (_BATCH - 1))]])
    y_SxP, weight_SxP = (np.broadcast_to(a_P, (len(start_SxK), len(y_P))) for a_P in (y_P, used_P.astype(np.float64)))
    with jax.enable_x64(True):
        theta_SxK, value_S = _minimise(curve, x_FxP, y_SxP, start_SxK, weight_SxP, 400)
    return theta_SxK[value_S.argmin()]


def trimmed(curve: Curve, x_FxP: np.ndarray, y_P: np.ndarray, start_SxK: np.ndarray, keep: int, seed: int = 0,
            best: int = 32) -> np.ndarray:
    """Parameters with the least sum of the `keep` smallest Huber losses, theta_K: what the other points are doesn't matter.

    At an end of a curve one point alone can bend it, and a Huber loss lets it. Least trimmed squares' way (Rousseeuw and
    Van Driessen 2006): fits to random halves of the points, many of which have no bad point at such an end; the `best` then
    choose the points that they pass nearest to and are fitted to these, again and again.
    """
    (rows, _), count = start_SxK.shape, len(y_P)
    half = np.random.default_rng(seed).random((rows, count)).argsort(1) < min(keep, max(count // 2, start_SxK.shape[1] + 2))
    theta_SxK, weight_SxP = start_SxK, half.astype(np.float64)
    with jax.enable_x64(True):
        for _ in range(5):
            y_SxP = np.broadcast_to(y_P, weight_SxP.shape)
            theta_SxK, _ = _minimise(curve, x_FxP, y_SxP, theta_SxK, weight_SxP, 400)
            loss_SxP = np.nan_to_num(huber(_curves(curve, theta_SxK, x_FxP) - y_P), nan=np.inf)
            order_S = np.sort(loss_SxP, 1)[:, :keep].sum(1).argsort()[:best]
            theta_SxK = theta_SxK[order_S]
            weight_SxP = (loss_SxP[order_S].argsort(1).argsort(1) < keep).astype(np.float64)
    return theta_SxK[0]
