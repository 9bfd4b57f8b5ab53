"""The ladder's models: bytes of source code, one recipe for every size, so that size and tokens are all that differs.

Width decides the rest: heads of 16, one layer for each 16 of width, the MLP 8/3 of the width; AdamW's learning rate is
BASE_LR * BASE_DIM / width for hidden and output weights and BASE_LR for those that read one token or no matrix (the muP rule of
Yang et al. 2022, table 8, without its change of the output's initial scale). Warm-up, stable, then a fifth of decay to zero,
so that one trunk serves many token counts (Hu et al. 2024, section 4).
"""

import dataclasses
from typing import Callable

from research.errors import InputError
from research.models.attention import Attention
from research.models.mamba2 import Mamba2
from research.models.mlp import GatedMlp
from research.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Source,
    Stage,
    TrainConfig,
    Validation,
)

HEAD_DIM = 16
# Bytes. All that the smallest rung can use: in longer rows larger models learn to look further back, and no one law holds.
ROW = 16
BASE_DIM, BASE_LR = 64, 3e-3


def _ladder(name: str, stage: Stage) -> Config:
    return Config(
        name=name, model=ModelConfig(vocab_size=264, dim=BASE_DIM, max_len=ROW, stages=(stage,)),
        data=DataConfig(sources=(Source("sourcecode", {"max_bytes": 40_000_000}),), seq_len=ROW,
                        validation=(Validation(max_rows=4096),)),
        optim=OptimConfig(lr=BASE_LR, schedule="wsd", warmup_steps=50, weight_decay=0.1),
        train=TrainConfig(steps=1000, batch_size=32, log_every=20), checkpoint=CheckpointConfig(every_minutes=1.0, keep_last=1))


def ladder_transformer() -> Config:
    mixers = Attention(heads=BASE_DIM // HEAD_DIM), GatedMlp(hidden=8 * (BASE_DIM // 3))
    return _ladder("ladder_transformer", Stage(mixers, BASE_DIM // 16))


def ladder_mamba2() -> Config:
    return _ladder("ladder_mamba2", Stage((Mamba2(head_dim=HEAD_DIM, state=16, chunk=ROW),), BASE_DIM // 8))


def _shared(dim: int) -> dict[str, int | float]:
    return {"model.dim": dim, "optim.lr": BASE_LR * BASE_DIM / dim, "optim.role_lr.input": dim / BASE_DIM,
            "optim.role_lr.vector": dim / BASE_DIM}


def transformer_size(dim: int) -> dict[str, int | float]:
    """Overrides of ladder_transformer for this width, a multiple of HEAD_DIM."""
    if dim % HEAD_DIM:
        raise InputError("--dims", f"{dim} is no multiple of {HEAD_DIM}, the width of a head", "choose multiples")
    return _shared(dim) | {"model.stages.0.repeats": dim // 16, "model.stages.0.pattern.0.heads": dim // HEAD_DIM,
                           "model.stages.0.pattern.1.hidden": 8 * (dim // 3)}


def mamba2_size(dim: int) -> dict[str, int | float]:
    """Overrides of ladder_mamba2 for this width; a Mamba-2 layer has half the weights of attention and MLP together."""
    return _shared(dim) | {"model.stages.0.repeats": dim // 8}


@dataclasses.dataclass(frozen=True)
class Family:
    """A ladder by its preset: `size` gives a width's overrides; the default widths, and isoFLOP budgets in FLOPs.

    The defaults take two cores about 20 minutes with `--jobs=2`.
    """

    preset: str
    size: Callable[[int], dict[str, int | float]]
    dims: tuple[int, ...]
    budgets: tuple[float, ...]


DIMS = 32, 48, 64, 80, 96
FAMILIES = {
    "transformer": Family("ladder_transformer", transformer_size, DIMS, (3.5e11, 8.5e11, 2.05e12, 5e12, 1.2e13)),
    "mamba2": Family("ladder_mamba2", mamba2_size, DIMS, (4.5e11, 1.05e12, 2.5e12, 6e12, 1.45e13)),
}
