"""Causal depthwise convolution over packed rows, with a state of the last inputs.

No tap crosses the start of a document, and padding isn't there: the taps of a token are the valid tokens
before it in its document, wherever padding lies between them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.varying import vary_alike


def document_counts(positions_BxL: jax.Array, segment_ids_BxL: jax.Array) -> jax.Array:
    """documents_BxL, int32: how many documents began in this row up to here (a valid position 0 begins one).

    0 is the document that the state before the row belongs to.
    """
    return jnp.cumsum((segment_ids_BxL != 0) & (positions_BxL == 0), axis=1, dtype=jnp.int32)


def causal_convolution(
    x_BxLxC: jax.Array,
    kernel_WxC: jax.Array,
    *,
    positions_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    state_BxPxC: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = sum over w of kernel[w] * x[t - (W-1) + w], within the document of t; kernel[W-1] is the token's own.

    Args:
      x_BxLxC: floating. kernel_WxC: floating.
      positions_BxL: int32; a valid position 0 begins a document.
      segment_ids_BxL: int32, 0 is padding: it gives 0 and leaves the state unchanged.
      state_BxPxC: the P = W-1 valid inputs before this row, oldest first, those of other documents 0; None: zeros.

    Returns:
      (y_BxLxC in x's dtype, summed in float32; the state after the row, in the dtype of the given one, or x's).

    Raises:
      ValueError: shapes that don't fit.

    With padding between the tokens of a document, the row is closed up first and opened again; the program
    looks at the segment ids to know, so that a row without pays no gather.
    """
    B, L, C = x_BxLxC.shape
    W = kernel_WxC.shape[0]
    P = W - 1
    if state_BxPxC is None:
        state_BxPxC = jnp.zeros((B, P, C), x_BxLxC.dtype)
    if kernel_WxC.shape != (W, C) or state_BxPxC.shape != (B, P, C):
        raise ValueError(
            f"convolution: x {x_BxLxC.shape}, kernel {kernel_WxC.shape}, state {state_BxPxC.shape} aren't BxLxC, "
            "WxC, Bx(W-1)xC"
        )
    if positions_BxL.shape != (B, L) or segment_ids_BxL.shape != (B, L):
        raise ValueError(
            f"convolution: positions {positions_BxL.shape}, segment ids {segment_ids_BxL.shape} aren't {(B, L)}"
        )
    valid_BxL = segment_ids_BxL != 0
    documents_BxL = document_counts(positions_BxL, segment_ids_BxL)
    # The state and the row, one after the other: T = P + L tokens, of which the valid ones count.
    documents_BxT = jnp.pad(documents_BxL, ((0, 0), (P, 0)))
    valid_BxT = jnp.pad(valid_BxL, ((0, 0), (P, 0)), constant_values=True)
    inside_BxL = valid_BxL[:, 1:] & ~valid_BxL[:, :-1] & (documents_BxL[:, 1:] == documents_BxL[:, :-1])

    def order_BxT() -> jax.Array:
        """The valid tokens first, in their order. A sort: only where it is needed."""
        return jnp.argsort(~valid_BxT, axis=1, stable=True)

    def closed_up(x_BxTxC: jax.Array, documents_BxT: jax.Array, kernel_WxC: jax.Array) -> jax.Array:
        order = order_BxT()
        x_BxTxC = jnp.take_along_axis(x_BxTxC, order[..., None], axis=1)
        y_BxLxC = _shifted(x_BxTxC, jnp.take_along_axis(documents_BxT, order, axis=1), kernel_WxC)
        rank_BxL = jnp.maximum(jnp.cumsum(valid_BxL, axis=1) - 1, 0)
        return jnp.take_along_axis(y_BxLxC, rank_BxL[..., None], axis=1)

    x_BxTxC = jnp.concatenate([state_BxPxC.astype(x_BxLxC.dtype), x_BxLxC], axis=1)
    # The backward pass starts from the inputs: else it would keep what both branches need.
    run = jax.checkpoint(lambda *arrays: jax.lax.cond(jnp.any(inside_BxL), closed_up, _shifted, *arrays))
    y_BxLxC = jnp.where(valid_BxL[..., None], run(*vary_alike(x_BxTxC, documents_BxT, kernel_WxC)), 0.0)

    last_BxP = jnp.sum(valid_BxL, axis=1, keepdims=True) + jnp.arange(P)
    last_BxP = jnp.take_along_axis(order_BxT(), last_BxP, axis=1)
    kept_BxP = jnp.take_along_axis(documents_BxT, last_BxP, axis=1) == documents_BxT[:, -1:]
    last_BxPxC = jnp.take_along_axis(x_BxTxC, last_BxP[..., None], axis=1)
    new_state_BxPxC = jnp.where(kept_BxP[..., None], last_BxPxC, 0).astype(state_BxPxC.dtype)
    return y_BxLxC.astype(x_BxLxC.dtype), new_state_BxPxC


def _same(documents_BxT: jax.Array, w: int, P: int) -> jax.Array:
    """same_BxLx1: tap w meets a token of the document that the token itself is of."""
    L = documents_BxT.shape[1] - P
    return (documents_BxT[:, w : w + L] == documents_BxT[:, P:])[..., None]


@jax.custom_vjp
def _shifted(x_BxTxC: jax.Array, documents_BxT: jax.Array, kernel_WxC: jax.Array) -> jax.Array:
    """Padding counts as a token here: y_BxLxC in float32. Its own derivative, for JAX's goes over the row once a tap."""
    W, T = kernel_WxC.shape[0], x_BxTxC.shape[1]
    taps = [jnp.where(_same(documents_BxT, w, W - 1), x_BxTxC[:, w : w + T - W + 1].astype(jnp.float32), 0.0) for w in range(W)]
    return sum(tap_BxLxC * kernel_WxC[w].astype(jnp.float32) for w, tap_BxLxC in enumerate(taps))


def _shifted_backward(saved: tuple[jax.Array, ...], dy_BxLxC: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    x_BxTxC, documents_BxT, kernel_WxC = saved
    (W, _), L = kernel_WxC.shape, dy_BxLxC.shape[1]
    dx_BxTxC, dkernel_WxC = jnp.zeros(x_BxTxC.shape, jnp.float32), []
    for w in range(W):
        dtap_BxLxC = jnp.where(_same(documents_BxT, w, W - 1), dy_BxLxC, 0.0)
        dx_BxTxC += jnp.pad(dtap_BxLxC * kernel_WxC[w].astype(jnp.float32), ((0, 0), (w, W - 1 - w), (0, 0)))
        dkernel_WxC.append(jnp.sum(x_BxTxC[:, w : w + L].astype(jnp.float32) * dtap_BxLxC, axis=(0, 1)))
    return dx_BxTxC.astype(x_BxTxC.dtype), None, jnp.stack(dkernel_WxC).astype(kernel_WxC.dtype)


_shifted.defvjp(lambda *arrays: (_shifted(*arrays), arrays), _shifted_backward)
