"""Rows to the devices of their experts and back: a ragged all-to-all inside `jax.shard_map`, each way the other's gradient.

P devices along `axis_name` hold E experts, E/P each, in order. Every device has M rows sorted by expert, the ones of no
expert last; `counts_PxE` says how many rows each device has for each expert. `dispatch` fills a device's buffer with all
devices' rows for its experts, sorted by expert, then by sender; `collect` brings rows of such a buffer home.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...]


class Plan(NamedTuple):
    """Where device p's rows for expert e begin, in its own rows and in the buffer of the expert's device, and how many."""

    starts_PxE: jax.Array
    slots_PxE: jax.Array
    counts_PxE: jax.Array


def make_plan(counts_PxE: jax.Array) -> Plan:
    devices, experts = counts_PxE.shape
    starts_PxE = jnp.cumsum(counts_PxE, axis=1) - counts_PxE
    # For each receiver, its experts in turn, and for each of them the senders.
    by_receiver = counts_PxE.reshape(devices, devices, -1).transpose(1, 2, 0).reshape(devices, -1)
    slots = jnp.cumsum(by_receiver, axis=1) - by_receiver
    slots_PxE = slots.reshape(devices, -1, devices).transpose(2, 0, 1).reshape(devices, experts)
    return Plan(starts_PxE, slots_PxE, counts_PxE)


def _expert_of_rows(counts_E: jax.Array, rows: int) -> jax.Array:
    """E for the rows behind the last expert's."""
    return jnp.searchsorted(jnp.cumsum(counts_E), jnp.arange(rows), side="right")


def _received(table_PxE: jax.Array, axis_name: AxisName) -> jax.Array:
    """Of a table by sender and expert, the entries of this device's experts: by sender, then expert."""
    devices = table_PxE.shape[0]
    return table_PxE.reshape(devices, devices, -1)[:, jax.lax.axis_index(axis_name)].reshape(-1)


def gathered_dispatch(x_MxD: jax.Array, plan: Plan, size: int, axis_name: AxisName) -> jax.Array:
    """By gathering all devices' rows: for back ends without a ragged all-to-all. P times its traffic."""
    devices, experts = plan.counts_PxE.shape
    rows = x_MxD.shape[0]
    x_PxMxD = jax.lax.all_gather(x_MxD, axis_name)
    expert_PxM = jax.vmap(functools.partial(_expert_of_rows, rows=rows))(plan.counts_PxE)
    look_up = functools.partial(jnp.take_along_axis, indices=expert_PxM, axis=1, mode="fill", fill_value=0)
    slot_PxM = jnp.arange(rows) - look_up(plan.starts_PxE) + look_up(plan.slots_PxE)
    mine_PxM = expert_PxM // (experts // devices) == jax.lax.axis_index(axis_name)
    slot_PxM = jnp.where(mine_PxM, slot_PxM, size)
    buffer = jnp.zeros((size, x_MxD.shape[1]), x_MxD.dtype)
    return buffer.at[slot_PxM.reshape(-1)].set(x_PxMxD.reshape(-1, x_MxD.shape[1]), mode="drop")


def gathered_collect(y_RxD: jax.Array, plan: Plan, size: int, axis_name: AxisName) -> jax.Array:
    """The way back of `gathered_dispatch`, by gathering all devices' buffers."""
    devices, experts = plan.counts_PxE.shape
    me = jax.lax.axis_index(axis_name)
    y_PxRxD = jax.lax.all_gather(y_RxD, axis_name)
    expert_M = _expert_of_rows(plan.counts_PxE[me], size)
    held_M = jnp.minimum(expert_M, experts - 1)
    slot_M = jnp.arange(size) - plan.starts_PxE[me][held_M] + plan.slots_PxE[me][held_M]
    y_MxD = y_PxRxD[held_M // (experts // devices), slot_M]
    return jnp.where((expert_M < experts)[:, None], y_MxD, 0)


def ragged_dispatch(x_MxD: jax.Array, plan: Plan, size: int, axis_name: AxisName) -> jax.Array:
    """One slice for each expert, which lands where it belongs: the buffer needs no sorting."""
    me = jax.lax.axis_index(axis_name)
    return jax.lax.ragged_all_to_all(
        x_MxD, jnp.zeros((size, x_MxD.shape[1]), x_MxD.dtype), plan.starts_PxE[me], plan.counts_PxE[me], plan.slots_PxE[me],
        _received(plan.counts_PxE, axis_name), axis_name=axis_name)


def ragged_collect(y_RxD: jax.Array, plan: Plan, size: int, axis_name: AxisName) -> jax.Array:
    """The same slices, back to where they began."""
    received = functools.partial(_received, axis_name=axis_name)
    return jax.lax.ragged_all_to_all(
        y_RxD, jnp.zeros((size, y_RxD.shape[1]), y_RxD.dtype), received(plan.slots_PxE), received(plan.counts_PxE),
        received(plan.starts_PxE), plan.counts_PxE[jax.lax.axis_index(axis_name)], axis_name=axis_name)


IMPLEMENTATIONS: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "gathered": (gathered_dispatch, gathered_collect),
    "ragged": (ragged_dispatch, ragged_collect),
}


def _run(way: int, x: jax.Array, plan: Plan, size: int, axis_name: AxisName, implementation: str | None) -> jax.Array:
    ways = {name: functools.partial(both[way], size=size, axis_name=axis_name) for name, both in IMPLEMENTATIONS.items()}
    if implementation is not None:
        return ways[implementation](x, plan)
    return jax.lax.platform_dependent(x, plan, tpu=ways["ragged"], cuda=ways["ragged"], default=ways["gathered"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5, 6))
def _exchange(way, x, plan, rows, size, axis_name, implementation):
    return _run(way, x, plan, (size, rows)[way], axis_name, implementation)


def _forward(way, x, plan, rows, size, axis_name, implementation):
    return _exchange(way, x, plan, rows, size, axis_name, implementation), plan


def _backward(way, rows, size, axis_name, implementation, plan, dy):
    return _exchange(1 - way, dy, plan, rows, size, axis_name, implementation), None


_exchange.defvjp(_forward, _backward)


def dispatch(
    x_MxD: jax.Array, plan: Plan, size: int, axis_name: AxisName, *, implementation: str | None = None,
) -> jax.Array:
    """buffer_RxD, R = `size`: every device's rows for this device's experts, zeros behind them.

    Args:
      x_MxD: rows sorted by expert; those behind the last expert's go nowhere.
      plan: `make_plan(counts_PxE)`, int32, the same on all devices.
      size: rows of the buffer; what doesn't fit is undefined, so give room for the worst case.
      axis_name: the manual mesh axis (or axes) that the experts lie on.
      implementation: a key of IMPLEMENTATIONS; None: `ragged` on TPU and GPU, `gathered` elsewhere, chosen when lowered.

    Raises:
      ValueError: an unknown implementation, or experts that the devices don't divide.

    Source: the all-to-all of GShard (Lepikhin et al. 2021), section 3.2, without its capacity.
    """
    _check(plan, implementation)
    return _exchange(0, x_MxD, plan, x_MxD.shape[0], size, axis_name, implementation)


def collect(
    y_RxD: jax.Array, plan: Plan, rows: int, axis_name: AxisName, *, implementation: str | None = None,
) -> jax.Array:
    """y_MxD, M = `rows`: the buffer's rows where `dispatch` took them from, zeros for those that it didn't take."""
    _check(plan, implementation)
    return _exchange(1, y_RxD, plan, rows, y_RxD.shape[0], axis_name, implementation)


def _check(plan: Plan, implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"expert_exchange: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    devices, experts = plan.counts_PxE.shape
    if experts % devices:
        raise ValueError(f"expert_exchange: {devices} devices don't divide {experts} experts")
