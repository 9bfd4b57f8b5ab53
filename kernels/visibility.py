"""Who may look at whom in attention: for pairs of tokens, and for blocks of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASK_KINDS = ("causal", "bidirectional", "prefix")
_HIGHEST = jnp.iinfo(jnp.int32).max


class Context(NamedTuple):
    """Who the queries and keys are. Integer or bool arrays only: no gradients."""

    q_positions_BxL: jax.Array
    k_positions_BxS: jax.Array
    q_segment_ids_BxL: jax.Array
    k_segment_ids_BxS: jax.Array
    k_prefix_BxS: jax.Array | None


class Rule(NamedTuple):
    """The static part: hashable, so that it can be closed over by a compiled function."""

    mask_kind: str
    window: int | None
    softcap: float | None
    scale: float


def sees(q_position, k_position, q_segment, k_segment, k_prefix, rule: Rule) -> jax.Array:
    """May the query look at the key? Arrays of shapes that broadcast; bool. The only place that knows."""
    distance = q_position - k_position
    seen = (q_segment == k_segment) & (k_segment != 0)
    if rule.mask_kind == "causal":
        seen &= distance >= 0
    elif rule.mask_kind == "prefix":
        seen &= (distance >= 0) | k_prefix
    if rule.window is not None:
        seen &= (jnp.abs(distance) if rule.mask_kind == "bidirectional" else distance) < rule.window
    return seen


def visible(context: Context, rule: Rule) -> jax.Array:
    """visible_BxLxS (bool): may query l look at key s?"""
    k_prefix_Bx1xS = None if context.k_prefix_BxS is None else context.k_prefix_BxS[:, None, :]
    return sees(context.q_positions_BxL[:, :, None], context.k_positions_BxS[:, None, :],
                context.q_segment_ids_BxL[:, :, None], context.k_segment_ids_BxS[:, None, :], k_prefix_Bx1xS, rule)


class _Facts(NamedTuple):
    """Of each block of tokens, padding left out: what decides for all its pairs at once."""

    lowest: jax.Array  # its lowest segment; above every segment if it is all padding
    highest: jax.Array  # its highest segment; 0 if it is all padding
    first: jax.Array  # the first position in the lowest segment
    last: jax.Array  # the last position in the highest segment
    uniform: jax.Array  # bool: one segment and no padding


def _facts(positions_BxL: jax.Array, segment_ids_BxL: jax.Array, block: int) -> _Facts:
    positions_BxIxC, segments_BxIxC = (x.reshape(x.shape[0], -1, block) for x in (positions_BxL, segment_ids_BxL))
    real_BxIxC = segments_BxIxC != 0
    lowest = jnp.min(jnp.where(real_BxIxC, segments_BxIxC, _HIGHEST), axis=-1)
    highest = jnp.max(jnp.where(real_BxIxC, segments_BxIxC, 0), axis=-1)
    first = jnp.min(jnp.where(segments_BxIxC == lowest[..., None], positions_BxIxC, _HIGHEST), axis=-1)
    last = jnp.max(jnp.where(segments_BxIxC == highest[..., None], positions_BxIxC, -1), axis=-1)
    return _Facts(lowest, highest, first, last, (lowest == highest) & jnp.all(real_BxIxC, axis=-1))


def visible_blocks(context: Context, rule: Rule, block_q: int, block_k: int) -> tuple[jax.Array, jax.Array]:
    """(some_BxIxJ, all_BxIxJ), bool, of I blocks of queries and J of keys, whose sizes divide L and S.

    Not some: no query of the block sees any key of the block. All: every query sees every key. Both are exact in that
    direction whatever the arguments hold; where segments and positions grow along the row, as packing writes them, `some`
    leaves out every block above the diagonal, of other documents or beyond the window.
    """
    q = _Facts(*(x[:, :, None] for x in _facts(context.q_positions_BxL, context.q_segment_ids_BxL, block_q)))
    k = _Facts(*(x[:, None, :] for x in _facts(context.k_positions_BxS, context.k_segment_ids_BxS, block_k)))
    shared = jnp.maximum(q.lowest, k.lowest) <= jnp.minimum(q.highest, k.highest)
    # Only one segment may be shared where the highest of one side is the lowest of the other: then its extremes bound every
    # distance, and the keys are all later, or all earlier, than the tests below allow.
    keys_follow, keys_precede = k.lowest == q.highest, q.lowest == k.highest
    nearest_after, nearest_before = k.first - q.last, q.first - k.last
    some, every = shared, q.uniform & k.uniform & keys_follow
    if rule.mask_kind != "bidirectional":
        too_late, in_time = keys_follow & (nearest_after > 0), nearest_before >= 0
        if rule.mask_kind == "prefix":
            prefix_BxJxC = context.k_prefix_BxS.reshape(context.k_prefix_BxS.shape[0], -1, block_k)
            too_late &= ~jnp.any(prefix_BxJxC, axis=-1)[:, None, :]
            in_time |= jnp.all(prefix_BxJxC, axis=-1)[:, None, :]
        some, every = some & ~too_late, every & in_time
    if rule.window is not None:
        some &= ~(keys_precede & (nearest_before >= rule.window))
        every &= q.last - k.first < rule.window
        if rule.mask_kind == "bidirectional":
            some &= ~(keys_follow & (nearest_after >= rule.window))
            every &= k.last - q.first < rule.window
    return some, every & some
