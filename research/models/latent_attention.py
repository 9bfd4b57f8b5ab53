"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1; V3 alike): keys and values are read from one small latent.

    latent = norm(x kv_down), its key_h = [latent key_h ; rope(x key_rope)], its value_h = latent value_h
    query_h = [n ; rope(r)] of norm(x query_down) query_h, or of x query_h

The cache holds the latent and the rotated key that all heads share, nothing by head. A decode step never makes the cached
keys and values: `key` is absorbed into the query and `value` into the output, which makes it attention of one key head over
the latents. A prefill expands them, which costs fewer FLOPs a score.

DeepSeek's checkpoints rotate neighbours (2k, 2k + 1); here halves are rotated (k, k + K/2), as everywhere in this house: an
import reorders the rotated columns of `query` and `key_rope`, evens first. With YaRN, its softmax scale carries mscale^2:
set `scale`.
"""

import dataclasses
import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear import linear
from research.config import MixerConfig, Positive, PositiveFloat
from research.errors import InputError
from research.models import cache
from research.models.attention import attend, visible_keys
from research.models.context import Context
from research.models.norm import rms_normalize
from research.models.rope import RopeScaling, rotate
from research.params import fan_in, ones, param


@dataclasses.dataclass(frozen=True)
class LatentAttention(MixerConfig):
    """`query_rank`: width of the queries' own latent; None: they are read from x. `nope_dim`, `rope_dim`: the parts of a head
    without and with positions. `scale`: None = 1 / sqrt(nope_dim + rope_dim)."""

    heads: Positive
    kv_rank: Positive
    nope_dim: Positive
    rope_dim: Positive
    value_dim: Positive
    query_rank: Positive | None = None
    rope_base: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    scale: PositiveFloat | None = None
    implementation: Literal["reference", "chunked", "flash", "triton", "cudnn"] | None = None

    def validate(self):
        if self.rope_dim % 2:
            raise InputError("rope_dim", f"{self.rope_dim} is odd, RoPE rotates pairs", "make it even")


class LatentAttentionMixer(nn.Module):
    cfg: LatentAttention

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        turn = functools.partial(rotate, positions_BxL=ctx.positions_BxL, base=cfg.rope_base, scaling=cfg.rope_scaling)
        q_BxLxHxK = self._query(x_BxLxD)
        q_BxLxHxK, q_rope_BxLxHxK = q_BxLxHxK[..., : cfg.nope_dim], turn(q_BxLxHxK[..., cfg.nope_dim :])
        latent_BxLxR = self._latent("kv", x_BxLxD, cfg.kv_rank)
        rope_DxK = param(self, "key_rope", (dim, cfg.rope_dim), ("embed", "head_dim"), fan_in(), inputs=("embed",))
        rope_BxLxK = turn(linear(x_BxLxD, rope_DxK)[:, :, None])[:, :, 0]
        if state is None:
            seen = {"latent_BxSxR": latent_BxLxR, "rope_BxSxK": rope_BxLxK, "positions_BxS": ctx.positions_BxL,
                    "documents_BxS": ctx.segment_ids_BxL, "prefix_BxS": ctx.prefix_BxL}
            documents_BxL = ctx.segment_ids_BxL
        else:
            new = {"latent_BxSxR": latent_BxLxR, "rope_BxSxK": rope_BxLxK}
            state, seen, documents_BxL = cache.write(state, new, ctx, ring=False)
        latent_BxSxR, rope_BxSxK = (seen[name].astype(x_BxLxD.dtype) for name in ("latent_BxSxR", "rope_BxSxK"))

        key_RxHxK, value_RxHxV = self._up("key", cfg.nope_dim), self._up("value", cfg.value_dim)
        absorb = state is not None and x_BxLxD.shape[1] == 1
        if absorb:
            q_BxLxHxK = jnp.einsum("blhk,rhk->blhr", q_BxLxHxK, key_RxHxK)
            k_BxSxGxK, v_BxSxGxV = latent_BxSxR[:, :, None], latent_BxSxR[:, :, None]
        else:
            k_BxSxGxK = jnp.einsum("bsr,rhk->bshk", latent_BxSxR, key_RxHxK)
            v_BxSxGxV = jnp.einsum("bsr,rhv->bshv", latent_BxSxR, value_RxHxV)
        shared = jnp.broadcast_to(rope_BxSxK[:, :, None], (*k_BxSxGxK.shape[:3], cfg.rope_dim))
        y = attend(
            jnp.concatenate([q_BxLxHxK, q_rope_BxLxHxK], axis=-1), jnp.concatenate([k_BxSxGxK, shared], axis=-1), v_BxSxGxV,
            ctx.positions_BxL, seen["positions_BxS"], documents_BxL, seen["documents_BxS"], ctx.mask_kind, seen["prefix_BxS"],
            scale=cfg.scale or 1 / math.sqrt(cfg.nope_dim + cfg.rope_dim), implementation=cfg.implementation)
        y_BxLxHxV = jnp.einsum("blhr,rhv->blhv", y, value_RxHxV) if absorb else y
        output_HxVxD = param(self, "output", (cfg.heads, cfg.value_dim, dim), ("heads", "head_dim", "embed"), fan_in(),
                             inputs=("heads", "head_dim"))
        return linear(y_BxLxHxV, output_HxVxD, 2), state, {}

    def _query(self, x_BxLxD: jax.Array) -> jax.Array:
        cfg = self.cfg
        width = cfg.nope_dim + cfg.rope_dim
        if cfg.query_rank:
            return jnp.einsum("blr,rhk->blhk", self._latent("query", x_BxLxD, cfg.query_rank),
                              self._up("query", width, cfg.query_rank))
        query_DxHxK = param(self, "query", (x_BxLxD.shape[-1], cfg.heads, width), ("embed", "heads", "head_dim"), fan_in(),
                            inputs=("embed",))
        return linear(x_BxLxD, query_DxHxK)

    def _latent(self, name: str, x_BxLxD: jax.Array, rank: int) -> jax.Array:
        down_DxR = param(self, f"{name}_down", (x_BxLxD.shape[-1], rank), ("embed", "rank"), fan_in(), inputs=("embed",))
        gain_R = param(self, f"{name}_norm", (rank,), ("rank",), ones, role="vector")
        latent_BxLxR = rms_normalize(linear(x_BxLxD, down_DxR), 1e-6) * gain_R
        return latent_BxLxR.astype(x_BxLxD.dtype)

    def _up(self, name: str, width: int, rank: int | None = None) -> jax.Array:
        """The latent's axis has another name where it is read, so that it can be split there: `embed` isn't in these."""
        shape = (rank or self.cfg.kv_rank, self.cfg.heads, width)
        return param(self, name, shape, ("latent", "heads", "head_dim"), fan_in(), inputs=("latent",))

    @staticmethod
    def init_state(cfg: LatentAttention, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        return {"latent_BxSxR": jnp.zeros((batch, max_len, cfg.kv_rank), dtype),
                "rope_BxSxK": jnp.zeros((batch, max_len, cfg.rope_dim), dtype), **cache.init_rows(batch, max_len)}

    @staticmethod
    def state_axes(cfg: LatentAttention) -> dict:
        return {"latent_BxSxR": ("batch", None, None), "rope_BxSxK": ("batch", None, None), **cache.row_axes()}

    @staticmethod
    def flops(cfg: LatentAttention, dim: int, seq_len: int, causal: bool = True) -> float:
        """Per token of a parallel call: projections, and scores and values of the visible keys."""
        width, rank = cfg.nope_dim + cfg.rope_dim, cfg.query_rank
        query = rank * (dim + cfg.heads * width) if rank else dim * cfg.heads * width
        keys = dim * (cfg.kv_rank + cfg.rope_dim) + cfg.kv_rank * cfg.heads * (cfg.nope_dim + cfg.value_dim)
        scores = cfg.heads * (width + cfg.value_dim) * visible_keys(seq_len, causal)
        return 2.0 * (query + keys + scores + cfg.heads * cfg.value_dim * dim)
