"""GPT-2 (Radford et al. 2019, table 2) and GPT-3 (Brown et al. 2020, table 2.1; its banded layers are dense here)."""

from configs.recipes import LAYERNORM, published, small, tiny
from research.models.attention import Attention
from research.models.mlp import Mlp
from research.schema import Config, ModelConfig, Stage


def _layer(heads: int, dim: int) -> tuple[Attention, Mlp]:
    return Attention(heads, positions="none", bias=True), Mlp(4 * dim, bias=True)


def _gpt(dim: int, layers: int, heads: int, max_len: int = 1024) -> ModelConfig:
    return ModelConfig(vocab_size=50257, dim=dim, max_len=max_len, stages=(Stage(_layer(heads, dim), layers),), norm=LAYERNORM,
                       positions="learned", tie_embeddings=True)


def gpt2_tiny() -> Config:
    return tiny("gpt2_tiny", Stage(_layer(4, 32), 2), norm=LAYERNORM, positions="learned")


def gpt2_small() -> Config:
    return small("gpt2_small", Stage(_layer(4, 256), 11), norm=LAYERNORM, positions="learned")


def gpt2_124m() -> Config:
    return published("gpt2_124m", _gpt(768, 12, 12), lr=6e-4, batch_size=512)


def gpt2_355m() -> Config:
    return published("gpt2_355m", _gpt(1024, 24, 16), lr=3e-4, batch_size=512)


def gpt2_774m() -> Config:
    return published("gpt2_774m", _gpt(1280, 36, 20), lr=2.5e-4, batch_size=512)


def gpt2_1558m() -> Config:
    return published("gpt2_1558m", _gpt(1600, 48, 25), lr=2e-4, batch_size=512)


def gpt3_175b() -> Config:
    return published("gpt3_175b", _gpt(12288, 96, 96, 2048), lr=6e-5, batch_size=1600)
