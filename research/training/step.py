"""One optimizer step and one evaluation step: pure functions, compiled once, sharded by their arguments."""

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from research import sharding
from research.models.heads import token_loss
from research.models.lm import LanguageModel
from research.params import Weight, flatten
from research.schema import Config
from research.training.averaging import update_ema
from research.training.objectives import Batch, row_context
from research.training.optimizers import OPTIMIZERS
from research.training.state import Layout, TrainState


def stage_norms(tree: Any, weights: Mapping[str, Weight]) -> dict[str, jax.Array]:
    """Global norm of each stage's arrays (float32), by the stage's name."""
    squares: dict[str, jax.Array] = {}
    for path, value in flatten(tree).items():
        stage = weights[path].stage
        square = jnp.sum(jnp.square(value.astype(jnp.float32)))
        squares[stage] = squares[stage] + square if stage in squares else square
    return {stage: jnp.sqrt(square) for stage, square in squares.items()}


def total_norm(norms: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()))


def train_step(
    model: LanguageModel, loss: Callable, optimizer: optax.GradientTransformation, schedule: Callable, config: Config,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step as a function of (state, frozen, batch); arrays of `batch` are (microbatches, rows, length)."""

    def gradients(state: TrainState, frozen: Any, batch: Batch, key: jax.Array):
        def objective(params, rows, key):
            loss_sum, weight, metrics, statistics = loss(params, frozen, rows, key)
            return loss_sum, (weight, metrics, statistics)

        def one(index, rows):
            (loss_sum, rest), grads = jax.value_and_grad(objective, has_aux=True)(
                state.params, rows, jax.random.fold_in(key, index))
            return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, loss_sum, *rest))

        count = config.train.microbatches
        if count == 1:
            return one(0, jax.tree.map(lambda x: x[0], batch))
        first = jax.eval_shape(one, 0, jax.tree.map(lambda x: x[0], batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def accumulate(total, item):
            return jax.tree.map(jnp.add, total, one(*item)), None

        return jax.lax.scan(accumulate, zeros, (jnp.arange(count), batch))[0]

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, loss_sum, weight, metrics, statistics = gradients(state, frozen, batch, key)
        weight = jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norms = {"grad_norm": stage_norms(grads, model.weights)}
        clip = config.optim.clip_norm
        if clip:
            shrink = jnp.minimum(1.0, clip / jnp.maximum(total_norm(norms["grad_norm"]), 1e-12))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        optimizer_state = state.optimizer
        if config.optim.offload:  # it comes when the gradients are there, not before, and goes back with the step's results
            grads, optimizer_state = jax.lax.optimization_barrier((grads, optimizer_state))
            optimizer_state = jax.device_put(optimizer_state, jax.memory.Space.Device)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if statistics:
            learned, params = params, model.apply_statistics(params, statistics)
            moved = OPTIMIZERS[config.optim.name].moved
            optimizer_state = moved(optimizer_state, learned, params) if moved else optimizer_state
        norms |= {"param_norm": stage_norms(params, model.weights), "update_norm": stage_norms(updates, model.weights)}
        out = {"objective": loss_sum / weight, "lr": jnp.asarray(schedule(state.step), jnp.float32), "weight": weight}
        out |= {name: total / jnp.maximum(count, 1e-9) for name, (total, count) in metrics.items()}
        if "row_loss" in metrics:
            rows = metrics["row_loss"][1]
            variance = jnp.maximum(out.pop("row_loss_squared") - jnp.square(out.pop("row_loss")), 0.0)
            out["loss_se"] = jnp.sqrt(variance / jnp.maximum(rows - 1.0, 1.0))
        for name, by_stage in norms.items():
            out[name] = total_norm(by_stage)
            out |= {f"{name}/{stage}": norm for stage, norm in by_stage.items()}
        ema = None if state.ema is None else update_ema(state.ema, params, config.train.ema, state.step)
        return TrainState(state.step + 1, params, optimizer_state, state.key, ema), out

    return step


def compile_step(step: Callable, layout: Layout, state: TrainState, frozen: Any, batch: Batch) -> Any:
    """Compiled for the shapes and shardings of its arguments (arrays or ShapeDtypeStructs); the state is donated."""
    with sharding.use(layout.mesh, layout.rules):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings, layout.replicated))
        return jitted.lower(state, frozen, batch).compile(compiler_options=_compiler_options(layout, batch))


def _compiler_options(layout: Layout, batch: Batch) -> dict[str, str]:
    """No YNNPACK on a CPU that has one row: there XLA gives it the sums over tokens (of every gain's, bias's and tap's
    gradient), and it walks them column by column: 12 ms for 4,096 tokens of 256, where a loop takes 1."""
    tokens_MxBxL = batch["tokens_BxL"]
    rows = layout.batch().shard_shape(tokens_MxBxL.shape)[1]
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if on_cpu and rows == 1 else {}


def evaluation_step(model: LanguageModel, config: Config, layout: Layout) -> Callable[[Any, Batch], jax.Array]:
    """(params, rows) -> nll_BxL, replicated, so that every host can read all of it."""

    def step(params: Any, batch: Batch) -> jax.Array:
        ctx = row_context(batch, config.data.packed, True, None)
        hidden_BxLxD, _, _ = model.hidden(params, batch["tokens_BxL"], ctx)
        _, nll_BxL, _ = token_loss(model.cfg, hidden_BxLxD, model.unembedding(params), batch["targets_BxL"],
                                   batch["weights_BxL"])
        return nll_BxL

    jitted = jax.jit(step, out_shardings=layout.replicated)

    def call(params: Any, batch: Batch) -> jax.Array:
        with sharding.use(layout.mesh, layout.rules):
            return jitted(params, batch)

    return call
