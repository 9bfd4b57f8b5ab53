"""Attention over keys that are split along a mesh axis: they go round the ring of its devices, the queries stay.

Each device holds its own shard of a row's queries and of its keys. P times it attends to the keys that it has and hands them
on; the parts are joined by their log-sum-exps. No device ever holds more than two shards of keys. Who sees whom is a matter of
positions and segment ids, which travel with the keys: shards may be cut in any order, and where the kernel skips blocks
(flash), one that lies wholly ahead costs next to nothing. (Then the last device of a causal row has the most work.)

Source: Liu et al. 2023 (Ring Attention), algorithm 1; the join: Dao et al. 2022, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.varying import vary_alike
from kernels.visibility import Context, Rule

AxisName = str | tuple[str, ...]


def _pass_on(tree: Any, axis_name: AxisName) -> Any:
    """Every device's arrays to the next one."""
    size = jax.lax.axis_size(axis_name)
    ring = [(index, (index + 1) % size) for index in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, ring), tree)


def _keys(k: jax.Array, v: jax.Array, context: Context) -> tuple:
    return k, v, context.k_positions_BxS, context.k_segment_ids_BxS, context.k_prefix_BxS


def _meet(context: Context, keys: tuple) -> tuple[jax.Array, jax.Array, Context]:
    """(k, v, and the queries' context with these keys)."""
    k, v, positions, segment_ids, prefix = keys
    return k, v, context._replace(k_positions_BxS=positions, k_segment_ids_BxS=segment_ids, k_prefix_BxS=prefix)


def forward(q, k, v, slopes, context: Context, rule: Rule, *, attend: Callable, axis_name: AxisName) -> tuple:
    """`attend`, a forward pass of attention.Form, over the keys of all devices. Results as its own."""

    def body(carry, _):
        keys, y_BxLxHxV, lse_BxHxL = carry
        k, v, own = _meet(context, keys)
        part_BxLxHxV, part_lse_BxHxL = attend(q, k, v, slopes, own, rule)
        total_BxHxL = jnp.logaddexp(lse_BxHxL, part_lse_BxHxL)
        share = lambda lse: jnp.swapaxes(jnp.exp(lse - total_BxHxL), 1, 2)[..., None]
        y_BxLxHxV = y_BxLxHxV * share(lse_BxHxL) + part_BxLxHxV * share(part_lse_BxHxL)
        return (_pass_on(keys, axis_name), y_BxLxHxV, total_BxHxL), None

    B, L, H, _ = q.shape
    y, _ = vary_alike(jnp.zeros((B, L, H, v.shape[3]), jnp.float32), q)
    lse, _ = vary_alike(jnp.full((B, H, L), jnp.finfo(jnp.float32).min), q)  # as of a query that sees nothing
    (_, y, lse), _ = jax.lax.scan(body, (_keys(k, v, context), y, lse), length=jax.lax.axis_size(axis_name))
    return y.astype(q.dtype), lse


def backward(q, k, v, slopes, context: Context, y, lse, dy, rule: Rule, *, pull: Callable, axis_name: AxisName) -> tuple:
    """`pull`, the backward pass of the same Form: keys go round once more, and their gradients with them, home."""

    def body(carry, _):
        keys, dkeys, own_sums = carry
        k, v, own = _meet(context, keys)
        dq, dk, dv, dslopes = pull(q, k, v, slopes, own, y, lse, dy, rule)
        dkeys, own_sums = jax.tree.map(jnp.add, (dkeys, own_sums), ((dk, dv), (dq, dslopes)))
        return (*_pass_on((keys, dkeys), axis_name), own_sums), None

    zeros = jax.tree.map(lambda x: vary_alike(jnp.zeros(x.shape, jnp.float32), q)[0], ((k, v), (q, slopes)))
    (_, (dk, dv), (dq, dslopes)), _ = jax.lax.scan(body, (_keys(k, v, context), *zeros), length=jax.lax.axis_size(axis_name))
    dslopes = None if slopes is None else dslopes.astype(slopes.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dslopes
