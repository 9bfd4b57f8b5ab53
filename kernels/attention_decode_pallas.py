"""Attention of a few queries to a long cache on a TPU, in Pallas: forward only.

The cache is read once, as it lies in memory, and only the blocks that some query of the row sees: an empty slot costs nothing.
The query heads of a key head are the rows of one product. Softmax, sums and precision are those of attention_pallas.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import attention_blocks as shared
from kernels.varying import like
from kernels.visibility import Context, Rule, sees, visible_blocks

QUERIES = 8  # at most: more are a prefill
ROWS = 256  # at most, of a key head: its queries times its query heads
BLOCK_BYTES = 2**20  # of keys at one time


def _groups_per_block(groups: int, width: int, value_width: int) -> int:
    """Key heads of one block: all, or few whose features fill whole registers of 128."""
    fits = [n for n in range(1, min(groups, 8) + 1) if groups % n == n * width % 128 == n * value_width % 128 == 0]
    return max(fits) if fits else groups


def refusal(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array) -> str | None:
    """Why the kernel can't serve these shapes and dtypes; None if it can."""
    B, L, H, _ = q_BxLxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    if L > QUERIES or L * H // G > ROWS:
        return f"{L} queries of {H // G} heads a key head are more than {QUERIES}, or than {ROWS} rows"
    if _groups_per_block(G, k_BxSxGxK.shape[3], v_BxSxGxV.shape[3]) > 32:
        return f"{G} key heads of width {k_BxSxGxK.shape[3]} don't form blocks"
    return shared.unfit(B * -(-S // 128), q_BxLxHxK, k_BxSxGxK, v_BxSxGxV)


def _kernel(visits, q, k, v, q_ids, slopes, k_ids, y, lse, top, total, sums, *, blocks: int, slots: int, alibi: bool,
            rule: Rule):
    """One block of the cache, for some key heads: `top`, `total` and `sums` live as long as the row."""
    entry = visits[pl.program_id(0) * blocks + pl.program_id(2)]
    heads, _, width = q.shape
    block, value_width = k.shape[0], sums.shape[2]

    @pl.when(entry & shared.FIRST != 0)
    def _():
        top[...] = jnp.full_like(top, shared.FLOOR)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def visit(masked: bool) -> None:
        k_position_1xE, k_segment_1xE, k_prefix_1xE = k_ids[0:1], k_ids[1:2], k_ids[2:3] != 0
        q_position_Mx1 = q_ids[0]
        if masked:
            seen_MxE = sees(q_position_Mx1, k_position_1xE, q_ids[1], k_segment_1xE, k_prefix_1xE, rule)
        values_ExGV = v[...]
        if slots % block:  # the last block reaches behind the cache, where anything may lie
            index_Ex1 = jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) + shared.place(entry, blocks)[1] * block
            values_ExGV = jnp.where(index_Ex1 < slots, values_ExGV, jnp.zeros_like(values_ExGV))
        for g in range(heads):
            scores_MxE = shared.dot(q[g], k[:, g * width:(g + 1) * width], (1, 1)) * rule.scale
            if rule.softcap is not None:
                scores_MxE = rule.softcap * jnp.tanh(scores_MxE / rule.softcap)
            if alibi:
                scores_MxE -= slopes[g] * jnp.abs(q_position_Mx1 - k_position_1xE).astype(jnp.float32)
            if masked:
                scores_MxE = jnp.where(seen_MxE, scores_MxE, shared.FLOOR)
            top_Mx1 = jnp.maximum(top[g], jnp.max(scores_MxE, axis=1, keepdims=True))
            weights_MxE = jnp.exp(scores_MxE - top_Mx1)
            if masked:
                weights_MxE = jnp.where(seen_MxE, weights_MxE, 0.0)
            fade_Mx1 = jnp.exp(top[g] - top_Mx1)
            total[g] = total[g] * fade_Mx1 + jnp.sum(weights_MxE, axis=1, keepdims=True)
            values_ExV = values_ExGV[:, g * value_width:(g + 1) * value_width]
            sums[g] = sums[g] * fade_Mx1 + shared.dot(weights_MxE.astype(v.dtype), values_ExV, (1, 0))
            top[g] = top_Mx1

    pl.when(entry & shared.SOME != 0)(functools.partial(visit, True))
    pl.when(entry & shared.ALL != 0)(functools.partial(visit, False))

    @pl.when(entry & shared.LAST != 0)
    def _():
        total_GxMx1 = jnp.where(total[...] == 0, 1.0, total[...])
        y[...] = (sums[...] / total_GxMx1).astype(y.dtype)
        lse[...] = top[...] + jnp.log(total_GxMx1)


def forward(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array, slopes_H: jax.Array | None, context: Context,
            rule: Rule, *, interpret=False) -> tuple[jax.Array, jax.Array]:
    """(y_BxLxHxV, lse_BxHxL: log of the sum of exp(scores), float32); arguments as in `attention.attention`."""
    S, G, K = k_BxSxGxK.shape[1:]
    V = v_BxSxGxV.shape[3]
    room = BLOCK_BYTES // (_groups_per_block(G, K, V) * max(K, V) * k_BxSxGxK.dtype.itemsize) // 128 * 128
    block = min(shared.BLOCK, max(128, room), S)
    return _forward(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context, block=block, rule=rule, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("block", "rule", "interpret"), inline=True)
def _forward(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context: Context, *, block: int, rule: Rule, interpret):
    (B, L, H, K), (S, G, V) = q_BxLxHxK.shape, v_BxSxGxV.shape[1:]
    R, N = H // G, _groups_per_block(G, K, V)
    M = shared.up(L * R, 16)

    def rows(x_BxLxHxK):
        """x_BxGxMxK, M = query, then head of the group; behind them rows of segment 0, which see nothing."""
        x_BxGxLxRxK = jnp.moveaxis(x_BxLxHxK.reshape(*x_BxLxHxK.shape[:2], G, R, -1), 2, 1)
        return shared.fill(x_BxGxLxRxK.reshape(-1, G, x_BxGxLxRxK.shape[2] * R, x_BxGxLxRxK.shape[4]), {2: M})

    who = jnp.stack([context.q_positions_BxL, context.q_segment_ids_BxL], axis=1).astype(jnp.int32)
    q_ids_Bx2xMx1 = shared.fill(jnp.repeat(who, R, axis=2), {2: M})[..., None]
    alibi = slopes_H is not None
    slopes_H = jnp.zeros(H, jnp.float32) if slopes_H is None else slopes_H.astype(jnp.float32)
    slopes_GxMx1 = rows(jnp.broadcast_to(slopes_H[:, None], (1, L, H, 1)))[0]
    prefix = jnp.zeros_like(context.k_positions_BxS) if context.k_prefix_BxS is None else context.k_prefix_BxS
    keys = [shared.fill(x.astype(jnp.int32), {1: shared.up(S, block)})
            for x in (context.k_positions_BxS, context.k_segment_ids_BxS, prefix)]
    k_ids_Bx3xS = jnp.stack(keys, axis=1)
    padded = Context(context.q_positions_BxL, keys[0], context.q_segment_ids_BxL, keys[1], keys[2] != 0)
    lists, count = shared.visits(*visible_blocks(padded, rule, L, block))
    blocks = shared.up(S, block) // block

    def spec(shape, index):
        """index: of the block, from b, n (of N key heads) and j."""
        return pl.BlockSpec(shape, lambda b, n, t, visits: index(b, n, shared.place(visits[b * blocks + t], blocks)[1]))

    by_rows = lambda width: spec((None, N, M, width), lambda b, n, j: (b, n, 0, 0))
    by_keys = lambda width: spec((None, block, N * width), lambda b, n, j: (b, j, n))
    y_BxGxMxV, lse_BxGxMx1 = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, slots=S, alibi=alibi, rule=rule),
        out_shape=[like(q_BxLxHxK, (B, G, M, V), q_BxLxHxK.dtype), like(q_BxLxHxK, (B, G, M, 1), jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(B, G // N, count),
            in_specs=[by_rows(K), by_keys(K), by_keys(V), spec((None, 2, M, 1), lambda b, n, j: (b, 0, 0, 0)),
                      spec((N, M, 1), lambda b, n, j: (n, 0, 0)), spec((None, 3, block), lambda b, n, j: (b, 0, j))],
            out_specs=[by_rows(V), by_rows(1)],
            scratch_shapes=[pltpu.VMEM((N, M, width), jnp.float32) for width in (1, 1, V)]),
        cost_estimate=shared.cost(K + V, B * H * L * S, q_BxLxHxK, k_BxSxGxK, v_BxSxGxV),  # as of a cache that is full
        compiler_params=shared.compiler("ppa"), interpret=interpret, name="decode_attention",
    )(lists, rows(q_BxLxHxK), k_BxSxGxK.reshape(B, S, G * K), v_BxSxGxV.reshape(B, S, G * V), q_ids_Bx2xMx1, slopes_GxMx1,
      k_ids_Bx3xS)
    y_BxGxLxRxV = y_BxGxMxV[:, :, :L * R].reshape(B, G, L, R, V)
    lse_BxGxLxR = lse_BxGxMx1[:, :, :L * R, 0].reshape(B, G, L, R)
    return jnp.moveaxis(y_BxGxLxRxV, 2, 1).reshape(B, L, H, V), jnp.swapaxes(lse_BxGxLxR, 2, 3).reshape(B, H, L)
