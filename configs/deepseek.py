"""DeepSeek-V3 (2024, section 4.2): latent attention, three dense layers, then experts; without its multi-token head."""

from configs.recipes import published, small, tiny
from research.models.latent_attention import LatentAttention
from research.models.mlp import GatedMlp
from research.models.moe import Moe
from research.models.rope import RopeScaling, yarn_magnitude
from research.schema import Config, ModelConfig, Stage


def _stages(attention: LatentAttention, dense: GatedMlp, moe: Moe, first: int, rest: int) -> tuple[Stage, Stage]:
    return Stage((attention, dense), first), Stage((attention, moe), rest)


def deepseek_tiny() -> Config:
    attention = LatentAttention(heads=2, kv_rank=16, nope_dim=16, rope_dim=8, value_dim=16, query_rank=24)
    moe = Moe(experts=4, top_k=2, hidden=24, shared_hidden=24, scores="sigmoid", balance_rate=1e-3, scale=2.5)
    return tiny("deepseek_tiny", *_stages(attention, GatedMlp(hidden=88), moe, 1, 1))


def deepseek_small() -> Config:
    attention = LatentAttention(heads=4, kv_rank=64, nope_dim=48, rope_dim=16, value_dim=64, query_rank=128)
    moe = Moe(experts=8, top_k=2, hidden=192, shared_hidden=192, scores="sigmoid", balance_rate=1e-3, scale=2.5)
    return small("deepseek_small", *_stages(attention, GatedMlp(hidden=704), moe, 1, 6))


def deepseek_v3() -> Config:
    stretch = 40.0  # YaRN, magnitudes of numerator and denominator equal; the softmax scale carries their square
    scaling = RopeScaling("yarn", factor=stretch, original_len=4096, magnitude=1.0)
    attention = LatentAttention(heads=128, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, query_rank=1536,
                                rope_scaling=scaling, scale=yarn_magnitude(stretch) ** 2 / 192**0.5)
    moe = Moe(experts=256, top_k=8, hidden=2048, shared_hidden=2048, scores="sigmoid", groups=8, top_groups=4, scale=2.5,
              balance_rate=1e-3)
    stages = _stages(attention, GatedMlp(hidden=18432), moe, 3, 58)
    model = ModelConfig(vocab_size=129280, dim=7168, max_len=163840, stages=stages)
    return published("deepseek_v3", model, lr=2.2e-4, batch_size=15360, seq_len=4096)
