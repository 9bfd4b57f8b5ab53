"""A checksum for every array, computed on its devices: shards add up, so it doesn't depend on the mesh.

Each element's bits, mixed with its index, times an odd number; summed modulo 2^32. Multiplying by an odd number is one to one,
so any change of a single element changes the sum; more changes are missed once in 2^32.
"""

import functools
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp

_ODD = 2654435761  # Knuth's multiplicative hash: the odd number nearest 2^32 / golden ratio


def checksum(x: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """The uint32 checksum of one array, or of the part of one whose first element is its `start`-th (in the order of C)."""
    x = jax.device_put(x, jax.memory.Space.Device)  # what rests on the host comes for its sum
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index += jnp.uint32(start)
    mixed = (bits ^ (index * jnp.uint32(_ODD))) * jnp.uint32(_ODD)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)


@functools.partial(jax.jit)
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([checksum(leaf) for leaf in leaves])


def begin_checksums(trees: Mapping[str, Any]) -> Callable[[], dict[str, int]]:
    """Starts to compute `checksums(trees)` and returns at once; what is returned waits for them (on any thread)."""
    found = jax.tree_util.tree_leaves_with_path(dict(trees))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    sums = _checksums([leaf for _, leaf in found]) if found else ()
    return lambda: {path: int(value) for path, value in zip(paths, jax.device_get(sums))}


def checksums(trees: Mapping[str, Any]) -> dict[str, int]:
    """Path in `trees` (nested dicts, optimizer states, ...) -> the checksum of its array."""
    return begin_checksums(trees)()


def checksum_of_part(x: jax.Array, start: int) -> int:
    """What the elements from `start` on (in the order of C) of an array add to its checksum, modulo 2^32."""
    return int(_part(x, jnp.uint32(start % 2**32)))


@jax.jit
def _part(x: jax.Array, start: jax.Array) -> jax.Array:
    return checksum(x, start)
