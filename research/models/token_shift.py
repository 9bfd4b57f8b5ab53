"""The token before: what RWKV mixes each token with."""

import jax
import jax.numpy as jnp

from research.models.context import Context


def token_shift(x_BxLxD: jax.Array, ctx: Context, last_BxD: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(the document's token before each one, the row's last token), padding passed over; zero where a document begins.

    last_BxD: the last token of the call before, in any dtype; None: zero. The program looks at the segment ids to know
    whether there is padding inside a document: rows without pay no gather.
    """
    B, L, D = x_BxLxD.shape
    last_BxD = jnp.zeros((B, D), x_BxLxD.dtype) if last_BxD is None else last_BxD
    valid_BxL, column_L = ctx.segment_ids_BxL != 0, jnp.arange(L)
    # The last token is in front, at 0, hence column l at l + 1.
    known_BxL1xD = jnp.concatenate([last_BxD[:, None].astype(x_BxLxD.dtype), x_BxLxD], axis=1)
    latest_BxL = jax.lax.cummax(jnp.where(valid_BxL, column_L + 1, 0), axis=1)
    before_BxL = jnp.pad(latest_BxL[:, :-1], ((0, 0), (1, 0)))
    follows_BxL = valid_BxL & (ctx.positions_BxL != 0)
    previous_BxLxD = jax.lax.cond(
        jnp.any(follows_BxL & (before_BxL != column_L)),
        lambda known_BxL1xD: jnp.take_along_axis(known_BxL1xD, before_BxL[..., None], axis=1),
        lambda known_BxL1xD: known_BxL1xD[:, :-1],
        known_BxL1xD,
    )
    new_last_BxD = jnp.take_along_axis(known_BxL1xD, latest_BxL[:, -1:, None], axis=1)[:, 0]
    return jnp.where(follows_BxL[..., None], previous_BxLxD, 0.0), new_last_BxD.astype(last_BxD.dtype)
