"""State-space duality (Mamba-2): a scan whose decay is one number a head, as matrix products over chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import ssd_pallas
from kernels.convolution import document_counts
from kernels.linear_attention import linear_attention
from kernels.lowering import by_platform


def reference(
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
    """The definition, token after token. R heads share a group's b and c."""

    def step(carry, token):
        h_BxGxRxKxN, before_B = carry
        x_BxGxRxK, dt_BxGxR, b_BxGxN, c_BxGxN, document_B, valid_B = token
        dt_BxGxR = jnp.where(valid_B[:, None, None], dt_BxGxR, 0.0)
        decay_BxGxR = jnp.where((document_B == before_B)[:, None, None], jnp.exp(dt_BxGxR * a_GxR), 0.0)
        u_BxGxRxK = jnp.where(valid_B[:, None, None, None], dt_BxGxR[..., None] * x_BxGxRxK.astype(jnp.float32), 0.0)
        input_BxGxRxKxN = u_BxGxRxK[..., None] * b_BxGxN.astype(jnp.float32)[:, :, None, None]
        h_BxGxRxKxN = decay_BxGxR[..., None, None] * h_BxGxRxKxN + input_BxGxRxKxN
        y_BxGxRxK = jnp.einsum("bgrkn,bgn->bgrk", h_BxGxRxKxN, c_BxGxN.astype(jnp.float32))
        return (h_BxGxRxKxN, document_B), y_BxGxRxK

    tokens = (x_BxLxGxRxK, dt_BxLxGxR, b_BxLxGxN, c_BxLxGxN, documents_BxL, valid_BxL)
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in tokens)
    (h_BxGxRxKxN, _), y = jax.lax.scan(step, (h_BxGxRxKxN, jnp.zeros_like(documents_BxL[:, 0])), tokens)
    return jnp.moveaxis(y, 0, 1), h_BxGxRxKxN


def chunked(
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
    """`reference` as masked attention within each chunk and one state between two (linear_attention.py).

    Matrix products take their operands in x's dtype and sum in float32; decays and the carried state are float32. The
    backward pass keeps the inputs, y and one state a chunk.
    """
    dt_BxLxGxR = jnp.where(valid_BxL[..., None, None], dt_BxLxGxR, 0.0)
    log_decay_BxLxGxR = dt_BxLxGxR * a_GxR
    return linear_attention(c_BxLxGxN, b_BxLxGxN, x_BxLxGxRxK, dt_BxLxGxR, log_decay_BxLxGxR, documents_BxL, h_BxGxRxKxN,
                            chunk)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": reference,
    "chunked": chunked,
    "pallas": ssd_pallas.pallas,
}


def ssd(
    x_BxLxHxK: jax.Array,
    dt_BxLxH: jax.Array,
    a_H: jax.Array,
    b_BxLxGxN: jax.Array,
    c_BxLxGxN: jax.Array,
    *,
    positions_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    state_BxHxKxN: jax.Array | None = None,
    chunk: int = 256,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t * a) * h_{t-1} + dt_t * x_t (outer) b_t;  y_t = h_t c_t, in each head.

    Args:
      x_BxLxHxK, b_BxLxGxN, c_BxLxGxN: floating; H is a multiple of G, and head h reads group h // (H/G).
      dt_BxLxH: positive, after its softplus. a_H: float32, negative.
      positions_BxL: int32; a valid position 0 begins a document: nothing of the state before is left.
      segment_ids_BxL: int32, 0 is padding: it leaves the state unchanged, and its y means nothing.
      state_BxHxKxN: float32, before the row; None: zeros.
      chunk: tokens in a chunk of the matrix form.
      implementation: a key of IMPLEMENTATIONS; None: `reference` for one token, else `pallas` where the program is lowered for
        a TPU and `chunked` elsewhere. A TPU's kernel runs elsewhere only within `pltpu.force_tpu_interpret_mode`.

    Returns:
      (y_BxLxHxK in x's dtype, state_BxHxKxN after the row, float32).

    Raises:
      ValueError: an unknown implementation, one that can't serve these arguments, or shapes that don't fit.

    Source: Dao and Gu 2024 (Mamba-2), sections 6 and listing 1.
    """
    (B, L, H, K), (G, N) = x_BxLxHxK.shape, b_BxLxGxN.shape[2:]
    if G == 0 or H % G or chunk < 1:
        raise ValueError(f"ssd: {H} heads aren't a multiple of {G} groups, or chunk {chunk} is below 1")
    expected = {"dt": (dt_BxLxH, (B, L, H)), "a": (a_H, (H,)), "b": (b_BxLxGxN, (B, L, G, N)),
                "c": (c_BxLxGxN, (B, L, G, N)), "positions": (positions_BxL, (B, L)),
                "segment ids": (segment_ids_BxL, (B, L)), "state": (state_BxHxKxN, (B, H, K, N))}  # fmt: skip
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"ssd: {name} has shape {array.shape}, not {shape}")
    refusal = ssd_pallas.refusal(x_BxLxHxK, b_BxLxGxN, chunk)
    if implementation == "pallas" and refusal:
        raise ValueError(refusal)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"ssd: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if state_BxHxKxN is None:
        state_BxHxKxN = jnp.zeros((B, H, K, N), jnp.float32)
    R = H // G
    operands = (
        x_BxLxHxK.reshape(B, L, G, R, K), dt_BxLxH.astype(jnp.float32).reshape(B, L, G, R),
        a_H.astype(jnp.float32).reshape(G, R), b_BxLxGxN, c_BxLxGxN, document_counts(positions_BxL, segment_ids_BxL),
        segment_ids_BxL != 0, state_BxHxKxN.astype(jnp.float32).reshape(B, G, R, K, N))  # fmt: skip

    def run(name: str, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_BxLxGxRxK, h_BxGxRxKxN = IMPLEMENTATIONS[name](*operands, chunk)
        return y_BxLxGxRxK.astype(x_BxLxHxK.dtype), h_BxGxRxKxN

    if implementation is None and L > 1:
        ways = dict(tpu=functools.partial(run, "pallas"), otherwise=functools.partial(run, "chunked"))
        y_BxLxGxRxK, h_BxGxRxKxN = by_platform(*operands, **ways, refusal=refusal)
    else:
        y_BxLxGxRxK, h_BxGxRxKxN = run(implementation or "reference", *operands)
    return y_BxLxGxRxK.reshape(B, L, H, K), h_BxGxRxKxN.reshape(B, H, K, N)
