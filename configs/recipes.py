"""What the presets of one size share, whatever the architecture: data, optimizer, batch."""

import dataclasses

from research.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    Norm,
    OptimConfig,
    Source,
    Stage,
    TrainConfig,
    Validation,
)

LAYERNORM = Norm("layernorm", eps=1e-5)


def tiny(
    name: str, *stages: Stage, norm: Norm = Norm(), positions: str = "none", embedding_norm: bool = False,
) -> Config:
    """Seconds on one core: bytes of the standard library's source, width 32. For tests and for trying things."""
    model = ModelConfig(vocab_size=264, dim=32, max_len=256, stages=stages, norm=norm, positions=positions,
                        embedding_norm=embedding_norm, tie_embeddings=True)
    return Config(
        name=name, model=model,
        data=DataConfig(sources=(Source("sourcecode", {"packages": False, "max_bytes": 400_000}),), seq_len=64, holdout=0.05,
                        validation=(Validation(max_rows=16),)),
        optim=OptimConfig(lr=1e-2, warmup_steps=10), train=TrainConfig(steps=100, batch_size=4))


def small(
    name: str, *stages: Stage, norm: Norm = Norm(), positions: str = "none", embedding_norm: bool = False,
) -> Config:
    """About 10 million parameters, which two cores train in hours: a vocabulary of 4096, width 256."""
    model = ModelConfig(vocab_size=4096, dim=256, max_len=2048, stages=stages, norm=norm, positions=positions,
                        embedding_norm=embedding_norm, tie_embeddings=True)
    return Config(
        name=name, model=model, data=DataConfig(sources=(Source("sourcecode"),), tokenizer="sentencepiece", seq_len=512),
        optim=OptimConfig(lr=2e-3, warmup_steps=100, weight_decay=0.1),
        train=TrainConfig(steps=5000, batch_size=8, eval_every=500))


def published(name: str, model: ModelConfig, lr: float, batch_size: int, seq_len: int | None = None) -> Config:
    """A published model as it was trained, in bfloat16 over fsdp; the data are yours: --set data.sources..., data.tokenizer."""
    return Config(
        name=name, model=dataclasses.replace(model, compute_dtype="bfloat16", remat="full"),
        data=DataConfig(sources=(Source("sourcecode"),), tokenizer=f"sentencepiece:{model.vocab_size}",
                        seq_len=seq_len or model.max_len),
        optim=OptimConfig(lr=lr, warmup_steps=2000, weight_decay=0.1),
        train=TrainConfig(steps=100_000, batch_size=batch_size, eval_every=1000), mesh=MeshConfig(rules="fsdp"),
        checkpoint=CheckpointConfig(every_minutes=30.0))
