"""RWKV-7's generalised delta rule as Pallas TPU kernels, forward and backward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels import unit_triangular
from kernels.chunks import chunk_documents, split
from kernels.chunks_pallas import Kernel, column, last, layout, product, scan
from kernels.gated_delta_pallas import solve
from kernels.varying import vary_alike


def _nothing(dtype, shared, fixed):
    return ()


def _head(dtype, tokens, shared, common, fixed, s_KxV):
    """One head's chunk, by the equations of `wkv7.chunked`."""
    r_QxK, log_QxK, k_QxK, v_QxV, key_QxK, removal_QxK = tokens
    documents_1xQ, old_1xQ = fixed
    Q = r_QxK.shape[0]
    row, col = (jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))
    documents_Qx1, old_Qx1 = column(documents_1xQ), column(old_1xQ) != 0
    same_QxQ = documents_Qx1 == documents_1xQ
    until_QxQ, before_QxQ = same_QxQ & (row >= col), same_QxQ & (row > col)
    # Each document's own sum: as a difference of sums over the row it would hold rounding of its neighbour's decays.
    total_QxK = product(dtype, until_QxQ.astype(jnp.float32), log_QxK, (1, 0))
    end_1xK = jnp.sum(jnp.where(row[:, :1] == Q - 1, total_QxK, 0.0), axis=0, keepdims=True)
    r_out, key_out = r_QxK * jnp.exp(total_QxK), key_QxK * jnp.exp(total_QxK - log_QxK)
    k_in, removal_in = k_QxK * jnp.exp(-total_QxK), removal_QxK * jnp.exp(-total_QxK)

    def scores(left_QxK: jax.Array, right_QxK: jax.Array, mask_QxQ: jax.Array) -> jax.Array:
        return jnp.where(mask_QxQ, product(dtype, left_QxK, right_QxK, (1, 1)), 0.0)

    found_QxV = product(dtype, scores(key_out, k_in, before_QxQ), v_QxV, (1, 0))
    found_QxV += product(dtype, jnp.where(old_Qx1, key_out, 0.0), s_KxV, (1, 0))
    u_QxV = solve(scores(key_out, removal_in, before_QxQ), found_QxV)
    y_QxV = product(dtype, scores(r_out, k_in, until_QxQ), v_QxV, (1, 0))
    y_QxV += product(dtype, jnp.where(old_Qx1, r_out, 0.0), s_KxV, (1, 0))
    y_QxV -= product(dtype, scores(r_out, removal_in, until_QxQ), u_QxV, (1, 0))

    left_QxK = jnp.exp(jnp.where(documents_Qx1 == last(documents_1xQ), end_1xK - total_QxK, -jnp.inf))
    kept_1xK = jnp.where(last(old_1xQ) != 0, jnp.exp(end_1xK), 0.0)
    new_KxV = product(dtype, k_QxK * left_QxK, v_QxV, (0, 0)) - product(dtype, removal_QxK * left_QxK, u_QxV, (0, 0))
    return y_QxV, column(kept_1xK) * s_KxV + new_KxV


def refusal(r_BxLxHxK: jax.Array, v_BxLxHxV: jax.Array, chunk: int) -> str | None:
    """Why the kernels can't serve these arguments; None: they can."""
    L, K, V = r_BxLxHxK.shape[1], r_BxLxHxK.shape[3], v_BxLxHxV.shape[3]
    if min(chunk, L) > 128 or max(K, V) > 256:
        return f"wkv7: pallas has room for chunks of 128 tokens, keys and values of 256, not {chunk}, {K} and {V}"
    return None


def pallas(
    r_BxLxHxK: jax.Array,
    log_decay_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxV: jax.Array,
    key_BxLxHxK: jax.Array,
    removal_BxLxHxK: jax.Array,
    reset_BxL: jax.Array,
    state_BxHxKxV: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`wkv7.chunked` on a TPU: nothing of a chunk's systems leaves VMEM, and the memory stays there along the row."""
    (B, L, H, K), V, Q = r_BxLxHxK.shape, v_BxLxHxV.shape[-1], min(chunk, r_BxLxHxK.shape[1])
    heads, key, value = layout(H, H, K, V)

    def wide(x_BxLxHxK: jax.Array, width: int) -> jax.Array:
        x_BxLxHxK = jnp.pad(x_BxLxHxK, [(0, 0)] * 3 + [(0, width - x_BxLxHxK.shape[3])])
        return split(x_BxLxHxK.reshape(B, L, -1), Q)

    before = r_BxLxHxK, log_decay_BxLxHxK, k_BxLxHxK
    tokens = [wide(x, key) for x in before] + [wide(v_BxLxHxV, value)] + [wide(x, key) for x in (key_BxLxHxK, removal_BxLxHxK)]
    fixed = chunk_documents(jnp.cumsum(reset_BxL, axis=1, dtype=jnp.int32), Q)
    state = jnp.pad(state_BxHxKxV, ((0, 0), (0, 0), (0, key - K), (0, value - V)))
    state = state.reshape(B, H // heads, heads, key, value)
    state, documents, old, *tokens = vary_alike(state, *(x[:, :, None, None] for x in fixed), *tokens)
    y, state = scan(KERNEL, tuple(tokens), (), (documents, old), state)
    return y.reshape(B, -1, H, value)[:, :L, ..., :V], state.reshape(B, H, key, value)[..., :K, :V]


def _flops(r_BxMxQxHK, log, k, v_BxMxQxHV, key, removal, documents, old, state, *_) -> tuple[float, float]:
    """As `wkv7.chunked` has them. Backward: two products for each of forward's, but for the sum of decays, which has one, and
    the systems' inverses, which have none."""
    (B, M, Q, lanes), values, V = r_BxMxQxHK.shape, v_BxMxQxHV.shape[3], state.shape[-1]
    scores, values, memory = 2.0 * B * M * Q * Q * lanes, 2.0 * B * M * Q * Q * values, 2.0 * B * M * Q * lanes * V
    forward = 6 * scores + 4 * values + 4 * memory  # one each for the systems, over keys and values as that form solves
    inverses = B * M * math.prod(state.shape[1:3]) * unit_triangular.flops(Q)
    return forward + inverses, 2 * forward - scores


KERNEL = Kernel("wkv7", _nothing, _head, _flops)
