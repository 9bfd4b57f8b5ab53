"""What the state-space mixers share: published initial values, and the short convolution with its weights."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.convolution import causal_convolution
from kernels.linear import linear
from research import sharding
from research.models.context import Context
from research.models.remade import remade
from research.params import Initializer, fan_in, param


def uniform(low: float, high: float) -> Initializer:
    return lambda key, shape, fan: jax.random.uniform(key, shape, minval=low, maxval=high)


def log_uniform(low: float, high: float) -> Initializer:
    """The logarithm of a number that is log-uniform in [low, high]."""
    return uniform(math.log(low), math.log(high))


def log_of_uniform(low: float, high: float) -> Initializer:
    """The logarithm of a number that is uniform in [low, high]."""
    return lambda key, shape, fan: jnp.log(uniform(low, high)(key, shape, fan))


def log_integers(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
    """log(1), ..., log(N) in every row: A = -1, ..., -N (S4D-Real, Gu et al. 2022)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


def dt_bias(low: float, high: float, floor: float) -> Initializer:
    """softplus(bias) is log-uniform in [low, high], and at least `floor` (Gu and Dao 2023, section 3.6)."""

    def init(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
        dt = jnp.maximum(jnp.exp(log_uniform(low, high)(key, shape, fan)), floor)
        return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus

    return init


def short_convolution(
    module: nn.Module, name: str, x_BxLxx: jax.Array, axes: tuple[str, ...], width: int, bias: bool, ctx: Context,
    state_BxPxx: jax.Array | None, activation: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> tuple[jax.Array, jax.Array | None]:
    """A causal depthwise convolution of x (B, L, *sizes of `axes`), and the P = width - 1 last inputs, if there is a state.

    Declares `name` (width, *axes) and `name_bias`; the last row of the kernel meets the token itself. The backward pass
    keeps x alone: the rest is one pass to make again.
    """
    sizes, bound = x_BxLxx.shape[2:], 1 / math.sqrt(width)
    kernel_Wxx = param(module, name, (width, *sizes), ("conv", *axes), uniform(-bound, bound), inputs=("conv",),
                       role="vector")

    def run(x_BxLxx, kernel_Wxx, positions_BxL, segment_ids_BxL, state_BxPxx):
        flat = lambda x, kept: None if x is None else x.reshape(*x.shape[:kept], -1)
        y, state = causal_convolution(
            flat(x_BxLxx, 2), flat(kernel_Wxx, 1), positions_BxL=positions_BxL, segment_ids_BxL=segment_ids_BxL,
            state_BxPxC=flat(state_BxPxx, 2))
        return y.reshape(x_BxLxx.shape), state.reshape(*state.shape[:2], *x_BxLxx.shape[2:])

    rows, channels = ("batch", None), ("batch", None, *axes)  # whole along the row: gathered under context parallelism
    run = sharding.local(run, (channels, (None, *axes), rows, rows, None if state_BxPxx is None else channels),
                         [channels, channels])
    bias_xx = param(module, f"{name}_bias", sizes, axes, uniform(-bound, bound), role="vector") if bias else None

    def finish(x_BxLxx, kernel_Wxx, bias_xx, positions_BxL, segment_ids_BxL, state_BxPxx):
        y_BxLxx, new_BxPxx = run(x_BxLxx, kernel_Wxx, positions_BxL, segment_ids_BxL, state_BxPxx)
        return activation(y_BxLxx if bias_xx is None else y_BxLxx + bias_xx.astype(y_BxLxx.dtype)), new_BxPxx

    y_BxLxx, new_BxPxx = remade(finish)(
        x_BxLxx, kernel_Wxx, bias_xx, ctx.positions_BxL, ctx.segment_ids_BxL, state_BxPxx)
    return y_BxLxx, None if state_BxPxx is None else new_BxPxx


def gated_output(module: nn.Module, y_BxLxI: jax.Array, dim: int) -> jax.Array:
    """output(y) * sigmoid(output_gate(y)): the projection of S4 and S4D."""
    value_IxD, gate_IxD = (
        param(module, name, (y_BxLxI.shape[-1], dim), ("mlp", "embed"), fan_in(), inputs=("mlp",))
        for name in ("output", "output_gate"))
    gate_BxLxD = nn.sigmoid(linear(y_BxLxI, gate_IxD))
    return linear(y_BxLxI, value_IxD) * gate_BxLxD
