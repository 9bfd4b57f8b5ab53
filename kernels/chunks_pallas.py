"""Recurrences over rows as Pallas TPU kernels: chunk after chunk with the state in VMEM, and their derivative.

A kernel is two functions of one chunk: `common`, of what its heads share, and `head`, of one head and its state. The
forward kernel runs them along the row and, where a gradient is to follow, writes the state before each chunk. The backward
kernel goes along the row from its end with the state's cotangent in VMEM: it makes a chunk's values again from the
state before it and pulls the cotangents through them (`jax.vjp` of the same two functions, inside the kernel). So
what a recurrence has to say is its forward chunk alone, and memory is the arguments and one state a chunk.

M chunks of Q tokens; P programs of R heads each; G groups that share, P a multiple of G. A program's heads lie side
by side in the lanes, as in the model: nothing is transposed but what has one number a token and head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.varying import like

Arrays = tuple[jax.Array, ...]
HEADS, LANES = 4, 512  # of one program, at most: what it has in VMEM fits the 16 MiB that every generation gives a kernel


class Kernel(NamedTuple):
    """common(dtype, shared, fixed) -> arrays; head(dtype, tokens, shared, common, fixed, state) -> (y, state).

    All float arguments come as float32 (Q, ...) values, those of one number a token and head as (1, Q); `dtype` is
    that of the first token array, for the operands of matrix products. `name`: of the calls, with _forward and _backward.
    `flops`: from a call's arguments, (forward's, backward's), as the portable form multiplies: one count on every back end.
    """

    name: str
    common: Callable[..., Arrays]
    head: Callable[..., tuple[jax.Array, jax.Array]]
    flops: Callable[..., tuple[float, float]]


def call(
    body: Callable, name: str, flops: float, ins: list, outs: list, scratch: list, grid: tuple, back: bool
) -> list[jax.Array]:
    """`body` at every (b, p, m), m from the end if `back`. ins, outs: (array or shape, kind), see `_block`."""
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in (*ins, *outs))
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[_block(x.shape, kind, grid, back) for x, kind in ins],
        out_specs=[_block(x.shape, kind, grid, back) for x, kind in outs],
        out_shape=[x for x, _ in outs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        cost_estimate=pl.CostEstimate(flops=int(flops), transcendentals=0, bytes_accessed=moved),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=name,
    )(*(x for x, _ in ins))


def _block(shape: tuple[int, ...], kind: str, grid: tuple[int, int, int], back: bool) -> pl.BlockSpec:
    """Of program p in chunk m. wide: (B, M, ..., lanes of all programs); lanes: (B or 1, ..., lanes of all programs); chunk:
    (B, M, P or a divisor, ...); row: (B, P, ...). What isn't named is whole in a block."""
    _, P, M = grid
    at = lambda m: M - 1 - m if back else m
    if kind == "wide":
        inner = shape[2:-1]
        return pl.BlockSpec((None, None, *inner, shape[-1] // P), lambda b, p, m: (b, at(m), *(0,) * len(inner), p))
    if kind == "lanes":
        inner = shape[1:-1]
        return pl.BlockSpec((None, *inner, shape[-1] // P), lambda b, p, m: (b if shape[0] > 1 else 0, *(0,) * len(inner), p))
    if kind == "row":
        return pl.BlockSpec((None, None, *shape[2:]), lambda b, p, m: (b, p) + (0,) * len(shape[2:]))
    share = P // shape[2]  # `//` in the index would ask which TPU this is
    zeros = (0,) * len(shape[3:])
    return pl.BlockSpec((None, None, None, *shape[3:]), lambda b, p, m: (b, at(m), jax.lax.div(p, share), *zeros))


def _kind(x: jax.Array) -> str:
    return "wide" if x.ndim == 4 else "chunk"


def _groups(refs: tuple, *sizes: int) -> list[tuple]:
    """The first sizes[0] of them, then sizes[1], ..., and the rest."""
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [refs[a:b] for a, b in zip(ends, [*ends[1:], len(refs)])]


def _lanes(ref, kind: str, r: int, R: int) -> tuple[slice, slice]:
    """Where head r's (Q, ...) lies, or its (1, Q) where it has one number a token."""
    width = ref.shape[1] // R
    return (slice(None), slice(r * width, (r + 1) * width)) if kind == "wide" else (slice(r, r + 1), slice(None))


def _forward(kernel: Kernel, tokens, shared, fixed, state, keep: bool) -> tuple[Arrays, jax.Array, jax.Array | None]:
    """(y_BxMxQxPRV in the first token array's dtype, state_BxPxRx.. after the row, starts_BxMxPxRx.. or None)."""
    (B, M, Q), (P, R), dtype, kinds = tokens[0].shape[:3], state.shape[1:3], tokens[0].dtype, [_kind(x) for x in tokens]
    wide = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    one = [wide((Q, x.shape[3] // (P * R)) if x.ndim == 4 else (1, Q)) for x in tokens]
    now, ids = [wide(x.shape[3:]) for x in shared], [jax.ShapeDtypeStruct(x.shape[3:], x.dtype) for x in fixed]
    common = jax.eval_shape(functools.partial(kernel.common, dtype), now, ids)
    y, _ = jax.eval_shape(functools.partial(kernel.head, dtype), one, now, common, ids, wide(state.shape[3:]))
    x = tokens[0]
    outs = [(like(x, (B, M, Q, P * R * y.shape[1]), dtype), "wide"), (like(x, state.shape, jnp.float32), "row")]
    if keep:
        outs.append((like(x, (B, M, *state.shape[1:]), jnp.float32), "chunk"))
    sizes = len(tokens), len(shared), len(fixed)

    def body(*refs):
        tokens, shared, fixed, (start, y, last, *starts, carried) = _groups(refs, *sizes)

        @pl.when(pl.program_id(2) == 0)
        def _():
            carried[...] = start[...]

        shared, fixed = [x[...].astype(jnp.float32) for x in shared], [x[...] for x in fixed]
        common = kernel.common(dtype, shared, fixed)
        for r in range(R):
            before = carried[r]
            if keep:
                starts[0][r] = before
            own = [x[_lanes(x, kind, r, R)].astype(jnp.float32) for x, kind in zip(tokens, kinds)]
            y_QxV, carried[r] = kernel.head(dtype, own, shared, common, fixed, before)
            y[_lanes(y, "wide", r, R)] = y_QxV.astype(y.dtype)

        @pl.when(pl.program_id(2) == M - 1)
        def _():
            last[...] = carried[...]

    ins = [*zip(tokens, kinds), *((x, "chunk") for x in (*shared, *fixed)), (state, "row")]
    flops, _ = kernel.flops(*(x for x, _ in ins))
    out = call(body, f"{kernel.name}_forward", flops, ins, outs, [state.shape[2:]], (B, P, M), back=False)
    return out[0], out[1], out[2] if keep else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(kernel: Kernel, tokens: Arrays, shared: Arrays, fixed: Arrays, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every head's row through `kernel`: (y, wide, in the first token array's dtype; the state after, float32).

    Args:
      tokens: each head's own, wide: (B, M, Q, P * R * width), or of one number: (B, M, P, R, Q); first a wide one,
        which gives the products their dtype. Mosaic wants R * width to be a multiple of 128, or P = 1.
      shared: (B, M, G, ...), one for P / G programs. Their gradients are summed in float32.
      fixed: (B, M, 1, ...), without a gradient.
      state: (B, P, R, ...), float32, before the row.
    """
    return _forward(kernel, tokens, shared, fixed, state, keep=False)[:2]


def _scan_forward(kernel, tokens, shared, fixed, state):
    y, last, starts = _forward(kernel, tokens, shared, fixed, state, keep=True)
    return (y, last), (tokens, shared, fixed, starts)


def _scan_backward(kernel, saved, cotangents):
    (tokens, shared, fixed, starts), (dy, dlast) = saved, cotangents
    (B, M), (P, R), dtype, kinds = tokens[0].shape[:2], dlast.shape[1:3], tokens[0].dtype, [_kind(x) for x in tokens]
    x = tokens[0]
    outs = [(like(x, a.shape, a.dtype), kind) for a, kind in zip(tokens, kinds)]
    outs += [(like(x, (B, M, P, *a.shape[3:]), jnp.float32), "chunk") for a in shared]
    outs.append((like(x, dlast.shape, jnp.float32), "row"))
    sizes = len(tokens), len(shared), len(fixed)

    def body(*refs):
        tokens, shared, fixed, (starts, dy, dlast), dtokens, dshared, (dfirst, carried) = _groups(refs, *sizes, 3, *sizes[:2])

        @pl.when(pl.program_id(2) == 0)
        def _():
            carried[...] = dlast[...]

        shared, fixed = [x[...].astype(jnp.float32) for x in shared], [x[...] for x in fixed]
        common, pull_common = jax.vjp(lambda shared: kernel.common(dtype, shared, fixed), shared)
        sums = jax.tree.map(jnp.zeros_like, (shared, common))
        for r in range(R):
            head = lambda *one: kernel.head(dtype, *one[:3], fixed, one[3])
            own = [x[_lanes(x, kind, r, R)].astype(jnp.float32) for x, kind in zip(tokens, kinds)]
            _, pull = jax.vjp(head, own, shared, common, starts[r])
            grads, *more, carried[r] = pull((dy[_lanes(dy, "wide", r, R)].astype(jnp.float32), carried[r]))
            sums = jax.tree.map(jnp.add, sums, tuple(more))
            for ref, kind, grad in zip(dtokens, kinds, grads, strict=True):
                ref[_lanes(ref, kind, r, R)] = grad.astype(ref.dtype)
        for ref, own, through in zip(dshared, sums[0], *pull_common(sums[1]), strict=True):
            ref[...] = own + through

        @pl.when(pl.program_id(2) == M - 1)
        def _():
            dfirst[...] = carried[...]

    ins = [*zip(tokens, kinds), *((a, "chunk") for a in (*shared, *fixed, starts)), (dy, "wide"), (dlast, "row")]
    _, flops = kernel.flops(*(x for x, _ in ins))
    *grads, dfirst = call(body, f"{kernel.name}_backward", flops, ins, outs, [dlast.shape[2:]], (B, P, M), back=True)
    dtokens, dshared = tuple(grads[: len(tokens)]), grads[len(tokens) :]
    dshared = tuple(d.reshape(*a.shape[:3], -1, *a.shape[3:]).sum(3).astype(a.dtype) for d, a in zip(dshared, shared))
    return dtokens, dshared, None, dfirst


scan.defvjp(_scan_forward, _scan_backward)


def layout(heads: int, group: int, *widths: int) -> tuple[int, ...]:
    """(heads of a program, all of one group; lanes of a head: each width, more where a program's would end in a register)."""
    divisors = [n for n in range(1, HEADS + 1) if group % n == 0 and (n == 1 or n * max(widths) <= LANES)]
    full = [n for n in divisors if n == heads or all(n * width % 128 == 0 for width in widths)]
    if full:
        return full[-1], *widths
    lanes = 128 // math.gcd(divisors[-1], 128)
    return divisors[-1], *(width + -width % lanes for width in widths)


def by_head(x_BxMxQxH: jax.Array, R: int) -> jax.Array:
    """(B, M, P, R, Q)."""
    B, M, Q, H = x_BxMxQxH.shape
    return jnp.swapaxes(x_BxMxQxH, 2, 3).reshape(B, M, H // R, R, Q)


def weights(log_1xQ: jax.Array, documents_1xQ: jax.Array, old_1xQ: jax.Array) -> tuple[jax.Array, ...]:
    """(decay_QxQ from column to row, 0 where it isn't seen; since_Qx1 the state before, 0 where nothing of it is left;
    until_1xQ the chunk's end; kept_1x1: what the chunk leaves of the state)."""
    Q = log_1xQ.shape[1]
    log_Qx1, old_Qx1, end_1x1, still_1x1 = column(log_1xQ), column(old_1xQ) != 0, last(log_1xQ), last(old_1xQ) != 0
    above_QxQ = jax.lax.broadcasted_iota(jnp.int32, (Q, Q), 0) >= jax.lax.broadcasted_iota(jnp.int32, (Q, Q), 1)
    seen_QxQ = (column(documents_1xQ) == documents_1xQ) & above_QxQ
    decay_QxQ = jnp.exp(jnp.where(seen_QxQ, log_Qx1 - log_1xQ, -jnp.inf))
    until_1xQ = jnp.exp(jnp.where(documents_1xQ == last(documents_1xQ), end_1x1 - log_1xQ, -jnp.inf))
    since_Qx1 = jnp.where(old_Qx1, jnp.exp(jnp.where(old_Qx1, log_Qx1, 0.0)), 0.0)
    kept_1x1 = jnp.where(still_1x1, jnp.exp(jnp.where(still_1x1, end_1x1, 0.0)), 0.0)
    return decay_QxQ, since_Qx1, until_1xQ, kept_1x1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(dtype: jnp.dtype, a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """a and b, summed over these axes: operands in `dtype`, here and in the derivative, float32 out; float32 ones exactly."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), numbers, precision, preferred_element_type=jnp.float32)


def _product_forward(dtype, a, b, axes):
    return product(dtype, a, b, axes), (a, b)


def _product_backward(dtype, axes, saved, dy):
    (a, b), (i, j) = saved, axes
    da = product(dtype, dy, b, (1, 1 - j)) if i else product(dtype, b, dy, (1 - j, 1))
    db = product(dtype, dy, a, (0, 1 - i)) if j else product(dtype, a, dy, (1 - i, 0))
    return da, db


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def column(row_1xQ: jax.Array) -> jax.Array:
    """The same numbers as (Q, 1)."""
    return row_1xQ.T


column.defvjp(lambda row_1xQ: (column(row_1xQ), None), lambda _, d_Qx1: (d_Qx1.T,))


def last(row_1xQ: jax.Array) -> jax.Array:
    """Its last number, (1, 1)."""
    Q = row_1xQ.shape[1]
    at = jax.lax.broadcasted_iota(jnp.int32, (1, Q), 1) == Q - 1
    return jnp.sum(jnp.where(at, row_1xQ, 0), axis=1, keepdims=True)
