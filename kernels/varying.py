"""For scans with a custom derivative inside `jax.shard_map`: arguments that vary over the same mesh axes."""

from __future__ import annotations

import jax


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
