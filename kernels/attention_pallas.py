"""Flash attention for TPU in Pallas: forward, and backward in one kernel. Memory linear in L and S.

Each row of the batch has a list of its visible blocks (`visits`), read from scalar memory, and the grid is as long as the
longest list: a block that nothing sees costs neither a product nor a load, and one that all see needs no mask. Where the lists
are too long for that memory, or the gradients too many for the chip, a kernel runs for some queries at a time. Scores are kept
transposed, keys down and queries across: what belongs to a query (maximum, sum, log-sum-exp) is then one row of lanes, and
reductions over keys are sums of registers. Softmax and all sums are float32; products of float32 are at HIGHEST precision.

Sources: Dao et al. 2022 (FlashAttention), algorithms 1 and 4; Dao 2023 (FlashAttention-2), section 3.1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import attention_blocks as shared
from kernels.varying import like, vary_alike
from kernels.visibility import Context, Rule, sees, visible_blocks


def refusal(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array) -> str | None:
    """Why the kernels can't serve these shapes and dtypes; None if they can."""
    (B, L, H, K), (S, G, V) = q_BxLxHxK.shape, v_BxSxGxV.shape[1:]
    p = shared.plan(L, S, K, V)
    if reason := shared.unfit(B * (p.keys // p.block_k), q_BxLxHxK, k_BxSxGxK, v_BxSxGxV):
        return reason
    if not shared.held_queries(H // G, shared.plan(L, S, K, V, H // G)):
        return f"{H // G} query heads of width {p.width} a key head are more than a core's memory holds"
    return None


def _column(row_1xC: jax.Array) -> jax.Array:
    """The same numbers down instead of across."""
    return jnp.broadcast_to(row_1xC, (8, row_1xC.shape[1])).T[:, :1]


def _scores(q_KxC, k_EK, q_ids, k_ids, slope, rule: Rule, masked: bool):
    """(scores_ExC of E keys and C queries before the mask; and, or None: seen_ExC; the cap's derivative; distance_ExC)."""
    scores_ExC = shared.dot(k_EK, q_KxC, (1, 0)) * rule.scale
    seen_ExC = slack_ExC = distance_ExC = None
    if rule.softcap is not None:
        capped_ExC = jnp.tanh(scores_ExC / rule.softcap)
        scores_ExC, slack_ExC = rule.softcap * capped_ExC, 1 - capped_ExC * capped_ExC
    if masked or slope is not None:
        q_position_1xC, q_segment_1xC = q_ids[0:1], q_ids[1:2]
        k_position_Ex1 = _column(k_ids[0:1])
    if slope is not None:
        distance_ExC = jnp.abs(q_position_1xC - k_position_Ex1).astype(jnp.float32)
        scores_ExC -= slope * distance_ExC
    if masked:
        k_prefix_Ex1 = _column(k_ids[2:3]) != 0 if rule.mask_kind == "prefix" else None
        seen_ExC = sees(q_position_1xC, k_position_Ex1, q_segment_1xC, _column(k_ids[1:2]), k_prefix_Ex1, rule)
    return scores_ExC, seen_ExC, slack_ExC, distance_ExC


def _forward_kernel(visits, slopes, q, k, v, q_ids, k_ids, y, lse, top, total, sums, *, blocks: int, alibi: bool, rule: Rule):
    """One block of keys, for one head's block of queries; `top`, `total` and `sums` live as long as those."""
    entry = visits[pl.program_id(0) * blocks + pl.program_id(2)]
    slope = slopes[pl.program_id(1)] if alibi else None

    @pl.when(entry & shared.FIRST != 0)
    def _():
        top[...] = jnp.full_like(top, shared.FLOOR)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def visit(masked: bool) -> None:
        scores_ExC, seen_ExC, _, _ = _scores(q[...], k[...], q_ids[...], k_ids[...], slope, rule, masked)
        if masked:
            scores_ExC = jnp.where(seen_ExC, scores_ExC, shared.FLOOR)
        top_1xC = jnp.maximum(top[...], jnp.max(scores_ExC, axis=0, keepdims=True))
        weights_ExC = jnp.exp(scores_ExC - top_1xC)
        if masked:
            weights_ExC = jnp.where(seen_ExC, weights_ExC, 0.0)
        fade_1xC = jnp.exp(top[...] - top_1xC)
        total[...] = total[...] * fade_1xC + jnp.sum(weights_ExC, axis=0, keepdims=True)
        sums[...] = sums[...] * fade_1xC + shared.dot(v[...], weights_ExC.astype(v.dtype), (1, 0))
        top[...] = top_1xC

    pl.when(entry & shared.SOME != 0)(functools.partial(visit, True))
    pl.when(entry & shared.ALL != 0)(functools.partial(visit, False))

    @pl.when(entry & shared.LAST != 0)
    def _():
        total_1xC = jnp.where(total[...] == 0, 1.0, total[...])  # a query that sees nothing: 0 / 1
        y[...] = (sums[...] / total_1xC).astype(y.dtype)
        lse[...] = top[...] + jnp.log(total_1xC)


def _backward_kernel(visits, slopes, q, k, v, q_ids, k_ids, lse, pulled, dy, dq, dk, dv, dslopes, dk_sum, dv_sum, *,
                     blocks: int, rows: int, alibi: bool, rule: Rule):
    """One head's block of queries, for one block of keys; dq and dslopes stay on the chip for all blocks of a key head."""
    step, r = pl.program_id(2), pl.program_id(3)
    entry = visits[pl.program_id(0) * blocks + step]
    slope = slopes[pl.program_id(1) * pl.num_programs(3) + r] if alibi else None

    @pl.when((step == 0) & (r == 0))
    def _():
        dq[...] = jnp.zeros_like(dq)
        dslopes[...] = jnp.zeros_like(dslopes)

    @pl.when((entry & shared.FIRST != 0) & (r == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def visit(masked: bool) -> None:
        scores_ExC, seen_ExC, slack_ExC, distance_ExC = _scores(q[...], k[...], q_ids[...], k_ids[...], slope, rule, masked)
        weights_ExC = jnp.exp(scores_ExC - lse[...])
        if masked:
            weights_ExC = jnp.where(seen_ExC, weights_ExC, 0.0)
        dv_sum[...] += shared.dot(weights_ExC.astype(dy.dtype), dy[...], (1, 1))
        dscores_ExC = weights_ExC * (shared.dot(v[...], dy[...], (1, 0)) - pulled[...])
        if alibi:
            dslopes[r] -= jnp.sum(dscores_ExC * distance_ExC, axis=0, keepdims=True)
        if slack_ExC is not None:
            dscores_ExC *= slack_ExC
        dscores_ExC = (dscores_ExC * rule.scale).astype(q.dtype)
        dk_sum[...] += shared.dot(dscores_ExC, q[...], (1, 1))
        block_q = q.shape[1]
        here = pl.ds(pl.multiple_of(shared.place(entry, rows)[1] * block_q, block_q), block_q)
        dq[r, :, here] += shared.dot(k[...], dscores_ExC, (0, 0))

    pl.when(entry & shared.SOME != 0)(functools.partial(visit, True))
    pl.when(entry & shared.ALL != 0)(functools.partial(visit, False))

    @pl.when((entry & shared.LAST != 0) & (r == pl.num_programs(3) - 1))
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


class _Padded(NamedTuple):
    """Arguments in the kernels' order, padded to whole blocks; what was added is segment 0."""

    q_BxHxKxL: jax.Array
    k_BxGxSxK: jax.Array
    q_ids_Bx2xL: jax.Array  # positions, segments
    k_ids_Bx3xS: jax.Array  # and prefix
    slopes_H: jax.Array
    context: Context


def _pad(q_BxLxHxK, k_BxSxGxK, slopes_H, context: Context, p: shared.Plan) -> _Padded:
    q_rows = [shared.fill(x.astype(jnp.int32), {1: p.length}) for x in (context.q_positions_BxL, context.q_segment_ids_BxL)]
    prefix = context.k_prefix_BxS
    prefix = jnp.zeros_like(context.k_positions_BxS) if prefix is None else prefix.astype(jnp.int32)
    k_rows = [context.k_positions_BxS, context.k_segment_ids_BxS, prefix]
    k_rows = [shared.fill(x.astype(jnp.int32), {1: p.keys}) for x in k_rows]
    slopes_H = jnp.zeros(q_BxLxHxK.shape[2], jnp.float32) if slopes_H is None else slopes_H.astype(jnp.float32)
    return _Padded(
        q_BxHxKxL=shared.fill(jnp.transpose(q_BxLxHxK, (0, 2, 3, 1)), {2: p.width, 3: p.length}),
        k_BxGxSxK=shared.fill(jnp.transpose(k_BxSxGxK, (0, 2, 1, 3)), {2: p.keys, 3: p.width}),
        q_ids_Bx2xL=jnp.stack(q_rows, axis=1), k_ids_Bx3xS=jnp.stack(k_rows, axis=1), slopes_H=slopes_H,
        context=Context(q_rows[0], k_rows[0], q_rows[1], k_rows[1], k_rows[2] != 0))


def forward(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array, slopes_H: jax.Array | None, context: Context,
            rule: Rule, *, interpret=False) -> tuple[jax.Array, jax.Array]:
    """(y_BxLxHxV, lse_BxHxL: log of the sum of exp(scores), float32); arguments as in `attention.attention`."""
    (B, L, H, K), (S, _, V) = q_BxLxHxK.shape, v_BxSxGxV.shape[1:]
    p = shared.plan(L, S, K, V)
    chunk = shared.listed_queries(B, p)
    attend = functools.partial(_forward, p=shared.plan(min(chunk, L), S, K, V), rule=rule, interpret=interpret)
    if chunk >= L:
        return attend(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context)

    def body(own):
        q_BxCxHxK, *who = own
        return attend(q_BxCxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, shared.of_queries(context, *who))

    chunks = [shared.split(q_BxLxHxK, 1, chunk), *shared.split_queries(context, chunk)]
    y_NxBxCxHxV, lse_NxBxHxC = jax.lax.map(body, chunks)
    y_BxLxHxV = jnp.moveaxis(y_NxBxCxHxV, 0, 1).reshape(B, -1, H, V)[:, :L]
    return y_BxLxHxV, jnp.moveaxis(lse_NxBxHxC, 0, 2).reshape(B, H, -1)[:, :, :L]


@functools.partial(jax.jit, static_argnames=("p", "rule", "interpret"), inline=True)
def _forward(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context: Context, *, p: shared.Plan, rule: Rule, interpret):
    (B, L, H, K), (S, G, V) = q_BxLxHxK.shape, v_BxSxGxV.shape[1:]
    padded = _pad(q_BxLxHxK, k_BxSxGxK, slopes_H, context, p)
    v_BxGxVxS = shared.fill(jnp.transpose(v_BxSxGxV, (0, 2, 3, 1)), {2: p.value_width, 3: p.keys})
    lists, count = shared.visits(*visible_blocks(padded.context, rule, p.block_q, p.block_k))
    columns = p.keys // p.block_k
    blocks = p.length // p.block_q * columns

    def spec(shape, index):
        """index: of the block, from b, h, i, j."""
        def at(b, h, t, visits, slopes):
            return index(b, h, *shared.place(visits[b * blocks + t], columns))
        return pl.BlockSpec(shape, at)

    q_spec = spec((None, None, p.width, p.block_q), lambda b, h, i, j: (b, h, 0, i))
    k_spec = spec((None, None, p.block_k, p.width), lambda b, h, i, j: (b, jax.lax.div(h, H // G), j, 0))
    v_spec = spec((None, None, p.value_width, p.block_k), lambda b, h, i, j: (b, jax.lax.div(h, H // G), 0, j))
    y_spec = spec((None, None, p.value_width, p.block_q), lambda b, h, i, j: (b, h, 0, i))
    lse_spec = spec((None, None, 1, p.block_q), lambda b, h, i, j: (b, h, 0, i))
    q_ids_spec = spec((None, 2, p.block_q), lambda b, h, i, j: (b, 0, i))
    k_ids_spec = spec((None, 3, p.block_k), lambda b, h, i, j: (b, 0, j))
    row = pltpu.VMEM((1, p.block_q), jnp.float32)
    y_BxHxVxL, lse_BxHx1xL = pl.pallas_call(
        functools.partial(_forward_kernel, blocks=blocks, alibi=slopes_H is not None, rule=rule),
        out_shape=[like(q_BxLxHxK, (B, H, p.value_width, p.length), q_BxLxHxK.dtype),
                   like(q_BxLxHxK, (B, H, 1, p.length), jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(B, H, count), in_specs=[q_spec, k_spec, v_spec, q_ids_spec, k_ids_spec],
            out_specs=[y_spec, lse_spec], scratch_shapes=[row, row, pltpu.VMEM((p.value_width, p.block_q), jnp.float32)]),
        cost_estimate=shared.cost(K + V, B * H * L * S * shared.computed_share(p, rule),
                                  q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, q_BxLxHxK),
        compiler_params=shared.compiler("ppa"), interpret=interpret, name="flash_attention_forward",
    )(lists, padded.slopes_H, padded.q_BxHxKxL, padded.k_BxGxSxK, v_BxGxVxS, padded.q_ids_Bx2xL, padded.k_ids_Bx3xS)
    return jnp.transpose(y_BxHxVxL[:, :, :V, :L], (0, 3, 1, 2)), lse_BxHx1xL[:, :, 0, :L]


def backward(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array, slopes_H: jax.Array | None, context: Context,
             y_BxLxHxV: jax.Array, lse_BxHxL: jax.Array, dy_BxLxHxV: jax.Array, rule: Rule, *, interpret=False) -> tuple:
    """(dq, dk, dv, dslopes_H or None), in the dtypes of the arguments, from what `forward` gave and y's gradient.

    The kernel holds the gradient of all queries of a key head that it is given.
    """
    (B, L, H, K), (S, G, V) = q_BxLxHxK.shape, v_BxSxGxV.shape[1:]
    p = shared.plan(L, S, K, V, H // G)
    chunk = min(shared.listed_queries(B, p), shared.held_queries(H // G, p))
    pulled_BxHxL = jnp.sum(dy_BxLxHxV.astype(jnp.float32) * y_BxLxHxV.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    gradients = functools.partial(_chunk_backward, k_BxSxGxK=k_BxSxGxK, v_BxSxGxV=v_BxSxGxV, slopes_H=slopes_H,
                                  p=shared.plan(min(chunk, L), S, K, V), rule=rule, interpret=interpret)
    if chunk >= L:
        dq, dk, dv, dslopes = gradients(q_BxLxHxK, dy_BxLxHxV, lse_BxHxL, pulled_BxHxL, context)
    else:
        def body(sums, own):
            *arrays, positions, segments = own
            dq, *partial = gradients(*arrays, shared.of_queries(context, positions, segments))
            return [a + b for a, b in zip(sums, partial, strict=True)], dq.astype(q_BxLxHxK.dtype)

        split = functools.partial(shared.split, chunk=chunk)
        chunks = [split(q_BxLxHxK, 1), split(dy_BxLxHxV, 1), split(lse_BxHxL, 2), split(pulled_BxHxL, 2),
                  *shared.split_queries(context, chunk)]
        zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k_BxSxGxK, v_BxSxGxV)] + [jnp.zeros(H, jnp.float32)]
        zeros = [vary_alike(zero, q_BxLxHxK)[0] for zero in zeros]
        (dk, dv, dslopes), dq_NxBxCxHxK = jax.lax.scan(body, zeros, chunks)
        dq = jnp.moveaxis(dq_NxBxCxHxK, 0, 1).reshape(B, -1, H, K)[:, :L]
    dslopes = None if slopes_H is None else dslopes.astype(slopes_H.dtype)
    return dq.astype(q_BxLxHxK.dtype), dk.astype(k_BxSxGxK.dtype), dv.astype(v_BxSxGxV.dtype), dslopes


@functools.partial(jax.jit, static_argnames=("p", "rule", "interpret"), inline=True)
def _chunk_backward(q_BxLxHxK, dy_BxLxHxV, lse_BxHxL, pulled_BxHxL, context: Context, *, k_BxSxGxK, v_BxSxGxV, slopes_H,
                    p: shared.Plan, rule: Rule, interpret):
    """(dq, dk, dv, dslopes_H), float32, of these queries alone."""
    (B, L, H, K), (S, G, V) = q_BxLxHxK.shape, v_BxSxGxV.shape[1:]
    R = H // G
    padded = _pad(q_BxLxHxK, k_BxSxGxK, slopes_H, context, p)
    dy_BxHxVxL = shared.fill(jnp.transpose(dy_BxLxHxV, (0, 2, 3, 1)), {2: p.value_width, 3: p.length})
    v_BxGxSxV = shared.fill(jnp.transpose(v_BxSxGxV, (0, 2, 1, 3)), {2: p.keys, 3: p.value_width})
    lse_BxHx1xL, pulled_BxHx1xL = (shared.fill(x[:, :, None], {3: p.length}) for x in (lse_BxHxL, pulled_BxHxL))
    lists, count = shared.visits(*(jnp.swapaxes(x, 1, 2) for x in visible_blocks(padded.context, rule, p.block_q, p.block_k)))
    rows = p.length // p.block_q
    blocks = p.keys // p.block_k * rows

    def spec(shape, index):
        """index: of the block, from b, g, h, i, j."""
        def at(b, g, t, r, visits, slopes):
            j, i = shared.place(visits[b * blocks + t], rows)
            return index(b, g, g * R + r, i, j)
        return pl.BlockSpec(shape, at)

    q_spec = spec((None, None, p.width, p.block_q), lambda b, g, h, i, j: (b, h, 0, i))
    dy_spec = spec((None, None, p.value_width, p.block_q), lambda b, g, h, i, j: (b, h, 0, i))
    row_spec = spec((None, None, 1, p.block_q), lambda b, g, h, i, j: (b, h, 0, i))
    k_spec = spec((None, None, p.block_k, p.width), lambda b, g, h, i, j: (b, g, j, 0))
    v_spec = spec((None, None, p.block_k, p.value_width), lambda b, g, h, i, j: (b, g, j, 0))
    q_ids_spec = spec((None, 2, p.block_q), lambda b, g, h, i, j: (b, 0, i))
    k_ids_spec = spec((None, 3, p.block_k), lambda b, g, h, i, j: (b, 0, j))
    dq_spec = spec((None, R, p.width, p.length), lambda b, g, h, i, j: (b, g, 0, 0))
    dslopes_spec = spec((None, R, 1, p.block_q), lambda b, g, h, i, j: (b, g, 0, 0))
    shapes = [(B, H, p.width, p.length), (B, G, p.keys, p.width), (B, G, p.keys, p.value_width), (B, H, 1, p.block_q)]
    dq_BxHxKxL, dk_BxGxSxK, dv_BxGxSxV, dslopes_BxHx1xC = pl.pallas_call(
        functools.partial(_backward_kernel, blocks=blocks, rows=rows, alibi=slopes_H is not None, rule=rule),
        out_shape=[like(q_BxLxHxK, shape, jnp.float32) for shape in shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(B, G, count, R),
            in_specs=[q_spec, k_spec, v_spec, q_ids_spec, k_ids_spec, row_spec, row_spec, dy_spec],
            out_specs=[dq_spec, k_spec, v_spec, dslopes_spec],
            scratch_shapes=[pltpu.VMEM((p.block_k, width), jnp.float32) for width in (p.width, p.value_width)]),
        cost_estimate=shared.cost(3 * K + 2 * V, B * H * L * S * shared.computed_share(p, rule),
                                  q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, dy_BxLxHxV, q_BxLxHxK, k_BxSxGxK),
        compiler_params=shared.compiler("ppaa"), interpret=interpret, name="flash_attention_backward",
    )(lists, padded.slopes_H, padded.q_BxHxKxL, padded.k_BxGxSxK, v_BxGxSxV, padded.q_ids_Bx2xL, padded.k_ids_Bx3xS,
      lse_BxHx1xL, pulled_BxHx1xL, dy_BxHxVxL)
    dq = jnp.transpose(dq_BxHxKxL[:, :, :K, :L], (0, 3, 1, 2))
    dk, dv = (jnp.swapaxes(x, 1, 2)[:, :S] for x in (dk_BxGxSxK, dv_BxGxSxV))
    return dq, dk[..., :K], dv[..., :V], jnp.sum(dslopes_BxHx1xC, axis=(0, 2, 3))
