"""Gated linear recurrence: h_t = a_t * h_{t-1} + (1 - a_t) * u_t (the diagonal part of RG-LRU, De et al.
2024).

All tokens at once by an associative scan, in float32. Position 0 sets a_t to 0, so nothing of the document
before is left, not even in a sum; padding sets a_t to 1 and adds nothing, so the state passes it unchanged.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.config import MixerConfig, Positive
from research.models.context import Context
from research.params import constant, fan_in, param


@dataclasses.dataclass(frozen=True)
class LinearRecurrence(MixerConfig):
    """`width` of the state."""

    width: Positive


class LinearRecurrenceMixer(nn.Module):
    cfg: LinearRecurrence

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None
    ) -> tuple[jax.Array, dict | None, dict]:
        dim, width = x_BxLxD.shape[-1], self.cfg.width
        u_DxN = param(self, "input", (dim, width), ("embed", "state"), fan_in(), inputs=("embed",))
        gate_DxN = param(self, "gate", (dim, width), ("embed", "state"), fan_in(), inputs=("embed",))
        gate_bias_N = param(self, "gate_bias", (width,), ("state",), constant(2.0), role="vector")
        output_NxD = param(self, "output", (width, dim), ("state", "embed"), fan_in(), inputs=("state",))
        u_BxLxN = jnp.einsum("bld,dn->bln", x_BxLxD, u_DxN).astype(jnp.float32)
        gate_BxLxN = jnp.einsum("bld,dn->bln", x_BxLxD, gate_DxN).astype(jnp.float32)
        a_BxLxN = jax.nn.sigmoid(gate_BxLxN + gate_bias_N.astype(jnp.float32))
        b_BxLxN = (1.0 - a_BxLxN) * u_BxLxN
        valid_BxLx1 = (ctx.segment_ids_BxL != 0)[..., None]
        first_BxLx1 = (ctx.positions_BxL == 0)[..., None]
        a_BxLxN = jnp.where(valid_BxLx1, jnp.where(first_BxLx1, 0.0, a_BxLxN), 1.0)
        b_BxLxN = jnp.where(valid_BxLx1, b_BxLxN, 0.0)
        if state is not None:
            b_BxLxN = b_BxLxN.at[:, 0].add(a_BxLxN[:, 0] * state["h_BxN"])
        _, h_BxLxN = jax.lax.associative_scan(_then, (a_BxLxN, b_BxLxN), axis=1)
        y_BxLxD = jnp.einsum("bln,nd->bld", h_BxLxN.astype(x_BxLxD.dtype), output_NxD)
        return y_BxLxD, None if state is None else {"h_BxN": h_BxLxN[:, -1]}, {}

    @staticmethod
    def init_state(cfg: LinearRecurrence, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        return {
            "h_BxN": jnp.zeros((batch, cfg.width), jnp.float32)
        }  # sums over a whole document: always float32

    @staticmethod
    def state_axes(cfg: LinearRecurrence) -> dict:
        return {"h_BxN": ("batch", "state")}

    @staticmethod
    def flops(cfg: LinearRecurrence, dim: int, seq_len: int, causal: bool = True) -> float:
        """The projections; the recurrence itself is elementwise and isn't counted, as everywhere."""
        return 6.0 * dim * cfg.width


def _then(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """h -> a2 * (a1 * h + b1) + b2."""
    (a1, b1), (a2, b2) = first, second
    return a1 * a2, a2 * b1 + b2
