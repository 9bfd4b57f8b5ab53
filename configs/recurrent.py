"""RWKV-4 (Peng et al. 2023, table 2), RWKV-7 "Goose" (Peng et al. 2025), gated delta net (Yang et al. 2024), and without its
delta rule gated linear attention."""

import dataclasses

from configs.recipes import LAYERNORM, published, small, tiny
from research.models.gated_delta import GatedDelta
from research.models.mlp import GatedMlp
from research.models.rwkv4 import Rwkv4ChannelMix, Rwkv4TimeMix
from research.models.rwkv7 import Rwkv7ChannelMix, Rwkv7TimeMix
from research.schema import Config, ModelConfig, Stage


def _rwkv(vocab_size: int, dim: int, max_len: int, *stages: Stage) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, dim=dim, max_len=max_len, stages=stages, norm=LAYERNORM, embedding_norm=True)


def _rwkv4(name: str, dim: int, layers: int, lr: float) -> Config:
    mixers = Rwkv4TimeMix(depth=layers), Rwkv4ChannelMix(hidden=4 * dim, depth=layers)
    return published(name, _rwkv(50277, dim, 1024, Stage(mixers, layers)), lr=lr, batch_size=1024)


def _rwkv7(name: str, dim: int, layers: int, lr: float, gate_rank: int | None = None) -> Config:
    stages = _rwkv7_stages(Rwkv7TimeMix(depth=layers, gate_rank=gate_rank), 4 * dim)
    return published(name, _rwkv(65536, dim, 4096, *stages), lr=lr, batch_size=512)


def _rwkv7_stages(mix: Rwkv7TimeMix, hidden: int) -> tuple[Stage, Stage]:
    """Layer 0, whose values the others mix theirs with, and the rest."""
    channel_mix = Rwkv7ChannelMix(hidden=hidden, depth=mix.depth)
    first = dataclasses.replace(mix, first=True)
    return Stage((first, channel_mix), 1), Stage((mix, channel_mix), mix.depth - 1)


def rwkv4_tiny() -> Config:
    stage = Stage((Rwkv4TimeMix(depth=2), Rwkv4ChannelMix(hidden=128, depth=2)), 2)
    return tiny("rwkv4_tiny", stage, norm=LAYERNORM, embedding_norm=True)


def rwkv4_small() -> Config:
    stage = Stage((Rwkv4TimeMix(depth=11), Rwkv4ChannelMix(hidden=1024, depth=11)), 11)
    return small("rwkv4_small", stage, norm=LAYERNORM, embedding_norm=True)


def rwkv4_169m() -> Config:
    return _rwkv4("rwkv4_169m", 768, 12, lr=6e-4)


def rwkv4_430m() -> Config:
    return _rwkv4("rwkv4_430m", 1024, 24, lr=4e-4)


def rwkv4_1_5b() -> Config:
    return _rwkv4("rwkv4_1_5b", 2048, 24, lr=3e-4)


def rwkv4_3b() -> Config:
    return _rwkv4("rwkv4_3b", 2560, 32, lr=1.5e-4)


def rwkv4_7b() -> Config:
    return _rwkv4("rwkv4_7b", 4096, 32, lr=1.5e-4)


def rwkv4_14b() -> Config:
    return _rwkv4("rwkv4_14b", 5120, 40, lr=1e-4)


def rwkv7_tiny() -> Config:
    mix = Rwkv7TimeMix(head_dim=16, decay_rank=8, rate_rank=8, value_rank=8, gate_rank=8, depth=2, chunk=16)
    return tiny("rwkv7_tiny", *_rwkv7_stages(mix, 128), norm=LAYERNORM, embedding_norm=True)


def rwkv7_small() -> Config:
    return small("rwkv7_small", *_rwkv7_stages(Rwkv7TimeMix(depth=10), 1024), norm=LAYERNORM, embedding_norm=True)


def rwkv7_190m() -> Config:
    return _rwkv7("rwkv7_190m", 768, 12, lr=6e-4)


def rwkv7_450m() -> Config:
    return _rwkv7("rwkv7_450m", 1024, 24, lr=5e-4, gate_rank=128)


def rwkv7_1_5b() -> Config:
    return _rwkv7("rwkv7_1_5b", 2048, 24, lr=4e-4)


def rwkv7_2_9b() -> Config:
    return _rwkv7("rwkv7_2_9b", 2560, 32, lr=3e-4)


def gated_delta_tiny() -> Config:
    return tiny("gated_delta_tiny", Stage((GatedDelta(heads=2, key_dim=16, chunk=16), GatedMlp(hidden=88)), 2))


def gated_delta_small() -> Config:
    return small("gated_delta_small", Stage((GatedDelta(heads=4, key_dim=48), GatedMlp(hidden=704)), 9))


def gated_linear_tiny() -> Config:
    mixer = GatedDelta(heads=2, key_dim=16, chunk=16, delta=False)
    return tiny("gated_linear_tiny", Stage((mixer, GatedMlp(hidden=88)), 2))


def gated_linear_small() -> Config:
    return small("gated_linear_small", Stage((GatedDelta(heads=4, key_dim=48, delta=False), GatedMlp(hidden=704)), 9))
