"""What every mixer is told besides its input."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Context:
    """Static: mask_kind, packed, deterministic. Arrays: the rest; None where a model doesn't use it.

    Attributes:
      mask_kind: `causal`, `bidirectional` or `prefix` (bidirectional within `prefix_BxL`, causal after).
      packed: may a row hold several documents?
      deterministic: no dropout.
      positions_BxL: int32, restart at 0 in each document: position 0 resets every state.
      segment_ids_BxL: int32, 0 is padding: it leaves state unchanged and is never attended to.
      prefix_BxL: bool, the token belongs to its document's bidirectional prefix.
      memory_BxSxD, memory_segment_ids_BxS: what cross-attention reads; a query sees its own segment's memory.
      layer: int32 scalar, the index of the scanned layer over all stages.
      key: PRNG key, folded with layer and mixer index.
      shared: what a model passes across layers; a mixer that changes it returns the new dict as aux["shared"].
    """

    positions_BxL: jax.Array
    segment_ids_BxL: jax.Array
    mask_kind: str = struct.field(pytree_node=False, default="causal")
    packed: bool = struct.field(pytree_node=False, default=True)
    deterministic: bool = struct.field(pytree_node=False, default=True)
    prefix_BxL: jax.Array | None = None
    memory_BxSxD: jax.Array | None = None
    memory_segment_ids_BxS: jax.Array | None = None
    layer: jax.Array | None = None
    key: jax.Array | None = None
    shared: dict[str, Any] | None = None


def one_document(batch: int, length: int, **fields: Any) -> Context:
    """A context for rows that hold one document each and no padding."""
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Context(positions, jnp.ones_like(positions), packed=False, **fields)
