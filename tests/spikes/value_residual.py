"""A gated value whose layers mix in the value of the first layer, passed to them through the scan (RWKV-7,
2025; value residual learning, Zhou et al. 2024).

    v = x @ value; in layer 0 the shared value becomes v; later v <- v + mix * (shared - v)
    y = (sigmoid(gate(x)) * v) @ output

It doesn't look sideways and has no decode state: each call runs layer 0 first, which makes the value anew.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.config import MixerConfig, Positive
from research.models.context import Context
from research.params import constant, fan_in, param

FIRST_VALUE = "first_value_BxLxN"


@dataclasses.dataclass(frozen=True)
class ValueResidual(MixerConfig):
    """`width` of the value; the same in every stage of a model, since it is shared by all of them."""

    width: Positive


class ValueResidualMixer(nn.Module):
    cfg: ValueResidual

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None
    ) -> tuple[jax.Array, dict | None, dict]:
        dim, width = x_BxLxD.shape[-1], self.cfg.width
        value_DxN = param(self, "value", (dim, width), ("embed", "state"), fan_in(), inputs=("embed",))
        gate_DxN = param(self, "gate", (dim, width), ("embed", "state"), fan_in(), inputs=("embed",))
        mix_N = param(self, "mix", (width,), ("state",), constant(0.5), role="vector")
        output_NxD = param(self, "output", (width, dim), ("state", "embed"), fan_in(), inputs=("state",))
        v_BxLxN = jnp.einsum("bld,dn->bln", x_BxLxD, value_DxN)
        first_BxLxN = jnp.where(ctx.layer == 0, v_BxLxN, ctx.shared[FIRST_VALUE])
        v_BxLxN += mix_N.astype(v_BxLxN.dtype) * (first_BxLxN - v_BxLxN)
        gated_BxLxN = jax.nn.sigmoid(jnp.einsum("bld,dn->bln", x_BxLxD, gate_DxN)) * v_BxLxN
        y_BxLxD = jnp.einsum("bln,nd->bld", gated_BxLxN, output_NxD)
        return y_BxLxD, state, {"shared": {**ctx.shared, FIRST_VALUE: first_BxLxN}}

    @staticmethod
    def init_shared(cfg: ValueResidual, x_BxLxD: jax.Array) -> dict:
        return {FIRST_VALUE: jnp.zeros((*x_BxLxD.shape[:2], cfg.width), x_BxLxD.dtype)}

    @staticmethod
    def init_state(cfg: ValueResidual, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        return {}

    @staticmethod
    def state_axes(cfg: ValueResidual) -> dict:
        return {}

    @staticmethod
    def flops(cfg: ValueResidual, dim: int, seq_len: int, causal: bool = True) -> float:
        return 6.0 * dim * cfg.width
