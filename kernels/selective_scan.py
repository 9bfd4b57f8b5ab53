"""The selective scan of Mamba (S6): a diagonal state space whose step size, input and output depend on the token."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import selective_scan_pallas
from kernels.chunks import chunks_first, join, one_by_one
from kernels.lowering import by_platform
from kernels.varying import vary_alike

CHUNK = 64  # tokens whose (B, I, N) states are alive at one time, in every form but `reference`


def reference(
    x_BxLxI: jax.Array,
    dt_BxLxI: jax.Array,
    a_IxN: jax.Array,
    b_BxLxN: jax.Array,
    c_BxLxN: jax.Array,
    first_BxL: jax.Array,
    valid_BxL: jax.Array,
    h_BxIxN: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The definition, token after token."""

    def step(h_BxIxN, token):
        x_BxI, dt_BxI, b_BxN, c_BxN, first_B, valid_B = token
        decay_BxIxN, input_BxIxN = _terms(x_BxI, dt_BxI, a_IxN, b_BxN, first_B, valid_B)
        h_BxIxN = decay_BxIxN * h_BxIxN + input_BxIxN
        return h_BxIxN, jnp.einsum("bin,bn->bi", h_BxIxN, c_BxN.astype(jnp.float32))

    tokens = (x_BxLxI, dt_BxLxI, b_BxLxN, c_BxLxN, first_BxL, valid_BxL)
    h_BxIxN, y_LxBxI = jax.lax.scan(step, h_BxIxN, tuple(jnp.moveaxis(x, 1, 0) for x in tokens))
    return jnp.moveaxis(y_LxBxI, 0, 1), h_BxIxN


def chunked(
    x_BxLxI, dt_BxLxI, a_IxN, b_BxLxN, c_BxLxN, first_BxL, valid_BxL, h_BxIxN
) -> tuple[jax.Array, jax.Array]:
    """`reference` by an associative scan within each chunk of CHUNK tokens, chunk after chunk.

    The backward pass keeps the inputs and one state a chunk, and makes a chunk's states again.
    """
    def chunk(h_BxIxN, x_BxQxI, dt_BxQxI, b_BxQxN, c_BxQxN, first_BxQ, valid_BxQ):
        decay, inputs = _terms(x_BxQxI, dt_BxQxI, a_IxN, b_BxQxN, first_BxQ, valid_BxQ)
        inputs = inputs.at[:, 0].add(decay[:, 0] * h_BxIxN)
        _, h_BxQxIxN = jax.lax.associative_scan(then, (decay, inputs), axis=1)
        return jnp.einsum("bqin,bqn->bqi", h_BxQxIxN, c_BxQxN.astype(jnp.float32)), h_BxQxIxN[:, -1]

    return one_by_one(chunk, h_BxIxN, (x_BxLxI, dt_BxLxI, b_BxLxN, c_BxLxN, first_BxL, valid_BxL), CHUNK)


def _terms(x_BxxI, dt_BxxI, a_IxN, b_BxxN, first_Bxx, valid_Bxx) -> tuple[jax.Array, jax.Array]:
    """(decay, input), (B, ..., I, N) in float32: h = decay * h + input; padding keeps h, a first token drops it."""
    dt_BxxIx1 = dt_BxxI.astype(jnp.float32)[..., None]
    first, valid = first_Bxx[..., None, None], valid_Bxx[..., None, None]
    decay = jnp.where(valid, jnp.where(first, 0.0, jnp.exp(dt_BxxIx1 * a_IxN)), 1.0)
    x_BxxIx1, b_Bxx1xN = x_BxxI.astype(jnp.float32)[..., None], b_BxxN.astype(jnp.float32)[..., None, :]
    return decay, jnp.where(valid, dt_BxxIx1 * x_BxxIx1 * b_Bxx1xN, 0.0)


def then(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """h -> a2 * (a1 * h + b1) + b2, for an associative scan."""
    (a1, b1), (a2, b2) = first, second
    return a1 * a2, a2 * b1 + b2


def sequential(
    x_BxLxI, dt_BxLxI, a_IxN, b_BxLxN, c_BxLxN, first_BxL, valid_BxL, h_BxIxN
) -> tuple[jax.Array, jax.Array]:
    """`reference` for a CPU: one token after another, with the channels side by side in memory, and its derivative by hand.

    The backward pass keeps the inputs and one state a chunk, and makes a chunk's states again.
    """
    x, dt, b = (jnp.where(valid_BxL[..., None], array.astype(jnp.float32), 0.0) for array in (x_BxLxI, dt_BxLxI, b_BxLxN))
    c, first = c_BxLxN.astype(jnp.float32), first_BxL.astype(jnp.float32)
    y_BxLxI, h_BxNxI = _scan(*vary_alike(x, dt, a_IxN.T, b, c, first, jnp.swapaxes(h_BxIxN, 1, 2)))
    return y_BxLxI, jnp.swapaxes(h_BxNxI, 1, 2)


def _advance(a_NxI: jax.Array, h_BxNxI: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """(h after the token, what it kept of each number of the one before). dt = 0 and x = 0, padding, leave h as it is."""
    x_BxI, dt_BxI, b_BxN, first_B = token
    decay_BxNxI = jnp.where(first_B[:, None, None] != 0, 0.0, jnp.exp(dt_BxI[:, None] * a_NxI))
    return decay_BxNxI * h_BxNxI + (dt_BxI * x_BxI)[:, None] * b_BxN[:, :, None], decay_BxNxI


def _by_token(tokens_BxQx: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.moveaxis(array, 1, 0) for array in tokens_BxQx)


@jax.custom_vjp
def _scan(x_BxLxI, dt_BxLxI, a_NxI, b_BxLxN, c_BxLxN, first_BxL, h_BxNxI) -> tuple[jax.Array, jax.Array]:
    """(y_BxLxI, the last h_BxNxI). All float32; padding has x = dt = b = 0, a first token 1 in `first`."""
    return _scan_forward(x_BxLxI, dt_BxLxI, a_NxI, b_BxLxN, c_BxLxN, first_BxL, h_BxNxI)[0]


def _scan_forward(x_BxLxI, dt_BxLxI, a_NxI, b_BxLxN, c_BxLxN, first_BxL, h_BxNxI):
    def step(h_BxNxI, token):
        *inputs, c_BxN = token
        h_BxNxI, _ = _advance(a_NxI, h_BxNxI, inputs)
        return h_BxNxI, jnp.einsum("bni,bn->bi", h_BxNxI, c_BxN)

    def chunk(h_BxNxI, tokens):
        after_BxNxI, y_QxBxI = jax.lax.scan(step, h_BxNxI, _by_token(tokens))
        return after_BxNxI, (jnp.moveaxis(y_QxBxI, 0, 1), h_BxNxI)

    Q = min(CHUNK, x_BxLxI.shape[1])
    tokens = tuple(chunks_first(array, Q) for array in (x_BxLxI, dt_BxLxI, b_BxLxN, first_BxL, c_BxLxN))
    h_BxNxI, (y_MxBxQxI, before_MxBxNxI) = jax.lax.scan(chunk, h_BxNxI, tokens)
    saved = x_BxLxI, dt_BxLxI, a_NxI, b_BxLxN, c_BxLxN, first_BxL, before_MxBxNxI
    return (join(y_MxBxQxI, x_BxLxI.shape[1]), h_BxNxI), saved


def _scan_backward(saved, cotangents):
    """With g the gradient of a token's own h: that of the one before has decay * g, and exp(dt a) gives both dt and a
    decay * h_before * g, times the other of them. Sums over N or I are products with b, c, a or x: those are fast."""
    x_BxLxI, dt_BxLxI, a_NxI, b_BxLxN, c_BxLxN, first_BxL, before_MxBxNxI = saved
    dy_BxLxI, dh_BxNxI = cotangents

    def step(carry, token):
        dh_BxNxI, da_NxI = carry
        x_BxI, dt_BxI, b_BxN, c_BxN, dy_BxI, h_BxNxI, kept_BxNxI, decay_BxNxI = token
        g_BxNxI = dh_BxNxI + dy_BxI[:, None] * c_BxN[:, :, None]
        db_BxN = jnp.einsum("bni,bi->bn", g_BxNxI, dt_BxI * x_BxI)
        dc_BxN = jnp.einsum("bni,bi->bn", h_BxNxI, dy_BxI)
        written_BxI = jnp.einsum("bni,bn->bi", g_BxNxI, b_BxN)
        rate_BxNxI = g_BxNxI * kept_BxNxI
        ddt_BxI = x_BxI * written_BxI + jnp.einsum("bni,ni->bi", rate_BxNxI, a_NxI)
        da_NxI += jnp.sum(dt_BxI[:, None] * rate_BxNxI, axis=0)
        return (decay_BxNxI * g_BxNxI, da_NxI), (dt_BxI * written_BxI, ddt_BxI, db_BxN, dc_BxN)

    def again(h_BxNxI, token):
        after_BxNxI, decay_BxNxI = _advance(a_NxI, h_BxNxI, token)
        return after_BxNxI, (after_BxNxI, decay_BxNxI * h_BxNxI, decay_BxNxI)

    def chunk(carry, one):
        h_BxNxI, *tokens = one
        x, dt, b, c, first, dy = _by_token(tokens)
        _, states = jax.lax.scan(again, h_BxNxI, (x, dt, b, first))
        carry, gradients = jax.lax.scan(step, carry, (x, dt, b, c, dy, *states), reverse=True)
        return carry, _by_token(gradients)

    Q = min(CHUNK, x_BxLxI.shape[1])
    tokens = (chunks_first(array, Q) for array in (x_BxLxI, dt_BxLxI, b_BxLxN, c_BxLxN, first_BxL, dy_BxLxI))
    da_NxI = vary_alike(jnp.zeros_like(a_NxI), a_NxI)[0]
    (dh_BxNxI, da_NxI), gradients = jax.lax.scan(chunk, (dh_BxNxI, da_NxI), (before_MxBxNxI, *tokens), reverse=True)
    dx, ddt, db, dc = (join(array, x_BxLxI.shape[1]) for array in gradients)
    return dx, ddt, da_NxI, db, dc, jnp.zeros_like(first_BxL), dh_BxNxI


_scan.defvjp(_scan_forward, _scan_backward)


def pallas(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The TPU's kernels, with the same chunks; arguments and result as of `chunked`."""
    return selective_scan_pallas.pallas(*operands, CHUNK)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": reference,
    "chunked": chunked,
    "sequential": sequential,
    "pallas": pallas,
}


def selective_scan(
    x_BxLxI: jax.Array,
    dt_BxLxI: jax.Array,
    a_IxN: jax.Array,
    b_BxLxN: jax.Array,
    c_BxLxN: jax.Array,
    *,
    positions_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    state_BxIxN: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t * a) * h_{t-1} + dt_t * b_t * x_t;  y_t = sum over n of c_t * h_t.

    Args:
      x_BxLxI, dt_BxLxI, b_BxLxN, c_BxLxN: floating; dt is positive, after its softplus. a_IxN: float32, negative.
      positions_BxL: int32; a valid position 0 begins a document: nothing of the state before is left.
      segment_ids_BxL: int32, 0 is padding: it leaves the state unchanged, and its y means nothing.
      state_BxIxN: float32, before the row; None: zeros.
      implementation: a key of IMPLEMENTATIONS; None: `reference` for one token, else `pallas` where the program is lowered for
        a TPU, `sequential` for a CPU and `chunked` elsewhere. A TPU's kernel runs elsewhere only within
        `pltpu.force_tpu_interpret_mode`.

    Returns:
      (y_BxLxI in x's dtype, state_BxIxN after the row, float32). The recurrence is float32 throughout.

    Raises:
      ValueError: an unknown implementation, one that can't serve these arguments, or shapes that don't fit.

    Source: Gu and Dao 2023 (Mamba), algorithm 2, with the input discretised by Euler as in their code.
    """
    (B, L, I), N = x_BxLxI.shape, a_IxN.shape[-1]
    expected = {"dt": (dt_BxLxI, (B, L, I)), "a": (a_IxN, (I, N)), "b": (b_BxLxN, (B, L, N)), "c": (c_BxLxN, (B, L, N)),
                "positions": (positions_BxL, (B, L)), "segment ids": (segment_ids_BxL, (B, L)),
                "state": (state_BxIxN, (B, I, N))}  # fmt: skip
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"selective_scan: {name} has shape {array.shape}, not {shape}")
    refusal = selective_scan_pallas.refusal(x_BxLxI, a_IxN, CHUNK)
    if implementation == "pallas" and refusal:
        raise ValueError(refusal)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"selective_scan: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    valid_BxL = segment_ids_BxL != 0
    if state_BxIxN is None:
        state_BxIxN = jnp.zeros((B, I, N), jnp.float32)
    operands = (x_BxLxI, dt_BxLxI, a_IxN.astype(jnp.float32), b_BxLxN, c_BxLxN, valid_BxL & (positions_BxL == 0), valid_BxL,
                state_BxIxN.astype(jnp.float32))  # fmt: skip

    def run(name: str, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_BxLxI, state_BxIxN = IMPLEMENTATIONS[name](*operands)
        return y_BxLxI.astype(x_BxLxI.dtype), state_BxIxN

    if implementation is None and L > 1:
        ways = {"tpu": "pallas", "cpu": "sequential", "otherwise": "chunked"}
        ways = {platform: functools.partial(run, name) for platform, name in ways.items()}
        return by_platform(*operands, **ways, refusal=refusal)
    return run(implementation or "reference", *operands)
