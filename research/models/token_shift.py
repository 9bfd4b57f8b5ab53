"""The token before: what RWKV mixes each token with."""

import jax
import jax.numpy as jnp

from research.models.context import Context


def token_shift(x_BxLxD: jax.Array, ctx: Context, last_BxD: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(the document's token before each one, the row's last token), padding passed over; zero where a document begins.

    last_BxD: the last token of the call before, in any dtype; None: zero.
    """
    B, L, D = x_BxLxD.shape
    last_BxD = jnp.zeros((B, D), x_BxLxD.dtype) if last_BxD is None else last_BxD
    # The last token is in front, at 0, hence column l at l + 1.
    known_BxL1xD = jnp.concatenate([last_BxD[:, None].astype(x_BxLxD.dtype), x_BxLxD], axis=1)
    column_BxL = jnp.where(ctx.segment_ids_BxL != 0, jnp.arange(1, L + 1), 0)
    latest_BxL = jax.lax.cummax(column_BxL, axis=1)
    before_BxL = jnp.pad(latest_BxL[:, :-1], ((0, 0), (1, 0)))
    previous_BxLxD = jnp.take_along_axis(known_BxL1xD, before_BxL[..., None], axis=1)
    new_last_BxD = jnp.take_along_axis(known_BxL1xD, latest_BxL[:, -1:, None], axis=1)[:, 0]
    first_BxLx1 = (ctx.positions_BxL == 0)[..., None]
    return jnp.where(first_BxLx1, 0.0, previous_BxLxD), new_last_BxD.astype(last_BxD.dtype)
