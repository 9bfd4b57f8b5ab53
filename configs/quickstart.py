"""The first run: a small decoder Transformer on the Python source that every machine has.

    make run        # or: python -m experiments.train --config=quickstart --workdir=runs/quickstart
"""

import dataclasses

from research.models.attention import Attention
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


def quickstart() -> Config:
    """Llama-style, 1.1 million parameters, about three minutes on two cores."""
    return Config(
        name="quickstart",
        model=ModelConfig(
            vocab_size=2048, dim=128, max_len=1024, tie_embeddings=True,
            stages=(Stage((Attention(heads=4), GatedMlp(hidden=352)), repeats=4),)),
        data=DataConfig(sources=(Source("sourcecode"),), tokenizer="sentencepiece", seq_len=256,
                        validation=(Validation(max_rows=256),)),
        optim=OptimConfig(lr=4e-3, warmup_steps=60, weight_decay=0.1, schedule="cosine"),
        train=TrainConfig(steps=1400, batch_size=4, eval_every=350, sample_every=350),
        checkpoint=CheckpointConfig(every_minutes=1.0),
    )


def text() -> Config:
    """The quickstart's model on your own files: --set data.sources.0.args.paths=notes/*.txt

    Documents end at blank lines, so that one file is enough to hold some out.
    """
    quick = quickstart()
    source = Source("text", {"split_on": "blank_line"})
    return dataclasses.replace(
        quick, name="text", data=dataclasses.replace(quick.data, sources=(source,), holdout=0.05),
        train=dataclasses.replace(quick.train, sample_prompt="The "))


def debug() -> Config:
    """Seconds, no files: synthetic text, bytes, a model of two narrow layers. For trying things and for tests."""
    return Config(
        name="debug",
        model=ModelConfig(
            vocab_size=264, dim=32, max_len=128,
            stages=(Stage((Attention(heads=4), GatedMlp(hidden=64)), repeats=2),)),
        data=DataConfig(sources=(Source("synthetic", {"documents": 400, "length": 200}),), seq_len=64, holdout=0.1,
                        validation=(Validation(max_rows=16),)),
        optim=OptimConfig(lr=1e-2, warmup_steps=5),
        train=TrainConfig(steps=30, batch_size=4, log_every=5),
    )
