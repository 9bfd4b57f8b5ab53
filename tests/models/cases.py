"""Small configs of every row of MIXERS, for the contract battery. A new mixer is added here."""

import dataclasses

from research.config import MixerConfig
from research.models.attention import Attention
from research.models.gated_delta import GatedDelta
from research.models.h3 import H3
from research.models.latent_attention import LatentAttention
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.mixers import Parallel
from research.models.mlp import GatedMlp, Mlp
from research.models.moe import Moe
from research.models.rglru import RgLru
from research.models.rope import RopeScaling
from research.models.rwkv4 import Rwkv4ChannelMix, Rwkv4TimeMix
from research.models.rwkv7 import Rwkv7ChannelMix, Rwkv7TimeMix
from research.models.s4 import S4
from research.models.s4d import S4d
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
      sharded: is it in the sharded battery? One case a row and layout is enough: compiling is nearly all it costs.
      extra_flops: what the implementation spends per token above the algorithmic `flops`, and `why`.
    """

    cfg: MixerConfig
    sideways: bool = True
    exact: bool = True
    sharded: bool = True
    extra_flops: float = 0.0
    why: str = ""


# Slots in place of chosen tokens: 4 experts * capacity 8 for 12 tokens * 2; dispatch and combine.
CAPACITY_EXTRA = 6.0 * DIM * 8 * (4 * 8 / 12 - 2) + 2 * 2.0 * 4 * 8 * DIM

WITHIN_CHUNKS = "the products of a chunk's tokens with each other, instead of one token at a time"

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
    "GatedDelta": {
        "chunks_grouped": Case(
            GatedDelta(heads=4, key_heads=2, key_dim=3, value_dim=5, chunk=4),
            extra_flops=4 * (6.0 * 4 * 3 + 4.0 * 4 * 5),
            why=WITHIN_CHUNKS,
        ),
        "linear": Case(GatedDelta(heads=2, key_dim=4, conv=2, delta=False, implementation="reference")),
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
    "H3": {"heads_of_2": Case(H3(head_dim=2, shift=3, state=4))},
    "LinearRecurrence": {"plain": Case(LinearRecurrence(width=12))},
    "Mamba": {
        "plain": Case(Mamba(state=4)),
        "norms_reference": Case(
            Mamba(expand=1, state=3, conv=3, dt_rank=2, norms=True, conv_bias=False, implementation="reference"),
            sharded=False,
        ),
    },
    "Mamba2": {"chunks": Case(Mamba2(head_dim=4, groups=2, state=3, chunk=4))},
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
    "RgLru": {"wide": Case(RgLru(heads=4, width=24))},
    "Rwkv4ChannelMix": {"plain": Case(Rwkv4ChannelMix(hidden=24, depth=3))},
    "Rwkv4TimeMix": {"wide": Case(Rwkv4TimeMix(width=24, depth=3))},
    "Rwkv7ChannelMix": {"plain": Case(Rwkv7ChannelMix(hidden=24, depth=3))},
    "Rwkv7TimeMix": {
        "chunks": Case(
            Rwkv7TimeMix(head_dim=8, decay_rank=3, rate_rank=4, value_rank=5, gate_rank=6, depth=3, chunk=4),
            extra_flops=20.0 * DIM * 4,
            why=WITHIN_CHUNKS,
        ),
        "first": Case(
            Rwkv7TimeMix(head_dim=8, decay_rank=3, rate_rank=4, gate_rank=6, depth=3, chunk=4, first=True),
            extra_flops=20.0 * DIM * 4,
            why=WITHIN_CHUNKS,
        ),
    },
    "S4": {"legs": Case(S4(state=4))},
    "S4d": {
        "lin": Case(S4d(state=4)),
        "real_bilinear": Case(
            S4d(state=3, init="real", discretization="bilinear", implementation="reference"), sharded=False
        ),
    },
    "ValueResidual": {"plain": Case(ValueResidual(width=12), sideways=False)},
}

FLAT = {f"{row}-{name}": case for row, cases in CASES.items() for name, case in cases.items()}
