"""Small configs of every row of MIXERS, for the contract battery. A new mixer is added here."""

import dataclasses

from research.config import MixerConfig
from research.models.attention import Attention
from research.models.latent_attention import LatentAttention
from research.models.mixers import Parallel
from research.models.mlp import GatedMlp, Mlp
from research.models.moe import Moe
from research.models.rope import RopeScaling
from tests.spikes.pallas_scale import PallasScale
from tests.spikes.recurrence import LinearRecurrence
from tests.spikes.value_residual import ValueResidual

DIM = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A config and how it may differ from what the battery expects of all.

    Attributes:
      sideways: does an output depend on earlier tokens of its row?
      exact: do packing, prefill and steps give the same? If not, `why`.
      extra_flops: what the implementation spends per token above the algorithmic `flops`, and `why`.
    """

    cfg: MixerConfig
    sideways: bool = True
    exact: bool = True
    extra_flops: float = 0.0
    why: str = ""


# Slots in place of chosen tokens: 4 experts * capacity 8 for 12 tokens * 2; dispatch and combine.
CAPACITY_EXTRA = 6.0 * DIM * 8 * (4 * 8 / 12 - 2) + 2 * 2.0 * 4 * 8 * DIM

CASES: dict[str, dict[str, Case]] = {
    "Attention": {
        "mha": Case(Attention(heads=4)),
        "gqa": Case(Attention(heads=4, kv_heads=2)),
        "mqa_alibi": Case(Attention(heads=4, kv_heads=1, positions="alibi")),
        "no_positions_wide": Case(Attention(heads=2, positions="none", head_dim=10, scale=0.2)),
        "window": Case(Attention(heads=2, window=3)),
        "rope_stretched_partly": Case(
            Attention(heads=2, rope_share=0.5, rope_scaling=RopeScaling("yarn", 4.0, 8, high=2.0))
        ),
        "window_alibi_gqa": Case(Attention(heads=4, kv_heads=2, window=5, positions="alibi")),
        "qk_norm_softcap": Case(Attention(heads=2, qk_norm=True, softcap=2.0)),
        "bias_chunked": Case(Attention(heads=2, bias=True, implementation="chunked")),
        "cross": Case(Attention(heads=4, kv_heads=2, positions="none", cross=True), sideways=False),
    },
    "GatedMlp": {
        "silu": Case(GatedMlp(hidden=24), sideways=False),
        "gelu_bias": Case(GatedMlp(hidden=24, activation="gelu", bias=True), sideways=False),
    },
    "LatentAttention": {
        "v3": Case(LatentAttention(heads=2, kv_rank=8, nope_dim=4, rope_dim=2, value_dim=5, query_rank=8)),
        "direct_query_yarn": Case(
            LatentAttention(
                heads=4, kv_rank=4, nope_dim=3, rope_dim=4, value_dim=3, scale=0.3,
                rope_scaling=RopeScaling("yarn", 4.0, 8, high=2.0, magnitude=1.0), implementation="chunked",
            )
        ),
    },
    "LinearRecurrence": {"plain": Case(LinearRecurrence(width=12))},
    "Mlp": {
        "gelu": Case(Mlp(hidden=24), sideways=False),
        "relu_squared_bias": Case(Mlp(hidden=24, activation="relu_squared", bias=True), sideways=False),
    },
    "Moe": {
        "mixtral": Case(Moe(experts=4, top_k=2, hidden=8, balance_loss=0.1), sideways=False),
        "deepseek": Case(
            Moe(experts=8, top_k=3, hidden=8, shared_hidden=8, scores="sigmoid", scale=2.5, groups=4, top_groups=2,
                balance_rate=1e-3, z_loss=0.1),
            sideways=False,
        ),
        "not_renormalized": Case(
            Moe(experts=4, top_k=1, hidden=8, renormalize=False, activation="gelu", implementation="reference"),
            sideways=False,
        ),
        "capacity": Case(
            Moe(experts=4, top_k=2, hidden=8, capacity_factor=1.25, balance_rate=1e-3, z_loss=0.1),
            sideways=False,
            exact=False,
            extra_flops=CAPACITY_EXTRA,
            why="a full expert drops tokens; empty slots are computed too",
        ),
    },
    "PallasScale": {"blocks": Case(PallasScale(block=8), sideways=False)},
    "Parallel": {
        "attention_mlp": Case(Parallel((Attention(heads=2), GatedMlp(hidden=24)))),
        "recurrence_moe": Case(
            Parallel((LinearRecurrence(width=12), Moe(experts=4, top_k=2, hidden=8, balance_rate=1e-3)))
        ),
    },
    "ValueResidual": {"plain": Case(ValueResidual(width=12), sideways=False)},
}

FLAT = {f"{row}-{name}": case for row, cases in CASES.items() for name, case in cases.items()}
