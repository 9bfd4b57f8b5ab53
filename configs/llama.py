"""Llama 2 (Touvron et al. 2023, table 1), Llama 3 (2024, table 3), Qwen3 (2025), Mixtral 8x7B (Jiang et al. 2024)."""

from configs.recipes import published, small, tiny
from research.models.attention import Attention
from research.models.mlp import GatedMlp
from research.models.moe import Moe
from research.models.rope import RopeScaling
from research.schema import Config, ModelConfig, Norm, Stage


def _model(dim: int, layers: int, vocab_size: int, max_len: int, *mixers, eps: float = 1e-5) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, dim=dim, max_len=max_len, stages=(Stage(mixers, layers),), norm=Norm(eps=eps))


def _llama2(dim: int, layers: int, heads: int, hidden: int, kv_heads: int | None = None) -> ModelConfig:
    return _model(dim, layers, 32000, 4096, Attention(heads, kv_heads), GatedMlp(hidden))


def _llama3(
    dim: int, layers: int, heads: int, hidden: int, max_len: int = 8192, scaling: RopeScaling | None = None,
) -> ModelConfig:
    attention = Attention(heads, kv_heads=8, rope_base=500000.0, rope_scaling=scaling)
    return _model(dim, layers, 128256, max_len, attention, GatedMlp(hidden))


def llama_tiny() -> Config:
    return tiny("llama_tiny", Stage((Attention(heads=4, kv_heads=2), GatedMlp(hidden=88)), 2))


def llama_small() -> Config:
    return small("llama_small", Stage((Attention(heads=4, kv_heads=2), GatedMlp(hidden=704)), 12))


def llama2_7b() -> Config:
    return published("llama2_7b", _llama2(4096, 32, 32, 11008), lr=3e-4, batch_size=1024)


def llama2_13b() -> Config:
    return published("llama2_13b", _llama2(5120, 40, 40, 13824), lr=3e-4, batch_size=1024)


def llama2_70b() -> Config:
    return published("llama2_70b", _llama2(8192, 80, 64, 28672, kv_heads=8), lr=1.5e-4, batch_size=1024)


def llama3_8b() -> Config:
    return published("llama3_8b", _llama3(4096, 32, 32, 14336), lr=3e-4, batch_size=1024)


def llama3_70b() -> Config:
    return published("llama3_70b", _llama3(8192, 80, 64, 28672), lr=1.5e-4, batch_size=1024)


def llama3_405b() -> Config:
    """Llama 3.1, with its stretched RoPE."""
    stretched = RopeScaling("llama3", factor=8.0, original_len=8192)
    return published("llama3_405b", _llama3(16384, 126, 128, 53248, 131072, stretched), lr=8e-5, batch_size=2048, seq_len=8192)


def qwen3_tiny() -> Config:
    return tiny("qwen3_tiny", Stage((Attention(heads=4, kv_heads=2, head_dim=16, qk_norm=True), GatedMlp(hidden=88)), 2))


def qwen3_small() -> Config:
    return small("qwen3_small", Stage((Attention(heads=4, kv_heads=2, qk_norm=True), GatedMlp(hidden=704)), 12))


def qwen3_8b() -> Config:
    attention = Attention(heads=32, kv_heads=8, head_dim=128, rope_base=1e6, qk_norm=True)
    model = _model(4096, 36, 151936, 40960, attention, GatedMlp(12288), eps=1e-6)
    return published("qwen3_8b", model, lr=3e-4, batch_size=1024, seq_len=4096)


def mixtral_tiny() -> Config:
    moe = Moe(experts=4, top_k=2, hidden=48, balance_loss=0.01)
    return tiny("mixtral_tiny", Stage((Attention(heads=4, kv_heads=2), moe), 2))


def mixtral_small() -> Config:
    moe = Moe(experts=4, top_k=2, hidden=384, balance_loss=0.01)
    return small("mixtral_small", Stage((Attention(heads=4, kv_heads=2), moe), 8))


def mixtral_8x7b() -> Config:
    mixers = Attention(heads=32, kv_heads=8, rope_base=1e6), Moe(experts=8, top_k=2, hidden=14336, balance_loss=0.02)
    return published("mixtral_8x7b", _model(4096, 32, 32000, 32768, *mixers), lr=3e-4, batch_size=1024, seq_len=4096)
