"""Gated DeltaNet (Yang et al. 2024), and without its delta rule gated linear attention with one decay a head.

    q, k, v = silu(convolution(x @ W)), q and k of length 1;  a = exp(-exp(a_log) softplus(x @ decay + dt_bias));
    b = sigmoid(x @ write);  S <- a S (1 - b k k') + b v k';  y = (RMSNorm(S q / sqrt(K)) * silu(x @ gate)) @ output

`delta=False` is S <- a S + v k', all else being the same: the decay of Mamba-2 (Dao and Gu 2024) in the layer of gated
linear attention (Yang et al. 2023, whose decay has a value for each of the K rows: kernels/wkv7.py has that recurrence).
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.convolution import causal_convolution
from kernels.gated_delta import gated_delta
from kernels.linear import linear
from research import sharding
from research.config import MixerConfig, Positive, PositiveFloat
from research.errors import InputError
from research.models.context import Context
from research.models.norm import rms_normalize
from research.models.remade import remade
from research.params import Initializer, fan_in, ones, param

L2_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class GatedDelta(MixerConfig):
    """`key_dim`, `value_dim` are widths of one head; value_dim: None = 2 * key_dim, as published.

    `heads` have a memory each; groups of them share the queries and keys of one of the `key_heads` (None = heads).
    `conv`: taps of the short convolutions. `delta`: correct what is written. `chunk`: tokens whose products are taken at once.
    """

    heads: Positive
    key_dim: Positive
    key_heads: Positive | None = None
    value_dim: Positive | None = None
    conv: Positive = 4
    delta: bool = True
    eps: PositiveFloat = 1e-5
    chunk: Positive = 64
    implementation: Literal["reference", "chunked", "pallas"] | None = None

    def validate(self):
        if self.heads % (self.key_heads or self.heads):
            raise InputError("key_heads", f"{self.key_heads} does not divide heads={self.heads}", "choose a divisor")

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Heads and width of what the memory is given."""
        keys = (self.key_heads or self.heads, self.key_dim)
        return {"query": keys, "key": keys, "value": (self.heads, self.value_dim or 2 * self.key_dim)}


def log_uniform(low: float, high: float) -> Initializer:
    """log of a number drawn evenly from low to high."""
    return lambda key, shape, fan: jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high))


def step_bias(low: float, high: float) -> Initializer:
    """softplus of it is drawn evenly in its logarithm from low to high (Gu and Dao 2023)."""
    def init(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
        step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high)))
        return step + jnp.log(-jnp.expm1(-step))

    return init


def taps(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
    """Even in +- 1 / sqrt(taps)."""
    size = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-size, maxval=size)


def _convolve(xs, taps, positions_BxL, segment_ids_BxL, states) -> tuple[list[jax.Array], list[jax.Array]]:
    """silu of the causal convolutions of several x_BxLxHxK, in one; and the new states, each BxPxHxK."""
    def joined(arrays) -> jax.Array:
        return jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in arrays], axis=-1)

    def parted(x: jax.Array) -> list[jax.Array]:
        parts = jnp.split(x, np.cumsum([x.shape[2] * x.shape[3] for x in xs])[:-1], axis=-1)
        return [part.reshape(*part.shape[:-1], *x.shape[2:]) for part, x in zip(parts, xs)]

    y_BxLxC, state_BxPxC = causal_convolution(
        joined(xs), joined(taps), positions_BxL=positions_BxL, segment_ids_BxL=segment_ids_BxL,
        state_BxPxC=None if states[0] is None else joined(states))
    return parted(remade(jax.nn.silu)(y_BxLxC)), parted(state_BxPxC)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + L2_EPS)


class GatedDeltaMixer(nn.Module):
    cfg: GatedDelta

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        projected, kernels = [], []
        for name, (heads, width) in cfg.shapes().items():
            axis = "heads" if name == "value" else "kv_heads"
            projected.append(self._project(name, x_BxLxD, (heads, width), (axis, "head_dim")))
            kernels.append(param(self, f"{name}_conv", (cfg.conv, heads, width), ("tap", axis, "head_dim"), taps,
                                 role="vector"))
        a_log_H = param(self, "a_log", (cfg.heads,), ("heads",), log_uniform(0.01, 16.0), role="vector").astype(jnp.float32)
        dt_bias_H = param(self, "dt_bias", (cfg.heads,), ("heads",), step_bias(1e-3, 0.1), role="vector").astype(jnp.float32)
        step_BxLxH = self._project("decay", x_BxLxD, (cfg.heads,), ("heads",)).astype(jnp.float32) + dt_bias_H
        log_decay_BxLxH = -jnp.exp(a_log_H) * jax.nn.softplus(step_BxLxH)
        write_BxLxH = None
        if cfg.delta:
            write_BxLxH = jax.nn.sigmoid(self._project("write", x_BxLxD, (cfg.heads,), ("heads",)).astype(jnp.float32))

        own = [None] * 4 if state is None else [state[name] for name in self.state_axes(cfg)]
        y_BxLxHxV, *new = self._remember(*projected, *kernels, log_decay_BxLxH, write_BxLxH, ctx, own)
        gain_V = param(self, "norm", y_BxLxHxV.shape[3:], ("head_dim",), ones, role="vector")
        gate_BxLxHxV = self._project("gate", x_BxLxD, cfg.shapes()["value"], ("heads", "head_dim"))

        output_HxVxD = param(self, "output", (*y_BxLxHxV.shape[2:], dim), ("heads", "head_dim", "embed"), fan_in(),
                             inputs=("heads", "head_dim"))

        def finish(y_BxLxHxV, gain_V, gate_BxLxHxV, output_HxVxD):
            y_BxLxHxV = rms_normalize(y_BxLxHxV, cfg.eps) * gain_V.astype(jnp.float32)
            y_BxLxHxV *= jax.nn.silu(gate_BxLxHxV.astype(jnp.float32))
            return linear(y_BxLxHxV.astype(x_BxLxD.dtype), output_HxVxD, 2)

        # Only its inputs are kept for the backward pass: all but the product is one pass to make again.
        y_BxLxD = remade(finish)(y_BxLxHxV, gain_V, gate_BxLxHxV, output_HxVxD)
        return y_BxLxD, None if state is None else dict(zip(self.state_axes(cfg), new)), {}

    def _project(self, name: str, x_BxLxD: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        weight = param(self, name, (x_BxLxD.shape[-1], *shape), ("embed", *axes), fan_in(), inputs=("embed",))
        return linear(x_BxLxD, weight)

    def _remember(self, q, k, v, q_taps, k_taps, v_taps, log_decay, write, ctx: Context, state: list) -> tuple:
        """(y_BxLxHxV, the state's arrays), each device with its own rows and heads."""
        cfg = self.cfg

        def kernel(q, k, v, q_taps, k_taps, v_taps, log_decay, write, positions, segments, *states):
            (q, k, v), inputs = _convolve((q, k, v), (q_taps, k_taps, v_taps), positions, segments, states[:3])
            share = lambda x_BxLxGxK: jnp.repeat(x_BxLxGxK, v.shape[2] // x_BxLxGxK.shape[2], axis=2)
            y, s = gated_delta(
                share(_unit(q) * cfg.key_dim**-0.5), share(_unit(k)), v, log_decay, write, positions_BxL=positions,
                segment_ids_BxL=segments, state_BxHxKxV=states[3], chunk=cfg.chunk, implementation=cfg.implementation)
            return y, *inputs, s

        rows, heads, keys = ("batch", None), ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
        key_taps, gates, states = (None, "kv_heads", None), ("batch", None, "heads"), list(self.state_axes(cfg).values())
        in_axes = (keys, keys, heads, key_taps, key_taps, (None, "heads", None), gates, None if write is None else gates,
                   rows, rows, *([None] * 4 if state[0] is None else states))
        kernel = sharding.local(kernel, in_axes, [heads, *states])  # rows whole along their length
        return kernel(q, k, v, q_taps, k_taps, v_taps, log_decay, write, ctx.positions_BxL, ctx.segment_ids_BxL, *state)

    @staticmethod
    def init_state(cfg: GatedDelta, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        shapes = cfg.shapes()
        inputs = [jnp.zeros((batch, cfg.conv - 1, *shape), dtype) for shape in shapes.values()]
        memory = jnp.zeros((batch, cfg.heads, cfg.key_dim, shapes["value"][1]), jnp.float32)
        return dict(zip(GatedDeltaMixer.state_axes(cfg), (*inputs, memory)))

    @staticmethod
    def state_axes(cfg: GatedDelta) -> dict:
        keys = ("batch", None, "kv_heads", None)
        return {"query_BxPxGxK": keys, "key_BxPxGxK": keys, "value_BxPxHxV": ("batch", None, "heads", None),
                "s_BxHxKxV": ("batch", "heads", None, None)}

    @staticmethod
    def flops(cfg: GatedDelta, dim: int, seq_len: int, causal: bool = True) -> float:
        """Projections, and the memory: look up (delta only), write, read."""
        (key_heads, K), (H, V) = cfg.shapes()["key"], cfg.shapes()["value"]
        projections = 2.0 * dim * (2 * key_heads * K + 3 * H * V + (2 if cfg.delta else 1) * H)
        return projections + (6.0 if cfg.delta else 4.0) * H * K * V
