"""The selective scan (Mamba, S6) as Pallas TPU kernels, forward and backward: token after token, the state in registers.

A program has a block of channels in the lanes and all N states of each in the sublanes: (N, lanes). Chunk after chunk
its inputs come to VMEM; the state stays there. The forward kernel writes the state before each chunk where a gradient is to
follow; the backward kernel goes from the row's end, makes a chunk's states again in VMEM, and goes through them backwards.
No (B, L, I, N) array exists; memory is the arguments and one (I, N) state a chunk.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.chunks_pallas import call
from kernels.varying import like, vary_alike

LANES = 512  # channels of one program, at most


def _at(columns_NxQ: jax.Array, t: jax.Array) -> jax.Array:
    """Column t, (N, 1)."""
    lane_NxQ = jax.lax.broadcasted_iota(jnp.int32, columns_NxQ.shape, 1)
    return jnp.sum(jnp.where(lane_NxQ == t, columns_NxQ, 0.0), axis=1, keepdims=True)


def _forward_body(x, dt, first, b, c, a, start, y, last, *rest, keep_starts: bool):
    """One chunk. x, dt, y: (Q, I); first: (1, Q); b, c: (N, Q); a and states: (N, I)."""
    *starts, carried, input_QxI, y_QxI = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = start[...]

    if keep_starts:
        starts[0][...] = carried[...]
    input_QxI[...] = dt[...] * x[...].astype(jnp.float32)
    a_NxI, b_NxQ, c_NxQ, keep_1xQ = a[...], b[...], c[...], 1.0 - first[...]

    def token(t, h_NxI):
        now = pl.ds(t, 1)
        decay_NxI = jnp.exp(dt[now] * a_NxI) * _at(keep_1xQ, t)
        h_NxI = decay_NxI * h_NxI + input_QxI[now] * _at(b_NxQ, t)
        y_QxI[now] = jnp.sum(h_NxI * _at(c_NxQ, t), axis=0, keepdims=True)
        return h_NxI

    carried[...] = jax.lax.fori_loop(0, x.shape[0], token, carried[...])
    y[...] = y_QxI[...].astype(y.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[...] = carried[...]


def _backward_body(
    x, dt, first, b, c, a, starts, dy, dlast, dx, ddt, db, dc, da, dstart, carried, input_QxI, dy_QxI, dinput_QxI, h_QxNxI
):
    """One chunk, the last one first. Shapes as in `_forward_body`; h_QxNxI: the states before each token."""
    Q = x.shape[0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dlast[...]
        da[...] = jnp.zeros_like(da)

    x_QxI = x[...].astype(jnp.float32)
    input_QxI[...] = dt[...] * x_QxI
    dy_QxI[...] = dy[...].astype(jnp.float32)
    a_NxI, b_NxQ, c_NxQ, keep_1xQ = a[...], b[...], c[...], 1.0 - first[...]

    def again(t, h_NxI):
        h_QxNxI[t] = h_NxI
        now = pl.ds(t, 1)
        return jnp.exp(dt[now] * a_NxI) * _at(keep_1xQ, t) * h_NxI + input_QxI[now] * _at(b_NxQ, t)

    after_NxI = jax.lax.fori_loop(0, Q, again, starts[...])
    lane_NxQ = jax.lax.broadcasted_iota(jnp.int32, b_NxQ.shape, 1)

    def token(i, carry):
        dh_NxI, h_NxI, da_NxI, db_NxQ, dc_NxQ = carry  # h: after the token
        t = Q - 1 - i
        now, before_NxI = pl.ds(t, 1), h_QxNxI[t]
        dt_1xI, dy_1xI = dt[now], dy_QxI[now]
        dh_NxI += _at(c_NxQ, t) * dy_1xI
        dc_NxQ = jnp.where(lane_NxQ == t, jnp.sum(h_NxI * dy_1xI, axis=1, keepdims=True), dc_NxQ)
        db_NxQ = jnp.where(lane_NxQ == t, jnp.sum(dh_NxI * input_QxI[now], axis=1, keepdims=True), db_NxQ)
        dinput_QxI[now] = jnp.sum(dh_NxI * _at(b_NxQ, t), axis=0, keepdims=True)
        dh_NxI *= jnp.exp(dt_1xI * a_NxI) * _at(keep_1xQ, t)
        dlog_NxI = dh_NxI * before_NxI
        ddt[now] = jnp.sum(dlog_NxI * a_NxI, axis=0, keepdims=True)
        return dh_NxI, before_NxI, da_NxI + dlog_NxI * dt_1xI, db_NxQ, dc_NxQ

    zeros = jnp.zeros_like
    end = carried[...], after_NxI, zeros(a_NxI), zeros(b_NxQ), zeros(c_NxQ)
    carried[...], _, da_NxI, db[...], dc[...] = jax.lax.fori_loop(0, Q, token, end)
    da[...] += da_NxI
    dx[...] = (dinput_QxI[...] * dt[...]).astype(dx.dtype)
    ddt[...] += dinput_QxI[...] * x_QxI

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dstart[...] = carried[...]


def _sizes(x_BxMxQxI: jax.Array, a_NxI: jax.Array) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(grid, (Q, N, lanes of a program))."""
    (B, M, Q, I), N = x_BxMxQxI.shape, a_NxI.shape[0]
    lanes = lanes_of(I, Q, N)
    return (B, I // lanes, M), (Q, N, lanes)


def _forward(x, dt, first, b, c, a, start, keep_starts: bool) -> list[jax.Array]:
    """[y_BxMxQxI, last_BxNxI] and, if asked, starts_BxMxNxI."""
    grid, (Q, _, lanes) = _sizes(x, a)
    outs = [(like(x, x.shape, x.dtype), "wide"), (like(x, start.shape, jnp.float32), "lanes")]
    if keep_starts:
        outs.append((like(x, (*x.shape[:2], *start.shape[1:]), jnp.float32), "wide"))
    ins = [(x, "wide"), (dt, "wide"), (first, "chunk"), (b, "chunk"), (c, "chunk"), (a[None], "lanes"), (start, "lanes")]
    scratch = [(a.shape[0], lanes), (Q, lanes), (Q, lanes)]
    body = functools.partial(_forward_body, keep_starts=keep_starts)
    return call(body, "selective_scan_forward", _read_flops(x, b), ins, outs, scratch, grid, back=False)


@jax.custom_vjp
def _scan(x, dt, first, b, c, a, start):
    return tuple(_forward(x, dt, first, b, c, a, start, keep_starts=False))


def _scan_forward(x, dt, first, b, c, a, start):
    y, last, starts = _forward(x, dt, first, b, c, a, start, keep_starts=True)
    return (y, last), (x, dt, first, b, c, a, starts)


def _scan_backward(saved, cotangents):
    (x, dt, first, b, c, a, starts), (dy, dlast) = saved, cotangents
    (B, P, M), (Q, N, lanes) = grid, _ = _sizes(x, a)
    outs = [(like(x, x.shape, x.dtype), "wide"), (like(x, dt.shape, jnp.float32), "wide")]
    outs += [(like(x, (B, M, P, N, Q), jnp.float32), "chunk")] * 2
    outs += [(like(x, (B, *a.shape), jnp.float32), "lanes"), (like(x, dlast.shape, jnp.float32), "lanes")]
    ins = [(x, "wide"), (dt, "wide"), (first, "chunk"), (b, "chunk"), (c, "chunk"), (a[None], "lanes"), (starts, "wide"),
           (dy, "wide"), (dlast, "lanes")]  # fmt: skip
    scratch = [(N, lanes), (Q, lanes), (Q, lanes), (Q, lanes), (Q, N, lanes)]
    dx, ddt, db, dc, da, dstart = call(
        _backward_body, "selective_scan_backward", 2 * _read_flops(x, b), ins, outs, scratch, grid, back=True)
    return dx, ddt, None, db.sum(2, keepdims=True), dc.sum(2, keepdims=True), da.sum(0), dstart


_scan.defvjp(_scan_forward, _scan_backward)


def lanes_of(I: int, Q: int, N: int) -> int:
    """Channels of one program: all of them, or a multiple of 128 that divides I and whose Q states fill at most 4 MiB."""
    room = max(1, min(LANES, 2**20 // (Q * N)) // 128)
    return I if I <= 128 * room else 128 * max(n for n in range(1, room + 1) if I % (128 * n) == 0)


def refusal(x_BxLxI: jax.Array, a_IxN: jax.Array, chunk: int) -> str | None:
    """Why the kernels can't serve these arguments; None: they can."""
    if x_BxLxI.dtype not in (jnp.float32, jnp.bfloat16):
        return f"selective_scan: pallas takes float32 and bfloat16, not {x_BxLxI.dtype}"
    if a_IxN.shape[1] * chunk > 2**14:
        return f"selective_scan: pallas has room for {2**14} states of a channel in a chunk, not {chunk} x {a_IxN.shape[1]}"
    return None


def pallas(
    x_BxLxI: jax.Array,
    dt_BxLxI: jax.Array,
    a_IxN: jax.Array,
    b_BxLxN: jax.Array,
    c_BxLxN: jax.Array,
    first_BxL: jax.Array,
    valid_BxL: jax.Array,
    h_BxIxN: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`selective_scan.reference` on a TPU, `chunk` tokens in VMEM at a time."""
    (B, L, I), Q = x_BxLxI.shape, min(chunk, x_BxLxI.shape[1])
    more = -I % 128 if I > 128 else 0  # channels in whole registers

    def by_chunk(x_BxLx: jax.Array, pad: int = 0) -> jax.Array:
        x_BxLx = jnp.pad(x_BxLx, ((0, 0), (0, -L % Q), (0, pad)))
        return x_BxLx.reshape(B, -1, Q, x_BxLx.shape[2])

    def columns(x_BxLxN: jax.Array) -> jax.Array:
        return jnp.swapaxes(by_chunk(x_BxLxN.astype(jnp.float32)), 2, 3)[:, :, None]

    valid_BxLx1 = valid_BxL[..., None]
    x_BxMxQxI = by_chunk(jnp.where(valid_BxLx1, x_BxLxI, 0), more)
    dt_BxMxQxI = by_chunk(jnp.where(valid_BxLx1, dt_BxLxI.astype(jnp.float32), 0.0), more)  # padding: decay 1, input 0
    a_NxI = jnp.pad(a_IxN.T, ((0, 0), (0, more)))
    h_BxNxI = jnp.pad(jnp.swapaxes(h_BxIxN, 1, 2), ((0, 0), (0, 0), (0, more)))
    y_BxMxQxI, h_BxNxI = _scan(*vary_alike(
        x_BxMxQxI, dt_BxMxQxI, columns(first_BxL[..., None]), columns(jnp.where(valid_BxLx1, b_BxLxN, 0)),
        columns(c_BxLxN), a_NxI, h_BxNxI))  # fmt: skip
    return y_BxMxQxI.reshape(B, -1, I + more)[:, :L, :I], jnp.swapaxes(h_BxNxI[..., :I], 1, 2)


def _read_flops(x_BxMxQxI: jax.Array, b_BxMx1xNxQ: jax.Array) -> float:
    """Of what is read from the states, as `selective_scan.chunked` has it: one product."""
    return 2.0 * math.prod(x_BxMxQxI.shape) * b_BxMx1xNxQ.shape[3]
