"""State-space duality (Mamba-2) as Pallas TPU kernels, forward and backward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels.chunks_pallas import Kernel, column, last, product, scan
from kernels.selective_scan import then
from kernels.varying import vary_alike

HEADS = 8  # of one program, at most: they share the scores of their group


def _scores(dtype, shared, fixed):
    b_QxN, c_QxN = shared
    return (product(dtype, c_QxN, b_QxN, (1, 1)),)


def _head(dtype, tokens, shared, common, fixed, h_KxN):
    """One head's chunk, as in `ssd.chunked`; dt weighs the scores instead of x, which so keeps its digits."""
    x_QxK, dt_1xQ, log_1xQ = tokens
    (b_QxN, c_QxN), (scores_QxQ,), (documents_1xQ, old_1xQ) = shared, common, fixed
    Q = x_QxK.shape[0]
    log_Qx1, old_Qx1 = column(log_1xQ), column(old_1xQ) != 0
    above_QxQ = jax.lax.broadcasted_iota(jnp.int32, (Q, Q), 0) >= jax.lax.broadcasted_iota(jnp.int32, (Q, Q), 1)
    seen_QxQ = (column(documents_1xQ) == documents_1xQ) & above_QxQ
    decay_QxQ = jnp.exp(jnp.where(seen_QxQ, log_Qx1 - log_1xQ, -jnp.inf))
    y_QxK = product(dtype, scores_QxQ * decay_QxQ * dt_1xQ, x_QxK, (1, 0))

    since_Qx1 = jnp.where(old_Qx1, jnp.exp(jnp.where(old_Qx1, log_Qx1, 0.0)), 0.0)
    y_QxK += since_Qx1 * product(dtype, c_QxN, h_KxN, (1, 1))
    end_1x1, still_1x1 = last(log_1xQ), last(old_1xQ) != 0
    until_1xQ = jnp.exp(jnp.where(documents_1xQ == last(documents_1xQ), end_1x1 - log_1xQ, -jnp.inf)) * dt_1xQ
    kept_1x1 = jnp.where(still_1x1, jnp.exp(jnp.where(still_1x1, end_1x1, 0.0)), 0.0)
    return y_QxK, kept_1x1 * h_KxN + product(dtype, column(until_1xQ) * x_QxK, b_QxN, (0, 0))


KERNEL = Kernel("ssd", _scores, _head)


def layout(G: int, R: int, K: int) -> tuple[int, int]:
    """(heads of a program, lanes of a head: K, or more where a program's lanes would not fill registers)."""
    divisors = [n for n in range(1, HEADS + 1) if R % n == 0]
    full = [n for n in divisors if n * K % 128 == 0 or n == G * R]
    if full:
        return full[-1], K
    heads = divisors[-1]
    lanes = 128 // math.gcd(heads, 128)
    return heads, K + -K % lanes


def pallas(
    x_BxLxGxRxK: jax.Array,
    dt_BxLxGxR: jax.Array,
    a_GxR: jax.Array,
    b_BxLxGxN: jax.Array,
    c_BxLxGxN: jax.Array,
    documents_BxL: jax.Array,
    valid_BxL: jax.Array,
    h_BxGxRxKxN: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`ssd.chunked` on a TPU: no (.., Q, Q) array leaves VMEM, and the state stays there along the row."""
    (B, L, G, R, K), N = x_BxLxGxRxK.shape, b_BxLxGxN.shape[-1]
    Q = min(chunk, L)
    heads, width = layout(G, R, K)

    def by_chunk(x_BxLx: jax.Array, mode: str = "constant") -> jax.Array:
        x_BxLx = jnp.pad(x_BxLx, [(0, 0), (0, -L % Q)] + [(0, 0)] * (x_BxLx.ndim - 2), mode=mode)
        return x_BxLx.reshape(B, -1, Q, *x_BxLx.shape[2:])

    def by_head(x_BxMxQxGxR: jax.Array) -> jax.Array:
        x_BxMxGxRxQ = jnp.moveaxis(x_BxMxQxGxR, 2, 4)
        return x_BxMxGxRxQ.reshape(B, -1, G * R // heads, heads, Q)

    dt_BxMxQxGxR = by_chunk(jnp.where(valid_BxL[..., None, None], dt_BxLxGxR, 0.0))
    x_BxLxGxRxK = jnp.where(valid_BxL[..., None, None, None], x_BxLxGxRxK, 0)
    x_BxLxGxRxK = jnp.pad(x_BxLxGxRxK, [(0, 0)] * 4 + [(0, width - K)])
    # What fills the last chunk up belongs to the last document: it isn't valid, and begins nothing.
    documents_BxMxQ = by_chunk(documents_BxL, "edge")
    before_BxMx1 = jnp.pad(documents_BxMxQ[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    # The logarithm of the decay since the chunk's or the document's beginning, as in `ssd.chunked`.
    keep_BxMxQ = jnp.diff(documents_BxMxQ, axis=2, prepend=before_BxMx1) == 0
    keep = jnp.broadcast_to(keep_BxMxQ[..., None, None].astype(jnp.float32), dt_BxMxQxGxR.shape)
    _, log_BxMxQxGxR = jax.lax.associative_scan(then, (keep, dt_BxMxQxGxR * a_GxR), axis=2)

    tokens = by_chunk(x_BxLxGxRxK.reshape(B, L, -1)), by_head(dt_BxMxQxGxR), by_head(log_BxMxQxGxR)
    shared = tuple(jnp.moveaxis(by_chunk(x), 3, 2) for x in (b_BxLxGxN, c_BxLxGxN))
    fixed = tuple(x[:, :, None, None] for x in (documents_BxMxQ, (documents_BxMxQ == before_BxMx1).astype(jnp.int32)))
    h = jnp.pad(h_BxGxRxKxN, [(0, 0)] * 3 + [(0, width - K), (0, 0)]).reshape(B, -1, heads, width, N)
    x, dt, log, b, c, documents, old, h = vary_alike(*tokens, *shared, *fixed, h)
    y, h = scan(KERNEL, (x, dt, log), (b, c), (documents, old), h)
    y_BxLxGxRxK = y.reshape(B, -1, G, R, width)[:, :L, ..., :K]
    return y_BxLxGxRxK, h.reshape(B, G, R, width, N)[..., :K, :]
