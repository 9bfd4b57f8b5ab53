"""Mamba-2 (Dao and Gu 2024): heads with one decay each, groups that share B and C, a gated norm."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear import linear
from kernels.ssd import ssd
from research import sharding
from research.config import MixerConfig, Positive, PositiveFloat
from research.errors import InputError
from research.models.context import Context
from research.models.norm import rms_normalize
from research.models.remade import remade
from research.models.ssm import dt_bias, log_of_uniform, short_convolution
from research.params import fan_in, ones, param

HEADS, GROUPS = ("heads", "head_dim"), ("kv_heads", "state_dim")


@dataclasses.dataclass(frozen=True)
class Mamba2(MixerConfig):
    """`expand` * dim / head_dim heads with a state of head_dim * `state`; a group of heads shares B and C.

    The gated norm sees each group apart. The steps dt begin log-uniform in [dt_min, dt_max], at least dt_floor; -A
    begins uniform in [1, 16].
    """

    expand: Positive = 2
    head_dim: Positive = 64
    groups: Positive = 1
    state: Positive = 128
    conv: Positive = 4
    chunk: Positive = 256
    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 0.1
    dt_floor: PositiveFloat = 1e-4
    conv_bias: bool = True
    norm_eps: PositiveFloat = 1e-5
    implementation: Literal["reference", "chunked", "pallas"] | None = None

    def validate(self):
        if self.dt_min > self.dt_max:
            raise InputError("dt_min", f"{self.dt_min} is above dt_max={self.dt_max}", "swap them")

    def check(self, dim: int) -> None:
        if self.expand * dim % self.head_dim:
            raise InputError("head_dim", f"{self.head_dim} does not divide expand * dim = {self.expand * dim}",
                             "choose a divisor")
        if self.heads(dim) % self.groups:
            raise InputError("groups", f"{self.groups} does not divide the {self.heads(dim)} heads", "choose a divisor")

    def heads(self, dim: int) -> int:
        return self.expand * dim // self.head_dim


class Mamba2Mixer(nn.Module):
    cfg: Mamba2

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        heads = cfg.heads(dim)
        z_BxLxHxK = self._project("gate", x_BxLxD, (heads, cfg.head_dim), HEADS)
        u_BxLxHxK, conv_BxPxHxK = self._convolved("input", x_BxLxD, (heads, cfg.head_dim), HEADS, ctx, state, "conv_BxPxHxK")
        b_BxLxGxN, b_BxPxGxN = self._convolved("b", x_BxLxD, (cfg.groups, cfg.state), GROUPS, ctx, state, "b_BxPxGxN")
        c_BxLxGxN, c_BxPxGxN = self._convolved("c", x_BxLxD, (cfg.groups, cfg.state), GROUPS, ctx, state, "c_BxPxGxN")
        dt_bias_H = param(self, "dt_bias", (heads,), ("heads",), dt_bias(cfg.dt_min, cfg.dt_max, cfg.dt_floor), role="vector")
        dt_BxLxH = self._project("dt", x_BxLxD, (heads,), ("heads",)).astype(jnp.float32)
        dt_BxLxH = nn.softplus(dt_BxLxH + dt_bias_H.astype(jnp.float32))
        a_log_H = param(self, "a_log", (heads,), ("heads",), log_of_uniform(1.0, 16.0), role="vector")
        skip_H = param(self, "skip", (heads,), ("heads",), ones, role="vector")

        h_BxHxKxN = None if state is None else state["h_BxHxKxN"]
        y_BxLxHxK, h_BxHxKxN = self._scan(u_BxLxHxK, dt_BxLxH, -jnp.exp(a_log_H.astype(jnp.float32)), b_BxLxGxN, c_BxLxGxN,
                                          ctx, h_BxHxKxN)
        y_BxLxD = self._output(y_BxLxHxK, u_BxLxHxK, skip_H, z_BxLxHxK, dim)
        if state is None:
            return y_BxLxD, None, {}
        state = {"conv_BxPxHxK": conv_BxPxHxK, "b_BxPxGxN": b_BxPxGxN, "c_BxPxGxN": c_BxPxGxN, "h_BxHxKxN": h_BxHxKxN}
        return y_BxLxD, state, {}

    def _project(self, name: str, x_BxLxD: jax.Array, sizes: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        weight_Dxx = param(self, name, (x_BxLxD.shape[-1], *sizes), ("embed", *axes), fan_in(), inputs=("embed",))
        return linear(x_BxLxD, weight_Dxx)

    def _convolved(self, name, x_BxLxD, sizes, axes, ctx: Context, state: dict | None, key: str):
        last_BxPxx = None if state is None else state[key]
        y, last_BxPxx = short_convolution(self, f"{name}_conv", self._project(name, x_BxLxD, sizes, axes), axes,
                                          self.cfg.conv, self.cfg.conv_bias, ctx, last_BxPxx, nn.silu)
        return y, last_BxPxx

    def _output(self, y_BxLxHxK, u_BxLxHxK, skip_H: jax.Array, z_BxLxHxK: jax.Array, dim: int) -> jax.Array:
        """(rms_normalize((y + skip * u) * silu(z)) * gain) @ output, normed over each group's width, after the gate.

        The backward pass keeps the arguments alone: the rest, but for the product, is one pass to make again.
        """
        B, L, H, K = y_BxLxHxK.shape
        gain_HxK = param(self, "norm", (H, K), HEADS, ones, role="vector").astype(jnp.float32)
        output_HxKxD = param(self, "output", (H, K, dim), (*HEADS, "embed"), fan_in(), inputs=HEADS)

        def run(y_BxLxHxK, u_BxLxHxK, skip_H, z_BxLxHxK, gain_HxK, output_HxKxD):
            y_BxLxHxK += skip_H.astype(u_BxLxHxK.dtype)[:, None] * u_BxLxHxK
            gated_BxLxHxK = y_BxLxHxK.astype(jnp.float32) * nn.silu(z_BxLxHxK.astype(jnp.float32))
            normed = rms_normalize(gated_BxLxHxK.reshape(B, L, self.cfg.groups, -1), self.cfg.norm_eps)
            return linear((normed.reshape(B, L, H, K) * gain_HxK).astype(y_BxLxHxK.dtype), output_HxKxD, 2)

        return remade(run)(y_BxLxHxK, u_BxLxHxK, skip_H, z_BxLxHxK, gain_HxK, output_HxKxD)

    def _scan(self, u_BxLxHxK, dt_BxLxH, a_H, b_BxLxGxN, c_BxLxGxN, ctx: Context, h_BxHxKxN) -> tuple[jax.Array, jax.Array]:
        def kernel(u, dt, a, b, c, positions, segment_ids, h):
            return ssd(u, dt, a, b, c, positions_BxL=positions, segment_ids_BxL=segment_ids, state_BxHxKxN=h,
                       chunk=self.cfg.chunk, implementation=self.cfg.implementation)

        rows, heads, groups = ("batch", None), ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
        hidden = ("batch", "heads", None, None)
        axes = (heads, heads[:3], ("heads",), groups, groups, rows, rows, None if h_BxHxKxN is None else hidden)
        kernel = sharding.local(kernel, axes, [heads, hidden])
        return kernel(u_BxLxHxK, dt_BxLxH, a_H, b_BxLxGxN, c_BxLxGxN, ctx.positions_BxL, ctx.segment_ids_BxL, h_BxHxKxN)

    @staticmethod
    def init_state(cfg: Mamba2, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        heads, last = (cfg.heads(dim), cfg.head_dim), (batch, cfg.conv - 1)
        groups = (*last, cfg.groups, cfg.state)
        return {"conv_BxPxHxK": jnp.zeros((*last, *heads), dtype), "b_BxPxGxN": jnp.zeros(groups, dtype),
                "c_BxPxGxN": jnp.zeros(groups, dtype), "h_BxHxKxN": jnp.zeros((batch, *heads, cfg.state), jnp.float32)}

    @staticmethod
    def state_axes(cfg: Mamba2) -> dict:
        groups = ("batch", None, "kv_heads", None)
        return {"conv_BxPxHxK": ("batch", None, "heads", None), "b_BxPxGxN": groups, "c_BxPxGxN": groups,
                "h_BxHxKxN": ("batch", "heads", None, None)}

    @staticmethod
    def flops(cfg: Mamba2, dim: int, seq_len: int, causal: bool = True) -> float:
        """Projections and, in chunks: scores and values of the tokens seen, what goes into a state and what is read from it."""
        heads, inner, groups = cfg.heads(dim), cfg.expand * dim, cfg.groups * cfg.state
        projections = 2.0 * dim * (3 * inner + 2 * groups + heads)
        if cfg.implementation == "reference":
            return projections + 2.0 * inner * cfg.state
        chunk = min(cfg.chunk, seq_len)
        seen = (chunk + 1) / 2 if causal else chunk
        return projections + 2.0 * seen * (groups + inner) + 4.0 * inner * cfg.state
