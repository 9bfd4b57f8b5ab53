"""The one table of mixers. A new mixer is its file and a row here; the contract battery then runs on it by itself.

A mixer is a Linen module whose only field is its config, a frozen dataclass beside it:

    y_BxLxD, state, aux = Module(cfg)(x_BxLxD, ctx, state)

`state=None` is training; with a state, L > 1 is prefill and L = 1 a decode step. `aux` is a dict: entries whose name ends in
`_loss` are added to the loss (already weighted), `shared` replaces the carried dict, `statistics` holds sums for
`update_weight`, the rest are metrics. Beside `__call__` stand four static functions of the config:

    init_state(cfg, batch, dim, max_len, dtype) -> dict of arrays      the state before the first token
    state_axes(cfg) -> the same dict of logical axes
    flops(cfg, dim, seq_len, causal=True) -> float                    algorithmic, forward, per token
    update_weight(cfg, name, value, statistic) -> value               only where `statistics` is returned
    active_share(cfg) -> float                                        only where weights have an axis `expert`
"""

import dataclasses
import re
from typing import Iterator, Mapping, NamedTuple, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.config import MixerConfig
from research.errors import InputError
from research.models.attention import Attention, AttentionMixer
from research.models.context import Context
from research.models.gated_delta import GatedDelta, GatedDeltaMixer
from research.models.h3 import H3, H3Mixer
from research.models.latent_attention import LatentAttention, LatentAttentionMixer
from research.models.mamba import Mamba, MambaMixer
from research.models.mamba2 import Mamba2, Mamba2Mixer
from research.models.mlp import GatedMlp, GatedMlpMixer, Mlp, MlpMixer
from research.models.moe import Moe, MoeMixer
from research.models.rglru import RgLru, RgLruMixer
from research.models.rwkv4 import Rwkv4ChannelMix, Rwkv4ChannelMixMixer, Rwkv4TimeMix, Rwkv4TimeMixMixer
from research.models.rwkv7 import Rwkv7ChannelMix, Rwkv7ChannelMixMixer, Rwkv7TimeMix, Rwkv7TimeMixMixer
from research.models.s4 import S4, S4Mixer
from research.models.s4d import S4d, S4dMixer


class Mixer(NamedTuple):
    config: type[MixerConfig]
    module: type[nn.Module]


@dataclasses.dataclass(frozen=True)
class Parallel(MixerConfig):
    """Mixers side by side on one norm, summed (GPT-J, PaLM: attention and MLP in parallel)."""

    mixers: tuple[MixerConfig, ...]

    def validate(self):
        if len(self.mixers) < 2:
            raise InputError("mixers", "holds fewer than two", "name the mixers to sum")

    def check(self, dim: int) -> None:
        for mixer in self.mixers:
            mixer.check(dim)


class ParallelMixer(nn.Module):
    """y = sum of the mixers; state and aux are theirs, by name."""

    cfg: Parallel

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        y_BxLxD, states, auxes = jnp.zeros_like(x_BxLxD), {}, {}
        for name, cfg in named(self.cfg.mixers):
            module = row(cfg).module(cfg, name=name)
            y, new_state, aux = module(x_BxLxD, ctx, None if state is None else state[name])
            if "shared" in aux:
                raise NotImplementedError("a mixer inside Parallel can't change what is shared across layers")
            y_BxLxD, states[name], auxes[name] = y_BxLxD + y, new_state, aux
        return y_BxLxD, None if state is None else states, {name: aux for name, aux in auxes.items() if aux}

    @staticmethod
    def init_state(cfg: Parallel, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        return {name: row(m).module.init_state(m, batch, dim, max_len, dtype)
                for name, m in named(cfg.mixers)}

    @staticmethod
    def state_axes(cfg: Parallel) -> dict:
        return {name: row(m).module.state_axes(m) for name, m in named(cfg.mixers)}

    @staticmethod
    def flops(cfg: Parallel, dim: int, seq_len: int, causal: bool = True) -> float:
        return sum(row(m).module.flops(m, dim, seq_len, causal) for m in cfg.mixers)


MIXERS: dict[str, Mixer] = {
    "Attention": Mixer(Attention, AttentionMixer),
    "GatedDelta": Mixer(GatedDelta, GatedDeltaMixer),
    "GatedMlp": Mixer(GatedMlp, GatedMlpMixer),
    "LatentAttention": Mixer(LatentAttention, LatentAttentionMixer),
    "H3": Mixer(H3, H3Mixer),
    "Mamba": Mixer(Mamba, MambaMixer),
    "Mamba2": Mixer(Mamba2, Mamba2Mixer),
    "Mlp": Mixer(Mlp, MlpMixer),
    "Moe": Mixer(Moe, MoeMixer),
    "Parallel": Mixer(Parallel, ParallelMixer),
    "RgLru": Mixer(RgLru, RgLruMixer),
    "Rwkv4ChannelMix": Mixer(Rwkv4ChannelMix, Rwkv4ChannelMixMixer),
    "Rwkv4TimeMix": Mixer(Rwkv4TimeMix, Rwkv4TimeMixMixer),
    "Rwkv7ChannelMix": Mixer(Rwkv7ChannelMix, Rwkv7ChannelMixMixer),
    "Rwkv7TimeMix": Mixer(Rwkv7TimeMix, Rwkv7TimeMixMixer),
    "S4": Mixer(S4, S4Mixer),
    "S4d": Mixer(S4d, S4dMixer),
}


def row(cfg: MixerConfig) -> Mixer:
    return MIXERS[type(cfg).__name__]


def kinds() -> dict[str, type[MixerConfig]]:
    """Name -> config class, as `config.from_json` wants it."""
    return {name: mixer.config for name, mixer in MIXERS.items()}


def named(pattern: Sequence[MixerConfig]) -> Iterator[tuple[str, MixerConfig]]:
    """("attention_0", Attention(...)), ("gated_mlp_1", ...): the names of a pattern's mixers in the parameter tree."""
    for index, cfg in enumerate(pattern):
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(cfg).__name__).lower()
        yield f"{snake}_{index}", cfg


def state_bytes(cfg: MixerConfig, dim: int, seq_len: int, dtype: jnp.dtype) -> int:
    """Bytes of one sequence's state after `seq_len` tokens, from the shapes of `init_state`."""
    state = jax.eval_shape(lambda: row(cfg).module.init_state(cfg, 1, dim, seq_len, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def stack(tree: Mapping, repeats: int) -> Mapping:
    """The state of one layer -> that of `repeats` scanned layers."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), tree)
