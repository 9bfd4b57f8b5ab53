"""The gated delta rule as Pallas TPU kernels, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import unit_triangular
from kernels.chunks import chunk_documents, log_decays, split
from kernels.chunks_pallas import Kernel, by_head, column, layout, product, scan, weights
from kernels.varying import vary_alike


def _nothing(dtype, shared, fixed):
    return ()


def _head(dtype, tokens, shared, common, fixed, s_KxV):
    """One head's chunk, by the equations of `gated_delta.chunked`."""
    q_QxK, k_QxK, u_QxV, log_1xQ, *write = tokens
    decay_QxQ, since_Qx1, until_1xQ, kept_1x1 = weights(log_1xQ, *fixed)
    if write:
        write_Qx1 = column(write[0])
        a_QxQ = write_Qx1 * product(dtype, k_QxK, k_QxK, (1, 1)) * decay_QxQ
        u_QxV = solve(a_QxQ, write_Qx1 * (u_QxV - since_Qx1 * product(dtype, k_QxK, s_KxV, (1, 0))))
    y_QxV = product(dtype, product(dtype, q_QxK, k_QxK, (1, 1)) * decay_QxQ, u_QxV, (1, 0))
    y_QxV += since_Qx1 * product(dtype, q_QxK, s_KxV, (1, 0))
    return y_QxV, kept_1x1 * s_KxV + product(dtype, column(until_1xQ) * k_QxK, u_QxV, (0, 0))


def _inverse(a_QxQ: jax.Array) -> jax.Array:
    """(1 + tril(A, -1))^-1 from blocks of 1, 2, 4, ... on the diagonal: [[X, 0], [C, Y]]^-1 = [[X', 0], [-Y' C X', Y']].

    All pairs of a size at once, as products of whole matrices in which the rest is 0. Unlike a product of powers
    of A it only ever multiplies inverses of its own diagonal blocks, as substitution does.
    """
    Q = a_QxQ.shape[0]
    row, col = (jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))
    inverse_QxQ = (row == col).astype(jnp.float32)
    for bits in range((Q - 1).bit_length()):
        other = ((row >> (bits + 1)) == (col >> (bits + 1))) & ((row >> bits) > (col >> bits))
        below_QxQ = product(jnp.float32, jnp.where(other, a_QxQ, 0.0), inverse_QxQ, (1, 0))
        inverse_QxQ -= product(jnp.float32, inverse_QxQ, below_QxQ, (1, 0))
    return inverse_QxQ


@jax.custom_vjp
def solve(a_QxQ: jax.Array, right_QxV: jax.Array) -> jax.Array:
    """u of (1 + tril(A, -1)) u = right."""
    return product(jnp.float32, _inverse(a_QxQ), right_QxV, (1, 0))


def _solve_forward(a_QxQ, right_QxV):
    inverse_QxQ = _inverse(a_QxQ)
    u_QxV = product(jnp.float32, inverse_QxQ, right_QxV, (1, 0))
    return u_QxV, (inverse_QxQ, u_QxV)


def _solve_backward(saved, du_QxV):
    inverse_QxQ, u_QxV = saved
    Q = u_QxV.shape[0]
    dright_QxV = product(jnp.float32, inverse_QxQ, du_QxV, (0, 0))
    below = jax.lax.broadcasted_iota(jnp.int32, (Q, Q), 0) > jax.lax.broadcasted_iota(jnp.int32, (Q, Q), 1)
    return jnp.where(below, -product(jnp.float32, dright_QxV, u_QxV, (1, 1)), 0.0), dright_QxV


solve.defvjp(_solve_forward, _solve_backward)


def refusal(q_BxLxHxK: jax.Array, v_BxLxHxV: jax.Array, chunk: int) -> str | None:
    """Why the kernels can't serve these arguments; None: they can."""
    L, K, V = q_BxLxHxK.shape[1], q_BxLxHxK.shape[3], v_BxLxHxV.shape[3]
    if min(chunk, L) > 128 or max(K, V) > 256:
        return f"gated_delta: pallas has room for chunks of 128 tokens, keys and values of 256, not {chunk}, {K} and {V}"
    return None


def pallas(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxV: jax.Array,
    log_decay_BxLxH: jax.Array,
    write_BxLxH: jax.Array | None,
    reset_BxL: jax.Array,
    state_BxHxKxV: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`gated_delta.chunked` on a TPU: nothing of a chunk's systems leaves VMEM, and the memory stays there along the row."""
    (B, L, H, K), V, Q = q_BxLxHxK.shape, v_BxLxHxV.shape[-1], min(chunk, q_BxLxHxK.shape[1])
    heads, key, value = layout(H, H, K, V)

    def wide(x_BxLxHxK: jax.Array, width: int) -> jax.Array:
        x_BxLxHxK = jnp.pad(x_BxLxHxK, [(0, 0)] * 3 + [(0, width - x_BxLxHxK.shape[3])])
        return split(x_BxLxHxK.reshape(B, L, -1), Q)

    fixed = chunk_documents(jnp.cumsum(reset_BxL, axis=1, dtype=jnp.int32), Q)
    log_BxMxQxH = log_decays(log_decay_BxLxH, fixed[0])
    tokens = [wide(q_BxLxHxK, key), wide(k_BxLxHxK, key), wide(v_BxLxHxV, value), by_head(log_BxMxQxH, heads)]
    if write_BxLxH is not None:
        tokens.append(by_head(split(write_BxLxH, Q), heads))
    state = jnp.pad(state_BxHxKxV, ((0, 0), (0, 0), (0, key - K), (0, value - V)))
    state = state.reshape(B, H // heads, heads, key, value)
    state, documents, old, *tokens = vary_alike(state, *(x[:, :, None, None] for x in fixed), *tokens)
    y, state = scan(LINEAR if write_BxLxH is None else DELTA, tuple(tokens), (), (documents, old), state)
    y_BxLxHxV = y.reshape(B, -1, H, value)[:, :L, ..., :V]
    return y_BxLxHxV, state.reshape(B, H, key, value)[..., :K, :V]


def _products(q_BxMxQxHK, k, v_BxMxQxHV, log_BxMxPxRxQ, *rest) -> tuple[float, float, float]:
    """Flops of Q K', of its product with the values, and of one with the memory."""
    (B, M, Q, lanes), (P, R), values = q_BxMxQxHK.shape, log_BxMxPxRxQ.shape[2:4], v_BxMxQxHV.shape[3]
    return 2.0 * B * M * Q * Q * lanes, 2.0 * B * M * Q * Q * values, 2.0 * B * M * Q * lanes * values / (P * R)


def _linear_flops(*operands: jax.Array) -> tuple[float, float]:
    """As `linear_attention` has them. Backward: two products for each of forward's, and the scores once more."""
    scores, values, memory = _products(*operands)
    forward = scores + values + 2 * memory
    return forward, 2 * forward + scores


def _delta_flops(*operands: jax.Array) -> tuple[float, float]:
    """As `gated_delta.chunked` has them. Backward: two products for each of forward's, but for the systems' inverses."""
    scores, values, memory = _products(*operands)
    forward = 3 * scores + 2 * values + 3 * memory  # one each for the systems, over keys and values
    (B, M, Q), (P, R) = operands[0].shape[:3], operands[3].shape[2:4]
    return forward + B * M * P * R * unit_triangular.flops(Q), 2 * forward


LINEAR, DELTA = Kernel("gated_linear", _nothing, _head, _linear_flops), Kernel("gated_delta", _nothing, _head, _delta_flops)
