"""Mixture of gated experts: Mixtral, DeepSeek-V2 and V3, Qwen3-MoE and Jamba by their fields.

    score = softmax or sigmoid of (x . router), float32; the top_k experts of score + bias are chosen
    y = shared(x) + sum over the chosen of weight_e * expert_e(x),  expert(x) = down(activation(gate(x)) * up(x))

Shazeer et al. 2017; softmax, renormalised: Jiang et al. 2024 (Mixtral); shared experts: Dai et al. 2024 (DeepSeekMoE); sigmoid
scores, a bias that balances without gradient, groups: DeepSeek-V3 (2024), section 2.1.2.

Dropless, rows are sorted by expert and multiplied group by group (kernels/grouped_matmul.py); where experts lie on several
devices, rows go there and come back by a ragged all-to-all (kernels/expert_exchange.py). With `capacity_factor`, each row of
the batch gives an expert its first ceil(L * top_k * capacity_factor / experts) tokens and drops the rest (GShard, Lepikhin et
al. 2021): what is dropped depends on neighbours, so the exactness contracts hold only for the form without.
"""

import dataclasses
import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.expert_exchange import collect, dispatch, make_plan
from kernels.grouped_matmul import grouped_matmul
from research import sharding
from research.config import MixerConfig, Natural, NonNegative, Positive, PositiveFloat
from research.errors import InputError
from research.models.context import Context
from research.models.mlp import ACTIVATIONS, Activation
from research.params import fan_in, param, zeros
from research.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Moe(MixerConfig):
    """`hidden`: width of an expert. `shared_hidden`: of the expert that every token passes (several are one, side by side), 0
    for none. `renormalize`: the chosen weights sum to one, before `scale` multiplies them. With `groups`, experts are chosen
    from the `top_groups` groups alone that have the best single score (softmax, as in V2) or the best sum of two (sigmoid).
    `balance_rate`: how far the choice's bias moves in a step; None: there is no bias. `balance_loss`, `z_loss`: weights of the
    load-balance loss (Fedus et al. 2022, Switch: 1 at balance, over the batch's tokens) and of the router's z-loss (Zoph et
    al. 2022).
    """

    experts: Positive
    top_k: Positive
    hidden: Positive
    shared_hidden: Natural = 0
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: PositiveFloat = 1.0
    groups: Positive = 1
    top_groups: Positive = 1
    balance_rate: NonNegative | None = None
    balance_loss: NonNegative = 0.0
    z_loss: NonNegative = 0.0
    capacity_factor: PositiveFloat | None = None
    activation: Activation = "silu"
    implementation: Literal["reference", "ragged"] | None = None

    def validate(self):
        if self.experts % self.groups or self.top_groups > self.groups:
            raise InputError("groups", f"{self.groups} does not divide experts={self.experts} or is below top_groups="
                             f"{self.top_groups}", "choose a divisor")
        if self.groups > 1 and self.scores == "sigmoid" and self.experts == self.groups:
            raise InputError("groups", "of one expert each have no best two", "choose fewer")
        if self.top_k > self.experts // self.groups * self.top_groups:
            raise InputError("top_k", f"{self.top_k} is above the {self.experts // self.groups * self.top_groups} experts of "
                             "the chosen groups", "choose fewer")
        if self.top_k == 1 and self.renormalize:
            raise InputError("renormalize", "makes the weight of one expert 1: its router would not learn", "set it to false")


class MoeMixer(nn.Module):
    cfg: Moe

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        chosen_BxLxJ, weight_BxLxJ, aux = self._route(x_BxLxD, ctx)
        up, down = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        weights = (
            param(self, "gate", (cfg.experts, dim, cfg.hidden), up, fan_in(), inputs=("embed",)),
            param(self, "up", (cfg.experts, dim, cfg.hidden), up, fan_in(), inputs=("embed",)),
            param(self, "down", (cfg.experts, cfg.hidden, dim), down, fan_in(), inputs=("mlp",)),
        )
        if cfg.capacity_factor is None:
            y_BxLxD = self._dropless(x_BxLxD, chosen_BxLxJ, weight_BxLxJ, *weights)
        else:
            y_BxLxD, aux["dropped_share"] = self._within_capacity(x_BxLxD, chosen_BxLxJ, weight_BxLxJ, *weights)
        if cfg.shared_hidden:
            y_BxLxD += self._shared(x_BxLxD)
        return y_BxLxD, state, aux

    def _route(self, x_BxLxD: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array, dict]:
        """(chosen_BxLxJ, the token's top_k experts, `experts` for padding; weight_BxLxJ, float32; aux)."""
        cfg = self.cfg
        # Not "expert": router and bias are whole on every expert's device, and count as active whatever is chosen.
        router_DxE = param(self, "router", (x_BxLxD.shape[-1], cfg.experts), ("embed", "router"), fan_in(), inputs=("embed",))
        logits_BxLxE = jnp.einsum("bld,de->ble", x_BxLxD.astype(jnp.float32), router_DxE.astype(jnp.float32))
        logits_BxLxE = constrain(logits_BxLxE, ("batch", "length", None))
        log_score_BxLxE = (jax.nn.log_softmax if cfg.scores == "softmax" else jax.nn.log_sigmoid)(logits_BxLxE)
        score_BxLxE = jnp.exp(log_score_BxLxE)
        choice_BxLxE = jax.lax.stop_gradient(score_BxLxE)
        if cfg.balance_rate is not None:
            bias_E = param(self, "balance_bias", (cfg.experts,), ("router",), zeros, role="vector")
            choice_BxLxE += jax.lax.stop_gradient(bias_E).astype(jnp.float32)
        _, chosen_BxLxJ = jax.lax.top_k(self._in_groups(choice_BxLxE), cfg.top_k)
        log_weight_BxLxJ = jnp.take_along_axis(log_score_BxLxE, chosen_BxLxJ, axis=-1)
        # A softmax of logarithms is score / sum of scores, and stays finite where all of them are tiny.
        weight_BxLxJ = (jax.nn.softmax if cfg.renormalize else jnp.exp)(log_weight_BxLxJ)
        valid_BxLx1 = (ctx.segment_ids_BxL != 0)[..., None]
        chosen_BxLxJ = jnp.where(valid_BxLx1, chosen_BxLxJ, cfg.experts)
        aux = self._aux(logits_BxLxE, log_score_BxLxE, chosen_BxLxJ, valid_BxLx1.astype(jnp.float32))
        return chosen_BxLxJ, weight_BxLxJ * cfg.scale, aux

    def _in_groups(self, choice_BxLxE: jax.Array) -> jax.Array:
        """-inf for the experts outside the best groups."""
        cfg = self.cfg
        if cfg.groups == 1:
            return choice_BxLxE
        by_group = choice_BxLxE.reshape(*choice_BxLxE.shape[:-1], cfg.groups, -1)
        best, _ = jax.lax.top_k(by_group, 1 if cfg.scores == "softmax" else 2)
        _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), cfg.top_groups)
        kept = jnp.any(jax.nn.one_hot(kept, cfg.groups, dtype=bool), axis=-2)
        return jnp.where(kept[..., None], by_group, -jnp.inf).reshape(choice_BxLxE.shape)

    def _aux(self, logits_BxLxE, log_score_BxLxE, chosen_BxLxJ, valid_BxLx1) -> dict:
        """Losses and loads, over the tokens that aren't padding; loads are in fair shares, 1 at balance."""
        cfg = self.cfg
        tokens = jnp.maximum(jnp.sum(valid_BxLx1), 1.0)
        load_E = jnp.sum(jax.nn.one_hot(chosen_BxLxJ, cfg.experts), axis=(0, 1, 2))
        share_E = load_E * cfg.experts / (tokens * cfg.top_k)
        aux = {"max_load": jnp.max(share_E), "min_load": jnp.min(share_E)}
        if cfg.balance_loss:
            probability_BxLxE = jax.nn.softmax(log_score_BxLxE)
            probability_E = jnp.sum(probability_BxLxE * valid_BxLx1, axis=(0, 1)) / tokens
            aux["balance_loss"] = cfg.balance_loss * jnp.sum(share_E * probability_E)
        if cfg.z_loss:
            z_BxLx1 = jnp.square(jax.nn.logsumexp(logits_BxLxE, axis=-1, keepdims=True))
            aux["router_z_loss"] = cfg.z_loss * jnp.sum(z_BxLx1 * valid_BxLx1) / tokens
        if cfg.balance_rate is not None:
            aux["statistics"] = {"balance_bias": load_E}
        return aux

    def _dropless(self, x_BxLxD, chosen_BxLxJ, weight_BxLxJ, gate_ExDxF, up_ExDxF, down_ExFxD) -> jax.Array:
        """Each device sorts its own rows; experts' weights stay where they rest."""
        cfg, rows = self.cfg, ("batch", "length", None)
        up, down = ("expert", None, "mlp"), ("expert", "mlp", None)
        run = functools.partial(dropless, cfg, sharding.mesh_axes("expert", cfg.experts), sharding.mesh_axes("mlp", cfg.hidden))
        return sharding.local(run, (rows, rows, rows, up, up, down), rows)(
            x_BxLxD, chosen_BxLxJ, weight_BxLxJ, gate_ExDxF, up_ExDxF, down_ExFxD)

    def _within_capacity(self, x_BxLxD, chosen_BxLxJ, weight_BxLxJ, gate_ExDxF, up_ExDxF, down_ExFxD):
        """(y_BxLxD, the share of choices that found an expert full). Rows and experts change places by all-to-all."""
        cfg, length = self.cfg, x_BxLxD.shape[1]
        capacity = min(math.ceil(length * cfg.top_k * cfg.capacity_factor / cfg.experts), length)
        sent_BxLxJxE = jax.nn.one_hot(chosen_BxLxJ, cfg.experts)
        weight_BxLxE = jnp.sum(sent_BxLxJxE * weight_BxLxJ[..., None], axis=2)
        sent_BxLxE = jnp.sum(sent_BxLxJxE, axis=2)
        slot_BxLxE = jnp.where(sent_BxLxE == 1, jnp.cumsum(sent_BxLxE, axis=1).astype(jnp.int32) - 1, capacity)
        place_BxLxExC = jax.nn.one_hot(slot_BxLxE, capacity, dtype=x_BxLxD.dtype)  # of `capacity` and above: all zeros
        dropped = jnp.sum(sent_BxLxE * (slot_BxLxE >= capacity)) / jnp.maximum(jnp.sum(sent_BxLxE), 1.0)
        x_BxExCxD = jnp.einsum("blec,bld->becd", place_BxLxExC, x_BxLxD)
        # Both layouts in turn, here and below: one alone makes the compiler gather experts' weights or more rows than it
        # must, and jaxlib 0.12.0.1 can abort on the ambiguous dot (hlo_sharding.h, V3).
        x_BxExCxD = constrain(x_BxExCxD, ("batch", None, None, "embed"))
        x_BxExCxD = constrain(x_BxExCxD, ("expert_batch", "expert", None, "embed"))
        gate_BxExCxF = jnp.einsum("becd,edf->becf", x_BxExCxD, gate_ExDxF)
        up_BxExCxF = jnp.einsum("becd,edf->becf", x_BxExCxD, up_ExDxF)
        y_BxExCxD = jnp.einsum("becf,efd->becd", gated(cfg, gate_BxExCxF, up_BxExCxF), down_ExFxD)
        y_BxExCxD = constrain(y_BxExCxD, ("expert_batch", "expert", None, "embed"))
        y_BxExCxD = constrain(y_BxExCxD, ("batch", None, None, "embed"))
        back_BxLxExC = place_BxLxExC * weight_BxLxE[..., None].astype(x_BxLxD.dtype)
        return constrain(jnp.einsum("blec,becd->bld", back_BxLxExC, y_BxExCxD), ("batch", "length", "embed")), dropped

    def _shared(self, x_BxLxD: jax.Array) -> jax.Array:
        shape, axes = (x_BxLxD.shape[-1], self.cfg.shared_hidden), ("embed", "mlp")
        gate_DxF = param(self, "shared_gate", shape, axes, fan_in(), inputs=axes[:1])
        up_DxF = param(self, "shared_up", shape, axes, fan_in(), inputs=axes[:1])
        down_FxD = param(self, "shared_down", shape[::-1], axes[::-1], fan_in(), inputs=axes[1:])
        gate_BxLxF, up_BxLxF = jnp.einsum("bld,df->blf", x_BxLxD, gate_DxF), jnp.einsum("bld,df->blf", x_BxLxD, up_DxF)
        return jnp.einsum("blf,fd->bld", gated(self.cfg, gate_BxLxF, up_BxLxF), down_FxD)

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


def gated(cfg: Moe, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up; only gate and up are kept for the backward pass."""
    return jax.checkpoint(lambda gate, up: ACTIVATIONS[cfg.activation](gate) * up)(gate, up)


@jax.custom_vjp
def permute(x_MxD: jax.Array, order_M: jax.Array, inverse_M: jax.Array) -> jax.Array:
    """x[order]; its gradient is dy[inverse]: gathers both ways, where JAX's own would scatter."""
    return x_MxD[order_M]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


def dropless(
    cfg: Moe, expert_axes: tuple[str, ...], mlp_axes: tuple[str, ...], x_BxLxD: jax.Array, chosen_BxLxJ: jax.Array,
    weight_BxLxJ: jax.Array, gate_ExDxF: jax.Array, up_ExDxF: jax.Array, down_ExFxD: jax.Array,
) -> jax.Array:
    """Every chosen expert's share of y, in x's dtype; `*_axes` are the mesh axes that experts or their width are split over.

    On several devices the buffer that receives rows has room for the worst case (all tokens choose one device's experts):
    memory grows with the devices, work does not, because grouped products visit only the rows that came.
    """
    (B, L, D), J, experts = x_BxLxD.shape, cfg.top_k, gate_ExDxF.shape[0]
    expert_M = chosen_BxLxJ.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    inverse_M = jnp.argsort(order_M)
    x_MxD = jnp.broadcast_to(x_BxLxD[:, :, None], (B, L, J, D)).reshape(-1, D)
    x_MxD = permute(x_MxD, order_M, inverse_M)
    sizes_E = jnp.sum(jax.nn.one_hot(expert_M, cfg.experts, dtype=jnp.int32), axis=0)
    if expert_axes:
        plan = make_plan(jax.lax.all_gather(sizes_E, expert_axes))
        devices = cfg.experts // experts
        rows = devices * B * L * min(J, experts)  # a token's experts are distinct
        x_MxD = dispatch(x_MxD, plan, rows, expert_axes)
        sizes_E = jnp.sum(plan.counts_PxE.reshape(devices, devices, -1)[:, jax.lax.axis_index(expert_axes)], axis=0)
    multiply = functools.partial(grouped_matmul, sizes_E=sizes_E, implementation=cfg.implementation)
    y_MxD = multiply(gated(cfg, multiply(x_MxD, gate_ExDxF), multiply(x_MxD, up_ExDxF)), down_ExFxD)
    if expert_axes:
        y_MxD = collect(y_MxD, plan, B * L * J, expert_axes)
    y_BxLxJxD = permute(y_MxD, inverse_M, order_M).reshape(B, L, J, D)
    y_BxLxD = jnp.sum(y_BxLxJxD * weight_BxLxJ[..., None], axis=2).astype(x_BxLxD.dtype)
    return jax.lax.psum(y_BxLxD, mlp_axes) if mlp_axes else y_BxLxD
