"""Mamba (Gu and Dao 2023, table 12), Mamba-2 (Dao and Gu 2024), and small S4D and H3 models."""

from configs.recipes import LAYERNORM, published, small, tiny
from research.models.h3 import H3
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.mlp import GatedMlp, Mlp
from research.models.s4 import S4
from research.models.s4d import S4d
from research.schema import Config, ModelConfig, Norm, Stage


def _published(name: str, mixer: Mamba | Mamba2, dim: int, layers: int, vocab_size: int, lr: float) -> Config:
    model = ModelConfig(vocab_size=vocab_size, dim=dim, max_len=2**20, stages=(Stage((mixer,), layers),), norm=Norm(eps=1e-5),
                        tie_embeddings=True)
    return published(name, model, lr=lr, batch_size=256, seq_len=2048)


def _mamba(name: str, dim: int, layers: int, lr: float) -> Config:
    """The vocabulary is GPT-NeoX's 50277, padded to a multiple of 8."""
    return _published(name, Mamba(), dim, layers, 50280, lr)


def _mamba2(name: str, dim: int, layers: int, lr: float) -> Config:
    """The vocabulary is GPT-NeoX's 50277, padded to a multiple of 16."""
    return _published(name, Mamba2(), dim, layers, 50288, lr)


def mamba_tiny() -> Config:
    return tiny("mamba_tiny", Stage((Mamba(state=8),), 2))


def mamba_small() -> Config:
    return small("mamba_small", Stage((Mamba(),), 20))


def mamba_130m() -> Config:
    return _mamba("mamba_130m", 768, 24, lr=6e-4)


def mamba_370m() -> Config:
    return _mamba("mamba_370m", 1024, 48, lr=3e-4)


def mamba_790m() -> Config:
    return _mamba("mamba_790m", 1536, 48, lr=2.5e-4)


def mamba_1_4b() -> Config:
    return _mamba("mamba_1_4b", 2048, 48, lr=2e-4)


def mamba_2_8b() -> Config:
    return _mamba("mamba_2_8b", 2560, 64, lr=1.6e-4)


def mamba2_tiny() -> Config:
    return tiny("mamba2_tiny", Stage((Mamba2(head_dim=16, state=16, chunk=32),), 2), norm=Norm(eps=1e-5))


def mamba2_small() -> Config:
    return small("mamba2_small", Stage((Mamba2(head_dim=32, state=64, chunk=64),), 20), norm=Norm(eps=1e-5))


def mamba2_2_7b() -> Config:
    return _mamba2("mamba2_2_7b", 2560, 64, lr=1.6e-4)


def s4d_tiny() -> Config:
    return tiny("s4d_tiny", Stage((S4d(state=16), GatedMlp(hidden=88)), 2))


def s4d_small() -> Config:
    return small("s4d_small", Stage((S4d(), GatedMlp(hidden=704)), 13))


def s4_tiny() -> Config:
    return tiny("s4_tiny", Stage((S4(state=16), GatedMlp(hidden=88)), 2))


def s4_small() -> Config:
    return small("s4_small", Stage((S4(), GatedMlp(hidden=704)), 13))


def h3_tiny() -> Config:
    return tiny("h3_tiny", Stage((H3(state=8, shift=8), Mlp(hidden=128, bias=True)), 2), norm=LAYERNORM)


def h3_small() -> Config:
    return small("h3_small", Stage((H3(), Mlp(hidden=1024, bias=True)), 11), norm=LAYERNORM)
