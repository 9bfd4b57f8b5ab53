"""Flash attention for NVIDIA GPUs, in Pallas with the Triton back end: forward and backward. Memory linear in L and S.

Forward, and for the gradient of the queries: a program for each block of a head's queries, over blocks of keys. For the
gradients of keys and values: one for each block of a key head's keys, over blocks of all its query heads. A program's sums
stay in registers; who is visible is known by block beforehand (`_bounds`): what lies before a row's first and behind its last
visible block is never read, and a run of blocks that all see needs no mask. Scores are in units of log 2, for exp2. Softmax and
all sums are float32; products of float32 are in full precision (not TensorFloat-32, hence without tensor cores: slow).

Needs a GPU from Ampere on, which can't be known where a program is lowered: an older one fails to compile it, or is slow.
Nobody has run it on a GPU, or timed it: TILES are near FlexAttention's, cut down to the shared memory that all these GPUs have,
and to what stays in registers when Triton 3.9, which needs no GPU for it, compiles the programs for compute capability 9.0 (by
wgmma; of 8.0 and 9.0 the worst spills 500 bytes). JAX 0.12 warns that it will drop this back end one day.

Sources: Dao 2023 (FlashAttention-2), algorithms 1 and 2, section 3.2.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels import attention_blocks as shared
from kernels.varying import like
from kernels.visibility import Context, Rule, sees, visible_blocks

LEAST, WIDEST = 16, 256  # sizes of a product in Triton: powers of two; wider heads leave no room for a block
SHARED_BYTES = 99 * 1024  # of a program, on the smallest of these GPUs (compute capability 8.6)
LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """own: rows that a program holds; inner: rows of each step of its loop; stages: steps whose inner rows are in flight."""

    own: int
    inner: int
    warps: int
    stages: int


# By dtype and width, up to which: of the forward pass, and of the backward pass's programs of queries and of keys.
TILES = {
    ("bfloat16", 64): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    ("bfloat16", 128): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 32, 8, 2)),
    ("bfloat16", 256): (Tile(64, 32, 8, 2), Tile(64, 16, 8, 2), Tile(64, 16, 8, 2)),
    ("float32", 64): (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("float32", 128): (Tile(32, 16, 8, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2)),
    ("float32", 256): (Tile(32, 16, 8, 1), Tile(16, 16, 4, 2), Tile(16, 16, 4, 1)),
}
FORWARD, QUERIES, KEYS = range(3)


def _tile(q_BxLxHxK: jax.Array, v_BxSxGxV: jax.Array, which: int) -> Tile:
    """which: FORWARD, QUERIES or KEYS."""
    name, widest = q_BxLxHxK.dtype.name, max(q_BxLxHxK.shape[3], v_BxSxGxV.shape[3])
    return TILES[name, next(width for dtype, width in TILES if dtype == name and width >= widest)][which]


def _power(size: int) -> int:
    return max(LEAST, pl.next_power_of_2(size))


def refusal(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array) -> str | None:
    """Why the kernels can't serve these shapes and dtypes; None if they can."""
    width = max(q_BxLxHxK.shape[3], v_BxSxGxV.shape[3])
    if width > WIDEST:
        return f"a head width of {width} is above {WIDEST}"
    return shared.unfit(0, q_BxLxHxK, k_BxSxGxK, v_BxSxGxV)


def _bounds(some_BxIxJ: jax.Array, all_BxIxJ: jax.Array) -> jax.Array:
    """bounds_BxIx4 of columns: from 0 to 3 lie all that some query sees, from 1 to 2 a run of those that all see."""
    J = some_BxIxJ.shape[2]
    column_J = jnp.arange(J, dtype=jnp.int32)
    last_BxI = jnp.max(jnp.where(some_BxIxJ, column_J + 1, 0), axis=2)
    first_BxI = jnp.minimum(jnp.min(jnp.where(some_BxIxJ, column_J, J), axis=2), last_BxI)
    begin_BxI = jnp.min(jnp.where(all_BxIxJ, column_J, last_BxI[..., None]), axis=2)
    past_BxIxJ = ~all_BxIxJ & (column_J >= begin_BxI[..., None])
    end_BxI = jnp.min(jnp.where(past_BxIxJ, column_J, last_BxI[..., None]), axis=2)
    return jnp.stack([first_BxI, begin_BxI, end_BxI, last_BxI], axis=2)


def _visit(bounds: Any, step: Callable, sums: Any) -> Any:
    """sums = step(column, masked, sums) for each column in `bounds`: those without a mask in a loop of their own."""
    first, begin, end, last = (bounds[n] for n in range(4))
    before = begin - first
    sums = jax.lax.fori_loop(begin, end, lambda j, sums: step(j, False, sums), sums)

    def masked(t, sums):
        return step(jnp.where(t < before, first + t, end + t - before), True, sums)

    return jax.lax.fori_loop(0, before + last - end, masked, sums)


def _who(ids: Any, here: Any, axis: int) -> list[jax.Array]:
    """Positions, segments and, of keys, prefix at the rows `here`, as they meet a tile of scores, whose other `axis` it is."""
    return [jnp.expand_dims(ids[n, here], axis) for n in range(ids.shape[0])]


def _scores(products, q_who, k_who, slope, rule: Rule, masked: bool):
    """(scores in units of log 2, before the mask; and, or None: seen; the cap's derivative; distance), in one orientation."""
    seen = slack = distance = None
    if rule.softcap is None:
        scores = products * (rule.scale * LOG2_E)
    else:
        capped = jnp.tanh(products * (rule.scale / rule.softcap))
        scores, slack = capped * (rule.softcap * LOG2_E), 1 - capped * capped
    if slope is not None:
        distance = jnp.abs(q_who[0] - k_who[0]).astype(jnp.float32)
        scores -= slope * LOG2_E * distance
    if masked:
        k_prefix = k_who[2] != 0 if rule.mask_kind == "prefix" else None
        seen = sees(q_who[0], k_who[0], q_who[1], k_who[1], k_prefix, rule)
    return scores, seen, slack, distance


def _attention_forward(bounds, slopes, q, k, v, q_ids, k_ids, y, lse, *, block: int, alibi: bool, rule: Rule):
    """A block of a head's queries, over blocks of keys."""
    q_CxK, q_who, slope = q[...], _who(q_ids, slice(None), 1), slopes[0] if alibi else None

    def step(j, masked, sums):
        sums_CxV, total_C, top_C = sums
        here = pl.ds(j * block, block)
        k_who = _who(k_ids, here, 0) if masked or alibi else None
        scores_CxE, seen_CxE, _, _ = _scores(shared.dot(q_CxK, k[here, :], (1, 1)), q_who, k_who, slope, rule, masked)
        if masked:
            scores_CxE = jnp.where(seen_CxE, scores_CxE, shared.FLOOR)
        new_C = jnp.maximum(top_C, jnp.max(scores_CxE, axis=1))
        weights_CxE = jnp.exp2(scores_CxE - new_C[:, None])
        if masked:
            weights_CxE = jnp.where(seen_CxE, weights_CxE, 0.0)
        fade_C = jnp.exp2(top_C - new_C)
        sums_CxV = sums_CxV * fade_C[:, None] + shared.dot(weights_CxE.astype(v.dtype), v[here, :], (1, 0))
        return sums_CxV, total_C * fade_C + jnp.sum(weights_CxE, axis=1), new_C

    C = q.shape[0]
    zeros = jnp.zeros(y.shape, jnp.float32), jnp.zeros((C,), jnp.float32), jnp.full((C,), shared.FLOOR, jnp.float32)
    sums_CxV, total_C, top_C = _visit(bounds, step, zeros)
    total_C = jnp.where(total_C == 0, 1.0, total_C)  # a query that sees nothing: 0 / 1
    y[...] = (sums_CxV / total_C[:, None]).astype(y.dtype)
    lse[...] = top_C / LOG2_E + jnp.log(total_C)


def _weights(products, lse, q_who, k_who, slope, rule: Rule, masked: bool):
    """(weights; the cap's derivative; distance), made again from the products and the log-sum-exp."""
    scores, seen, slack, distance = _scores(products, q_who, k_who, slope, rule, masked)
    weights = jnp.exp2(scores - lse * LOG2_E)
    return jnp.where(seen, weights, 0.0) if masked else weights, slack, distance


def _attention_backward_queries(bounds, slopes, q, k, v, q_ids, k_ids, lse, pulled, dy, dq, *dslopes, block: int, alibi: bool,
                                rule: Rule):
    """A block of a head's queries, over blocks of keys."""
    q_CxK, dy_CxV, q_who, slope = q[...], dy[...], _who(q_ids, slice(None), 1), slopes[0] if alibi else None
    lse_Cx1, pulled_Cx1 = lse[...][:, None], pulled[...][:, None]

    def step(j, masked, sums):
        dq_CxK, dslopes_C = sums
        here = pl.ds(j * block, block)
        k_ExK, k_who = k[here, :], _who(k_ids, here, 0) if masked or alibi else None
        products_CxE = shared.dot(q_CxK, k_ExK, (1, 1))
        weights_CxE, slack_CxE, distance_CxE = _weights(products_CxE, lse_Cx1, q_who, k_who, slope, rule, masked)
        dscores_CxE = weights_CxE * (shared.dot(dy_CxV, v[here, :], (1, 1)) - pulled_Cx1)
        if alibi:
            dslopes_C -= jnp.sum(dscores_CxE * distance_CxE, axis=1)
        if slack_CxE is not None:
            dscores_CxE *= slack_CxE
        return dq_CxK + shared.dot(dscores_CxE.astype(k.dtype), k_ExK, (1, 0)), dslopes_C

    zeros = jnp.zeros(dq.shape, jnp.float32), jnp.zeros(lse.shape, jnp.float32)
    dq_CxK, dslopes_C = _visit(bounds, step, zeros)
    dq[...] = (dq_CxK * rule.scale).astype(dq.dtype)
    if alibi:
        dslopes[0][...] = dslopes_C


def _attention_backward_keys(bounds, slopes, q, k, v, q_ids, k_ids, lse, pulled, dy, dk, dv, *, block: int, alibi: bool,
                             rule: Rule):
    """A block of a key head's keys, over its query heads and their blocks of queries: tiles are keys down, queries across."""
    k_ExK, v_ExV, k_who = k[...], v[...], _who(k_ids, slice(None), 1)

    def head(r, sums):
        slope = slopes[r] if alibi else None

        def step(i, masked, sums):
            dk_ExK, dv_ExV = sums
            here = pl.ds(i * block, block)
            q_CxK, dy_CxV, q_who = q[here, r, :], dy[here, r, :], _who(q_ids, here, 0) if masked or alibi else None
            products_ExC = shared.dot(k_ExK, q_CxK, (1, 1))
            weights_ExC, slack_ExC, _ = _weights(products_ExC, lse[r, here][None, :], q_who, k_who, slope, rule, masked)
            dv_ExV += shared.dot(weights_ExC.astype(dy.dtype), dy_CxV, (1, 0))
            dscores_ExC = weights_ExC * (shared.dot(v_ExV, dy_CxV, (1, 1)) - pulled[r, here][None, :])
            if slack_ExC is not None:
                dscores_ExC *= slack_ExC
            return dk_ExK + shared.dot(dscores_ExC.astype(q.dtype), q_CxK, (1, 0)), dv_ExV

        return _visit(bounds, step, sums)

    zeros = jnp.zeros(dk.shape, jnp.float32), jnp.zeros(dv.shape, jnp.float32)
    dk_ExK, dv_ExV = jax.lax.fori_loop(0, q.shape[1], head, zeros)
    dk[...] = (dk_ExK * rule.scale).astype(dk.dtype)
    dv[...] = dv_ExV.astype(dv.dtype)


class _Call(NamedTuple):
    """What all three kernels begin with, padded to whole blocks and to powers of two: added rows are segment 0."""

    plan: shared.Plan
    tile: Tile
    arrays: list[jax.Array]  # bounds, slopes_H, q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, q_ids_Bx2xL, k_ids_BxNxS
    rows: int  # of k_ids: positions, segments and, for a prefix, whether the key is in it
    shares: int  # query heads of a key head

    @classmethod
    def of(cls, q, k, v, slopes_H, context: Context, rule: Rule, tile: Tile, of_keys: bool = False) -> _Call:
        """of_keys: a program holds keys, and goes over queries."""
        (_, L, H, K), (S, G, V) = q.shape, v.shape[1:]
        rows_q, rows_k = (tile.inner, tile.own) if of_keys else (tile.own, tile.inner)
        block_q, block_k = min(rows_q, _power(L)), min(rows_k, _power(S))
        p = shared.Plan(shared.up(L, block_q), shared.up(S, block_k), _power(K), _power(V), block_q, block_k)
        row = lambda x, size: shared.fill(x.astype(jnp.int32), {1: size})
        who_q = [row(x, p.length) for x in (context.q_positions_BxL, context.q_segment_ids_BxL)]
        who_k = [row(x, p.keys) for x in (context.k_positions_BxS, context.k_segment_ids_BxS)]
        if rule.mask_kind == "prefix":
            who_k.append(row(context.k_prefix_BxS, p.keys))
        padded = Context(who_q[0], who_k[0], who_q[1], who_k[1], who_k[2] != 0 if len(who_k) == 3 else None)
        blocks = visible_blocks(padded, rule, block_q, block_k)
        arrays = [_bounds(*(jnp.swapaxes(x, 1, 2) for x in blocks)) if of_keys else _bounds(*blocks),
                  jnp.zeros(H, jnp.float32) if slopes_H is None else slopes_H.astype(jnp.float32),
                  shared.fill(q, {1: p.length, 3: p.width}), shared.fill(k, {1: p.keys, 3: p.width}),
                  shared.fill(v, {1: p.keys, 3: p.value_width}), jnp.stack(who_q, axis=1), jnp.stack(who_k, axis=1)]
        return cls(p, tile, arrays, len(who_k), H // G)

    def by_queries(self) -> tuple[list[pl.BlockSpec], Callable[[int], pl.BlockSpec], pl.BlockSpec]:
        """Blocks of `arrays`, of more arrays BxLxHx(their width), and BxHxL, by grid (block of queries, head, row): the last
        blocks, which take longest under a causal mask, come first."""
        p = self.plan
        place = lambda i: p.length // p.block_q - 1 - i
        own = lambda width: pl.BlockSpec((None, p.block_q, None, width), lambda i, h, b: (b, place(i), h, 0))
        inner = lambda width: pl.BlockSpec((None, p.keys, None, width), lambda i, h, b: (b, 0, jax.lax.div(h, self.shares), 0))
        specs = [pl.BlockSpec((None, None, 4), lambda i, h, b: (b, place(i), 0)), pl.BlockSpec((1,), lambda i, h, b: (h,)),
                 own(p.width), inner(p.width), inner(p.value_width),
                 pl.BlockSpec((None, 2, p.block_q), lambda i, h, b: (b, 0, place(i))),
                 pl.BlockSpec((None, self.rows, p.keys), lambda i, h, b: (b, 0, 0))]
        return specs, own, pl.BlockSpec((None, None, p.block_q), lambda i, h, b: (b, h, place(i)))

    def by_keys(self) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec], list[pl.BlockSpec]]:
        """Blocks of `arrays`; of lse, pulled and dy; of dk and dv: by grid (block of keys, key head, row)."""
        p, R = self.plan, self.shares
        own = lambda width: pl.BlockSpec((None, p.block_k, None, width), lambda j, g, b: (b, j, g, 0))
        inner = lambda width: pl.BlockSpec((None, p.length, R, width), lambda j, g, b: (b, 0, g, 0))
        specs = [pl.BlockSpec((None, None, 4), lambda j, g, b: (b, j, 0)), pl.BlockSpec((R,), lambda j, g, b: (g,)),
                 inner(p.width), own(p.width), own(p.value_width),
                 pl.BlockSpec((None, 2, p.length), lambda j, g, b: (b, 0, 0)),
                 pl.BlockSpec((None, self.rows, p.block_k), lambda j, g, b: (b, 0, j))]
        row = pl.BlockSpec((None, R, p.length), lambda j, g, b: (b, g, 0))
        return specs, [row, row, inner(p.value_width)], [own(p.width), own(p.value_width)]

    def options(self, rule: Rule, products: int, interpret: bool, *moved: jax.Array) -> dict[str, Any]:
        """products: multiply-adds of a query and a key; moved: the arrays to and from memory."""
        pairs = math.prod(moved[0].shape[:3]) * moved[1].shape[1] * shared.computed_share(self.plan, rule)
        return dict(cost_estimate=shared.cost(products, pairs, *moved), interpret=interpret,
                    compiler_params=triton.CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages))


def forward(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array, slopes_H: jax.Array | None, context: Context,
            rule: Rule, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(y_BxLxHxV, lse_BxHxL: log of the sum of exp(scores), float32); arguments as in `attention.attention`."""
    tile = _tile(q_BxLxHxK, v_BxSxGxV, FORWARD)
    return _forward(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context, tile=tile, rule=rule, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("tile", "rule", "interpret"), inline=True)
def _forward(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context: Context, *, tile: Tile, rule: Rule, interpret):
    (B, L, H, K), V = q_BxLxHxK.shape, v_BxSxGxV.shape[3]
    call = _Call.of(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context, rule, tile)
    p, (specs, own, row) = call.plan, call.by_queries()
    y_BxLxHxV, lse_BxHxL = pl.pallas_call(
        functools.partial(_attention_forward, block=p.block_k, alibi=slopes_H is not None, rule=rule),
        grid=(p.length // p.block_q, H, B), in_specs=specs, out_specs=[own(p.value_width), row],
        out_shape=[like(q_BxLxHxK, (B, p.length, H, p.value_width), q_BxLxHxK.dtype),
                   like(q_BxLxHxK, (B, H, p.length), jnp.float32)],
        name="triton_attention_forward",
        **call.options(rule, K + V, interpret, q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, q_BxLxHxK),
    )(*call.arrays)
    return y_BxLxHxV[:, :L, :, :V], lse_BxHxL[:, :, :L]


def backward(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array, slopes_H: jax.Array | None, context: Context,
             y_BxLxHxV: jax.Array, lse_BxHxL: jax.Array, dy_BxLxHxV: jax.Array, rule: Rule, *, interpret=False) -> tuple:
    """(dq, dk, dv, dslopes_H or None), in the dtypes of the arguments, from what `forward` gave and y's gradient."""
    pulled_BxHxL = jnp.sum(dy_BxLxHxV.astype(jnp.float32) * y_BxLxHxV.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    arrays = q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context, lse_BxHxL, pulled_BxHxL, dy_BxLxHxV
    of_queries, of_keys = (_tile(q_BxLxHxK, v_BxSxGxV, which) for which in (QUERIES, KEYS))
    dq, dslopes = _backward_queries(*arrays, tile=of_queries, rule=rule, interpret=interpret)
    dk, dv = _backward_keys(*arrays, tile=of_keys, rule=rule, interpret=interpret)
    return dq, dk, dv, dslopes


def _pulls(p: shared.Plan, lse_BxHxL, pulled_BxHxL, dy_BxLxHxV) -> list[jax.Array]:
    return [shared.fill(lse_BxHxL, {2: p.length}), shared.fill(pulled_BxHxL, {2: p.length}),
            shared.fill(dy_BxLxHxV, {1: p.length, 3: p.value_width})]


@functools.partial(jax.jit, static_argnames=("tile", "rule", "interpret"), inline=True)
def _backward_queries(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context: Context, *pulls, tile: Tile, rule: Rule, interpret):
    """(dq, dslopes_H or None)"""
    (B, L, H, K), V, alibi = q_BxLxHxK.shape, v_BxSxGxV.shape[3], slopes_H is not None
    call = _Call.of(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context, rule, tile)
    p, (specs, own, row) = call.plan, call.by_queries()
    dq_BxLxHxK, *dslopes = pl.pallas_call(
        functools.partial(_attention_backward_queries, block=p.block_k, alibi=alibi, rule=rule),
        grid=(p.length // p.block_q, H, B), in_specs=[*specs, row, row, own(p.value_width)],
        out_specs=[own(p.width)] + [row] * alibi,
        out_shape=[like(q_BxLxHxK, (B, p.length, H, p.width), q_BxLxHxK.dtype)]
                  + [like(q_BxLxHxK, (B, H, p.length), jnp.float32)] * alibi,
        name="triton_attention_backward_queries",
        **call.options(rule, 2 * K + V, interpret, q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, pulls[2], q_BxLxHxK),
    )(*call.arrays, *_pulls(p, *pulls))
    return dq_BxLxHxK[:, :L, :, :K], jnp.sum(dslopes[0], axis=(0, 2)).astype(slopes_H.dtype) if alibi else None


@functools.partial(jax.jit, static_argnames=("tile", "rule", "interpret"), inline=True)
def _backward_keys(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context: Context, *pulls, tile: Tile, rule: Rule, interpret):
    """(dk, dv)"""
    B, S, G, K = k_BxSxGxK.shape
    V = v_BxSxGxV.shape[3]
    call = _Call.of(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, slopes_H, context, rule, tile, of_keys=True)
    p, (specs, pull_specs, out_specs) = call.plan, call.by_keys()
    dk_BxSxGxK, dv_BxSxGxV = pl.pallas_call(
        functools.partial(_attention_backward_keys, block=p.block_q, alibi=slopes_H is not None, rule=rule),
        grid=(p.keys // p.block_k, G, B), in_specs=[*specs, *pull_specs], out_specs=out_specs,
        out_shape=[like(q_BxLxHxK, (B, p.keys, G, p.width), k_BxSxGxK.dtype),
                   like(q_BxLxHxK, (B, p.keys, G, p.value_width), v_BxSxGxV.dtype)],
        name="triton_attention_backward_keys",
        **call.options(rule, 2 * (K + V), interpret, q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, pulls[2], k_BxSxGxK, v_BxSxGxV),
    )(*call.arrays, *_pulls(p, *pulls))
    return dk_BxSxGxK[:, :S, :, :K], dv_BxSxGxV[:, :S, :, :V]
