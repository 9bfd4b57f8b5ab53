"""The whole training program of a config, from shapes alone: what `loop` runs, what `aot` compiles, what tests look into."""

import dataclasses
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from research import sharding
from research.errors import InputError
from research.models.lm import LanguageModel
from research.schema import Config
from research.training import step as steps
from research.training.averaging import check_averages
from research.training.objectives import objective_named
from research.training.optimizers import make_optimizer, make_schedule
from research.training.state import Layout, TrainState, abstract_state, make_layout

BATCH_FIELDS = {"tokens_BxL": jnp.int32, "targets_BxL": jnp.int32, "weights_BxL": jnp.float32,
                "positions_BxL": jnp.int32, "segment_ids_BxL": jnp.int32}
TRAINING_COST = 3.0  # forward, and twice as much backward


@dataclasses.dataclass(frozen=True)
class Program:
    """Nothing here holds an array. `step` is a pure function of (state, frozen, batch)."""

    config: Config
    model: LanguageModel
    optimizer: optax.GradientTransformation
    layout: Layout
    step: Callable
    abstract: TrainState

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        train = self.config.train
        shape = (train.microbatches, train.batch_size // train.microbatches, self.config.data.seq_len)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.batch()) for name, dtype in BATCH_FIELDS.items()}

    def compile(self, frozen: Any = None) -> Any:
        """The compiled step; its state argument is donated."""
        return steps.compile_step(self.step, self.layout, self.abstract, frozen, self.abstract_batch())

    @property
    def flops_per_token(self) -> float:
        """Algorithmic training FLOPs a token: 3 x forward, causal attention counted once (PaLM, appendix B)."""
        return TRAINING_COST * self.model.flops_per_token(self.config.data.seq_len)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.seq_len


def make_program(config: Config, devices: Sequence[Any] | None = None) -> Program:
    """Builds it for `devices` (default: those of this job; a TPU topology's to compile without the TPU).

    Raises:
      InputError: names the field: an unknown objective, optimizer or rule; averages that can't be made; a mesh
        that doesn't fit the devices, the batch, the row or a weight.
    """
    objective = objective_named(config.train.objective)
    check_averages(config)
    rules = sharding.rules_named(config.mesh.rules)
    mesh = sharding.make_mesh(config.mesh, devices)
    parts, rows = sharding.batch_divisor(mesh, rules), config.train.batch_size // config.train.microbatches
    if rows % parts:
        raise InputError("train.batch_size",
                         f"{rows} rows a microbatch cannot be divided over {parts} batch shards of the mesh",
                         f"use a multiple of {parts * config.train.microbatches}, or put devices on another mesh axis")
    if config.data.seq_len % mesh.shape["context"]:
        raise InputError("mesh.context", f"{mesh.shape['context']} does not divide data.seq_len={config.data.seq_len}",
                         "choose a divisor")
    if mesh.shape["context"] > 1 and "length" not in rules.activations:
        raise InputError("mesh.context", f"is {mesh.shape['context']}, but rules {config.mesh.rules} split no row",
                         "use mesh.rules=cp")
    model = LanguageModel(config.model, objective.heads)
    optimizer = make_optimizer(config.optim, config.train.steps, model.weights)
    layout = make_layout(model.init, model.weights, optimizer, mesh, rules, ema=bool(config.train.ema),
                         offload=config.optim.offload)
    step = steps.train_step(model, objective.make(model, config), optimizer, make_schedule(config.optim, config.train.steps),
                            config)
    return Program(config, model, optimizer, layout, step, abstract_state(model.init, optimizer, layout))
