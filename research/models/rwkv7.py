"""RWKV-7 (Peng et al. 2025, "Goose"): time mix and channel mix, each a mixer with a state of constant size.

    pattern=(Rwkv7TimeMix(depth=L), Rwkv7ChannelMix(hidden=4 * D, depth=L)), repeats=L

with norm.kind=layernorm and model.embedding_norm. Weights have the names of the authors' code (x_*: mix with the token
before; *0, *1, *2: bias and low-rank factors of the decay w, the learning rate a, the value's mix v and the gate g), and
its initial values. The authors' layer 0 mixes no values: a stage of its own, of Rwkv7TimeMix(first=True). Without that stage
the mix of layer 0 has weights that nothing reads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear import linear
from kernels.wkv7 import wkv7
from research import sharding
from research.config import MixerConfig, Positive
from research.errors import InputError
from research.models.context import Context
from research.models.remade import remade
from research.models.rwkv4 import progress
from research.models.token_shift import token_shift
from research.params import Initializer, constant, orthogonal, param, zeros

FIRST_VALUE = "rwkv7_first_value_BxLxN"
GROUP_NORM_EPS = 64e-5
RANKS = {"w": (1.8, 0.5), "a": (1.8, 0.5), "v": (1.3, 0.5), "g": (0.6, 0.8)}  # c * D**p, in steps of 32


@dataclasses.dataclass(frozen=True)
class Rwkv7TimeMix(MixerConfig):
    """`depth`: layers of the model, over which the initial values change. `*_rank`: of the low-rank parts, None = what the
    authors suggest for the width. `chunk`: tokens whose products are taken at once. `first`: the model's layer 0."""

    depth: Positive
    head_dim: Positive = 64
    decay_rank: Positive | None = None
    rate_rank: Positive | None = None
    value_rank: Positive | None = None
    gate_rank: Positive | None = None
    chunk: Positive = 32
    first: bool = False

    def check(self, dim: int) -> None:
        if dim % self.head_dim:
            raise InputError("head_dim", f"{self.head_dim} does not divide dim={dim}", "choose a divisor")

    def validate(self):
        if self.chunk > 128:
            raise InputError("chunk", f"{self.chunk} decays may leave float32", "choose at most 128")

    def ranks(self, dim: int) -> dict[str, int]:
        given = {"w": self.decay_rank, "a": self.rate_rank, "v": self.value_rank, "g": self.gate_rank}
        return {part: given[part] or max(32, round(c * dim**power / 32) * 32) for part, (c, power) in RANKS.items()}


@dataclasses.dataclass(frozen=True)
class Rwkv7ChannelMix(MixerConfig):
    """`depth`: layers of the model, over which the initial values change."""

    hidden: Positive
    depth: Positive


def uniform(size: float) -> Initializer:
    """In +- size / sqrt(fan_in)."""
    return lambda key, shape, fan: jax.random.uniform(key, shape, minval=-size, maxval=size) / math.sqrt(fan)


def mix(power: jax.Array) -> Initializer:
    """1 - (i / n) ** power for channel i of n: the less of the token before, the later the channel."""
    return lambda key, shape, fan: 1.0 - (jnp.arange(shape[0]) / shape[0]) ** power


def channels(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(from -1/2 to 1/2 over all channels; from -1 to 1 over each head, flat in the middle)."""
    heads, width = shape
    line_HxK = jnp.arange(heads * width).reshape(shape) / max(heads * width - 1, 1) - 0.5
    zigzag_K = (jnp.arange(width) - (width - 1) / 2) / max((width - 1) / 2, 0.5)
    return line_HxK, jnp.broadcast_to(zigzag_K * jnp.abs(zigzag_K), shape)


def lines(value: float, slope: float, zigzag: float = 0.0) -> Initializer:
    """`value`, plus `slope` and `zigzag` times the two lines of `channels`."""
    return lambda key, shape, fan: value + slope * channels(shape)[0] + zigzag * channels(shape)[1]


def decay_speed(early: jax.Array) -> Initializer:
    """w0: channels from the slowest decay to the fastest, over all of them and over each head."""
    def init(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
        line_HxK, zigzag_HxK = channels(shape)
        return -5.5 + 6.0 * (line_HxK + 0.5) ** (1.0 + early**0.3) + 2.5 * zigzag_HxK

    return init


def low_rank(x_BxLxD: jax.Array, first_DxR: jax.Array, second_RxHxK: jax.Array, activation=lambda x: x) -> jax.Array:
    """activation(x @ first) @ second, float32."""
    return linear(activation(linear(x_BxLxD, first_DxR)), second_RxHxK).astype(jnp.float32)


def prepared(k_BxLxHxK, w_BxLxHxK, a_BxLxHxK, vectors: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """The memory's log decays, keys, normed keys and what these take away, float32."""
    log_decay_BxLxHxK = -math.exp(-0.5) * jax.nn.sigmoid(vectors["w0"] + w_BxLxHxK)
    a_BxLxHxK = jax.nn.sigmoid(vectors["a0"] + a_BxLxHxK)
    k_BxLxHxK = k_BxLxHxK.astype(jnp.float32)
    kappa_BxLxHxK = k_BxLxHxK * vectors["k_k"]
    square_BxLxHx1 = jnp.sum(jnp.square(kappa_BxLxHxK), axis=-1, keepdims=True)
    kappa_BxLxHxK *= jax.lax.rsqrt(jnp.maximum(square_BxLxHx1, 1e-24))
    k_BxLxHxK *= 1.0 + (a_BxLxHxK - 1.0) * vectors["k_a"]
    return log_decay_BxLxHxK, k_BxLxHxK, kappa_BxLxHxK, a_BxLxHxK * kappa_BxLxHxK


def mixed_values(v_BxLxHxK: jax.Array, first_BxLxHxK: jax.Array, rank_BxLxHxK: jax.Array, bias_HxK: jax.Array) -> jax.Array:
    """Values, by channel some of layer 0's."""
    return v_BxLxHxK + ((first_BxLxHxK - v_BxLxHxK) * jax.nn.sigmoid(bias_HxK + rank_BxLxHxK)).astype(v_BxLxHxK.dtype)


def finished(y_BxLxHxK, r_BxLxHxK, k_BxLxHxK, v_BxLxHxK, g_BxLxHxK, vectors: dict[str, jax.Array],
             output_HxKxD: jax.Array) -> jax.Array:
    """((LayerNorm of each head by itself + the token's own bonus) * gate) @ output: y_BxLxD."""
    y_BxLxHxK = y_BxLxHxK.astype(jnp.float32)
    y_BxLxHxK -= jnp.mean(y_BxLxHxK, axis=-1, keepdims=True)
    y_BxLxHxK *= jax.lax.rsqrt(jnp.mean(jnp.square(y_BxLxHxK), axis=-1, keepdims=True) + GROUP_NORM_EPS)
    y_BxLxHxK = y_BxLxHxK * vectors["ln_x_gain"] + vectors["ln_x_bias"]
    bonus_BxLxHxK = r_BxLxHxK.astype(jnp.float32) * k_BxLxHxK * vectors["r_k"]
    y_BxLxHxK += jnp.sum(bonus_BxLxHxK, axis=-1, keepdims=True) * v_BxLxHxK.astype(jnp.float32)
    return linear((y_BxLxHxK * g_BxLxHxK).astype(r_BxLxHxK.dtype), output_HxKxD, 2)


class _Mix(nn.Module):
    """What time mix and channel mix share."""

    def mixed(self, name: str, x_BxLxD: jax.Array, previous_BxLxD: jax.Array, power: jax.Array,
              run: Callable[..., jax.Array], *weights: jax.Array) -> jax.Array:
        """run(x + (previous - x) * mix, *weights); the backward pass keeps x and previous, and makes the rest again."""
        mix_D = param(self, f"x_{name}", x_BxLxD.shape[-1:], ("embed",), mix(power), role="vector").astype(x_BxLxD.dtype)
        mix_and_run = lambda x, before, mix, *weights: run(x + (before - x) * mix, *weights)
        return remade(mix_and_run)(x_BxLxD, previous_BxLxD, mix_D, *weights)


class Rwkv7TimeMixMixer(_Mix):
    cfg: Rwkv7TimeMix

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, (B, L, D) = self.cfg, x_BxLxD.shape
        early, late = progress(ctx, cfg.depth)
        previous_BxLxD, last_BxD = token_shift(x_BxLxD, ctx, None if state is None else state["last_BxD"])
        def mixed(name: str, power: float, run: Callable[..., jax.Array], *weights: jax.Array) -> jax.Array:
            return self.mixed(name, x_BxLxD, previous_BxLxD, power * late, run, *weights)

        r_BxLxHxK = mixed("r", 0.2, linear, self._projection("receptance", D, uniform(0.5)))
        k_BxLxHxK = mixed("k", 0.7, linear, self._projection("key", D, uniform(0.05)))
        value_DxHxK = self._projection("value", D, uniform(0.5))
        if cfg.first:
            v_BxLxHxK = mixed("v", 0.7, linear, value_DxHxK)
            first_BxLxN = v_BxLxHxK.reshape(B, L, D)
        else:
            v_BxLxHxK, rank_BxLxHxK = mixed("v", 0.7, lambda x, value, *factors: (linear(x, value), low_rank(x, *factors)),
                                            value_DxHxK, *self._factors("v", D))
            first_BxLxN = jnp.where(ctx.layer == 0, v_BxLxHxK.reshape(B, L, D), ctx.shared[FIRST_VALUE])
            v_BxLxHxK = remade(mixed_values)(v_BxLxHxK, first_BxLxN.reshape(v_BxLxHxK.shape), rank_BxLxHxK,
                                             self._vector("v0", D, lines(0.73, -0.4)))
        w_BxLxHxK = mixed("w", 0.9, functools.partial(low_rank, activation=jnp.tanh), *self._factors("w", D))
        a_BxLxHxK = mixed("a", 0.9, low_rank, *self._factors("a", D))
        g_BxLxHxK = mixed("g", 0.2, functools.partial(low_rank, activation=jax.nn.sigmoid), *self._factors("g", D))

        vectors = {"w0": decay_speed(early), "a0": lines(-0.19, 0.4, 0.3), "k_k": lines(0.71, -0.1), "k_a": constant(1.02)}
        log_decay_BxLxHxK, k_BxLxHxK, kappa_BxLxHxK, removal_BxLxHxK = remade(prepared)(
            k_BxLxHxK, w_BxLxHxK, a_BxLxHxK, {name: self._vector(name, D, init) for name, init in vectors.items()})

        each, whole, rows = ("batch", None, "heads", None), ("batch", "heads", None, None), ("batch", None)
        kernel = sharding.local(self._wkv7, (*(each,) * 6, rows, rows, None if state is None else whole), [each, whole])
        y_BxLxHxK, s_BxHxKxK = kernel(
            r_BxLxHxK, log_decay_BxLxHxK, k_BxLxHxK, v_BxLxHxK, kappa_BxLxHxK, removal_BxLxHxK, ctx.positions_BxL,
            ctx.segment_ids_BxL, None if state is None else state["s_BxHxKxK"])

        gain = lambda key, shape, fan: jnp.full(shape, 1.0) * (1.0 - late + 1.0 / cfg.depth) ** 0.7
        vectors = {"ln_x_gain": gain, "ln_x_bias": zeros, "r_k": constant(-0.04)}
        output_HxKxD = param(self, "output", (*y_BxLxHxK.shape[2:], D), ("heads", "head_dim", "embed"), zeros,
                             inputs=("heads", "head_dim"))
        y_BxLxD = remade(finished)(y_BxLxHxK, r_BxLxHxK, k_BxLxHxK, v_BxLxHxK, g_BxLxHxK,
                                   {name: self._vector(name, D, init) for name, init in vectors.items()}, output_HxKxD)
        state = None if state is None else {"last_BxD": last_BxD, "s_BxHxKxK": s_BxHxKxK}
        return y_BxLxD, state, {"shared": {**ctx.shared, FIRST_VALUE: first_BxLxN}}

    def _wkv7(self, r, log_decay, k, v, key, removal, positions_BxL, segment_ids_BxL, state) -> tuple[jax.Array, jax.Array]:
        return wkv7(r, log_decay, k, v, key, removal, positions_BxL=positions_BxL, segment_ids_BxL=segment_ids_BxL,
                    state_BxHxKxV=state, chunk=self.cfg.chunk)

    def _projection(self, name: str, dim: int, init: Initializer) -> jax.Array:
        shape = (dim, dim // self.cfg.head_dim, self.cfg.head_dim)
        return param(self, name, shape, ("embed", "heads", "head_dim"), init, inputs=("embed",))

    def _vector(self, name: str, dim: int, init: Initializer) -> jax.Array:
        """float32, one number a channel."""
        shape = (dim // self.cfg.head_dim, self.cfg.head_dim)
        return param(self, name, shape, ("heads", "head_dim"), init, role="vector").astype(jnp.float32)

    def _factors(self, part: str, dim: int) -> tuple[jax.Array, jax.Array]:
        """Of `low_rank`, which is nothing at first: the first factor is zero."""
        rank, width = self.cfg.ranks(dim)[part], self.cfg.head_dim
        first_DxR = param(self, f"{part}1", (dim, rank), ("embed", "rank"), zeros, inputs=("embed",))
        second_RxHxK = param(self, f"{part}2", (rank, dim // width, width), ("rank", "heads", "head_dim"), orthogonal(0.1),
                             inputs=("rank",))
        return first_DxR, second_RxHxK

    @staticmethod
    def init_shared(cfg: Rwkv7TimeMix, x_BxLxD: jax.Array) -> dict:
        return {FIRST_VALUE: jnp.zeros_like(x_BxLxD)}

    @staticmethod
    def init_state(cfg: Rwkv7TimeMix, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        memory = (batch, dim // cfg.head_dim, cfg.head_dim, cfg.head_dim)
        return {"last_BxD": jnp.zeros((batch, dim), dtype), "s_BxHxKxK": jnp.zeros(memory, jnp.float32)}

    @staticmethod
    def state_axes(cfg: Rwkv7TimeMix) -> dict:
        return {"last_BxD": ("batch", "embed"), "s_BxHxKxK": ("batch", "heads", None, None)}

    @staticmethod
    def flops(cfg: Rwkv7TimeMix, dim: int, seq_len: int, causal: bool = True) -> float:
        """Projections, low-rank parts, and the memory: find, take away, write, read."""
        ranks = sum(rank for part, rank in cfg.ranks(dim).items() if part != "v" or not cfg.first)
        return 8.0 * dim * dim + 4.0 * dim * ranks + 8.0 * dim * cfg.head_dim


class Rwkv7ChannelMixMixer(_Mix):
    cfg: Rwkv7ChannelMix

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        dim, hidden = x_BxLxD.shape[-1], self.cfg.hidden
        _, late = progress(ctx, self.cfg.depth)
        previous_BxLxD, last_BxD = token_shift(x_BxLxD, ctx, None if state is None else state["last_BxD"])
        key_DxF = param(self, "key", (dim, hidden), ("embed", "mlp"), uniform(0.5), inputs=("embed",))
        value_FxD = param(self, "value", (hidden, dim), ("mlp", "embed"), zeros, inputs=("mlp",))
        h_BxLxF = self.mixed("k", x_BxLxD, previous_BxLxD, late**4, linear, key_DxF)
        y_BxLxD = remade(lambda h, value: linear(jnp.square(nn.relu(h)), value))(h_BxLxF, value_FxD)
        return y_BxLxD, None if state is None else {"last_BxD": last_BxD}, {}

    @staticmethod
    def init_state(cfg: Rwkv7ChannelMix, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        return {"last_BxD": jnp.zeros((batch, dim), dtype)}

    @staticmethod
    def state_axes(cfg: Rwkv7ChannelMix) -> dict:
        return {"last_BxD": ("batch", "embed")}

    @staticmethod
    def flops(cfg: Rwkv7ChannelMix, dim: int, seq_len: int, causal: bool = True) -> float:
        return 4.0 * dim * cfg.hidden
