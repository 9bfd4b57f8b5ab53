"""What attention's kernels share: how a call is cut into blocks, which of them are visited, and what they cost.

Each row of the batch has a list of its visible blocks (`visits`), which a TPU's kernels read from scalar memory.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.visibility import Context, Rule

BLOCK = 512  # queries, and keys, of a block
LEAST_BLOCK = 128  # the lanes of a register
LONGEST_LIST = 65536  # blocks in all lists of a kernel: 256 KiB of a core's 1 MiB of scalar memory
ROW_BYTES = 2**23  # of the queries' gradients that the backward kernel keeps on the chip at one time
VMEM_BYTES = 48 * 2**20  # the smallest chips (v5p, tpu7x) have 64 MiB
FIRST, LAST, SOME, ALL = 1, 2, 4, 8  # of a visit: begins its row of blocks, ends it; some pairs are visible, all are
FLOOR = float(jnp.finfo(jnp.float32).min)  # finite, so that a query which sees nothing can't make a NaN


class Plan(NamedTuple):
    """Static sizes of a call: with the rule, what a trace of a kernel is kept by."""

    length: int  # L, padded to whole blocks, as S, K and V are
    keys: int
    width: int
    value_width: int
    block_q: int
    block_k: int


def up(size: int, unit: int) -> int:
    return size + -size % unit


def plan(L: int, S: int, K: int, V: int, heads: int = 0) -> Plan:
    """heads: of a key head, in the backward kernel, which holds the gradients of all of them: many take smaller blocks."""
    block_q, block_k = (min(BLOCK, up(max(size, 1), LEAST_BLOCK)) for size in (L, S))
    width = up(K, 64)
    if heads:
        fitting = ROW_BYTES // (4 * heads * width) // LEAST_BLOCK * LEAST_BLOCK
        block_q = min(block_q, max(fitting, LEAST_BLOCK))
    return Plan(up(L, block_q), up(S, block_k), width, up(V, 64), block_q, block_k)


def listed_queries(B: int, p: Plan) -> int:
    """Queries of a row, in whole blocks, whose lists fit into scalar memory: the kernels take so many at a time."""
    return LONGEST_LIST // (B * (p.keys // p.block_k)) * p.block_q


def held_queries(heads: int, p: Plan) -> int:
    """Queries of a row, in whole blocks, whose gradients fit on the chip, for all heads of a key head; 0: one block's don't."""
    return ROW_BYTES // (4 * heads * p.width * p.block_q) * p.block_q


def unfit(blocks: int, *arrays: jax.Array) -> str | None:
    """Why no kernel can serve these q, k, v with lists of so many blocks at the least; None if it can."""
    dtypes = {x.dtype.name for x in arrays}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        return f"q, k and v are {', '.join(sorted(dtypes))}, not all bfloat16 or all float32"
    if blocks > LONGEST_LIST:
        return f"{blocks} blocks of keys, over all rows, are more than {LONGEST_LIST}"
    return "an axis has length 0" if any(x.size == 0 for x in arrays) else None


def fill(x: jax.Array, sizes: dict[int, int]) -> jax.Array:
    """x, with zeros behind it up to each axis's size."""
    return jnp.pad(x, [(0, (sizes[axis] if axis in sizes else size) - size) for axis, size in enumerate(x.shape)])


def visits(some_BxIxJ: jax.Array, all_BxIxJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the lists, flat, T a row of the batch; the longest one's length). An entry: (i * J + j) * 16 + flags.

    Every i is visited at least once, so that its result is written. Behind a list's end its last entry comes again, without
    flags: nothing to load, nothing to do.
    """
    B, I, J = some_BxIxJ.shape
    column_J = jnp.arange(J)
    visited_BxIxJ = some_BxIxJ | (~jnp.any(some_BxIxJ, axis=2, keepdims=True) & (column_J == 0))
    first_BxIx1 = jnp.min(jnp.where(visited_BxIxJ, column_J, J), axis=2, keepdims=True)
    last_BxIx1 = jnp.max(jnp.where(visited_BxIxJ, column_J, -1), axis=2, keepdims=True)
    flags_BxIxJ = jnp.where(all_BxIxJ, ALL, jnp.where(some_BxIxJ, SOME, 0))
    flags_BxIxJ += FIRST * (column_J == first_BxIx1) + LAST * (column_J == last_BxIx1)
    entry_BxT = (jnp.arange(I * J).reshape(I, J) * 16 + flags_BxIxJ).reshape(B, I * J).astype(jnp.int32)
    visited_BxT = visited_BxIxJ.reshape(B, I * J)
    final_Bx1 = jnp.max(jnp.where(visited_BxT, entry_BxT, 0), axis=1, keepdims=True) // 16 * 16
    count_Bx1 = jnp.sum(visited_BxT, axis=1, keepdims=True, dtype=jnp.int32)
    list_BxT = jnp.sort(jnp.where(visited_BxT, entry_BxT, jnp.iinfo(jnp.int32).max), axis=1)
    list_BxT = jnp.where(jnp.arange(I * J) < count_Bx1, list_BxT, final_Bx1)
    return list_BxT.reshape(-1), jnp.max(count_Bx1)


def place(entry: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    """(row, column) of the block that an entry of a list names."""
    place = jax.lax.shift_right_logical(entry, 4)
    return jax.lax.div(place, columns), jax.lax.rem(place, columns)  # not // and %: those ask for the sign, and the device


def split(x: jax.Array, axis: int, chunk: int) -> jax.Array:
    """Chunks of the axis, in front; what fills the last one up is segment 0, which sees nothing."""
    x = fill(x, {axis: up(x.shape[axis], chunk)})
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1:]), axis, 0)


def split_queries(context: Context, chunk: int) -> tuple[jax.Array, jax.Array]:
    return split(context.q_positions_BxL, 1, chunk), split(context.q_segment_ids_BxL, 1, chunk)


def of_queries(context: Context, positions: jax.Array, segment_ids: jax.Array) -> Context:
    return context._replace(q_positions_BxL=positions, q_segment_ids_BxL=segment_ids)


def dot(a, b, contract: tuple[int, int]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def compiler(semantics: str) -> pltpu.CompilerParams:
    """semantics: of each axis of the grid, p(arallel) or a(rbitrary)."""
    words = tuple({"p": "parallel", "a": "arbitrary"}[letter] for letter in semantics)
    return pltpu.CompilerParams(dimension_semantics=words, vmem_limit_bytes=VMEM_BYTES)


def computed_share(p: Plan, rule: Rule) -> float:
    """Of all pairs of blocks, those that the kernels multiply in a row of one document, in the mean over its queries (`p` may
    hold a part of them). Packed rows take fewer: whose they are is known when the step runs. Of a prefix, nothing is known."""
    if rule.mask_kind == "prefix":
        return 1.0
    columns, firsts, computed = p.keys // p.block_k, range(0, p.keys, p.block_q), 0
    for first in firsts:
        last, begin, end = first + p.block_q - 1, 0, columns
        if rule.mask_kind == "causal":
            end = min(columns, last // p.block_k + 1)
        if rule.window is not None:
            begin = max(0, (first - rule.window + 1) // p.block_k)
            if rule.mask_kind == "bidirectional":
                end = min(columns, (last + rule.window - 1) // p.block_k + 1)
        computed += end - begin
    return computed / (columns * len(firsts))


def cost(products: int, pairs: float, *arrays: jax.Array) -> pl.CostEstimate:
    """products: multiply-adds of a pair of a query and a key; pairs: those that are computed."""
    size, bytes_accessed = round(pairs), sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=2 * products * size, transcendentals=size, bytes_accessed=bytes_accessed)
