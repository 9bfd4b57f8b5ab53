"""Several mixers in one model: Jamba (Lieber et al. 2024), Griffin (De et al. 2024), a Transformer with Mamba-2 layers, and one
with windows in every second layer (Gemma 2, 2024)."""

from configs.recipes import published, small, tiny
from research.config import MixerConfig
from research.models.attention import Attention
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.mlp import GatedMlp
from research.models.moe import Moe
from research.models.rglru import RgLru
from research.schema import Config, ModelConfig, Norm, Stage


def jamba_pattern(mamba: Mamba, attention: Attention, mlp: GatedMlp, moe: Moe) -> tuple[MixerConfig, ...]:
    """Eight layers: the fifth is attention, the others Mamba; every second has experts."""
    return tuple(mixer for i in range(8) for mixer in (attention if i == 4 else mamba, moe if i % 2 else mlp))


def _griffin(attention: Attention, recurrence: RgLru, mlp: GatedMlp) -> tuple[MixerConfig, ...]:
    """Two recurrent blocks, then one of local attention."""
    return recurrence, mlp, recurrence, mlp, attention, mlp


def jamba_tiny() -> Config:
    pattern = jamba_pattern(Mamba(state=4, norms=True), Attention(heads=4, kv_heads=2, positions="none"), GatedMlp(hidden=48),
                            Moe(experts=4, top_k=2, hidden=48, renormalize=False))
    return tiny("jamba_tiny", Stage(pattern, 1))


def jamba_small() -> Config:
    pattern = jamba_pattern(Mamba(norms=True), Attention(heads=4, kv_heads=2, positions="none"), GatedMlp(hidden=384),
                            Moe(experts=4, top_k=2, hidden=384, renormalize=False))
    return small("jamba_small", Stage(pattern, 1))


def jamba_v0_1() -> Config:
    pattern = jamba_pattern(Mamba(norms=True), Attention(heads=32, kv_heads=8, positions="none"), GatedMlp(hidden=14336),
                            Moe(experts=16, top_k=2, hidden=14336, renormalize=False, balance_loss=0.001))
    model = ModelConfig(vocab_size=65536, dim=4096, max_len=262144, stages=(Stage(pattern, 4),), norm=Norm(eps=1e-6))
    return published("jamba_v0_1", model, lr=3e-4, batch_size=1024, seq_len=4096)


def griffin_tiny() -> Config:
    mlp = GatedMlp(hidden=88, activation="gelu")
    pattern = _griffin(Attention(heads=4, kv_heads=1, window=32), RgLru(heads=4, depth=6), mlp)
    return tiny("griffin_tiny", Stage(pattern, 1))


def griffin_small() -> Config:
    pattern = _griffin(Attention(heads=4, kv_heads=1, window=256), RgLru(heads=4, depth=24),
                       GatedMlp(hidden=704, activation="gelu"))
    return small("griffin_small", Stage(pattern, 4))


def hybrid_tiny() -> Config:
    """A Transformer, two of three of whose attention layers are Mamba-2."""
    mamba, mlp = Mamba2(head_dim=16, state=16, chunk=32), GatedMlp(hidden=88)
    return tiny("hybrid_tiny", Stage((mamba, mlp, mamba, mlp, Attention(heads=4), mlp), 1))


def hybrid_small() -> Config:
    mamba, mlp = Mamba2(head_dim=32, state=64, chunk=64), GatedMlp(hidden=704)
    return small("hybrid_small", Stage((mamba, mlp, mamba, mlp, Attention(heads=4), mlp), 4))


def _windowed(heads: int, kv_heads: int, window: int, mlp: GatedMlp) -> tuple[MixerConfig, ...]:
    """A layer that sees a window, then one that sees the whole row."""
    local, whole = Attention(heads=heads, kv_heads=kv_heads, window=window), Attention(heads=heads, kv_heads=kv_heads)
    return local, mlp, whole, mlp


def windowed_tiny() -> Config:
    return tiny("windowed_tiny", Stage(_windowed(4, 2, 32, GatedMlp(hidden=88, activation="gelu")), 1))


def windowed_small() -> Config:
    return small("windowed_small", Stage(_windowed(4, 2, 128, GatedMlp(hidden=704, activation="gelu")), 6))
