"""The state of a run and where each part of it rests; made in place, sharded, never first on one device."""

import dataclasses
from typing import Any, Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research import sharding
from research.params import Weight


@flax.struct.dataclass
class TrainState:
    """step: int32, optimizer steps done. params: what is trained. key: root key data; step n uses fold_in(key, n)."""

    step: jax.Array
    params: Any
    optimizer: optax.OptState
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a run lives: its mesh, the rules, and the shardings of its state."""

    mesh: Mesh
    rules: sharding.Rules
    shardings: TrainState

    def batch(self, axes: sharding.Axes = (None, "batch", "length")) -> NamedSharding:
        return sharding.batch_sharding(self.mesh, self.rules, axes)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def make_layout(
    init: Callable[[jax.Array], Any], weights: Mapping[str, Weight], optimizer: optax.GradientTransformation, mesh: Mesh,
    rules: sharding.Rules,
) -> Layout:
    """Parameters by their axes; optimizer state like the parameters it mirrors; the rest replicated."""
    params = sharding.weight_shardings(weights, mesh, rules)
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(lambda key: optimizer.init(init(key)), jax.random.key(0))
    optimizer_shardings = optax.tree_utils.tree_map_params(
        optimizer, lambda _, leaf: leaf, abstract, params, transform_non_params=lambda _: replicated)
    return Layout(mesh, rules, TrainState(replicated, params, optimizer_shardings, replicated))


def init_state(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, layout: Layout, seed: int
) -> TrainState:
    """A fresh state of `seed`, laid out as `layout` says."""

    def make(seed: jax.Array) -> TrainState:
        key = jax.random.key(seed)
        params = init(jax.random.fold_in(key, 0))
        root = jax.random.key_data(jax.random.fold_in(key, 1))
        return TrainState(jnp.int32(0), params, optimizer.init(params), root)

    with sharding.use(layout.mesh, layout.rules):
        return jax.jit(make, out_shardings=layout.shardings)(jnp.uint32(seed))


def abstract_state(init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into and a compiler is given."""

    def make(key: jax.Array) -> TrainState:
        params = init(key)
        return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(key))

    shapes = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout.shardings)
