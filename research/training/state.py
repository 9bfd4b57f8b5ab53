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
from research.training.averaging import start_ema

HOST = "pinned_host"  # JAX's name of the host's memory that devices read


@flax.struct.dataclass
class TrainState:
    """step: int32, optimizer steps done. params: what is trained. key: root key data; step n uses fold_in(key, n).
    ema: moving average of params in float32, or None."""

    step: jax.Array
    params: Any
    optimizer: optax.OptState
    key: jax.Array
    ema: Any = None


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
    rules: sharding.Rules, ema: bool = False, offload: bool = False,
) -> Layout:
    """Parameters and their average by their axes; optimizer state like the parameters it mirrors, in the host's memory if
    `offload`; the rest replicated."""
    params = sharding.weight_shardings(weights, mesh, rules)
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(lambda key: optimizer.init(init(key)), jax.random.key(0))
    specs = sharding.weight_specs(weights, mesh, rules)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = mirrored(path)
        if name not in weights or leaf.ndim != len(weights[name].shape):
            return replicated
        whole = (*specs[name], *[None] * (leaf.ndim - len(specs[name])))
        # A factored moment has size 1 along the axes it was averaged over.
        spec = PartitionSpec(*(part if size == full else None
                               for part, size, full in zip(whole, leaf.shape, weights[name].shape)))
        return NamedSharding(mesh, spec, memory_kind=HOST if offload else None)

    optimizer_shardings = jax.tree_util.tree_map_with_path(place, abstract)
    return Layout(mesh, rules, TrainState(replicated, params, optimizer_shardings, replicated, params if ema else None))


def mirrored(path: tuple) -> str:
    """The parameter's path at the end of a leaf's place in the optimizer state: the dict keys behind the last field."""
    names: list[str] = []
    for entry in reversed(path):
        if not isinstance(entry, jax.tree_util.DictKey):
            break
        names.insert(0, str(entry.key))
    return "/".join(names)


def init_state(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, layout: Layout, seed: int
) -> TrainState:
    """A fresh state of `seed`, laid out as `layout` says, with a moving average where the layout has one."""

    def make(seed: jax.Array) -> TrainState:
        key = jax.random.key(seed)
        params = init(jax.random.fold_in(key, 0))
        root = jax.random.key_data(jax.random.fold_in(key, 1))
        return _fresh(params, optimizer, root, layout)

    with sharding.use(layout.mesh, layout.rules):
        return jax.jit(make, out_shardings=layout.shardings)(jnp.uint32(seed))


def _fresh(params: Any, optimizer: optax.GradientTransformation, key: jax.Array, layout: Layout) -> TrainState:
    ema = None if layout.shardings.ema is None else start_ema(params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), key, ema)


def restart_from(params: Any, key: jax.Array, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """A fresh state of these parameters: optimizers and averages that hold copies of them start from them, too."""
    make = jax.jit(lambda params, key: _fresh(params, optimizer, key, layout), out_shardings=layout.shardings)
    with sharding.use(layout.mesh, layout.rules):
        return make(params, key)


def abstract_state(init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into and a compiler is given."""

    def make(key: jax.Array) -> TrainState:
        params = init(key)
        return _fresh(params, optimizer, jax.random.key_data(key), layout)

    shapes = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout.shardings)
