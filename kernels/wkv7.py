"""RWKV-7's generalised delta rule over packed rows: the definition, and a form of matrix products over chunks.

`reference` is the definition. Every other row of IMPLEMENTATIONS gives the same values and gradients: the
tests hold all of them to one float64 oracle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import unit_triangular, wkv7_pallas
from kernels.chunks import chunks_first
from kernels.lowering import by_platform


def reference(
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
    """The definition, one token after another. All float32; padding has k = removal = 0 and log_decay = 0."""

    def step(state_BxHxKxV, token):
        r_BxHxK, log_decay_BxHxK, k_BxHxK, v_BxHxV, key_BxHxK, removal_BxHxK, reset_B = token
        state_BxHxKxV = jnp.where(reset_B[:, None, None, None], 0.0, state_BxHxKxV)
        found_BxHxV = jnp.einsum("bhk,bhkv->bhv", key_BxHxK, state_BxHxKxV)
        state_BxHxKxV *= jnp.exp(log_decay_BxHxK)[..., None]
        state_BxHxKxV -= jnp.einsum("bhk,bhv->bhkv", removal_BxHxK, found_BxHxV)
        state_BxHxKxV += jnp.einsum("bhk,bhv->bhkv", k_BxHxK, v_BxHxV)
        return state_BxHxKxV, jnp.einsum("bhk,bhkv->bhv", r_BxHxK, state_BxHxKxV)

    tokens = (r_BxLxHxK, log_decay_BxLxHxK, k_BxLxHxK, v_BxLxHxV, key_BxLxHxK, removal_BxLxHxK, reset_BxL)
    state_BxHxKxV, y_LxBxHxV = jax.lax.scan(
        step, state_BxHxKxV, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    )
    return jnp.moveaxis(y_LxBxHxV, 0, 1), state_BxHxKxV


def chunked(
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
    """`reference`, for N chunks of C tokens: matrix products within a chunk, a scan over the N states between them.

    With the sums G of log decays since the chunk or the document began, S the state before the chunk (absent after a
    reset), X~ = X exp(G) (the key's G is that of the token before) and X^ = X exp(-G), what is found is

        U = key~ S + tril(key~ k^', -1) V - tril(key~ removal^', -1) U, a triangular system, and
        Y = r~ S + tril(r~ k^') V - tril(r~ removal^') U.
    """
    L = r_BxLxHxK.shape[1]
    C = min(chunk, L)

    split = functools.partial(chunks_first, Q=C)  # what fills the last chunk up is padding
    arrays = (r_BxLxHxK, log_decay_BxLxHxK, k_BxLxHxK, v_BxLxHxV, key_BxLxHxK, removal_BxLxHxK)
    r, log_decay, k, v, key, removal = (jnp.moveaxis(split(x), 3, 2) for x in arrays)  # NxBxHxCxK
    documents_NxBx1xC = jnp.cumsum(split(reset_BxL), axis=2)[:, :, None]
    same_NxBx1xCxC = documents_NxBx1xC[..., :, None] == documents_NxBx1xC[..., None, :]
    until_NxBx1xCxC = same_NxBx1xCxC & jnp.tril(jnp.ones((C, C), bool))
    before_NxBx1xCxC = same_NxBx1xCxC & jnp.tril(jnp.ones((C, C), bool), -1)
    # Each document's own sum: as a difference of sums over the row it would hold rounding of its neighbour's decays.
    total = jnp.einsum(
        "nbcs,nbhsk->nbhck", until_NxBx1xCxC[:, :, 0].astype(jnp.float32), log_decay, precision=jax.lax.Precision.HIGHEST
    )
    reaches_NxBx1xCx1 = (documents_NxBx1xC == 0)[..., None]

    r_out, key_out = r * jnp.exp(total), key * jnp.exp(total - log_decay)
    k_in, removal_in = k * jnp.exp(-total), removal * jnp.exp(-total)

    def scores(left: jax.Array, right: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, jnp.einsum("nbhck,nbhsk->nbhcs", left, right), 0.0)

    right = jnp.concatenate([
        jnp.einsum("nbhcs,nbhsv->nbhcv", scores(key_out, k_in, before_NxBx1xCxC), v),
        jnp.where(reaches_NxBx1xCx1, key_out, 0.0),
    ], axis=-1)  # fmt: skip
    solved = unit_triangular.solve(scores(key_out, removal_in, before_NxBx1xCxC), right)
    found, w = jnp.split(solved, [v.shape[-1]], axis=-1)  # U = found + w S
    y_own = jnp.einsum("nbhcs,nbhsv->nbhcv", scores(r_out, k_in, until_NxBx1xCxC), v)
    r_removal = scores(r_out, removal_in, until_NxBx1xCxC)
    left_NxBxHxCxK = jnp.exp(
        jnp.where(same_NxBx1xCxC[..., -1, :, None], total[..., -1:, :] - total, -jnp.inf)
    )
    k_left, removal_left = k * left_NxBxHxCxK, removal * left_NxBxHxCxK
    r_reaches = jnp.where(reaches_NxBx1xCx1, r_out, 0.0)
    carry_NxBxHxK = jnp.where(reaches_NxBx1xCx1[..., -1, :], jnp.exp(total[..., -1, :]), 0.0)

    def step(state_BxHxKxV, one):
        r, r_removal, y_own, found, w, k, v, removal, carry = one
        u_BxHxCxV = found + jnp.einsum("bhck,bhkv->bhcv", w, state_BxHxKxV)
        y_BxHxCxV = y_own + jnp.einsum("bhck,bhkv->bhcv", r, state_BxHxKxV)
        y_BxHxCxV -= jnp.einsum("bhcs,bhsv->bhcv", r_removal, u_BxHxCxV)
        state_BxHxKxV = carry[..., None] * state_BxHxKxV + jnp.einsum("bhck,bhcv->bhkv", k, v)
        state_BxHxKxV -= jnp.einsum("bhck,bhcv->bhkv", removal, u_BxHxCxV)
        return state_BxHxKxV, y_BxHxCxV

    chunks = (r_reaches, r_removal, y_own, found, w, k_left, v, removal_left, carry_NxBxHxK)
    state_BxHxKxV, y_NxBxHxCxV = jax.lax.scan(step, state_BxHxKxV, chunks)
    y_BxNxCxHxV = jnp.transpose(y_NxBxHxCxV, (1, 0, 3, 2, 4))
    return y_BxNxCxHxV.reshape(y_BxNxCxHxV.shape[0], -1, *y_BxNxCxHxV.shape[3:])[:, :L], state_BxHxKxV


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": reference,
    "chunked": chunked,
    "pallas": wkv7_pallas.pallas,
}


def wkv7(
    r_BxLxHxK: jax.Array,
    log_decay_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxV: jax.Array,
    key_BxLxHxK: jax.Array,
    removal_BxLxHxK: jax.Array,
    *,
    positions_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    state_BxHxKxV: jax.Array | None = None,
    chunk: int = 32,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A memory of H matrices with a decay for each of its K rows: (y_BxLxHxV in r's dtype, state_BxHxKxV float32).

        u = key' S;  S <- diag(exp(log_decay)) S - removal u' + k v';  y = r' S

    Sums are float32. Position 0 clears the memory first, so nothing passes from one document to the next; padding (segment
    0) leaves it as it is, bit by bit, and its y means nothing.

    Args:
      r, k, v: floating; the receptance reads, k is where v is written.
      key, removal: what is found at `key` is taken away at `removal`; in RWKV-7 kappa, of length 1, and a * kappa.
      log_decay: at most 0; in `chunked` and `pallas`, chunk * -log_decay must stay under 80 (RWKV-7: at most 32 * 0.61),
        so that its exponentials are finite.
      positions_BxL, segment_ids_BxL: int32, positions from 0 in each document; segment 0 is padding.
      state_BxHxKxV: the memory before the first token; None: empty.
      chunk: tokens whose products are taken at once, in `chunked` and `pallas`.
      implementation: a key of IMPLEMENTATIONS; None: `reference` for one token, else `pallas` where the program is lowered for
        a TPU and `chunked` elsewhere. A TPU's kernel runs elsewhere only within `pltpu.force_tpu_interpret_mode`.

    Raises:
      ValueError: shapes that don't fit, a chunk below 1, an implementation that is unknown or can't serve these arguments.

    Source: Peng et al. 2025 (RWKV-7), the state evolution of the time mix (theirs is the transpose of this S).
    """
    B, L, H, K = r_BxLxHxK.shape
    V = v_BxLxHxV.shape[-1]
    given = {
        "log_decay_BxLxHxK": (log_decay_BxLxHxK, (B, L, H, K)), "k_BxLxHxK": (k_BxLxHxK, (B, L, H, K)),
        "v_BxLxHxV": (v_BxLxHxV, (B, L, H, V)), "key_BxLxHxK": (key_BxLxHxK, (B, L, H, K)),
        "removal_BxLxHxK": (removal_BxLxHxK, (B, L, H, K)), "positions_BxL": (positions_BxL, (B, L)),
        "segment_ids_BxL": (segment_ids_BxL, (B, L)), "state_BxHxKxV": (state_BxHxKxV, (B, H, K, V)),
    }  # fmt: skip
    for name, (array, shape) in given.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"wkv7: {name} has shape {array.shape}, not {shape}")
    if chunk < 1:
        raise ValueError(f"wkv7: chunk {chunk} is below 1")
    refusal = wkv7_pallas.refusal(r_BxLxHxK, v_BxLxHxV, chunk)
    if implementation == "pallas" and refusal:
        raise ValueError(refusal)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"wkv7: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    valid_BxL = segment_ids_BxL != 0
    reset_BxL = valid_BxL & (positions_BxL == 0)
    valid_BxLx1x1, decays_BxLx1x1 = valid_BxL[..., None, None], (valid_BxL & ~reset_BxL)[..., None, None]
    r, k, v, key, removal = (
        x.astype(jnp.float32) for x in (r_BxLxHxK, k_BxLxHxK, v_BxLxHxV, key_BxLxHxK, removal_BxLxHxK)
    )
    k, removal = jnp.where(valid_BxLx1x1, k, 0.0), jnp.where(valid_BxLx1x1, removal, 0.0)
    log_decay = jnp.where(decays_BxLx1x1, log_decay_BxLxHxK.astype(jnp.float32), 0.0)  # at a reset nothing decays
    state = jnp.zeros((B, H, K, V)) if state_BxHxKxV is None else state_BxHxKxV
    operands = r, log_decay, k, v, key, removal, reset_BxL, state.astype(jnp.float32)
    runs = {name: functools.partial(run, chunk=chunk) for name, run in IMPLEMENTATIONS.items()}
    if implementation is None and L > 1:
        y, state = by_platform(
            *operands, tpu=runs["pallas"], otherwise=runs["chunked"], refusal=refusal
        )
    else:
        y, state = runs[implementation or "reference"](*operands)
    return y.astype(r_BxLxHxK.dtype), state
