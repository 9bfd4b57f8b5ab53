"""Diagonal complex state spaces that don't depend on the token (S4D, H3): as a recurrence, and as one long convolution.

Complex numbers are pairs of float32 arrays, real and imaginary part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.chunks import one_by_one
from kernels.lowering import by_platform

CHUNK = 64  # tokens whose (B, C * M, N) states are alive at one time in `chunked`, and again in `sequential`

Pair = tuple[jax.Array, jax.Array]


def multiply(x: Pair, y: Pair) -> Pair:
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def reference(
    u_BxLxC: jax.Array, a_CxN: Pair, c_CxN: Pair, first_BxL: jax.Array, valid_BxL: jax.Array, h_BxCxN: Pair
) -> tuple[jax.Array, Pair]:
    """The definition, token after token."""

    def step(h, token):
        u_BxC, first_B, valid_B = token
        decay, u_BxCx1 = _terms(u_BxC, a_CxN, first_B, valid_B)
        real, imaginary = multiply(decay, h)
        h = real + u_BxCx1, imaginary
        return h, _read("bcn,cn->bc", h, c_CxN)

    h_BxCxN, y = jax.lax.scan(step, h_BxCxN, tuple(jnp.moveaxis(x, 1, 0) for x in (u_BxLxC, first_BxL, valid_BxL)))
    return jnp.moveaxis(y, 0, 1), h_BxCxN


def chunked(
    u_BxLxC: jax.Array, a_CxN: Pair, c_CxN: Pair, first_BxL: jax.Array, valid_BxL: jax.Array, h_BxCxN: Pair
) -> tuple[jax.Array, Pair]:
    """`reference` by an associative scan within each chunk; the backward pass keeps the inputs and a state a chunk."""
    def then(first: tuple[Pair, Pair], second: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        (a1, b1), (a2, b2) = first, second
        passed = multiply(a2, b1)
        return multiply(a1, a2), (passed[0] + b2[0], passed[1] + b2[1])

    def chunk(h, u_BxQxC, first_BxQ, valid_BxQ):
        decay, u_BxQxCx1 = _terms(u_BxQxC, a_CxN, first_BxQ, valid_BxQ)
        carried = multiply((decay[0][:, 0], decay[1][:, 0]), h)
        real_BxQxCxN = jnp.broadcast_to(u_BxQxCx1, (*u_BxQxC.shape, a_CxN[0].shape[1]))
        inputs = real_BxQxCxN.at[:, 0].add(carried[0]), jnp.zeros_like(real_BxQxCxN).at[:, 0].add(carried[1])
        _, h = jax.lax.associative_scan(then, (decay, inputs), axis=1)
        return _read("bqcn,cn->bqc", h, c_CxN), (h[0][:, -1], h[1][:, -1])

    return one_by_one(chunk, h_BxCxN, (u_BxLxC, first_BxL, valid_BxL), CHUNK)


def sequential(
    u_BxLxC: jax.Array, a_CxN: Pair, c_CxN: Pair, first_BxL: jax.Array, valid_BxL: jax.Array, h_BxCxN: Pair
) -> tuple[jax.Array, Pair]:
    """`reference` for a CPU; the backward pass keeps the inputs and a state a chunk."""
    chunk = lambda h, u_BxQxC, first_BxQ, valid_BxQ: reference(u_BxQxC, a_CxN, c_CxN, first_BxQ, valid_BxQ, h)
    return one_by_one(chunk, h_BxCxN, (u_BxLxC, first_BxL, valid_BxL), CHUNK)


def _terms(u_BxxC: jax.Array, a_CxN: Pair, first_Bxx: jax.Array, valid_Bxx: jax.Array) -> tuple[Pair, jax.Array]:
    """(decay (B, ..., C, N), input (B, ..., C, 1)): padding keeps the state, a first token drops it."""
    valid, first = valid_Bxx[..., None, None], first_Bxx[..., None, None]
    stay = jnp.where(first, 0.0, a_CxN[0]), jnp.where(first, 0.0, a_CxN[1])
    u = jnp.where(valid, u_BxxC.astype(jnp.float32)[..., None], 0.0)
    return (jnp.where(valid, stay[0], 1.0), jnp.where(valid, stay[1], 0.0)), u


def _read(spec: str, h: Pair, c_CxN: Pair) -> jax.Array:
    """The real part of the sum of c * h over n."""
    return jnp.einsum(spec, h[0], c_CxN[0]) - jnp.einsum(spec, h[1], c_CxN[1])


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, Pair]]] = {
    "reference": reference, "chunked": chunked, "sequential": sequential,
}  # fmt: skip


def diagonal_ssm(
    u_BxLxCxM: jax.Array,
    a_CxN: Pair,
    c_CxN: Pair,
    *,
    positions_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    state_BxCxMxN: Pair | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Pair]:
    """h_t = a * h_{t-1} + u_t;  y_t = Re(sum over n of c * h_t), in float32.

    Args:
      u_BxLxCxM: floating; M inputs share the state space of a channel.
      a_CxN: the discretised decay, |a| < 1. c_CxN: the output, with whatever scales the input multiplied in.
      positions_BxL: int32; a valid position 0 begins a document: nothing of the state before is left.
      segment_ids_BxL: int32, 0 is padding: it leaves the state unchanged, and its y means nothing.
      state_BxCxMxN: float32, before the row; None: zeros.
      implementation: a key of IMPLEMENTATIONS; None: `reference` for one token, else `sequential` where the program is lowered
        for a CPU and `chunked` elsewhere.

    Returns:
      (y_BxLxCxM in u's dtype, the state after the row).

    Raises:
      ValueError: an unknown implementation, or shapes that don't fit.

    Source: Gu et al. 2022 (S4D), equation 2 and section 3.3.
    """
    B, L, C, M = u_BxLxCxM.shape
    N = a_CxN[0].shape[-1]
    state = (jnp.zeros((B, C, M, N), jnp.float32),) * 2 if state_BxCxMxN is None else state_BxCxMxN
    expected = {"a": (a_CxN, (C, N)), "c": (c_CxN, (C, N)), "state": (state, (B, C, M, N)),
                "positions": ((positions_BxL,), (B, L)), "segment ids": ((segment_ids_BxL,), (B, L))}  # fmt: skip
    for name, (parts, shape) in expected.items():
        if any(part.shape != shape for part in parts):
            raise ValueError(f"diagonal_ssm: {name} has shape {parts[0].shape}, not {shape}")
    if implementation is None:
        run = reference if L == 1 else functools.partial(by_platform, cpu=sequential, otherwise=chunked)
    elif implementation in IMPLEMENTATIONS:
        run = IMPLEMENTATIONS[implementation]
    else:
        raise ValueError(f"diagonal_ssm: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    valid_BxL = segment_ids_BxL != 0
    # Channels and copies are one axis inside: an axis of one copy between C and N once crashed the TPU compiler (H3).
    a_CxN, c_CxN = ([jnp.repeat(part, M, axis=0) for part in pair] for pair in (a_CxN, c_CxN))
    h_BxCxN = tuple(part.reshape(B, C * M, N) for part in state)
    first_BxL = valid_BxL & (positions_BxL == 0)
    y, h_BxCxN = run(u_BxLxCxM.reshape(B, L, C * M), a_CxN, c_CxN, first_BxL, valid_BxL, h_BxCxN)
    state = tuple(part.reshape(B, C, M, N) for part in h_BxCxN)
    return y.reshape(u_BxLxCxM.shape).astype(u_BxLxCxM.dtype), state


def impulse_response(a_CxN: Pair, c_CxN: Pair, L: int) -> jax.Array:
    """k_CxL = Re(sum over n of c * a^l), l = 0..L-1, in float32.

    l = q * Q + r with Q about the root of L: (C, Q, N) powers twice and one product, never (C, L, N).
    """
    Q = math.isqrt(L - 1) + 1
    # 0 has no logarithm, and no angle: what is gone after one step counts as 1e-15, with no gradient.
    gone_CxN = a_CxN[0] ** 2 + a_CxN[1] ** 2 < 1e-30
    real_CxN, imaginary_CxN = jnp.where(gone_CxN, 1e-15, a_CxN[0]), jnp.where(gone_CxN, 0.0, a_CxN[1])
    log_CxN, angle_CxN = jnp.log(jnp.hypot(real_CxN, imaginary_CxN)), jnp.arctan2(imaginary_CxN, real_CxN)

    def powers(exponents_Q: jax.Array) -> Pair:
        size_CxQxN = jnp.exp(exponents_Q[:, None] * log_CxN[:, None])
        angle_CxQxN = exponents_Q[:, None] * angle_CxN[:, None]
        return size_CxQxN * jnp.cos(angle_CxQxN), size_CxQxN * jnp.sin(angle_CxQxN)

    low_CxRxN = powers(jnp.arange(Q, dtype=jnp.float32))
    high_CxQxN = multiply(powers(Q * jnp.arange(Q, dtype=jnp.float32)), (c_CxN[0][:, None], c_CxN[1][:, None]))
    exact = jax.lax.Precision.HIGHEST
    real, imaginary = (jnp.einsum("cqn,crn->cqr", x, y, precision=exact) for x, y in zip(high_CxQxN, low_CxRxN))
    return (real - imaginary).reshape(-1, Q * Q)[:, :L]


def long_convolution(u_BxLxCxM: jax.Array, k_CxL: jax.Array, segment_ids_BxL: jax.Array) -> jax.Array:
    """y_BxLxCxM, in u's dtype: y_t = sum over s <= t of k[t - s] * u_s, for rows that hold **one** document each.

    By FFT over twice the length, in float32. An FFT can't stop at a document's start: for packed rows, and to get a
    state, use the recurrence. Padding (segment 0) is closed up first where it lies before a valid token.
    """
    L = u_BxLxCxM.shape[1]
    valid_BxL = segment_ids_BxL != 0
    gaps = jnp.any(valid_BxL[:, 1:] & ~valid_BxL[:, :-1])

    def close_up(x: jax.Array) -> jax.Array:
        order_BxL = jnp.argsort(~valid_BxL, axis=1, stable=True)
        return jnp.take_along_axis(x, order_BxL[..., None, None], axis=1)

    def open_up(x: jax.Array) -> jax.Array:
        rank_BxL = jnp.maximum(jnp.cumsum(valid_BxL, axis=1) - 1, 0)
        return jnp.take_along_axis(x, rank_BxL[..., None, None], axis=1)

    u = jnp.where(valid_BxL[..., None, None], u_BxLxCxM.astype(jnp.float32), 0.0)
    u = jax.lax.cond(gaps, close_up, lambda x: x, u)
    spectrum = jnp.fft.rfft(u, 2 * L, axis=1) * jnp.fft.rfft(k_CxL.T, 2 * L, axis=0)[..., None]
    y = jnp.fft.irfft(spectrum, 2 * L, axis=1)[:, :L]
    return jax.lax.cond(gaps, open_up, lambda x: x, y).astype(u_BxLxCxM.dtype)
