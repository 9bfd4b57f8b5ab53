"""The recurrent block of Griffin, RG-LRU (De et al. 2024, section 2.4, eq. 1-4).

    u = convolution(x @ input);  r, i = sigmoid(u @ W + b), block by block;  log a = -8 softplus(lambda) r
    h <- a h + sqrt(1 - a^2) (i u), a document's first token unscaled;  y = (h * gelu(x @ gate)) @ output

Weights, biases and initial values are those of the authors' code (RecurrentGemma), where softplus(lambda) alone, not 8
times it, starts between -log 0.999 and -log 0.9.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.convolution import causal_convolution
from kernels.linear import linear
from kernels.linear_recurrence import linear_recurrence
from research import sharding
from research.config import MixerConfig, Positive
from research.errors import InputError
from research.models.context import Context
from research.models.remade import remade
from research.params import fan_in, normal, param, zeros

STEEPNESS = 8.0
STEEPEST_ROOT = 1000.0  # the derivative of the square root is bounded by it, as in the authors' code


@dataclasses.dataclass(frozen=True)
class RgLru(MixerConfig):
    """`width` of the state, None = dim. `heads`: blocks of the gates' weights. `conv`: taps of the convolution.

    `depth`: layers of the model, each with its MLP; the output's initial values are sqrt(2 / depth) times those of the rest.
    """

    heads: Positive
    width: Positive | None = None
    conv: Positive = 4
    depth: Positive = 2

    def check(self, dim: int) -> None:
        if (self.width or dim) % self.heads:
            raise InputError("heads", f"{self.heads} does not divide the width {self.width or dim}", "choose a divisor")

    def shape(self, dim: int) -> tuple[int, int]:
        """Heads and width of one."""
        return self.heads, (self.width or dim) // self.heads


def ring(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
    """lambda: exp(-softplus(lambda)) is drawn evenly by area from the ring between 0.9 and 0.999 (Orvieto et al. 2023)."""
    log_a = 0.5 * jnp.log(jax.random.uniform(key, shape, minval=0.9**2, maxval=0.999**2))
    return jnp.log(jnp.expm1(-log_a))


def bounded_root(x: jax.Array) -> jax.Array:
    """sqrt(x) with a derivative of at most STEEPEST_ROOT."""
    root = jax.lax.stop_gradient(jnp.sqrt(x))
    slope = 0.5 / jnp.maximum(root, 0.5 / STEEPEST_ROOT)
    return root + (x - jax.lax.stop_gradient(x)) * slope


def rglru(
    x_BxLxHxK: jax.Array, weights: dict[str, jax.Array], positions_BxL: jax.Array, segment_ids_BxL: jax.Array,
    x_BxPxHxK: jax.Array | None, h_BxHxK: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Convolution, gates and recurrence of one device's rows and heads: (h_BxLxHxK float32, the new state of each)."""
    def flat(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else x.reshape(*x.shape[:-2], -1)

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], *x_BxLxHxK.shape[2:])

    ids = dict(positions_BxL=positions_BxL, segment_ids_BxL=segment_ids_BxL)
    u_BxLxN, x_BxPxN = causal_convolution(flat(x_BxLxHxK), flat(weights["conv"]), state_BxPxC=flat(x_BxPxHxK), **ids)
    u_BxLxHxK = heads(u_BxLxN) + weights["conv_bias"].astype(u_BxLxN.dtype)

    def coefficients(u_BxLxHxK, products: dict[str, jax.Array], weights: dict[str, jax.Array]):
        def gate(name: str) -> jax.Array:
            return jax.nn.sigmoid(products[name].astype(jnp.float32) + weights[f"{name}_bias"].astype(jnp.float32))

        log_a_BxLxHxK = -STEEPNESS * jax.nn.softplus(weights["lambda"].astype(jnp.float32)) * gate("recurrence_gate")
        scale_BxLxHxK = bounded_root(-jnp.expm1(2.0 * log_a_BxLxHxK))
        scale_BxLxHxK = jnp.where((positions_BxL == 0)[..., None, None], 1.0, scale_BxLxHxK)
        return jnp.exp(log_a_BxLxHxK), scale_BxLxHxK * gate("input_gate") * u_BxLxHxK.astype(jnp.float32)

    products = {name: jnp.einsum("blhi,hik->blhk", u_BxLxHxK, weights[name]) for name in ("recurrence_gate", "input_gate")}
    a_BxLxHxK, gated_BxLxHxK = remade(coefficients)(u_BxLxHxK, products, weights)
    h_BxLxN, h_BxN = linear_recurrence(flat(a_BxLxHxK), flat(gated_BxLxHxK), state_BxN=flat(h_BxHxK), **ids)
    return heads(h_BxLxN), heads(x_BxPxN), heads(h_BxN)


class RgLruMixer(nn.Module):
    cfg: RgLru

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        H, K = cfg.shape(dim)
        gate_BxLxHxK = self._project("gate", x_BxLxD)
        x_BxLxHxK = self._project("input", x_BxLxD)
        channels = ("heads", "head_dim")
        weights = {"conv": param(self, "conv", (cfg.conv, H, K), ("tap", *channels), normal(0.1 * cfg.conv**-0.5),
                                 role="vector"),
                   "conv_bias": param(self, "conv_bias", (H, K), channels, zeros, role="vector"),
                   "lambda": param(self, "lambda", (H, K), channels, ring, role="vector")}
        for name in ("input_gate", "recurrence_gate"):
            weights[name] = param(self, name, (H, K, K), ("heads", "block", "head_dim"), fan_in(), inputs=("block",))
            weights[f"{name}_bias"] = param(self, f"{name}_bias", (H, K), channels, zeros, role="vector")

        each, rows = ("batch", None, "heads", None), ("batch", None)
        states = [None] * 2 if state is None else list(self.state_axes(cfg).values())
        in_axes = [(None, "heads", None) if name == "conv" else ("heads", *[None] * (weight.ndim - 1))
                   for name, weight in weights.items()]

        def kernel(x, positions, segments, x_state, h_state, *arrays):
            return rglru(x, dict(zip(weights, arrays)), positions, segments, x_state, h_state)

        kernel = sharding.local(kernel, (each, rows, rows, *states, *in_axes), [each, *self.state_axes(cfg).values()])
        own = [None] * 2 if state is None else [state[name] for name in self.state_axes(cfg)]
        h_BxLxHxK, *new = kernel(x_BxLxHxK, ctx.positions_BxL, ctx.segment_ids_BxL, *own, *weights.values())
        output_HxKxD = param(self, "output", (H, K, dim), (*channels, "embed"), fan_in(math.sqrt(2.0 / cfg.depth)),
                             inputs=channels)
        gated_output = remade(lambda h, gate, output: linear(h.astype(gate.dtype) * nn.gelu(gate), output, 2))
        y_BxLxD = gated_output(h_BxLxHxK, gate_BxLxHxK, output_HxKxD)
        y_BxLxD += param(self, "output_bias", (dim,), ("embed",), zeros, role="vector").astype(y_BxLxD.dtype)
        return y_BxLxD, None if state is None else dict(zip(self.state_axes(cfg), new)), {}

    def _project(self, name: str, x_BxLxD: jax.Array) -> jax.Array:
        dim, shape, axes = x_BxLxD.shape[-1], self.cfg.shape(x_BxLxD.shape[-1]), ("heads", "head_dim")
        weight_DxHxK = param(self, name, (dim, *shape), ("embed", *axes), fan_in(), inputs=("embed",))
        bias_HxK = param(self, f"{name}_bias", shape, axes, zeros, role="vector")
        return linear(x_BxLxD, weight_DxHxK) + bias_HxK.astype(x_BxLxD.dtype)

    @staticmethod
    def init_state(cfg: RgLru, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        shape = cfg.shape(dim)  # h sums over a whole document: always float32
        return {"x_BxPxHxK": jnp.zeros((batch, cfg.conv - 1, *shape), dtype),
                "h_BxHxK": jnp.zeros((batch, *shape), jnp.float32)}

    @staticmethod
    def state_axes(cfg: RgLru) -> dict:
        return {"x_BxPxHxK": ("batch", None, "heads", None), "h_BxHxK": ("batch", "heads", None)}

    @staticmethod
    def flops(cfg: RgLru, dim: int, seq_len: int, causal: bool = True) -> float:
        """Three projections and two gates; convolution and recurrence are elementwise and aren't counted, as everywhere."""
        heads, width = cfg.shape(dim)
        return 6.0 * dim * heads * width + 4.0 * heads * width * width
