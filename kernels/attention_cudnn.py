"""Attention by cuDNN, through `jax.nn.dot_product_attention`: bfloat16 or float16, on NVIDIA GPUs from Ampere on.

Positions and segments are known when the step runs only, so who sees whom goes in as a mask of B*L*S, which cuDNN reads as a
bias: memory grows with the square of the length, and no block is left out. Where there is no cuDNN as the program is traced (a
host without an NVIDIA GPU), the same call runs as JAX's own products, in float32, too: the tests hold that to the oracle.
Nobody has run it on a GPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend import backend

from kernels.attention_blocks import fill, up
from kernels.visibility import Context, Rule, visible

WIDEST = 256  # of a head, on Hopper and later; on Ampere 128, as cuDNN's own error says


def _by_cudnn() -> bool:
    return "cuda" in backend.get_backend().platform_version


def refusal(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array, alibi_slopes_H: jax.Array | None, rule: Rule,
            by_cudnn: bool) -> str | None:
    """Why it can't serve this; None if it can."""
    if rule.softcap is not None:
        return "it has no softcap"
    if alibi_slopes_H is not None:
        return "ALiBi would be a bias of B*H*L*S"
    width = max(q_BxLxHxK.shape[3], v_BxSxGxV.shape[3])
    if width > WIDEST:
        return f"a head width of {width} is above {WIDEST}"
    if any(x.size == 0 for x in (q_BxLxHxK, k_BxSxGxK, v_BxSxGxV)):
        return "an axis has length 0"
    dtypes = {x.dtype.name for x in (q_BxLxHxK, k_BxSxGxK, v_BxSxGxV)}
    if len(dtypes) > 1 or by_cudnn and not dtypes <= {"bfloat16", "float16"}:
        return f"q, k and v are {', '.join(sorted(dtypes))}, not all bfloat16 or all float16"
    return None


def attend(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array, alibi_slopes_H: jax.Array | None, context: Context,
           rule: Rule) -> jax.Array:
    """Arguments and result as in `attention.attention`.

    Raises:
      ValueError: it can't serve this.
    """
    by_cudnn = _by_cudnn()
    if reason := refusal(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, alibi_slopes_H, rule, by_cudnn):
        raise ValueError(f"attention: cudnn can't serve this: {reason}")
    (_, L, _, K), (S, _, V) = q_BxLxHxK.shape, v_BxSxGxV.shape[1:]
    # Even lengths, keys as wide as values, in eights: with zeros, which nobody sees.
    rows_q, rows_k, width = up(L, 2), up(S, 2), up(max(K, V), 8)
    seen_BxLxS = fill(visible(context, rule), {1: rows_q, 2: rows_k})
    y_BxLxHxV = jax.nn.dot_product_attention(
        fill(q_BxLxHxK, {1: rows_q, 3: width}), fill(k_BxSxGxK, {1: rows_k, 3: width}), fill(v_BxSxGxV, {1: rows_k, 3: width}),
        mask=seen_BxLxS[:, None], scale=rule.scale, implementation="cudnn" if by_cudnn else "xla")[:, :L, :, :V]
    # A query that sees nothing has equal weights there, of all keys.
    return jnp.where(jnp.any(seen_BxLxS[:, :L], axis=2)[:, :, None, None], y_BxLxHxV, 0)
