"""State-space duality (Mamba-2) as Pallas TPU kernels, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.chunks import chunk_documents, log_decays, split
from kernels.chunks_pallas import Kernel, by_head, column, layout, product, scan, weights
from kernels.varying import vary_alike


def _scores(dtype, shared, fixed):
    b_QxN, c_QxN = shared
    return (product(dtype, c_QxN, b_QxN, (1, 1)),)


def _head(dtype, tokens, shared, common, fixed, h_KxN):
    """One head's chunk, as in `ssd.chunked`; dt weighs the scores instead of x, which so keeps its digits."""
    x_QxK, dt_1xQ, log_1xQ = tokens
    (b_QxN, c_QxN), (scores_QxQ,) = shared, common
    decay_QxQ, since_Qx1, until_1xQ, kept_1x1 = weights(log_1xQ, *fixed)
    y_QxK = product(dtype, scores_QxQ * decay_QxQ * dt_1xQ, x_QxK, (1, 0))
    y_QxK += since_Qx1 * product(dtype, c_QxN, h_KxN, (1, 1))
    return y_QxK, kept_1x1 * h_KxN + product(dtype, column(until_1xQ * dt_1xQ) * x_QxK, b_QxN, (0, 0))


def refusal(x_BxLxHxK: jax.Array, b_BxLxGxN: jax.Array, chunk: int) -> str | None:
    """Why the kernels can't serve these arguments; None: they can."""
    if x_BxLxHxK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"ssd: pallas takes float32 and bfloat16, not {x_BxLxHxK.dtype}"
    K, N, most = x_BxLxHxK.shape[3], b_BxLxGxN.shape[3], 1024 // x_BxLxHxK.dtype.itemsize
    if min(chunk, x_BxLxHxK.shape[1]) > most or max(K, N) > 256:
        return f"ssd: pallas has room for chunks of {most} tokens, heads and states of 256, not {chunk}, {K} and {N}"
    return None


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
    heads, width = layout(G * R, R, K)
    dt_BxLxH = jnp.where(valid_BxL[..., None], dt_BxLxGxR.reshape(B, L, -1), 0.0)
    x_BxLxGxRxK = jnp.where(valid_BxL[..., None, None, None], x_BxLxGxRxK, 0)
    x_BxLxGxRxK = jnp.pad(x_BxLxGxRxK, [(0, 0)] * 4 + [(0, width - K)])
    fixed = chunk_documents(documents_BxL, Q)
    log_BxMxQxH = log_decays(dt_BxLxH * a_GxR.reshape(-1), fixed[0])

    tokens = split(x_BxLxGxRxK.reshape(B, L, -1), Q), by_head(split(dt_BxLxH, Q), heads), by_head(log_BxMxQxH, heads)
    shared = tuple(jnp.moveaxis(split(x, Q), 3, 2) for x in (b_BxLxGxN, c_BxLxGxN))
    h = jnp.pad(h_BxGxRxKxN, [(0, 0)] * 3 + [(0, width - K), (0, 0)]).reshape(B, -1, heads, width, N)
    x, dt, log, b, c, documents, old, h = vary_alike(*tokens, *shared, *(x[:, :, None, None] for x in fixed), h)
    y, h = scan(KERNEL, (x, dt, log), (b, c), (documents, old), h)
    y_BxLxGxRxK = y.reshape(B, -1, G, R, width)[:, :L, ..., :K]
    return y_BxLxGxRxK, h.reshape(B, G, R, width, N)[..., :K, :]


def _flops(x_BxMxQxHK, dt_BxMxPxRxQ, log, b_BxMxGxQxN, *_) -> tuple[float, float]:
    """As `ssd.chunked` has them: scores once a group, though each program of HEADS heads makes its own.

    Backward: two products for each of forward's, and the scores once more.
    """
    B, M, Q, lanes = x_BxMxQxHK.shape
    G, N = b_BxMxGxQxN.shape[2], b_BxMxGxQxN.shape[4]
    scores, values, state = 2.0 * B * M * Q * Q * G * N, 2.0 * B * M * Q * Q * lanes, 2.0 * B * M * Q * N * lanes
    forward = scores + values + 2 * state
    return forward, 2 * forward + scores


KERNEL = Kernel("ssd", _scores, _head, _flops)
