"""RWKV-4's WKV as Pallas TPU kernels, forward and backward: token after token, the sums in registers.

A program has a block of channels, SUBLANES x lanes of them in whole registers. Chunk after chunk its keys and values come to
VMEM; the sums stay there. The forward kernel writes the sums before each chunk where a gradient is to follow; the backward
kernel goes from the row's end, makes the sums before each token of a chunk again in VMEM, and pulls the cotangents through
the tokens (`jax.vjp` of the definition's one step, inside the kernel). Memory is the arguments and one set of sums a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.chunks_pallas import call
from kernels.varying import like, vary_alike

SUBLANES, LANES = 8, 256  # channels of a program, at most: the backward kernel's chunk of 64 tokens takes 8 MiB of VMEM
PADDING, TOKEN, FIRST = 0.0, 1.0, 2.0  # of a document


def _masks(kinds_1xQ: jax.Array, t: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(valid, reset) of token t, each of `shape`."""
    lane_1xQ = jax.lax.broadcasted_iota(jnp.int32, kinds_1xQ.shape, 1)
    kind_1x1 = jnp.sum(jnp.where(lane_1xQ == t, kinds_1xQ, 0.0), axis=1, keepdims=True)
    kind = jnp.broadcast_to(kind_1x1, shape)
    return kind != PADDING, kind == FIRST


def _tuple(ref) -> tuple[jax.Array, ...]:
    return tuple(ref[i] for i in range(ref.shape[0]))


def _store(ref, values: tuple[jax.Array, ...]) -> None:
    for i, value in enumerate(values):
        ref[i] = value


def _forward_body(k, v, kinds, rates, start, y, last, *rest, step: Callable, sums: type, keep_starts: bool):
    """One chunk. k, v, y: (Q, 8, lanes); kinds: (1, Q); rates, decay and bonus: (2, 8, lanes); sums: (3, 8, lanes)."""
    *starts, carried = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = start[...]

    if keep_starts:
        starts[0][...] = carried[...]
    (decay, bonus), kinds_1xQ = _tuple(rates), kinds[...]

    def token(t, before):
        after, y[t] = step(before, k[t], v[t], decay, bonus, *_masks(kinds_1xQ, t, decay.shape))
        return after

    _store(carried, jax.lax.fori_loop(0, k.shape[0], token, sums(*_tuple(carried))))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[...] = carried[...]


def _backward_body(
    k, v, kinds, rates, starts, dy, dlast, dk, dv, drates, dstart, carried, sums_Qx3xCxN, *, step: Callable, sums: type
):
    """One chunk, the last one first. Shapes as in `_forward_body`; sums_Qx3xCxN: before each token."""
    Q = k.shape[0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dlast[...]
        drates[...] = jnp.zeros_like(drates)

    (decay, bonus), kinds_1xQ = _tuple(rates), kinds[...]

    def again(t, before):
        _store(sums_Qx3xCxN.at[t], before)
        after, _ = step(before, k[t], v[t], decay, bonus, *_masks(kinds_1xQ, t, decay.shape))
        return after

    jax.lax.fori_loop(0, Q, again, sums(*_tuple(starts)))

    def token(i, carry):
        dsums, ddecay, dbonus = carry
        t = Q - 1 - i
        masks = _masks(kinds_1xQ, t, decay.shape)
        before = sums(*_tuple(sums_Qx3xCxN.at[t]))
        _, pull = jax.vjp(lambda *x: step(*x, *masks), before, k[t], v[t], decay, bonus)
        dsums, dk[t], dv[t], more_decay, more_bonus = pull((dsums, dy[t]))
        return dsums, ddecay + more_decay, dbonus + more_bonus

    zeros = jnp.zeros_like(decay)
    dsums, ddecay, dbonus = jax.lax.fori_loop(0, Q, token, (sums(*_tuple(carried)), zeros, zeros))
    _store(carried, dsums)
    drates[0] += ddecay
    drates[1] += dbonus

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dstart[...] = carried[...]


class _Step(NamedTuple):
    """The definition's `step`, and the type of its sums."""

    step: Callable
    sums: type


def _grid(k_BxMxQxCxN: jax.Array) -> tuple[tuple[int, int, int], int]:
    """(grid, lanes of a program)."""
    B, M, _, _, N = k_BxMxQxCxN.shape
    lanes = N if N <= LANES else next(n for n in (LANES, 128) if N % n == 0)
    return (B, N // lanes, M), lanes


def _forward(token: _Step, k, v, kinds, rates, start, keep_starts: bool) -> list[jax.Array]:
    """[y_BxMxQxCxN, last_Bx3xCxN] and, if asked, starts_BxMx3xCxN."""
    grid, lanes = _grid(k)
    outs = [(like(k, k.shape, jnp.float32), "wide"), (like(k, start.shape, jnp.float32), "lanes")]
    if keep_starts:
        outs.append((like(k, (*k.shape[:2], *start.shape[1:]), jnp.float32), "wide"))
    ins = [(k, "wide"), (v, "wide"), (kinds, "chunk"), (rates[None], "lanes"), (start, "lanes")]
    body = functools.partial(_forward_body, **token._asdict(), keep_starts=keep_starts)
    return call(body, "wkv_forward", 0, ins, outs, [(*start.shape[1:-1], lanes)], grid, back=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(token: _Step, k, v, kinds, rates, start):
    return tuple(_forward(token, k, v, kinds, rates, start, keep_starts=False))


def _scan_forward(token, k, v, kinds, rates, start):
    y, last, starts = _forward(token, k, v, kinds, rates, start, keep_starts=True)
    return (y, last), (k, v, kinds, rates, starts)


def _scan_backward(token, saved, cotangents):
    (k, v, kinds, rates, starts), (dy, dlast) = saved, cotangents
    grid, lanes = _grid(k)
    outs = [(like(k, k.shape, jnp.float32), "wide")] * 2
    outs += [(like(k, (k.shape[0], *rates.shape), jnp.float32), "lanes"), (like(k, dlast.shape, jnp.float32), "lanes")]
    ins = [(k, "wide"), (v, "wide"), (kinds, "chunk"), (rates[None], "lanes"), (starts, "wide"), (dy, "wide"), (dlast, "lanes")]
    state = (*dlast.shape[1:-1], lanes)
    body = functools.partial(_backward_body, **token._asdict())
    dk, dv, drates, dstart = call(body, "wkv_backward", 0, ins, outs, [state, (k.shape[2], *state)], grid, back=True)
    return dk, dv, None, drates.sum(0), dstart


_scan.defvjp(_scan_forward, _scan_backward)


def pallas(step: Callable, k_BxLxN, v_BxLxN, decay_N, bonus_N, valid_BxL, reset_BxL, state, chunk: int):
    """`wkv.reference` on a TPU, by its own `step`, `chunk` tokens in VMEM at a time."""
    (B, L, N), Q = k_BxLxN.shape, min(chunk, k_BxLxN.shape[1])
    lanes = math.ceil(N / SUBLANES)
    lanes += -lanes % 128 if lanes > LANES else 0

    def registers(x_xxN: jax.Array) -> jax.Array:
        """(..., 8, lanes)."""
        pad = [(0, 0)] * (x_xxN.ndim - 1) + [(0, SUBLANES * lanes - N)]
        return jnp.pad(x_xxN, pad).reshape(*x_xxN.shape[:-1], SUBLANES, lanes)

    def channels(x_xxCxN: jax.Array) -> jax.Array:
        return x_xxCxN.reshape(*x_xxCxN.shape[:-2], -1)[..., :N]

    def by_chunk(x_BxLx: jax.Array) -> jax.Array:
        x_BxLx = jnp.pad(x_BxLx, ((0, 0), (0, -L % Q)) + ((0, 0),) * (x_BxLx.ndim - 2))
        return x_BxLx.reshape(B, -1, Q, *x_BxLx.shape[2:])

    kinds_BxL = jnp.where(reset_BxL, FIRST, jnp.where(valid_BxL, TOKEN, PADDING))
    y_BxMxQxCxN, last_Bx3xCxN = _scan(_Step(step, type(state)), *vary_alike(
        by_chunk(registers(k_BxLxN)), by_chunk(registers(v_BxLxN)), by_chunk(kinds_BxL)[:, :, None, None],
        registers(jnp.stack([decay_N, bonus_N])), registers(jnp.stack(state, axis=1))))  # fmt: skip
    y_BxLxN = channels(y_BxMxQxCxN).reshape(B, -1, N)[:, :L]
    return y_BxLxN, type(state)(*jnp.moveaxis(channels(last_Bx3xCxN), 1, 0))
