"""Small configs of every row of MIXERS, for the contract battery. A new mixer is added here."""

import dataclasses

from research.config import MixerConfig
from research.models.attention import Attention
from research.models.h3 import H3
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.mixers import Parallel
from research.models.mlp import GatedMlp, Mlp
from research.models.s4 import S4
from research.models.s4d import S4d
from tests.spikes.moe import Moe
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


EVERY_EXPERT = (
    "every expert runs on every token, in place of the top k; that form is for exactness, not for speed"
)
# Gate, up and down of the experts that weren't chosen.
MOE_EXTRA = 6.0 * DIM * 8 * (4 - 2)
# Slots in place of chosen tokens: 4 experts * capacity 8 for 12 tokens * 2; dispatch and combine.
CAPACITY_EXTRA = 6.0 * DIM * 8 * (4 * 8 / 12 - 2) + 2 * 2.0 * 4 * 8 * DIM

CASES: dict[str, dict[str, Case]] = {
    "Attention": {
        "mha": Case(Attention(heads=4)),
        "gqa": Case(Attention(heads=4, kv_heads=2)),
        "mqa_alibi": Case(Attention(heads=4, kv_heads=1, positions="alibi")),
        "no_positions_wide": Case(Attention(heads=2, positions="none", head_dim=10, scale=0.2)),
        "window": Case(Attention(heads=2, window=3)),
        "window_alibi_gqa": Case(Attention(heads=4, kv_heads=2, window=5, positions="alibi")),
        "qk_norm_softcap": Case(Attention(heads=2, qk_norm=True, softcap=2.0)),
        "bias_chunked": Case(Attention(heads=2, bias=True, implementation="chunked")),
        "cross": Case(Attention(heads=4, kv_heads=2, positions="none", cross=True), sideways=False),
    },
    "GatedMlp": {
        "silu": Case(GatedMlp(hidden=24), sideways=False),
        "gelu_bias": Case(GatedMlp(hidden=24, activation="gelu", bias=True), sideways=False),
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
        "shared": Case(
            Moe(experts=4, top_k=2, hidden=8, shared_hidden=8),
            sideways=False,
            extra_flops=MOE_EXTRA,
            why=EVERY_EXPERT,
        ),
        "capacity": Case(
            Moe(experts=4, top_k=2, hidden=8, capacity_factor=1.25),
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
            Parallel((LinearRecurrence(width=12), Moe(experts=4, top_k=2, hidden=8))),
            extra_flops=MOE_EXTRA,
            why=EVERY_EXPERT,
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
