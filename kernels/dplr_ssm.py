"""Diagonal plus low-rank state spaces (S4): as a recurrence of rank one, and as one long convolution by the Cauchy kernel.

Complex numbers are pairs of float32 arrays, real and imaginary part, but for the Cauchy kernel, which is complex64. Of
each pair of conjugate modes one is kept, so maps of the state are linear over the reals: h -> Re(sum of p * h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.chunks import one_by_one
from kernels.diagonal_ssm import Pair, multiply

CHUNK = 64  # tokens whose states are kept at one time by `chunked`, in the backward pass
EXACT = jax.lax.Precision.HIGHEST
NODES = 64  # nodes of the Cauchy kernel at one time


class Continuous(NamedTuple):
    """x' = (diag(rate) - p p*) x + b u;  y = 2 Re(c x), of the modes kept. rate: real part negative."""

    rate_CxN: Pair
    p_CxN: Pair
    b_CxN: Pair
    c_CxN: Pair
    dt_C: jax.Array


class Discrete(NamedTuple):
    """h_t = decay * h_{t-1} - left * Re(sum of right * h_{t-1}) + b * u_t;  y_t = Re(sum of c * h_t)."""

    decay_CxN: Pair
    left_CxN: Pair
    right_CxN: Pair
    b_CxN: Pair
    c_CxN: Pair


def discretize(system: Continuous) -> Discrete:
    """The bilinear rule, with the inverse of (1 - dt/2 A) by Woodbury: it stays diagonal plus rank one."""
    half_Cx1 = system.dt_C[:, None] / 2
    z = system.rate_CxN[0] * half_Cx1, system.rate_CxN[1] * half_Cx1
    square = (1 - z[0]) ** 2 + z[1] ** 2
    inverse = (1 - z[0]) / square, z[1] / square  # 1 / (1 - dt/2 rate)
    decay = multiply((1 + z[0], z[1]), inverse)
    conjugate = system.p_CxN[0], -system.p_CxN[1]
    solved_p, solved_b = multiply(inverse, system.p_CxN), multiply(inverse, system.b_CxN)
    inner = lambda x: 2 * jnp.sum(multiply(conjugate, x)[0], axis=-1, keepdims=True)  # p* x, over both conjugates
    share_Cx1 = half_Cx1 / (1 + half_Cx1 * inner(solved_p))
    left = share_Cx1 * solved_p[0], share_Cx1 * solved_p[1]
    right = multiply(conjugate, inverse)
    read_b = inner(solved_b)
    b = tuple(2 * half_Cx1 * (x - y * read_b) for x, y in zip(solved_b, left))
    return Discrete(decay, left, (4 * right[0], 4 * right[1]), b, (2 * system.c_CxN[0], 2 * system.c_CxN[1]))


def _step(system: Discrete, h: Pair, u_BxC: jax.Array, first_B: jax.Array, valid_B: jax.Array) -> tuple[Pair, jax.Array]:
    first, valid = first_B[:, None, None], valid_B[:, None, None]
    before = jnp.where(first, 0.0, h[0]), jnp.where(first, 0.0, h[1])
    read_BxCx1 = _read(before, system.right_CxN)[..., None]
    u_BxCx1 = u_BxC.astype(jnp.float32)[..., None]
    new = tuple(x - left * read_BxCx1 + b * u_BxCx1
                for x, left, b in zip(multiply(system.decay_CxN, before), system.left_CxN, system.b_CxN))
    h = jnp.where(valid, new[0], h[0]), jnp.where(valid, new[1], h[1])
    return h, _read(h, system.c_CxN)


def _read(h: Pair, c_CxN: Pair) -> jax.Array:
    """Re(sum of c * h); it goes back into the state, so float32 is meant, also where a matrix unit would round to less."""
    read = [jnp.einsum("bcn,cn->bc", x, y, precision=EXACT) for x, y in zip(h, c_CxN)]
    return read[0] - read[1]


def reference(
    u_BxLxC: jax.Array, system: Discrete, first_BxL: jax.Array, valid_BxL: jax.Array, h_BxCxN: Pair
) -> tuple[jax.Array, Pair]:
    """The definition, token after token."""
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (u_BxLxC, first_BxL, valid_BxL))
    h_BxCxN, y_LxBxC = jax.lax.scan(lambda h, token: _step(system, h, *token), h_BxCxN, tokens)
    return jnp.moveaxis(y_LxBxC, 0, 1), h_BxCxN


def chunked(
    u_BxLxC: jax.Array, system: Discrete, first_BxL: jax.Array, valid_BxL: jax.Array, h_BxCxN: Pair
) -> tuple[jax.Array, Pair]:
    """`reference` in chunks: the backward pass keeps one state a chunk and makes the others again."""
    chunk = lambda h, u_BxQxC, first_BxQ, valid_BxQ: reference(u_BxQxC, system, first_BxQ, valid_BxQ, h)
    return one_by_one(chunk, h_BxCxN, (u_BxLxC, first_BxL, valid_BxL), CHUNK)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, Pair]]] = {"reference": reference, "chunked": chunked}


def dplr_ssm(
    u_BxLxC: jax.Array,
    system: Discrete,
    *,
    positions_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    state_BxCxN: Pair | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Pair]:
    """The recurrence of `Discrete` over packed rows, in float32.

    Args:
      u_BxLxC: floating. system: float32, as `discretize` gives it.
      positions_BxL: int32; a valid position 0 begins a document: nothing of the state before is left.
      segment_ids_BxL: int32, 0 is padding: it leaves the state unchanged, and its y means nothing.
      state_BxCxN: float32, before the row; None: zeros.
      implementation: a key of IMPLEMENTATIONS; None chooses by shape.

    Returns:
      (y_BxLxC in u's dtype, the state after the row).

    Raises:
      ValueError: an unknown implementation, or shapes that don't fit.

    Source: Gu, Goel and Re 2021 (S4), section 3 and appendix C.
    """
    (B, L, C), N = u_BxLxC.shape, system.decay_CxN[0].shape[-1]
    state = (jnp.zeros((B, C, N), jnp.float32),) * 2 if state_BxCxN is None else state_BxCxN
    expected = {name: (pair, (C, N)) for name, pair in system._asdict().items()}
    expected |= {"state": (state, (B, C, N)), "positions": ((positions_BxL,), (B, L)),
                 "segment ids": ((segment_ids_BxL,), (B, L))}  # fmt: skip
    for name, (parts, shape) in expected.items():
        if any(part.shape != shape for part in parts):
            raise ValueError(f"dplr_ssm: {name} has shape {parts[0].shape}, not {shape}")
    if implementation is None:
        implementation = "reference" if L <= CHUNK else "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"dplr_ssm: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    valid_BxL = segment_ids_BxL != 0
    y, state = IMPLEMENTATIONS[implementation](u_BxLxC, system, valid_BxL & (positions_BxL == 0), valid_BxL, state)
    return y.astype(u_BxLxC.dtype), state


def impulse_response(system: Continuous, L: int) -> jax.Array:
    """k_CxL: the first L outputs of `discretize(system)` for the input 1, 0, 0, ..., in float32.

    Its discrete Fourier transform is the generating function at the L-th roots of unity, truncated by c (1 - Ā^L):
    with z a root, s = 1 + z, and R = 1 / (2 (1 - z) / dt - s rate), it is 2 (cRb - s cRp p*Rb / (1 + s p*Rp)): four
    Cauchy products (section 3 of the paper; multiplied out by s, so that z = -1 is as good as any other).
    """
    z_K = jnp.exp(-2j * jnp.pi / L * jnp.arange(L // 2 + 1)).astype(jnp.complex64)
    rate, p, b = (jax.lax.complex(*pair) for pair in (system.rate_CxN, system.p_CxN, system.b_CxN))
    truncated = _truncated(discretize(system), L)
    c = jax.lax.complex(truncated[0] / 2, truncated[1] / 2)
    v_4xCxN = jnp.stack([c * b, c * p, p.conj() * b, p.conj() * p])

    @jax.checkpoint
    def cauchy(z):
        """sum over n, and over the conjugate modes, of v / (2 (1 - z) / dt - s rate): (4, C)."""
        s, q_Cx1 = 1 + z, 2 * (1 - z) / system.dt_C[:, None]
        both = v_4xCxN / (q_Cx1 - s * rate) + v_4xCxN.conj() / (q_Cx1 - s * rate.conj())
        cb, cp, pb, pp = jnp.sum(both, axis=-1)
        return 2 * (cb - s * cp * pb / (1 + s * pp))

    spectrum_KxC = jax.lax.map(cauchy, z_K, batch_size=min(NODES, L // 2 + 1))
    return jnp.fft.irfft(spectrum_KxC, L, axis=0).T


def _truncated(system: Discrete, L: int) -> Pair:
    """c (1 - Ā^L), as a pair like c: the powers of Ā as a real matrix, by squaring."""
    N = system.decay_CxN[0].shape[-1]
    flat = lambda pair, sign: jnp.concatenate([pair[0], sign * pair[1]], axis=-1)
    diagonal = [jax.vmap(jnp.diag)(x) for x in system.decay_CxN]
    a_CxMxM = jnp.concatenate([jnp.concatenate([diagonal[0], -diagonal[1]], -1), jnp.concatenate(diagonal[::-1], -1)], -2)
    a_CxMxM -= flat(system.left_CxN, 1)[:, :, None] * flat(system.right_CxN, -1)[:, None, :]
    row_CxM = last_CxM = flat(system.c_CxN, -1)  # Re(sum of c h) = [c_re, -c_im] . [h_re, h_im]
    for bit in bin(L)[:1:-1]:
        if bit == "1":
            last_CxM = jnp.einsum("cm,cmn->cn", last_CxM, a_CxMxM, precision=EXACT)
        a_CxMxM = jnp.einsum("clm,cmn->cln", a_CxMxM, a_CxMxM, precision=EXACT)
    rest_CxM = row_CxM - last_CxM
    return rest_CxM[:, :N], -rest_CxM[:, N:]
