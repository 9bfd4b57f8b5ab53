"""Diagonal state spaces with their weights (S4D, H3): modes, discretisation, and which algorithm runs. Not a mixer."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.diagonal_ssm import Pair, diagonal_ssm, impulse_response, long_convolution, multiply
from research import sharding
from research.models.context import Context
from research.models.ssm import log_uniform
from research.params import Initializer, normal, param

Init = Literal["lin", "inv", "real"]
Discretization = Literal["zoh", "bilinear"]
Implementation = Literal["reference", "chunked", "sequential", "fft"]


def continuous_modes(init: Init, modes: int) -> tuple[np.ndarray, np.ndarray]:
    """(real, imaginary) parts of A, section 4: Lin, Inv with N = 2 * modes, Real."""
    n = np.arange(modes, dtype=np.float64)
    if init == "real":
        return -(n + 1), np.zeros(modes)
    size = 2 * modes
    imaginary = np.pi * n if init == "lin" else size / np.pi * (size / (2 * n + 1) - 1)
    return np.full(modes, -0.5), imaginary


def discretize(a_CxN: Pair, dt_C: jax.Array, rule: Discretization) -> tuple[Pair, Pair]:
    """(decay, input) of one step of dt: exp(dt a) and (exp(dt a) - 1) / a, or the bilinear ones. Section 3.2."""
    real, imaginary = a_CxN[0] * dt_C[:, None], a_CxN[1] * dt_C[:, None]
    if rule == "zoh":
        decay = jnp.exp(real) * jnp.cos(imaginary), jnp.exp(real) * jnp.sin(imaginary)
        # exp(z) - 1 without cancellation: expm1(re) cos(im) - 2 sin(im / 2)^2.
        minus_one = jnp.expm1(real) * jnp.cos(imaginary) - 2 * jnp.sin(imaginary / 2) ** 2
        return decay, multiply((minus_one, decay[1]), _inverse(a_CxN))
    inverse = _inverse((1 - real / 2, -imaginary / 2))
    return multiply((1 + real / 2, imaginary / 2), inverse), (dt_C[:, None] * inverse[0], dt_C[:, None] * inverse[1])


def _inverse(x: Pair) -> Pair:
    square = x[0] ** 2 + x[1] ** 2
    return x[0] / square, -x[1] / square


def diagonal_weights(
    module: nn.Module, channels: int, axis: str, modes: int, init: Init, rule: Discretization, low: float, high: float,
) -> tuple[Pair, Pair]:
    """(decay_CxN, output_CxN) of a diagonal state space. Declares its weights in `module`: log_dt, a_log, a_imaginary and c,
    which holds the input's weights, too."""
    real_N, imaginary_N = continuous_modes(init, modes)
    shape, axes = (channels, modes), (axis, "state_dim")

    def rows(values_N: np.ndarray) -> Initializer:
        return lambda key, shape, fan: jnp.broadcast_to(jnp.asarray(values_N, jnp.float32), shape)

    def vector(name: str, init: Initializer, shape: tuple = shape, axes: tuple = axes) -> jax.Array:
        return param(module, name, shape, axes, init, role="vector").astype(jnp.float32)

    dt_C = jnp.exp(vector("log_dt", log_uniform(low, high), shape[:1], axes[:1]))
    real_CxN = -jnp.exp(vector("a_log", rows(np.log(-real_N))))
    c_real_CxN = vector("c_real", normal(0.5**0.5 if init != "real" else 1.0))
    if init == "real":
        zeros_CxN = jnp.zeros_like(real_CxN)
        decay, inputs = discretize((real_CxN, zeros_CxN), dt_C, rule)
        return decay, multiply(inputs, (c_real_CxN, zeros_CxN))
    decay, inputs = discretize((real_CxN, vector("a_imaginary", rows(imaginary_N))), dt_C, rule)
    output = multiply(inputs, (c_real_CxN, vector("c_imaginary", normal(0.5**0.5))))
    return decay, (2 * output[0], 2 * output[1])  # a mode and its conjugate


def run_diagonal(
    u_BxLxCxM: jax.Array, decay_CxN: Pair, output_CxN: Pair, axis: str, ctx: Context, state: Pair | None,
    implementation: Implementation | None,
) -> tuple[jax.Array, Pair | None]:
    """The state space over the rows of `ctx`: a convolution where it may be one, else the recurrence."""
    channels, modes = ("batch", None, axis, None), (axis, None)
    rows, hidden = ("batch", None), ("batch", axis, None, None)
    if state is None and not ctx.packed and implementation in (None, "fft"):
        def convolve(u, a_real, a_imaginary, c_real, c_imaginary, segment_ids):
            k_CxL = impulse_response((a_real, a_imaginary), (c_real, c_imaginary), u.shape[1])
            return long_convolution(u, k_CxL, segment_ids)

        convolve = sharding.local(convolve, (channels, *[modes] * 4, rows), channels)
        return convolve(u_BxLxCxM, *decay_CxN, *output_CxN, ctx.segment_ids_BxL), None

    def recur(u, a_real, a_imaginary, c_real, c_imaginary, positions, segment_ids, h_real, h_imaginary):
        before = None if h_real is None else (h_real, h_imaginary)
        y, after = diagonal_ssm(u, (a_real, a_imaginary), (c_real, c_imaginary), positions_BxL=positions,
                                segment_ids_BxL=segment_ids, state_BxCxMxN=before,
                                implementation=None if implementation == "fft" else implementation)
        return y, *after

    before = (None, None) if state is None else state
    recur = sharding.local(recur, (channels, *[modes] * 4, rows, rows, *[None if state is None else hidden] * 2),
                           [channels, hidden, hidden])
    y, *after = recur(u_BxLxCxM, *decay_CxN, *output_CxN, ctx.positions_BxL, ctx.segment_ids_BxL, *before)
    return y, None if state is None else tuple(after)
