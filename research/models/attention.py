"""Softmax attention: MHA, GQA, MQA; RoPE, ALiBi or no positions; windows; QK-norm; soft-cap; cross-attention.

Vaswani et al. 2017; GQA: Ainslie et al. 2023; RoPE: Su et al. 2021 (rope.py); ALiBi: Press et al. 2022; QK-norm: Dehghani
et al. 2023; soft-cap: Gemma 2 (2024).
"""

import dataclasses
import functools
import math
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention
from kernels.linear import linear
from research import sharding
from research.config import MixerConfig, Positive, PositiveFloat, Range
from research.errors import InputError
from research.models import cache
from research.models.context import Context
from research.models.norm import rms_normalize
from research.models.rope import RopeScaling, rotate
from research.params import fan_in, ones, param, zeros


@dataclasses.dataclass(frozen=True)
class Attention(MixerConfig):
    """kv_heads: None = heads, 1 = MQA. head_dim: None = dim / heads. scale: None = 1 / sqrt(head_dim).

    `window` tokens are visible, the query's own included. `rope_share`: how much of each head is rotated, its first
    features. `cross` reads `ctx.memory_BxSxD` instead of its own row.
    """

    heads: Positive
    kv_heads: Positive | None = None
    head_dim: Positive | None = None
    positions: Literal["rope", "alibi", "none"] = "rope"
    rope_base: PositiveFloat = 10000.0
    rope_share: Annotated[float, Range(above=0.0, most=1.0)] = 1.0
    rope_scaling: RopeScaling | None = None
    window: Positive | None = None
    qk_norm: bool = False
    qk_norm_eps: PositiveFloat = 1e-6
    softcap: PositiveFloat | None = None
    cross: bool = False
    bias: bool = False
    scale: PositiveFloat | None = None
    implementation: Literal["reference", "chunked", "flash", "triton", "cudnn"] | None = None

    def validate(self):
        if self.heads % (self.kv_heads or self.heads):
            raise InputError("kv_heads", f"{self.kv_heads} does not divide heads={self.heads}", "choose a divisor")
        if self.cross and (self.window or self.positions != "none"):
            raise InputError("cross", "a memory has no positions", "set positions=none and no window")

    def check(self, dim: int) -> None:
        if self.head_dim is None and dim % self.heads:
            raise InputError("heads", f"{self.heads} does not divide dim={dim}", "choose a divisor or set head_dim")
        if self.positions == "rope" and (self.rotated(dim) % 2 or not self.rotated(dim)):
            raise InputError("head_dim", f"RoPE rotates pairs, not {self.rotated(dim)} features", "make it even")

    def width(self, dim: int) -> int:
        return self.head_dim or dim // self.heads

    def rotated(self, dim: int) -> int:
        return int(self.width(dim) * self.rope_share)


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of ALiBi: 2^(-8i/n) for n heads a power of two, else interleaved from the next one, as published."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return np.array(slopes, np.float32)


def attend(
    q, k, v, q_positions, k_positions, q_segments, k_segments, mask_kind: str, k_prefix, *, scale: float,
    window: int | None = None, softcap: float | None = None, slopes_H: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`kernels.attention` on each device's own rows and heads; the shapes are its own.

    Where rows are split along their length, keys come whole, or, by rules that split them likewise, go round the devices.
    """
    ring = sharding.mesh_axes("keys", k.shape[1])
    if ring != sharding.mesh_axes("length", q.shape[1]) or implementation in ("reference", "cudnn"):
        ring = ()  # a cache, a memory of another length: read whole

    def kernel(q, k, v, q_positions, k_positions, q_segments, k_segments, k_prefix, slopes_H):
        return attention(
            q, k, v, q_positions_BxL=q_positions, k_positions_BxS=k_positions, q_segment_ids_BxL=q_segments,
            k_segment_ids_BxS=k_segments, mask_kind=mask_kind, k_prefix_BxS=k_prefix, window=window,
            alibi_slopes_H=slopes_H, softcap=softcap, scale=scale, implementation=implementation, axis_name=ring or None)

    queries, keys = ("batch", "length", "heads", None), ("batch", "keys" if ring else None, "kv_heads", None)
    rows_q, rows_k = queries[:2], keys[:2]
    k_prefix = k_prefix if mask_kind == "prefix" else None
    axes = (queries, keys, keys, rows_q, rows_k, rows_q, rows_k, rows_k if k_prefix is not None else None,
            ("heads",) if slopes_H is not None else None)
    kernel = sharding.local(kernel, axes, queries)
    return kernel(q, k, v, q_positions, k_positions, q_segments, k_segments, k_prefix, slopes_H)


def visible_keys(seq_len: int, causal: bool, window: int | None = None) -> float:
    """Keys that a query sees, mean over a row of one document."""
    if not causal:
        return float(seq_len)
    window = min(window or seq_len, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


class AttentionMixer(nn.Module):
    cfg: Attention

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        q_BxLxHxK = self._project("query", x_BxLxD, cfg.heads, "heads")
        turn = functools.partial(rotate, positions_BxL=ctx.positions_BxL, base=cfg.rope_base, scaling=cfg.rope_scaling,
                                 width=cfg.rotated(dim))
        if cfg.positions == "rope":
            q_BxLxHxK = turn(q_BxLxHxK)
        if cfg.cross:
            y_BxLxHxK, state = self._read_memory(q_BxLxHxK, ctx, state)
        else:
            k_BxLxGxK = self._project("key", x_BxLxD, cfg.kv_heads or cfg.heads, "kv_heads")
            v_BxLxGxK = self._project("value", x_BxLxD, cfg.kv_heads or cfg.heads, "kv_heads")
            if cfg.positions == "rope":
                k_BxLxGxK = turn(k_BxLxGxK)
            if state is None:
                y_BxLxHxK = self._attend(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, ctx.positions_BxL, ctx.positions_BxL,
                                         ctx.segment_ids_BxL, ctx.segment_ids_BxL, ctx.mask_kind, ctx.prefix_BxL)
            else:
                y_BxLxHxK, state = self._attend_cached(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, ctx, state)
        output_HxKxD = param(self, "output", (cfg.heads, cfg.width(dim), dim), ("heads", "head_dim", "embed"), fan_in(),
                             inputs=("heads", "head_dim"))
        y_BxLxD = linear(y_BxLxHxK, output_HxKxD, 2)
        if cfg.bias:
            y_BxLxD += param(self, "output_bias", (dim,), ("embed",), zeros, role="vector").astype(y_BxLxD.dtype)
        return y_BxLxD, state, {}

    def _project(self, name: str, x_BxLxD: jax.Array, heads: int, axis: str) -> jax.Array:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        shape, axes = (dim, heads, cfg.width(dim)), ("embed", axis, "head_dim")
        weight_DxHxK = param(self, name, shape, axes, fan_in(), inputs=("embed",))
        y_BxLxHxK = linear(x_BxLxD, weight_DxHxK)
        if cfg.bias:
            y_BxLxHxK += param(self, f"{name}_bias", shape[1:], axes[1:], zeros, role="vector").astype(y_BxLxHxK.dtype)
        if cfg.qk_norm and name != "value":
            gain_K = param(self, f"{name}_norm", shape[2:], axes[2:], ones, role="vector")
            y_BxLxHxK = (rms_normalize(y_BxLxHxK, cfg.qk_norm_eps) * gain_K).astype(y_BxLxHxK.dtype)
        return y_BxLxHxK

    def _attend(self, q, k, v, q_positions, k_positions, q_segments, k_segments, mask_kind, k_prefix) -> jax.Array:
        cfg = self.cfg
        slopes_H = jnp.asarray(alibi_slopes(cfg.heads)) if cfg.positions == "alibi" else None
        return attend(q, k, v, q_positions, k_positions, q_segments, k_segments, mask_kind, k_prefix,
                      scale=cfg.scale or 1 / math.sqrt(q.shape[-1]), window=cfg.window, softcap=cfg.softcap, slopes_H=slopes_H,
                      implementation=cfg.implementation)

    def _attend_cached(self, q, k_BxLxGxK, v_BxLxGxK, ctx: Context, state: dict) -> tuple[jax.Array, dict]:
        new = {"k_BxSxGxK": k_BxLxGxK, "v_BxSxGxK": v_BxLxGxK}
        state, seen, documents_BxL = cache.write(state, new, ctx, ring=self.cfg.window is not None)
        y = self._attend(q, seen["k_BxSxGxK"].astype(q.dtype), seen["v_BxSxGxK"].astype(q.dtype), ctx.positions_BxL,
                         seen["positions_BxS"], documents_BxL, seen["documents_BxS"], ctx.mask_kind, seen["prefix_BxS"])
        return y, state

    def _read_memory(self, q_BxLxHxK, ctx: Context, state: dict | None) -> tuple[jax.Array, dict | None]:
        """With a memory: its keys and values, kept in the state if there is one. Without: those kept before."""
        cfg = self.cfg
        if ctx.memory_BxSxD is not None:
            memory, segments_BxS = ctx.memory_BxSxD, ctx.memory_segment_ids_BxS
            k = self._project("key", memory, cfg.kv_heads or cfg.heads, "kv_heads")
            v = self._project("value", memory, cfg.kv_heads or cfg.heads, "kv_heads")
            if state is not None:
                keep = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=0, axis=1)
                state = {"k_BxSxGxK": keep(state["k_BxSxGxK"], k.astype(state["k_BxSxGxK"].dtype)),
                         "v_BxSxGxK": keep(state["v_BxSxGxK"], v.astype(state["v_BxSxGxK"].dtype)),
                         "segment_ids_BxS": keep(jnp.zeros_like(state["segment_ids_BxS"]), segments_BxS)}
        elif state is not None:
            k, v = state["k_BxSxGxK"].astype(q_BxLxHxK.dtype), state["v_BxSxGxK"].astype(q_BxLxHxK.dtype)
            segments_BxS = state["segment_ids_BxS"]
        else:
            raise InputError("ctx.memory_BxSxD", "cross-attention has nothing to read", "give a memory or a filled state")
        y = self._attend(q_BxLxHxK, k, v, jnp.zeros_like(ctx.positions_BxL), jnp.zeros_like(segments_BxS),
                         ctx.segment_ids_BxL, segments_BxS, "bidirectional", None)
        return y, state

    @staticmethod
    def init_state(cfg: Attention, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        slots = min(max_len, cfg.window) if cfg.window else max_len
        heads = (batch, slots, cfg.kv_heads or cfg.heads, cfg.width(dim))
        state = {"k_BxSxGxK": jnp.zeros(heads, dtype), "v_BxSxGxK": jnp.zeros(heads, dtype)}
        if cfg.cross:
            return {**state, "segment_ids_BxS": jnp.zeros((batch, slots), jnp.int32)}
        return {**state, **cache.init_rows(batch, slots)}

    @staticmethod
    def state_axes(cfg: Attention) -> dict:
        heads = ("batch", None, "kv_heads", None)
        axes = {"k_BxSxGxK": heads, "v_BxSxGxK": heads}
        if cfg.cross:
            return {**axes, "segment_ids_BxS": ("batch", None)}
        return {**axes, **cache.row_axes()}

    @staticmethod
    def flops(cfg: Attention, dim: int, seq_len: int, causal: bool = True) -> float:
        """Per token: projections, and scores and values of the visible keys only."""
        width, kv_heads = cfg.width(dim), cfg.kv_heads or cfg.heads
        projections = 4.0 * dim * width * (cfg.heads + kv_heads)
        return projections + 4.0 * cfg.heads * width * visible_keys(seq_len, causal and not cfg.cross, cfg.window)
