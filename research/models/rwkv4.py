"""RWKV-4 (Peng et al. 2023): time mix and channel mix, each a mixer with a state of constant size.

    pattern=(Rwkv4TimeMix(depth=L), Rwkv4ChannelMix(hidden=4 * D, depth=L)), repeats=L

with norm.kind=layernorm and model.embedding_norm. Names and layout are those of transformers' RwkvModel (its linear
weights transposed). Initial values are those of the authors' code: orthogonal, or zero where a branch begins closed.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear import linear
from kernels.wkv import Sums, empty, wkv
from research import sharding
from research.config import MixerConfig, Positive
from research.models.context import Context
from research.models.remade import remade
from research.models.token_shift import token_shift
from research.params import Initializer, orthogonal, param, zeros

SUMS = ("numerator_BxN", "denominator_BxN", "exponent_BxN")  # of the state, in the order of `Sums`


@dataclasses.dataclass(frozen=True)
class Rwkv4TimeMix(MixerConfig):
    """`depth`: layers of the model, over which the initial values change. `width` of the state, None = dim."""

    depth: Positive
    width: Positive | None = None


@dataclasses.dataclass(frozen=True)
class Rwkv4ChannelMix(MixerConfig):
    """`depth`: layers of the model, over which the initial values change."""

    hidden: Positive
    depth: Positive


def progress(ctx: Context, depth: int) -> tuple[jax.Array, jax.Array]:
    """How deep the layer is: from 0 in the first to 1 in the last; and from 1 in the first to 1/depth in the last. Layers
    beyond `depth` are as the last one."""
    layer = jnp.float32(0) if ctx.layer is None else jnp.minimum(ctx.layer, depth - 1).astype(jnp.float32)
    return layer / max(depth - 1, 1), 1.0 - layer / depth


def ramp(power: jax.Array | float, offset: jax.Array | float = 0.0) -> Initializer:
    """(i / n) ** power + offset for channel i of n: the more, the later the channel."""
    return lambda key, shape, fan: (jnp.arange(shape[0]) / shape[0]) ** power + offset


def decay_speed(progress: jax.Array) -> Initializer:
    """time_decay: from -5, slowest, to 3."""
    return lambda key, shape, fan: -5.0 + 8.0 * (jnp.arange(shape[0]) / max(shape[0] - 1, 1)) ** (0.7 + 1.3 * progress)


def zigzag(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
    """time_first: log 0.3, and -1/2, 0 or 1/2 in turn."""
    return math.log(0.3) + 0.5 * ((jnp.arange(shape[0]) + 1) % 3 - 1)


class _Mix(nn.Module):
    """What time mix and channel mix share."""

    def mixed(self, name: str, x_BxLxD: jax.Array, previous_BxLxD: jax.Array, mix: Initializer, size: int,
              axes: tuple[str, str], init: Initializer) -> jax.Array:
        """linear(x * time_mix + previous * (1 - time_mix)); the backward pass keeps x and previous, and mixes again."""
        mix_D = param(self, f"time_mix_{name}", x_BxLxD.shape[-1:], ("embed",), mix, role="vector").astype(x_BxLxD.dtype)
        weight_DxO = self.weight(name, (x_BxLxD.shape[-1], size), axes, init)
        run = remade(lambda x, before, mix, weight: linear(x * mix + before * (1 - mix), weight))
        return run(x_BxLxD, previous_BxLxD, mix_D, weight_DxO)

    def weight(self, name: str, shape: tuple[int, int], axes: tuple[str, str], init: Initializer) -> jax.Array:
        return param(self, name, shape, axes, init, inputs=axes[:1])


def _wkv(k_BxLxN, v_BxLxN, time_decay_N, time_first_N, positions_BxL, segment_ids_BxL, *sums) -> tuple[jax.Array, ...]:
    decay_N = jnp.exp(time_decay_N.astype(jnp.float32))
    y_BxLxN, sums = wkv(k_BxLxN, v_BxLxN, decay_N, time_first_N, positions_BxL=positions_BxL,
                        segment_ids_BxL=segment_ids_BxL, state=None if sums[0] is None else Sums(*sums))
    return y_BxLxN, *sums


class Rwkv4TimeMixMixer(_Mix):
    cfg: Rwkv4TimeMix

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        dim = x_BxLxD.shape[-1]
        width = self.cfg.width or dim
        early, late = progress(ctx, self.cfg.depth)
        previous_BxLxD, last_BxD = token_shift(x_BxLxD, ctx, None if state is None else state["last_BxD"])
        axes = ("embed", "state")
        k_BxLxN, v_BxLxN, r_BxLxN = (
            self.mixed(name, x_BxLxD, previous_BxLxD, mix, width, axes, init) for name, mix, init in (
                ("key", ramp(late), zeros),
                ("value", ramp(late, 0.3 * early), orthogonal(math.sqrt(max(1.0, width / dim)))),
                ("receptance", ramp(0.5 * late), zeros)))
        decay_N = param(self, "time_decay", (width,), ("state",), decay_speed(early), role="vector")
        first_N = param(self, "time_first", (width,), ("state",), zigzag, role="vector")
        sums = (None,) * 3 if state is None else [state[name] for name in SUMS]
        rows, channels, sums_axes = ("batch", None), ("state",), None if state is None else ("batch", "state")
        each = ("batch", None, "state")  # the row whole along its length: gathered under context parallelism
        kernel = sharding.local(_wkv, (each, each, channels, channels, rows, rows, *(sums_axes,) * 3),
                                [each, *(("batch", "state"),) * 3])
        y_BxLxN, *sums = kernel(k_BxLxN, v_BxLxN, decay_N, first_N, ctx.positions_BxL, ctx.segment_ids_BxL, *sums)
        output_NxD = self.weight("output", (width, dim), ("state", "embed"), zeros)
        gated = remade(lambda r, y, output: linear(jax.nn.sigmoid(r) * y, output))
        y_BxLxD = gated(r_BxLxN, y_BxLxN, output_NxD)
        return y_BxLxD, None if state is None else {"last_BxD": last_BxD, **dict(zip(SUMS, sums))}, {}

    @staticmethod
    def init_state(cfg: Rwkv4TimeMix, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        sums = empty((batch, cfg.width or dim))
        return {"last_BxD": jnp.zeros((batch, dim), dtype), **dict(zip(SUMS, sums))}

    @staticmethod
    def state_axes(cfg: Rwkv4TimeMix) -> dict:
        return {"last_BxD": ("batch", "embed"), **dict.fromkeys(SUMS, ("batch", "state"))}

    @staticmethod
    def flops(cfg: Rwkv4TimeMix, dim: int, seq_len: int, causal: bool = True) -> float:
        """The projections; the recurrence is elementwise and isn't counted, as everywhere."""
        return 8.0 * dim * (cfg.width or dim)


class Rwkv4ChannelMixMixer(_Mix):
    cfg: Rwkv4ChannelMix

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        dim = x_BxLxD.shape[-1]
        _, late = progress(ctx, self.cfg.depth)
        previous_BxLxD, last_BxD = token_shift(x_BxLxD, ctx, None if state is None else state["last_BxD"])
        hidden, gain = self.cfg.hidden, math.sqrt(max(1.0, self.cfg.hidden / dim))
        h_BxLxF = self.mixed("key", x_BxLxD, previous_BxLxD, ramp(late), hidden, ("embed", "mlp"), orthogonal(gain))
        value_FxD = self.weight("value", (hidden, dim), ("mlp", "embed"), zeros)
        y_BxLxD = remade(lambda h, value: linear(jnp.square(nn.relu(h)), value))(h_BxLxF, value_FxD)
        # A square weight needs two names: the gate's rows are the outputs, and stay whole.
        y_BxLxD *= jax.nn.sigmoid(self.mixed("receptance", x_BxLxD, previous_BxLxD, ramp(late), dim, ("embed", "gate"), zeros))
        return y_BxLxD, None if state is None else {"last_BxD": last_BxD}, {}

    @staticmethod
    def init_state(cfg: Rwkv4ChannelMix, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        return {"last_BxD": jnp.zeros((batch, dim), dtype)}

    @staticmethod
    def state_axes(cfg: Rwkv4ChannelMix) -> dict:
        return {"last_BxD": ("batch", "embed")}

    @staticmethod
    def flops(cfg: Rwkv4ChannelMix, dim: int, seq_len: int, causal: bool = True) -> float:
        return 4.0 * dim * cfg.hidden + 2.0 * dim * dim
