"""Mixture of gated experts with sigmoid scores and a balancing bias that learns without gradient
(DeepSeek-V3, 2024).

    score_e = sigmoid(x . router_e); the top k of score + bias are chosen
    y = shared(x) + sum over the chosen of weight_e * expert_e(x); weights: their scores, made to sum to one

Scores are float32. Without a capacity factor every expert sees every token and the weights of the others are
zero: exact, and slow. With one, each row gives an expert at most ceil(L * top_k * capacity_factor / experts)
tokens and drops the rest (GShard, Lepikhin et al. 2021): what a row drops depends on its neighbours, so the
exactness contracts hold only for the form without.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.config import MixerConfig, Natural, NonNegative, Positive, PositiveFloat
from research.errors import InputError
from research.models.context import Context
from research.params import fan_in, param, zeros
from research.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Moe(MixerConfig):
    """`shared_hidden`: width of the expert that every token passes, 0 for none. `router_z`: weight of the
    router's z-loss (Zoph et al. 2022); `balance_rate`: how far the bias moves in a step."""

    experts: Positive
    top_k: Positive
    hidden: Positive
    shared_hidden: Natural = 0
    balance_rate: NonNegative = 1e-3
    router_z: NonNegative = 1e-3
    capacity_factor: PositiveFloat | None = None

    def validate(self):
        if self.top_k > self.experts:
            raise InputError("top_k", f"{self.top_k} is above experts={self.experts}", "choose fewer")


class MoeMixer(nn.Module):
    cfg: Moe

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None
    ) -> tuple[jax.Array, dict | None, dict]:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        weight_BxLxE, aux = self._route(x_BxLxD, ctx)
        shape_up, shape_down = (cfg.experts, dim, cfg.hidden), (cfg.experts, cfg.hidden, dim)
        axes_up, axes_down = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        gate_ExDxF = param(self, "gate", shape_up, axes_up, fan_in(), inputs=("embed",))
        up_ExDxF = param(self, "up", shape_up, axes_up, fan_in(), inputs=("embed",))
        down_ExFxD = param(self, "down", shape_down, axes_down, fan_in(), inputs=("mlp",))
        if cfg.capacity_factor is None:
            x_BxLxD_all = constrain(x_BxLxD, ("expert_batch", "length", "embed"))
            y_BxLxD = self._all_experts(x_BxLxD_all, weight_BxLxE, gate_ExDxF, up_ExDxF, down_ExFxD)
        else:
            y_BxLxD = self._within_capacity(x_BxLxD, weight_BxLxE, gate_ExDxF, up_ExDxF, down_ExFxD)
        y_BxLxD = constrain(y_BxLxD, ("batch", "length", "embed"))
        if cfg.shared_hidden:
            y_BxLxD += self._shared(x_BxLxD)
        return y_BxLxD, state, aux

    def _route(self, x_BxLxD: jax.Array, ctx: Context) -> tuple[jax.Array, dict]:
        """weight_BxLxE, zero where an expert isn't chosen or the token is padding; and aux."""
        cfg, shape = self.cfg, (x_BxLxD.shape[-1], self.cfg.experts)
        router_DxE = param(self, "router", shape, ("embed", "expert"), fan_in(), inputs=("embed",))
        bias_E = param(self, "balance_bias", shape[1:], ("expert",), zeros, role="vector")
        logits_BxLxE = jnp.einsum("bld,de->ble", x_BxLxD.astype(jnp.float32), router_DxE.astype(jnp.float32))
        score_BxLxE = jax.nn.sigmoid(logits_BxLxE)
        _, chosen_BxLxT = jax.lax.top_k(
            jax.lax.stop_gradient(score_BxLxE + bias_E.astype(jnp.float32)), cfg.top_k
        )
        valid_BxL = (ctx.segment_ids_BxL != 0).astype(jnp.float32)
        chosen_BxLxE = jnp.sum(jax.nn.one_hot(chosen_BxLxT, cfg.experts), axis=2) * valid_BxL[..., None]
        weight_BxLxE = score_BxLxE * chosen_BxLxE
        weight_BxLxE /= jnp.maximum(jnp.sum(weight_BxLxE, axis=-1, keepdims=True), 1e-9)
        z_BxL = jnp.square(jax.nn.logsumexp(logits_BxLxE, axis=-1))
        load_E = jnp.sum(chosen_BxLxE, axis=(0, 1))
        tokens = jnp.maximum(jnp.sum(valid_BxL), 1.0)
        aux = {
            "router_z_loss": cfg.router_z * jnp.sum(z_BxL * valid_BxL) / tokens,
            "max_load": jnp.max(load_E) * cfg.experts / (tokens * cfg.top_k),  # of its fair share
            "statistics": {"balance_bias": load_E},
        }
        return weight_BxLxE, aux

    def _all_experts(self, x_BxLxD, weight_BxLxE, gate_ExDxF, up_ExDxF, down_ExFxD) -> jax.Array:
        h_BxLxExF = nn.silu(jnp.einsum("bld,edf->blef", x_BxLxD, gate_ExDxF))
        h_BxLxExF *= jnp.einsum("bld,edf->blef", x_BxLxD, up_ExDxF)
        h_BxLxExF = constrain(h_BxLxExF, ("expert_batch", "length", "expert", "mlp"))
        h_BxLxExF *= weight_BxLxE[..., None].astype(h_BxLxExF.dtype)
        return jnp.einsum("blef,efd->bld", h_BxLxExF, down_ExFxD)

    def _within_capacity(self, x_BxLxD, weight_BxLxE, gate_ExDxF, up_ExDxF, down_ExFxD) -> jax.Array:
        """Each row sends an expert its first C tokens; rows and experts change places by all-to-all."""
        cfg, length = self.cfg, x_BxLxD.shape[1]
        capacity = min(math.ceil(length * cfg.top_k * cfg.capacity_factor / cfg.experts), length)
        sent_BxLxE = (weight_BxLxE > 0).astype(jnp.int32)
        slot_BxLxE = jnp.cumsum(sent_BxLxE, axis=1) - 1
        slot_BxLxE = jnp.where(sent_BxLxE == 1, slot_BxLxE, capacity)  # one_hot of `capacity` is all zeros
        place_BxLxExC = jax.nn.one_hot(slot_BxLxE, capacity, dtype=x_BxLxD.dtype)
        x_BxExCxD = jnp.einsum("blec,bld->becd", place_BxLxExC, x_BxLxD)
        # Both layouts in turn, here and below: one alone makes the compiler gather experts' weights or more
        # rows than it must, and jaxlib 0.12.0.1 can abort on the ambiguous dot (hlo_sharding.h, V3).
        x_BxExCxD = constrain(x_BxExCxD, ("batch", None, None, "embed"))
        x_BxExCxD = constrain(x_BxExCxD, ("expert_batch", "expert", None, "embed"))
        h_BxExCxF = nn.silu(jnp.einsum("becd,edf->becf", x_BxExCxD, gate_ExDxF))
        h_BxExCxF *= jnp.einsum("becd,edf->becf", x_BxExCxD, up_ExDxF)
        y_BxExCxD = jnp.einsum("becf,efd->becd", h_BxExCxF, down_ExFxD)
        y_BxExCxD = constrain(y_BxExCxD, ("expert_batch", "expert", None, "embed"))
        y_BxExCxD = constrain(y_BxExCxD, ("batch", None, None, "embed"))
        back_BxLxExC = place_BxLxExC * weight_BxLxE[..., None].astype(x_BxLxD.dtype)
        return jnp.einsum("blec,becd->bld", back_BxLxExC, y_BxExCxD)

    def _shared(self, x_BxLxD: jax.Array) -> jax.Array:
        shape, axes = (x_BxLxD.shape[-1], self.cfg.shared_hidden), ("embed", "mlp")
        gate_DxF = param(self, "shared_gate", shape, axes, fan_in(), inputs=axes[:1])
        up_DxF = param(self, "shared_up", shape, axes, fan_in(), inputs=axes[:1])
        down_FxD = param(self, "shared_down", shape[::-1], axes[::-1], fan_in(), inputs=axes[1:])
        h_BxLxF = nn.silu(jnp.einsum("bld,df->blf", x_BxLxD, gate_DxF)) * jnp.einsum(
            "bld,df->blf", x_BxLxD, up_DxF
        )
        return jnp.einsum("blf,fd->bld", h_BxLxF, down_FxD)

    @staticmethod
    def init_state(cfg: Moe, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        return {}

    @staticmethod
    def state_axes(cfg: Moe) -> dict:
        return {}

    @staticmethod
    def flops(cfg: Moe, dim: int, seq_len: int, causal: bool = True) -> float:
        """Of the chosen experts, the shared one and the router."""
        return 6.0 * dim * (cfg.top_k * cfg.hidden + cfg.shared_hidden) + 2.0 * dim * cfg.experts

    @staticmethod
    def active_share(cfg: Moe) -> float:
        """The share of the experts' weights that one token passes through."""
        return cfg.top_k / cfg.experts

    @staticmethod
    def update_weight(cfg: Moe, name: str, value_E: jax.Array, load_E: jax.Array) -> jax.Array:
        """Towards experts that got less than their share (DeepSeek-V3, section 2.1.2)."""
        if name != "balance_bias":
            raise ValueError(f"Moe: {name} learns by gradient")
        return value_E + cfg.balance_rate * jnp.sign(jnp.mean(load_E) - load_E).astype(value_E.dtype)
