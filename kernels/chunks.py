"""Rows in chunks of equal length: what every chunked recurrence begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split(x_BxLx: jax.Array, Q: int, mode: str = "constant") -> jax.Array:
    """x_BxMxQx; the last chunk is filled up with zeros, or as numpy's pad says."""
    x_BxLx = jnp.pad(x_BxLx, [(0, 0), (0, -x_BxLx.shape[1] % Q)] + [(0, 0)] * (x_BxLx.ndim - 2), mode=mode)
    return x_BxLx.reshape(x_BxLx.shape[0], -1, Q, *x_BxLx.shape[2:])


def chunks_first(x_BxLx: jax.Array, Q: int) -> jax.Array:
    """x_MxBxQx, for a scan over chunks; the last one is filled up with zeros."""
    return jnp.moveaxis(split(x_BxLx, Q), 1, 0)


def join(x_MxBxQx: jax.Array, L: int) -> jax.Array:
    """The inverse of `chunks_first`."""
    x_BxMxQx = jnp.moveaxis(x_MxBxQx, 0, 1)
    return x_BxMxQx.reshape(x_BxMxQx.shape[0], -1, *x_BxMxQx.shape[3:])[:, :L]


def one_by_one(
    run: Callable[..., tuple[jax.Array, Any]], state: Any, tokens_BxLx: tuple[jax.Array, ...], Q: int
) -> tuple[jax.Array, Any]:
    """(y_BxLx, the state after the row) of `run(state, *tokens_BxQx)`, (y_BxQx, the state after them), chunk after chunk.

    The backward pass keeps the tokens and the state before each chunk, and makes the rest again, a chunk at a time.
    """
    L = tokens_BxLx[0].shape[1]

    @jax.checkpoint
    def chunk(state, tokens_BxQx):
        y_BxQx, state = run(state, *tokens_BxQx)
        return state, y_BxQx

    state, y_MxBxQx = jax.lax.scan(chunk, state, tuple(chunks_first(x, min(Q, L)) for x in tokens_BxLx))
    return join(y_MxBxQx, L), state


def chunk_documents(documents_BxL: jax.Array, Q: int) -> tuple[jax.Array, jax.Array]:
    """(documents_BxMxQ, old_BxMxQ: whether it is that of the state before the chunk), int32, from how many documents began
    up to here (`convolution.document_counts`). What fills the last chunk up belongs to the last."""
    documents_BxMxQ = split(documents_BxL, Q, "edge")
    before_BxMx1 = jnp.pad(documents_BxMxQ[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    return documents_BxMxQ, (documents_BxMxQ == before_BxMx1).astype(jnp.int32)


def log_decays(log_BxLxH: jax.Array, documents_BxMxQ: jax.Array) -> jax.Array:
    """log_BxMxQxH: the sums of log decays since the chunk or the document began; each document's own, so that what its
    neighbours hold doesn't even change the rounding."""
    log_BxMxQxH = split(log_BxLxH, documents_BxMxQ.shape[2])
    keep_BxMxQ = jnp.pad(documents_BxMxQ[..., 1:] == documents_BxMxQ[..., :-1], ((0, 0), (0, 0), (1, 0)))
    keep_BxMxQxH = jnp.broadcast_to(keep_BxMxQ[..., None].astype(jnp.float32), log_BxMxQxH.shape)
    add = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    return jax.lax.associative_scan(add, (keep_BxMxQxH, log_BxMxQxH), axis=2)[1]
