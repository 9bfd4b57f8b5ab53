"""MLPs: mixers that don't look sideways."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear import linear
from research.config import MixerConfig, Positive
from research.models.context import Context
from research.models.remade import remade
from research.params import fan_in, param, zeros

ACTIVATIONS = {"gelu": nn.gelu, "gelu_exact": lambda x: nn.gelu(x, approximate=False), "relu": nn.relu,
               "relu_squared": lambda x: jnp.square(nn.relu(x)), "silu": nn.silu}
Activation = Literal["gelu", "gelu_exact", "relu", "relu_squared", "silu"]


@dataclasses.dataclass(frozen=True)
class Mlp(MixerConfig):
    """down(activation(up(x))) (Vaswani et al. 2017)."""

    hidden: Positive
    activation: Activation = "gelu"
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class GatedMlp(MixerConfig):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020: SwiGLU with silu, GEGLU with gelu)."""

    hidden: Positive
    activation: Activation = "silu"
    bias: bool = False


class _Stateless(nn.Module):
    """What the mixers without state or aux share."""

    @staticmethod
    def init_state(cfg: MixerConfig, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        return {}

    @staticmethod
    def state_axes(cfg: MixerConfig) -> dict:
        return {}

    def linear(self, name: str, x_BxLxI: jax.Array, size: int, axes: tuple[str, str], bias: bool) -> jax.Array:
        return self.with_bias(name, linear(x_BxLxI, self.weight(name, x_BxLxI.shape[-1], size, axes)), axes[1], bias)

    def weight(self, name: str, inputs: int, outputs: int, axes: tuple[str, str]) -> jax.Array:
        return param(self, name, (inputs, outputs), axes, fan_in(), inputs=axes[:1])

    def with_bias(self, name: str, y_BxLxO: jax.Array, axis: str, bias: bool) -> jax.Array:
        if not bias:
            return y_BxLxO
        return y_BxLxO + param(self, f"{name}_bias", y_BxLxO.shape[-1:], (axis,), zeros, role="vector").astype(y_BxLxO.dtype)


class MlpMixer(_Stateless):
    cfg: Mlp

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg = self.cfg
        h_BxLxF = self.linear("up", x_BxLxD, cfg.hidden, ("embed", "mlp"), cfg.bias)
        activate = ACTIVATIONS[cfg.activation]
        down_FxD = self.weight("down", cfg.hidden, x_BxLxD.shape[-1], ("mlp", "embed"))
        y_BxLxD = remade(lambda h, down: linear(activate(h), down))(h_BxLxF, down_FxD)
        return self.with_bias("down", y_BxLxD, "embed", cfg.bias), state, {}

    @staticmethod
    def flops(cfg: Mlp, dim: int, seq_len: int, causal: bool = True) -> float:
        return 4.0 * dim * cfg.hidden


class GatedMlpMixer(_Stateless):
    cfg: GatedMlp

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg = self.cfg
        gate_BxLxF = self.linear("gate", x_BxLxD, cfg.hidden, ("embed", "mlp"), cfg.bias)
        up_BxLxF = self.linear("up", x_BxLxD, cfg.hidden, ("embed", "mlp"), cfg.bias)
        activate = ACTIVATIONS[cfg.activation]
        down_FxD = self.weight("down", cfg.hidden, x_BxLxD.shape[-1], ("mlp", "embed"))
        y_BxLxD = remade(lambda gate, up, down: linear(activate(gate) * up, down))(gate_BxLxF, up_BxLxF, down_FxD)
        return self.with_bias("down", y_BxLxD, "embed", cfg.bias), state, {}

    @staticmethod
    def flops(cfg: GatedMlp, dim: int, seq_len: int, causal: bool = True) -> float:
        return 6.0 * dim * cfg.hidden
