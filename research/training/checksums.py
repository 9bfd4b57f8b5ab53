"""A checksum for every array, computed where the array lies: shards add up, so it doesn't depend on the mesh.

Each element's bits, mixed with its index, times an odd number; summed modulo 2^32. Multiplying by an odd number is one to one,
so any change of a single element changes the sum; more changes are missed once in 2^32.
"""

import functools
from typing import Any, Mapping

import jax
import jax.numpy as jnp

_ODD = 2654435761  # Knuth's multiplicative hash: the odd number nearest 2^32 / golden ratio


def checksum(x: jax.Array) -> jax.Array:
    """The uint32 checksum of one array."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = (bits ^ (index * jnp.uint32(_ODD))) * jnp.uint32(_ODD)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)


@functools.partial(jax.jit)
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([checksum(leaf) for leaf in leaves])


def checksums(trees: Mapping[str, Any]) -> dict[str, int]:
    """Path in `trees` (nested dicts, optimizer states, ...) -> the checksum of its array."""
    found = jax.tree_util.tree_leaves_with_path(dict(trees))
    if not found:
        return {}
    values = jax.device_get(_checksums([leaf for _, leaf in found]))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): int(value) for (path, _), value in zip(found, values)}
