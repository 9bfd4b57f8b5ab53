"""Rows to their experts' devices and back, against plain loops; the ragged form's arguments obey its own contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels import expert_exchange
from kernels.expert_exchange import collect, dispatch, make_plan

P, E, M, D, SIZE = 4, 8, 6, 3, 24
COUNTS = {
    "mixed": [[1, 0, 2, 0, 0, 1, 1, 1], [0, 0, 0, 3, 0, 0, 0, 2], [2, 2, 2, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 1]],
    "all to one": [[0, 0, 6, 0, 0, 0, 0, 0], [0, 0, 3, 3, 0, 0, 0, 0], [0, 0, 0, 6, 0, 0, 0, 0], [0, 0, 6, 0, 0, 0, 0, 0]],
    "nothing": [[0] * E] * P,
}


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(P, M, D)).astype(np.float32)


def oracle(x_PxMxD: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The buffers: by expert, then by sender."""
    starts = np.cumsum(counts, axis=1) - counts
    buffers = np.zeros((P, SIZE, D))
    for device in range(P):
        mine = [x_PxMxD[p, starts[p, e] : starts[p, e] + counts[p, e]] for e in (2 * device, 2 * device + 1) for p in range(P)]
        filled = np.concatenate(mine)
        buffers[device, : len(filled)] = filled
    return buffers


def on_devices(devices, function, *arrays):
    mesh = jax.make_mesh((P,), ("expert",), axis_types=(AxisType.Auto,), devices=devices)
    split = PartitionSpec("expert")
    local = lambda *arrays: function(*(a[0] for a in arrays))[None]
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))(*arrays)


@pytest.mark.parametrize("name", COUNTS)
def test_there_and_back(name, devices):
    counts, x = np.array(COUNTS[name], np.int32), rows()
    plan = make_plan(jnp.asarray(counts))
    there = on_devices(devices, lambda x: dispatch(x, plan, SIZE, "expert"), x)
    np.testing.assert_array_equal(there, oracle(x, counts))
    back = on_devices(devices, lambda y: collect(y, plan, M, "expert"), there)
    np.testing.assert_array_equal(back, np.where(np.arange(M)[None, :, None] < counts.sum(1)[:, None, None], x, 0.0))


@pytest.mark.parametrize("name", COUNTS)
def test_each_way_is_the_other_s_gradient(name, devices):
    """<dispatch(x), y> = <x, collect(y)>, and that is what autodiff says."""
    plan, x, y = make_plan(jnp.asarray(COUNTS[name], jnp.int32)), rows(), np.random.default_rng(1).normal(size=(P, SIZE, D))
    y = y.astype(np.float32)

    def product(way, a, b):
        return jnp.sum(way(a) * b)

    there = lambda x: on_devices(devices, lambda x: dispatch(x, plan, SIZE, "expert"), x)
    back = lambda y: on_devices(devices, lambda y: collect(y, plan, M, "expert"), y)
    d_x = jax.grad(functools.partial(product, there))(x, y)
    np.testing.assert_array_equal(d_x, back(y))
    d_y = jax.grad(functools.partial(product, back))(y, x)
    np.testing.assert_array_equal(d_y, there(x))


def loop_of_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes):
    """What `jax.lax.ragged_all_to_all` is documented to do, for all devices' arguments at once."""
    per_device = send_sizes.shape[1] // P
    result = output.copy()
    for sender in range(P):
        for i in range(send_sizes.shape[1]):
            receiver, size = i // per_device, send_sizes[sender, i]
            assert size == recv_sizes[receiver, sender * per_device + i % per_device]
            to, source = output_offsets[sender, i], input_offsets[sender, i]
            result[receiver, to : to + size] = operand[sender, source : source + size]
    return result


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("way", [0, 1])
def test_the_ragged_form_asks_for_the_same(name, way, devices, monkeypatch):
    """No CPU runs the collective: its arguments are taken down and given to its documented loop."""
    counts, x = np.array(COUNTS[name], np.int32), rows()
    plan = make_plan(jnp.asarray(counts))
    operand = (x, oracle(x, counts).astype(np.float32))[way]
    size = (SIZE, M)[way]
    taken = []

    def take_down(operand, output, *offsets, axis_name):
        taken.append(output.shape)
        return jnp.stack(offsets)

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", take_down)
    function = expert_exchange.IMPLEMENTATIONS["ragged"][way]
    offsets = np.asarray(on_devices(devices, lambda x: function(x, plan, size, "expert"), operand))
    assert taken == [(size, D)]
    result = loop_of_ragged_all_to_all(operand, np.zeros((P, size, D)), *np.moveaxis(offsets, 1, 0))
    gathered = expert_exchange.IMPLEMENTATIONS["gathered"][way]
    np.testing.assert_array_equal(result, on_devices(devices, lambda x: gathered(x, plan, size, "expert"), operand))


def test_bad_calls_are_one_line():
    plan = make_plan(jnp.zeros((2, 3), jnp.int32)[:, :2])
    with pytest.raises(ValueError, match="'fast' is none of gathered, ragged$"):
        dispatch(jnp.zeros((2, 2)), plan, 4, "expert", implementation="fast")
    uneven = plan._replace(counts_PxE=jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="2 devices don't divide 3 experts$"):
        collect(jnp.zeros((2, 2)), uneven, 4, "expert")
