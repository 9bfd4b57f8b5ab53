"""Finds silent corruption: devices that hold the same shard of an array must hold the same bits.

Data-parallel devices compute the same update from the same summed gradient, so a difference is a fault of a device or its
memory. One checksum a device and array (checksums.py), over what that device holds; only these are gathered.
"""

import collections
import functools
from typing import Any, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.training.checksums import checksum


def disagreements(tree: Any) -> list[str]:
    """A line for each device that doesn't hold what its replicas hold; empty where all agree, or nothing is held twice.

    Every process of a job must call it, and gets the same answer. Of two replicas the culprit can't be told: both are named.

    Args:
      tree: arrays on one mesh; others are left out.
    """
    found = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree) if _replicated(x)]
    if not found:
        return []
    mesh = found[0][1].sharding.mesh
    compiled = _local_checksums(mesh, tuple(x.sharding.spec for _, x in found))
    sums_DxN = jax.device_get(compiled([x for _, x in found]))  # D devices in the mesh's order, N arrays
    suspects: dict[jax.Device, list[str]] = {}
    for (path, x), sums_D in zip(found, sums_DxN.T):
        for device in _odd_ones(x, mesh.devices.flatten(), sums_D.tolist()):
            suspects.setdefault(device, []).append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return [f"device {device.id} of process {device.process_index} ({device.device_kind}): {paths[0]}"
            + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") for device, paths in suspects.items()]


def _replicated(x: Any) -> bool:
    sharding = x.sharding
    return isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and any(
        len(group) > 1 for group in _holders(x).values())


def _holders(x: jax.Array) -> dict[str, list[jax.Device]]:
    """Shard -> the devices that hold it."""
    holders: dict[str, list[jax.Device]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        holders.setdefault(str(index), []).append(device)
    return holders


def _odd_ones(x: jax.Array, order: Sequence[jax.Device], sums: Sequence[int]) -> list[jax.Device]:
    value = dict(zip(order, sums))
    odd = []
    for group in _holders(x).values():
        counts = collections.Counter(value[device] for device in group)
        usual, most = counts.most_common(1)[0]
        odd += [device for device in group if 2 * most <= len(group) or value[device] != usual]
    return odd if len(set(sums)) > 1 else []


@functools.lru_cache(maxsize=8)
def _local_checksums(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    def local(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([checksum(x) for x in leaves])[None]

    # Not by sharding.local: it asks what each device has, whatever the layout says that it should have.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(mesh.axis_names), check_vma=False)
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec()))
