"""The decode cache of attention's keys: who is in which slot, and writing a call's tokens into it.

Keys are told apart by a counter of documents, which position 0 advances, so that a reset needs no clearing. A ring (a window's
cache) overwrites its oldest tokens; another cache holds `max_len` of them.
"""

import jax
import jax.numpy as jnp

from research.models.context import Context


def init_rows(batch: int, slots: int) -> dict:
    """The state beside the keys; document 0 is an empty slot."""
    return {"positions_BxS": jnp.zeros((batch, slots), jnp.int32), "documents_BxS": jnp.zeros((batch, slots), jnp.int32),
            "prefix_BxS": jnp.zeros((batch, slots), bool), "length_B": jnp.zeros((batch,), jnp.int32),
            "document_B": jnp.ones((batch,), jnp.int32)}


def row_axes() -> dict:
    rows = ("batch", None)
    return {"positions_BxS": rows, "documents_BxS": rows, "prefix_BxS": rows, "length_B": ("batch",), "document_B": ("batch",)}


def write(state: dict, keys: dict, ctx: Context, ring: bool) -> tuple[dict, dict, jax.Array]:
    """Writes this call's tokens; padding is not written.

    Args:
      state: `init_rows` and the entries of `keys` with S slots.
      keys: by name in `state`, what is kept of each token, (B, L, ...).

    Returns:
      (the new state; what this call's queries see: `keys`' entries and positions_BxS, documents_BxS, prefix_BxS; the
      queries' documents_BxL, 0 for padding).
    """
    valid_BxL = ctx.segment_ids_BxL != 0
    starts_BxL = valid_BxL & (ctx.positions_BxL == 0)
    documents_BxL = jnp.where(valid_BxL, state["document_B"][:, None] + jnp.cumsum(starts_BxL, axis=1), 0)
    order_BxL = state["length_B"][:, None] + jnp.cumsum(valid_BxL, axis=1) - 1
    length_B = state["length_B"] + jnp.sum(valid_BxL, axis=1)
    slots = state["documents_BxS"].shape[1]
    # Of two tokens that meet in one slot of a ring only the later is written.
    written_BxL = valid_BxL & (order_BxL >= length_B[:, None] - slots)
    slot_BxL = jnp.where(written_BxL, order_BxL % slots if ring else order_BxL, slots)
    prefix_BxL = jnp.zeros_like(valid_BxL) if ctx.prefix_BxL is None else ctx.prefix_BxL
    new = {**keys, "positions_BxS": ctx.positions_BxL, "documents_BxS": documents_BxL, "prefix_BxS": prefix_BxL}
    put = jax.vmap(lambda cache, value, slot: cache.at[slot].set(value.astype(cache.dtype), mode="drop"))
    seen = cache = {name: put(state[name], value, slot_BxL) for name, value in new.items()}
    if ring and documents_BxL.shape[1] > 1:  # a chunk may overwrite what its own first queries still see
        seen = {name: jnp.concatenate([state[name], new[name].astype(state[name].dtype)], axis=1) for name in new}
    document_B = state["document_B"] + jnp.sum(starts_BxL, axis=1)
    return {**cache, "length_B": length_B, "document_B": document_B}, seen, documents_BxL
