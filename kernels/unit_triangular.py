"""Systems (1 + tril(A, -1)) U = R, many small ones at once, as products of matrices.

Not `jax.lax.linalg.triangular_solve`: on a CPU that is LAPACK's, and for a large batch it waits for the pool of threads that
it runs on. Two of them at a time on two cores wait for each other for ever (jax 0.10.2 and 0.12; a step of RWKV-7 at 16,384
tokens). Products are float32's also where a matrix unit would round to less: an error in an inverse grows with its use.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels.varying import vary_alike

BLOCK = 8  # rows that are found one after another; larger inverses are made of two smaller ones

_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _padded(Q: int) -> int:
    """The least BLOCK * 2^n that holds Q."""
    return BLOCK << max(0, -(-Q // BLOCK) - 1).bit_length()


def _diagonal(a_xRxCx: jax.Array) -> jax.Array:
    """Blocks (..., i, :, i, :), as (..., i, :, :)."""
    return jnp.moveaxis(jnp.diagonal(a_xRxCx, axis1=-4, axis2=-2), -1, -3)


def inverse(a_xQxQ: jax.Array) -> jax.Array:
    """(1 + tril(A, -1))^-1, in float32: by substitution in blocks on the diagonal, then of two blocks and what is below

        [[X, 0], [C, Y]]^-1 = [[X', 0], [-Y' C X', Y']]

    Unlike a product of powers of A it only ever multiplies inverses of its own diagonal blocks, as substitution does: it loses
    no digits where rows of A repeat.
    """
    *batch, Q, _ = a_xQxQ.shape
    size = _padded(Q)
    a_xQxQ = jnp.pad(a_xQxQ.astype(jnp.float32), [(0, 0)] * len(batch) + [(0, size - Q)] * 2)
    own = jnp.tril(_diagonal(a_xQxQ.reshape(*batch, size // BLOCK, BLOCK, size // BLOCK, BLOCK)), -1)

    def row(found, i):  # rows from the i-th on are still 0
        known = jnp.sum(jax.lax.dynamic_index_in_dim(own, i, -2, False)[..., :, None] * found, axis=-2)
        one = jnp.broadcast_to(jax.nn.one_hot(i, BLOCK), known.shape) - known
        return jax.lax.dynamic_update_index_in_dim(found, one, i, found.ndim - 2), None

    found, _ = jax.lax.scan(row, vary_alike(jnp.zeros_like(own), own)[0], jnp.arange(BLOCK))
    side = BLOCK
    while side < size:
        pairs = size // (2 * side)
        below = _diagonal(a_xQxQ.reshape(*batch, pairs, 2, side, pairs, 2, side)[..., 1, :, :, 0, :])
        first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
        corner = -_product(second, _product(below, first))
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        found = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        side *= 2
    return found[..., 0, :Q, :Q]


@jax.custom_vjp
def solve(a_xQxQ: jax.Array, right_xQxV: jax.Array) -> jax.Array:
    """u_xQxV, float32, of (1 + tril(A, -1)) u = right; what A holds on and above its diagonal isn't read."""
    return _forward(a_xQxQ, right_xQxV)[0]


def _forward(a_xQxQ, right_xQxV):
    inverse_xQxQ = inverse(a_xQxQ)
    u_xQxV = _product(inverse_xQxQ, right_xQxV)
    return u_xQxV, (inverse_xQxQ, u_xQxV)


def _backward(saved, du_xQxV):
    inverse_xQxQ, u_xQxV = saved
    dright_xQxV = _product(jnp.swapaxes(inverse_xQxQ, -1, -2), du_xQxV)
    return -jnp.tril(_product(dright_xQxV, jnp.swapaxes(u_xQxV, -1, -2)), -1), dright_xQxV


solve.defvjp(_forward, _backward)


def flops(Q: int) -> float:
    """Those of the products in one inverse."""
    size, side, found = _padded(Q), BLOCK, 0.0
    while side < size:
        found += 2.0 * size * side**2  # of size / 2 side pairs, two products each
        side *= 2
    return found
