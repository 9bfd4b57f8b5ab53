"""Inside `jax.shard_map`: what a custom derivative or a Pallas kernel has to say of the mesh axes that its arrays vary over."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def vary_alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
    """The same values, each marked as varying over every manual mesh axis that any of them varies over.

    An argument that is the same on all devices (weights) gets a derivative that isn't: the mark is what tells
    JAX to sum it over them. Outside `shard_map`, or with check_vma=False, nothing varies and nothing changes.
    """
    own = [frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*own)
    return [
        x if x is None or axes == every else jax.lax.pcast(x, tuple(sorted(every - axes)), to="varying")
        for x, axes in zip(arrays, own, strict=True)
    ]


def like(x: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """Of a kernel's result that varies over the mesh axes that x varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
