"""Mamba (Gu and Dao 2023): convolution, selective scan, gate. With `norms`, as in Jamba (Lieber et al. 2024)."""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear import linear
from kernels.selective_scan import selective_scan
from research import sharding
from research.config import MixerConfig, Positive, PositiveFloat
from research.errors import InputError
from research.models.context import Context
from research.models.norm import rms_normalize
from research.models.ssm import dt_bias, log_integers, short_convolution, uniform
from research.params import fan_in, ones, param


@dataclasses.dataclass(frozen=True)
class Mamba(MixerConfig):
    """Inner width `expand` * dim, `state` numbers a channel. dt_rank: None = dim / 16, rounded up.

    `norms`: RMS norms on dt, B and C. The steps dt begin log-uniform in [dt_min, dt_max], at least dt_floor.
    """

    expand: Positive = 2
    state: Positive = 16
    conv: Positive = 4
    dt_rank: Positive | None = None
    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 0.1
    dt_floor: PositiveFloat = 1e-4
    conv_bias: bool = True
    norms: bool = False
    norm_eps: PositiveFloat = 1e-6
    implementation: Literal["reference", "chunked", "sequential", "pallas"] | None = None

    def validate(self):
        if self.dt_min > self.dt_max:
            raise InputError("dt_min", f"{self.dt_min} is above dt_max={self.dt_max}", "swap them")

    def rank(self, dim: int) -> int:
        return self.dt_rank or math.ceil(dim / 16)


class MambaMixer(nn.Module):
    cfg: Mamba

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        inner, rank = cfg.expand * dim, cfg.rank(dim)
        u_BxLxI = self._linear("input", x_BxLxD, inner, ("embed", "mlp"))
        gate_BxLxI = self._linear("gate", x_BxLxD, inner, ("embed", "mlp"))
        u_BxLxI, conv_BxPxI = short_convolution(
            self, "conv", u_BxLxI, ("mlp",), cfg.conv, cfg.conv_bias, ctx, None if state is None else state["conv_BxPxI"],
            nn.silu)

        dt_BxLxR = self._normed("dt_norm", self._linear("dt_down", u_BxLxI, rank, ("mlp", "dt_rank")), "dt_rank")
        b_BxLxN = self._normed("b_norm", self._linear("b", u_BxLxI, cfg.state, ("mlp", "state_dim")), "state_dim")
        c_BxLxN = self._normed("c_norm", self._linear("c", u_BxLxI, cfg.state, ("mlp", "state_dim")), "state_dim")
        bound = 1 / math.sqrt(rank)
        dt_up_RxI = param(self, "dt_up", (rank, inner), ("dt_rank", "mlp"), uniform(-bound, bound), inputs=("dt_rank",))
        dt_bias_I = param(self, "dt_bias", (inner,), ("mlp",), dt_bias(cfg.dt_min, cfg.dt_max, cfg.dt_floor), role="vector")
        dt_BxLxI = linear(dt_BxLxR, dt_up_RxI)
        dt_BxLxI = nn.softplus(dt_BxLxI.astype(jnp.float32) + dt_bias_I.astype(jnp.float32))
        a_log_IxN = param(self, "a_log", (inner, cfg.state), ("mlp", "state_dim"), log_integers, role="vector")
        skip_I = param(self, "skip", (inner,), ("mlp",), ones, role="vector")

        h_BxIxN = None if state is None else state["h_BxIxN"]
        a_IxN = -jnp.exp(a_log_IxN.astype(jnp.float32))
        y_BxLxI, h_BxIxN = self._scan(u_BxLxI, dt_BxLxI, a_IxN, b_BxLxN, c_BxLxN, ctx, h_BxIxN)
        y_BxLxI = (y_BxLxI + skip_I.astype(u_BxLxI.dtype) * u_BxLxI) * nn.silu(gate_BxLxI)
        y_BxLxD = self._linear("output", y_BxLxI, dim, ("mlp", "embed"))
        return y_BxLxD, None if state is None else {"conv_BxPxI": conv_BxPxI, "h_BxIxN": h_BxIxN}, {}

    def _linear(self, name: str, x_BxLxI: jax.Array, size: int, axes: tuple[str, str]) -> jax.Array:
        weight_IxO = param(self, name, (x_BxLxI.shape[-1], size), axes, fan_in(), inputs=axes[:1])
        return linear(x_BxLxI, weight_IxO)

    def _normed(self, name: str, x_BxLxN: jax.Array, axis: str) -> jax.Array:
        if not self.cfg.norms:
            return x_BxLxN
        gain_N = param(self, name, x_BxLxN.shape[-1:], (axis,), ones, role="vector").astype(jnp.float32)
        return (rms_normalize(x_BxLxN, self.cfg.norm_eps) * gain_N).astype(x_BxLxN.dtype)

    def _scan(self, u_BxLxI, dt_BxLxI, a_IxN, b_BxLxN, c_BxLxN, ctx: Context, h_BxIxN) -> tuple[jax.Array, jax.Array]:
        def kernel(u, dt, a, b, c, positions, segment_ids, h):
            return selective_scan(u, dt, a, b, c, positions_BxL=positions, segment_ids_BxL=segment_ids, state_BxIxN=h,
                                  implementation=self.cfg.implementation)

        rows, inner, hidden = ("batch", None), ("batch", None, "mlp"), ("batch", "mlp", None)
        whole = ("batch", None, None)
        axes = (inner, inner, ("mlp", None), whole, whole, rows, rows, None if h_BxIxN is None else hidden)
        kernel = sharding.local(kernel, axes, [inner, hidden])
        return kernel(u_BxLxI, dt_BxLxI, a_IxN, b_BxLxN, c_BxLxN, ctx.positions_BxL, ctx.segment_ids_BxL, h_BxIxN)

    @staticmethod
    def init_state(cfg: Mamba, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        inner = cfg.expand * dim
        return {"conv_BxPxI": jnp.zeros((batch, cfg.conv - 1, inner), dtype),
                "h_BxIxN": jnp.zeros((batch, inner, cfg.state), jnp.float32)}  # sums over a document: always float32

    @staticmethod
    def state_axes(cfg: Mamba) -> dict:
        return {"conv_BxPxI": ("batch", None, "mlp"), "h_BxIxN": ("batch", "mlp", None)}

    @staticmethod
    def flops(cfg: Mamba, dim: int, seq_len: int, causal: bool = True) -> float:
        """Projections, and what is read from the state; its update and the convolution are elementwise and not counted."""
        inner, rank = cfg.expand * dim, cfg.rank(dim)
        return 2.0 * inner * (3 * dim + 2 * rank + 3 * cfg.state)
