"""Linear attention with one decay a head, as matrix products over chunks, forward and backward: where there is no TPU.

    S_t = exp(log_decay_t) S_{t-1} + v_t k_t',  y_t = S_t q_t

`ssd` (q = c, k = b, v = dt x) and `gated_delta` without its rule are this recurrence; theirs are the definitions, and the
tests that hold this to an oracle. All chunks are computed at once, and only the states between them one after another.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.chunks import chunk_documents, log_decays, split
from kernels.varying import vary_alike


def linear_attention(
    q_BxLxGxN: jax.Array,
    k_BxLxGxN: jax.Array,
    x_BxLxGxRxK: jax.Array,
    scale_BxLxGxR: jax.Array | None,
    log_decay_BxLxGxR: jax.Array,
    documents_BxL: jax.Array,
    state_BxGxRxKxN: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """(y_BxLxGxRxK, state_BxGxRxKxN after the row), float32. Reverse mode only (custom_vjp).

    Args:
      q, k: floating; R heads share a group's. x: floating; products take their operands in its dtype and sum in float32.
      scale_BxLxGxR: float32, v = scale * x, whatever x is where it is 0; None: v = x.
      log_decay_BxLxGxR: float32, at most 0; padding has 0, and k = 0 or scale = 0.
      documents_BxL: int32, how many documents began up to here (`convolution.document_counts`); 0 is that of the state.
      state_BxGxRxKxN: float32.
      chunk: tokens of a chunk, Q. Memory is the arguments and, for each chunk, Q weights a token and head and one state.

    The backward pass keeps the arguments, y and the states before each chunk. A sum of log decays multiplies what its token
    reads and divides what its token wrote: its gradient is dy.y - v.dv, and at the chunk's end what the state's adds.

    Sources: Dao and Gu 2024 (Mamba-2), section 6; Yang et al. 2023 (GLA), section 4 and appendix C (the gradient of decays).
    """
    return _attend(chunk, *vary_alike(q_BxLxGxN, k_BxLxGxN, x_BxLxGxRxK, scale_BxLxGxR, log_decay_BxLxGxR, state_BxGxRxKxN,
                                      documents_BxL))  # fmt: skip


class _Chunks(NamedTuple):
    """M chunks of Q tokens; I = R * K. `until`: a token's decay to its chunk's end; `since`: the state's, to a token."""

    q_BxMxGxQxN: jax.Array
    k_BxMxGxQxN: jax.Array
    v_BxMxGxQxI: jax.Array
    decay_BxMxGxRxQxS: jax.Array
    since_BxMxGxQxR: jax.Array
    until_BxMxGxQxR: jax.Array
    kept_BxMxGxR: jax.Array


def _chunks(chunk, q_BxLxGxN, k_BxLxGxN, v_BxLxGxRxK, log_decay_BxLxGxR, documents_BxL) -> _Chunks:
    B, L, G, R, _ = v_BxLxGxRxK.shape
    Q = min(chunk, L)
    documents_BxMxQ, old_BxMxQ = chunk_documents(documents_BxL, Q)
    total_BxMxQxGxR = log_decays(log_decay_BxLxGxR.reshape(B, L, -1), documents_BxMxQ).reshape(B, -1, Q, G, R)
    total_BxMxGxRxQ = jnp.moveaxis(total_BxMxQxGxR, 2, 4)
    seen_BxMxQxS = (documents_BxMxQ[..., :, None] == documents_BxMxQ[..., None, :]) & jnp.tri(Q, dtype=bool)
    between_BxMxGxRxQxS = total_BxMxGxRxQ[..., :, None] - total_BxMxGxRxQ[..., None, :]
    decay_BxMxGxRxQxS = jnp.exp(jnp.where(seen_BxMxQxS[:, :, None, None], between_BxMxGxRxQxS, -jnp.inf))
    total_BxMxGxQxR = jnp.moveaxis(total_BxMxQxGxR, 2, 3)
    old_BxMx1xQx1 = (old_BxMxQ != 0)[:, :, None, :, None]
    since_BxMxGxQxR = jnp.where(old_BxMx1xQx1, jnp.exp(jnp.where(old_BxMx1xQx1, total_BxMxGxQxR, 0.0)), 0.0)
    by_group = lambda x: _by_group(x, Q)
    return _Chunks(by_group(q_BxLxGxN), by_group(k_BxLxGxN), by_group(v_BxLxGxRxK.reshape(B, L, G, -1)), decay_BxMxGxRxQxS,
                   since_BxMxGxQxR, jnp.swapaxes(decay_BxMxGxRxQxS[..., -1, :], 3, 4), since_BxMxGxQxR[..., -1, :])


def _by_group(x_BxLxGxN: jax.Array, Q: int) -> jax.Array:
    """x_BxMxGxQxN."""
    return jnp.swapaxes(split(x_BxLxGxN, Q), 2, 3)


def _by_token(x_BxMxGxQxN: jax.Array, L: int) -> jax.Array:
    """x_BxLxGxN."""
    x_BxMxQxGxN = jnp.swapaxes(x_BxMxGxQxN, 2, 3)
    return x_BxMxQxGxN.reshape(x_BxMxQxGxN.shape[0], -1, *x_BxMxQxGxN.shape[3:])[:, :L]


def _by_head(x_BxMxGxQxI: jax.Array, R: int) -> jax.Array:
    """x_BxMxGxRxQxK."""
    return jnp.swapaxes(x_BxMxGxQxI.reshape(*x_BxMxGxQxI.shape[:-1], R, -1), 3, 4)


def _side_by_side(x_BxMxGxRxQxK: jax.Array) -> jax.Array:
    """x_BxMxGxQxI."""
    x_BxMxGxQxRxK = jnp.swapaxes(x_BxMxGxRxQxK, 3, 4)
    return x_BxMxGxQxRxK.reshape(*x_BxMxGxQxRxK.shape[:-2], -1)


def _scaled(x_BxMxGxQxI: jax.Array, by_BxMxGxQxR: jax.Array) -> jax.Array:
    """Each head's part by its own number."""
    *rows, I = x_BxMxGxQxI.shape
    return (x_BxMxGxQxI.reshape(*rows, by_BxMxGxQxR.shape[-1], -1) * by_BxMxGxQxR[..., None]).reshape(*rows, I)


def _product(dtype: jnp.dtype):
    def product(a: jax.Array, b: jax.Array, over: tuple[int, int] = (-1, -2)) -> jax.Array:
        """Of matrices, summed over these axes: operands in `dtype`, float32 out."""
        batch = tuple(range(a.ndim - 2))
        contracted = (over[0] % a.ndim,), (over[1] % b.ndim,)
        numbers = contracted, (batch, batch)
        return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), numbers, preferred_element_type=jnp.float32)

    return product


def _summed(x: jax.Array, axis: int) -> jax.Array:
    """jnp.sum by halves: a CPU's compiler fuses a plain sum with the product before it, and is six times as slow."""
    while (size := x.shape[axis]) > 1:
        half = size // 2
        first, second, odd = jnp.split(x, [half, 2 * half], axis)
        x = jnp.concatenate([first + second, odd], axis)
    return jnp.squeeze(x, axis)


def _between(kept_BxMxGxR: jax.Array, new_BxMxGxIxN: jax.Array, first_BxGxIxN: jax.Array, reverse: bool = False):
    """(the last state, those before each chunk) of state <- kept state + new, chunk after chunk, or from the end."""

    def step(state_BxGxIxN, chunk):
        kept_BxGxR, new_BxGxIxN = chunk
        B, G, I, N = state_BxGxIxN.shape
        decayed_BxGxRxKxN = kept_BxGxR[..., None, None] * state_BxGxIxN.reshape(*kept_BxGxR.shape, -1, N)
        return decayed_BxGxRxKxN.reshape(B, G, I, N) + new_BxGxIxN, state_BxGxIxN

    chunks = jnp.moveaxis(kept_BxMxGxR, 1, 0), jnp.moveaxis(new_BxMxGxIxN, 1, 0)
    last_BxGxIxN, before_MxBxGxIxN = jax.lax.scan(step, first_BxGxIxN, chunks, reverse=reverse)
    return last_BxGxIxN, jnp.moveaxis(before_MxBxGxIxN, 0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(chunk, q, k, x, scale, log_decay, state, documents):
    return _forward(chunk, q, k, x, scale, log_decay, state, documents)[0]


def _written(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """v_BxLxGxRxK."""
    return x if scale is None else jnp.where(scale[..., None] == 0, 0.0, scale[..., None] * x).astype(x.dtype)


def _forward(chunk, q, k, x, scale, log_decay, state, documents):
    B, L, G, R, K = x.shape
    v = _written(x, scale)
    product, c = _product(v.dtype), _chunks(chunk, q, k, v, log_decay, documents)
    scores_BxMxGxQxS = product(c.q_BxMxGxQxN, c.k_BxMxGxQxN, (-1, -1))
    y_BxMxGxRxQxK = product(scores_BxMxGxQxS[:, :, :, None] * c.decay_BxMxGxRxQxS, _by_head(c.v_BxMxGxQxI, R))
    new_BxMxGxIxN = product(_scaled(c.v_BxMxGxQxI, c.until_BxMxGxQxR), c.k_BxMxGxQxN, (-2, -2))
    last_BxGxIxN, before_BxMxGxIxN = _between(c.kept_BxMxGxR, new_BxMxGxIxN, state.reshape(B, G, R * K, -1))
    read_BxMxGxQxI = _scaled(product(c.q_BxMxGxQxN, before_BxMxGxIxN, (-1, -1)), c.since_BxMxGxQxR)
    y = _by_token(_side_by_side(y_BxMxGxRxQxK) + read_BxMxGxQxI, L).reshape(B, L, G, R, K)
    saved = q, k, x, scale, log_decay, documents, y, before_BxMxGxIxN, last_BxGxIxN
    return (y, last_BxGxIxN.reshape(state.shape)), saved


def _backward(chunk, saved, cotangents):
    q, k, x, scale, log_decay, documents, y, before_BxMxGxIxN, last_BxGxIxN = saved
    dy, dlast = cotangents
    B, L, G, R, K = x.shape
    v = _written(x, scale)
    product, c = _product(v.dtype), _chunks(chunk, q, k, v, log_decay, documents)
    Q = c.q_BxMxGxQxN.shape[3]
    dy_BxMxGxQxI = _by_group(dy.reshape(B, L, G, -1), Q)
    dy_BxMxGxRxQxK = _by_head(dy_BxMxGxQxI, R)

    # Through the states.
    dread_BxMxGxQxI = _scaled(dy_BxMxGxQxI, c.since_BxMxGxQxR)
    dbefore_BxMxGxIxN = product(dread_BxMxGxQxI, c.q_BxMxGxQxN, (-2, -2))
    dstate_BxGxIxN, dafter_BxMxGxIxN = _between(c.kept_BxMxGxR, dbefore_BxMxGxIxN, dlast.reshape(last_BxGxIxN.shape), True)

    # Within the chunks.
    scores_BxMxGxQxS = product(c.q_BxMxGxQxN, c.k_BxMxGxQxN, (-1, -1))
    weights_BxMxGxRxQxS = scores_BxMxGxQxS[:, :, :, None] * c.decay_BxMxGxRxQxS
    dweights_BxMxGxRxQxS = product(dy_BxMxGxRxQxK, _by_head(c.v_BxMxGxQxI, R), (-1, -1))
    dscores_BxMxGxQxS = _summed(dweights_BxMxGxRxQxS * c.decay_BxMxGxRxQxS, 3)

    dq_BxMxGxQxN = product(dscores_BxMxGxQxS, c.k_BxMxGxQxN) + product(dread_BxMxGxQxI, before_BxMxGxIxN)
    written_BxMxGxQxI = _scaled(c.v_BxMxGxQxI, c.until_BxMxGxQxR)
    dk_BxMxGxQxN = product(dscores_BxMxGxQxS, c.q_BxMxGxQxN, (-2, -2)) + product(written_BxMxGxQxI, dafter_BxMxGxIxN)
    dv_BxMxGxQxI = _scaled(product(c.k_BxMxGxQxN, dafter_BxMxGxIxN, (-1, -1)), c.until_BxMxGxQxR)
    dv_BxMxGxQxI += _side_by_side(product(weights_BxMxGxRxQxS, dy_BxMxGxRxQxK, (-2, -2)))
    dv = _by_token(dv_BxMxGxQxI, L).reshape(v.shape)

    dtotal_BxMxQxH = split(jnp.sum(dy * y - v.astype(jnp.float32) * dv, axis=-1).reshape(B, L, G * R), Q)
    after_BxMxGxIxN = jnp.concatenate([before_BxMxGxIxN[:, 1:], last_BxGxIxN[:, None]], axis=1)
    end_BxMxH = jnp.sum((after_BxMxGxIxN * dafter_BxMxGxIxN).reshape(*dtotal_BxMxQxH.shape[:2], G * R, -1), axis=-1)
    dtotal_BxMxQxH = dtotal_BxMxQxH.at[:, :, -1].add(end_BxMxH)
    documents_BxMxQ, _ = chunk_documents(documents, Q)
    _, pull = jax.vjp(lambda log_BxLxH: log_decays(log_BxLxH, documents_BxMxQ), log_decay.reshape(B, L, -1))
    begins_BxL = jnp.diff(documents, axis=1, prepend=0) != 0  # a first token's decay isn't used: what is left is rounding
    dlog_decay = jnp.where(begins_BxL[..., None, None], 0.0, pull(dtotal_BxMxQxH)[0].reshape(log_decay.shape))
    dq, dk = (_by_token(x, L).astype(like.dtype) for x, like in ((dq_BxMxGxQxN, q), (dk_BxMxGxQxN, k)))
    dscale = None if scale is None else jnp.sum(dv * x, axis=-1)
    dx = (dv if scale is None else scale[..., None] * dv).astype(x.dtype)
    return dq, dk, dx, dscale, dlog_decay, dstate_BxGxIxN.reshape(dlast.shape), None


_attend.defvjp(_forward, _backward)
