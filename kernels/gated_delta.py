"""The gated delta rule over packed rows: the definition, and a form of matrix products over chunks.

`reference` is the definition. Every other row of IMPLEMENTATIONS gives the same values and gradients: the
tests hold all of them to one float64 oracle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import gated_delta_pallas, unit_triangular
from kernels.chunks import chunks_first
from kernels.linear_attention import linear_attention
from kernels.lowering import by_platform


def reference(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxV: jax.Array,
    log_decay_BxLxH: jax.Array,
    write_BxLxH: jax.Array | None,
    reset_BxL: jax.Array,
    state_BxHxKxV: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """The definition, one token after another. All float32; padding has k = 0 and log_decay = 0."""

    def step(state_BxHxKxV, token):
        q_BxHxK, k_BxHxK, v_BxHxV, log_decay_BxH, write_BxH, reset_B = token
        state_BxHxKxV = jnp.where(reset_B[:, None, None, None], 0.0, state_BxHxKxV)
        state_BxHxKxV *= jnp.exp(log_decay_BxH)[..., None, None]
        if write_BxH is not None:
            read_BxHxV = jnp.einsum("bhk,bhkv->bhv", k_BxHxK, state_BxHxKxV)
            v_BxHxV = write_BxH[..., None] * (v_BxHxV - read_BxHxV)
        state_BxHxKxV += jnp.einsum("bhk,bhv->bhkv", k_BxHxK, v_BxHxV)
        return state_BxHxKxV, jnp.einsum("bhk,bhkv->bhv", q_BxHxK, state_BxHxKxV)

    tokens = (q_BxLxHxK, k_BxLxHxK, v_BxLxHxV, log_decay_BxLxH, write_BxLxH, reset_BxL)
    tokens_LxBx = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state_BxHxKxV, y_LxBxHxV = jax.lax.scan(step, state_BxHxKxV, tokens_LxBx)
    return jnp.moveaxis(y_LxBxHxV, 0, 1), state_BxHxKxV


def chunked(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxV: jax.Array,
    log_decay_BxLxH: jax.Array,
    write_BxLxH: jax.Array | None,
    reset_BxL: jax.Array,
    state_BxHxKxV: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`reference`, for N chunks of C tokens: matrix products within a chunk, a scan over the N states between them.

    With the sum G of log decays since the chunk or the document began, D[t,s] = exp(G[t] - G[s]) where t can see s and
    0 elsewhere, E[t] = exp(G[t]) where t can see the state S before the chunk:

        U = b (V - E K S - tril(D * K K', -1) U), hence (1 + A) U = b V - b E K S with A = b tril(D * K K', -1)
        Y = E Q S + (D * Q K') U,  S after the chunk = E[C] S + K' (D[C] U)

    The system is solved (WY representation); its inverse as a product of powers of A would lose every digit where keys repeat.
    Without `write` there is none: linear_attention.py.
    """
    L = q_BxLxHxK.shape[1]
    if write_BxLxH is None:
        y_BxLxHx1xV, state_BxHx1xVxK = linear_attention(
            q_BxLxHxK, k_BxLxHxK, v_BxLxHxV[:, :, :, None], None, log_decay_BxLxH[..., None],
            jnp.cumsum(reset_BxL, axis=1, dtype=jnp.int32), jnp.swapaxes(state_BxHxKxV, 2, 3)[:, :, None], chunk)  # fmt: skip
        return y_BxLxHx1xV[:, :, :, 0], jnp.swapaxes(state_BxHx1xVxK[:, :, 0], 2, 3)
    C = min(chunk, L)

    split = functools.partial(chunks_first, Q=C)  # what fills the last chunk up is padding: k = 0, log_decay = 0, no reset

    def heads_first(x_NxBxCxH: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_NxBxCxH, 3, 2)

    q, k, v = (heads_first(split(x)) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxV))  # NxBxHxCxK, ...
    log_decay_NxBxHxC = heads_first(split(log_decay_BxLxH))
    documents_NxBx1xC = jnp.cumsum(split(reset_BxL), axis=2)[:, :, None]
    same_NxBx1xCxC = documents_NxBx1xC[..., :, None] == documents_NxBx1xC[..., None, :]
    same_NxBx1xCxC &= jnp.tril(jnp.ones((C, C), bool))
    # Each document's own sum: as a difference of sums over the row it would hold rounding of its neighbour's decays.
    total_NxBxHxC = jnp.sum(jnp.where(same_NxBx1xCxC, log_decay_NxBxHxC[..., None, :], 0.0), axis=-1)
    decay_NxBxHxCxC = jnp.exp(
        jnp.where(same_NxBx1xCxC, total_NxBxHxC[..., :, None] - total_NxBxHxC[..., None, :], -jnp.inf)
    )
    entry_NxBxHxC = jnp.where(documents_NxBx1xC == 0, jnp.exp(total_NxBxHxC), 0.0)

    scores_NxBxHxCxC = jnp.einsum("nbhck,nbhsk->nbhcs", q, k) * decay_NxBxHxCxC
    k_out = k * decay_NxBxHxCxC[..., -1, :, None]
    write_NxBxHxCx1 = heads_first(split(write_BxLxH))[..., None]
    a_NxBxHxCxC = write_NxBxHxCx1 * jnp.einsum("nbhck,nbhsk->nbhcs", k, k) * decay_NxBxHxCxC
    right = write_NxBxHxCx1 * jnp.concatenate([v, entry_NxBxHxC[..., None] * k], axis=-1)
    solved = unit_triangular.solve(a_NxBxHxCxC, right)
    v, w = jnp.split(solved, [v.shape[-1]], axis=-1)  # b V and b E K, each through the inverse

    def step(state_BxHxKxV, one):
        q, k_out, v, w, scores, entry = one
        u_BxHxCxV = v - jnp.einsum("bhck,bhkv->bhcv", w, state_BxHxKxV)
        y_BxHxCxV = entry[..., None] * jnp.einsum("bhck,bhkv->bhcv", q, state_BxHxKxV)
        y_BxHxCxV += jnp.einsum("bhcs,bhsv->bhcv", scores, u_BxHxCxV)
        state_BxHxKxV *= entry[..., -1, None, None]
        state_BxHxKxV += jnp.einsum("bhck,bhcv->bhkv", k_out, u_BxHxCxV)
        return state_BxHxKxV, y_BxHxCxV

    chunks = (q, k_out, v, w, scores_NxBxHxCxC, entry_NxBxHxC)
    state_BxHxKxV, y_NxBxHxCxV = jax.lax.scan(step, state_BxHxKxV, chunks)
    y_BxNxCxHxV = jnp.transpose(y_NxBxHxCxV, (1, 0, 3, 2, 4))
    return y_BxNxCxHxV.reshape(y_BxNxCxHxV.shape[0], -1, *y_BxNxCxHxV.shape[3:])[:, :L], state_BxHxKxV


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": reference,
    "chunked": chunked,
    "pallas": gated_delta_pallas.pallas,
}


def gated_delta(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxV: jax.Array,
    log_decay_BxLxH: jax.Array,
    write_BxLxH: jax.Array | None,
    *,
    positions_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    state_BxHxKxV: jax.Array | None = None,
    chunk: int = 64,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A memory of H matrices that each token decays, corrects and reads: (y_BxLxHxV in q's dtype, state_BxHxKxV float32).

        S <- exp(log_decay) S;  u = write (v - k' S);  S <- S + k u';  y = q' S

    Without `write` nothing is corrected, u = v: gated linear attention with one decay a head. Sums are float32. Position
    0 clears the memory first, so nothing passes from one document to the next; padding (segment 0) leaves it as it is, bit
    by bit, and its y means nothing.

    Args:
      q, k, v: floating; keys of length at most 1 keep the memory bounded.
      log_decay_BxLxH: at most 0. write_BxLxH: 0 to 1 (to 2 for negative eigenvalues), or None.
      positions_BxL, segment_ids_BxL: int32, positions from 0 in each document; segment 0 is padding.
      state_BxHxKxV: the memory before the first token; None: empty.
      chunk: tokens whose products are taken at once, in `chunked` and `pallas`.
      implementation: a key of IMPLEMENTATIONS; None: `reference` for one token, else `pallas` where the program is lowered for
        a TPU and `chunked` elsewhere. A TPU's kernel runs elsewhere only within `pltpu.force_tpu_interpret_mode`.

    Raises:
      ValueError: shapes that don't fit, a chunk below 1, an implementation that is unknown or can't serve these arguments.

    Sources: Yang, Kautz and Hatamizadeh 2024 (Gated DeltaNet), eq. 10 (theirs is the transpose of this S); chunks: Yang et
    al. 2024 (DeltaNet), section 3.2; without `write`: Dao and Gu 2024 (SSD), Yang et al. 2023 (GLA) with one decay a head.
    """
    B, L, H, K = q_BxLxHxK.shape
    V = v_BxLxHxV.shape[-1]
    given = {
        "k_BxLxHxK": (k_BxLxHxK, (B, L, H, K)), "v_BxLxHxV": (v_BxLxHxV, (B, L, H, V)),
        "log_decay_BxLxH": (log_decay_BxLxH, (B, L, H)), "write_BxLxH": (write_BxLxH, (B, L, H)),
        "positions_BxL": (positions_BxL, (B, L)), "segment_ids_BxL": (segment_ids_BxL, (B, L)),
        "state_BxHxKxV": (state_BxHxKxV, (B, H, K, V)),
    }  # fmt: skip
    for name, (array, shape) in given.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"gated_delta: {name} has shape {array.shape}, not {shape}")
    if chunk < 1:
        raise ValueError(f"gated_delta: chunk {chunk} is below 1")
    refusal = gated_delta_pallas.refusal(q_BxLxHxK, v_BxLxHxV, chunk)
    if implementation == "pallas" and refusal:
        raise ValueError(refusal)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"gated_delta: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}"
        )
    valid_BxL = segment_ids_BxL != 0
    reset_BxL = valid_BxL & (positions_BxL == 0)
    q, k, v = (x.astype(jnp.float32) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxV))
    k = jnp.where(valid_BxL[..., None, None], k, 0.0)
    # At a reset there is nothing to decay.
    log_decay_BxLxH = jnp.where((valid_BxL & ~reset_BxL)[..., None], log_decay_BxLxH.astype(jnp.float32), 0.0)
    write_BxLxH = None if write_BxLxH is None else write_BxLxH.astype(jnp.float32)
    if state_BxHxKxV is None:
        state_BxHxKxV = jnp.zeros((B, H, K, V), jnp.float32)
    state_BxHxKxV = state_BxHxKxV.astype(jnp.float32)
    operands = q, k, v, log_decay_BxLxH, write_BxLxH, reset_BxL, state_BxHxKxV
    runs = {name: functools.partial(run, chunk=chunk) for name, run in IMPLEMENTATIONS.items()}
    if implementation is None and L > 1:
        y_BxLxHxV, state_BxHxKxV = by_platform(
            *operands, tpu=runs["pallas"], otherwise=runs["chunked"], refusal=refusal
        )
    else:
        y_BxLxHxV, state_BxHxKxV = runs[implementation or "reference"](*operands)
    return y_BxLxHxV.astype(q_BxLxHxK.dtype), state_BxHxKxV
