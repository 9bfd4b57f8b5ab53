"""Every weight is declared once, by `param`; what else is known of it is derived from that line.

`axes` are logical names, `inputs` those of them that are summed over when the weight is used, `role` says how it scales
with width: `hidden`, `input`, `output`, `input+output` (a tied embedding) or `vector` (biases, gains, A_log, dt biases,
depthwise convolutions). Low-rank adapters (Hu et al. 2021) are applied here too, so they work in every einsum, under
scan and remat, for every mixer at once.
"""

import dataclasses
import fnmatch
import hashlib
import math
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from research.errors import InputError

ROLES = ("hidden", "input", "output", "input+output", "vector")
LAYERS = "layers"  # the axis that nn.scan adds in front

Initializer = Callable[[jax.Array, Sequence[int], int], jax.Array]  # (key, shape, fan_in) -> float32 array


def fan_in(gain: float = 1.0) -> Initializer:
    """Truncated normal with standard deviation gain / sqrt(fan_in) (LeCun et al. 1998), cut at two deviations."""
    cut_std = 0.87962566103423978  # of a standard normal truncated to [-2, 2]
    return lambda key, shape, fan: (
        jax.random.truncated_normal(key, -2.0, 2.0, shape) * (gain / math.sqrt(fan) / cut_std)
    )


def normal(std: float) -> Initializer:
    return lambda key, shape, fan: jax.random.normal(key, shape) * std


def orthogonal(gain: float = 1.0) -> Initializer:
    """gain times orthonormal rows or columns, whichever are fewer (Saxe et al. 2013). The input axes come first in the
    shape."""
    make = jax.nn.initializers.orthogonal(gain)
    return lambda key, shape, fan: make(key, (fan, math.prod(shape) // fan), jnp.float32).reshape(shape)


def constant(value: float) -> Initializer:
    return lambda key, shape, fan: jnp.full(shape, value, jnp.float32)


ones, zeros = constant(1.0), constant(0.0)


class Declared(nn.LogicallyPartitioned):
    """The box that carries a weight's declaration out of `init`; Linen's scan adds the `layers` axis to its names."""

    inputs: tuple[str, ...] = dataclasses.field(default=(), metadata={"pytree_node": False})
    role: str = dataclasses.field(default="hidden", metadata={"pytree_node": False})

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


class Weight(NamedTuple):
    """What is known of a weight. `axes` and `shape` begin with `layers` where the stage is scanned."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: tuple[str, ...]
    role: str
    stage: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def fan_in(self) -> int:
        return math.prod(n for n, axis in zip(self.shape, self.axes) if axis in self.inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """An adapter of one weight: adds scale * A @ B. a: [layers?, *inputs, rank], b: [layers?, rank, *outputs]."""

    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class AdapterRule:
    """Adapters for every weight whose path matches `pattern` (shell style, on `decoder/stage_0/attention_0/query`)."""

    pattern: str
    rank: int
    alpha: float


def param(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str], init: Initializer, *,
    inputs: Sequence[str] = (), role: str = "hidden",
) -> jax.Array:
    """Declares a weight of `module` and returns its value, with its adapter added where there is one.

    Args:
      shape, axes: sizes and their logical names, one each.
      init: (key, shape, fan_in) -> float32; fan_in is the product of the sizes of `inputs`.
      inputs: names of the axes summed over when the weight is used.
      role: one of ROLES.

    Returns:
      An array of `shape`, in the dtype of the parameters given to `apply`.
    """
    shape, axes, inputs = tuple(shape), tuple(axes), tuple(inputs)
    if len(shape) != len(axes) or len(set(axes)) != len(axes) or not set(inputs) <= set(axes) or role not in ROLES:
        raise ValueError(f"{module.name}/{name}: shape {shape}, axes {axes}, inputs {inputs}, role {role!r}: one distinct"
                         f" axis a dimension, inputs among them, role one of {ROLES}")
    fan = math.prod(n for n, axis in zip(shape, axes) if axis in inputs)
    weight = module.param(name, lambda key: Declared(init(key, shape, fan), axes, inputs=inputs, role=role))
    if not module.is_initializing() and module.has_variable("adapters", name):
        weight = _adapted(weight, module.get_variable("adapters", name), axes, inputs)
    return weight


def _adapted(weight: jax.Array, adapter: LowRank, axes: Sequence[str], inputs: Sequence[str]) -> jax.Array:
    letters = {axis: chr(ord("a") + i) for i, axis in enumerate(axes)}
    ins = "".join(letters[axis] for axis in axes if axis in inputs)
    outs = "".join(letters[axis] for axis in axes if axis not in inputs)
    if axes and axes[0] == LAYERS:  # only outside the scan (merge): the layers axis is shared by both factors
        outs = outs.replace(letters[LAYERS], "")
        spec = f"{letters[LAYERS]}{ins}z,{letters[LAYERS]}z{outs}->{''.join(letters[axis] for axis in axes)}"
    else:
        spec = f"{ins}z,z{outs}->{''.join(letters[axis] for axis in axes)}"
    delta = jnp.einsum(spec, adapter.a.astype(weight.dtype), adapter.b.astype(weight.dtype))
    return weight + adapter.scale * delta


def flatten(tree: Mapping) -> dict[str, Any]:
    """Nested dicts -> {"decoder/stage_0/attention_0/query": leaf}, in sorted order."""
    flat = flatten_dict(tree, sep="/")
    return {path: flat[path] for path in sorted(flat)}


def unflatten(flat: Mapping[str, Any]) -> dict:
    return unflatten_dict(flat, sep="/")


def weights_of(boxed: Mapping) -> dict[str, Weight]:
    """The declarations in a tree of boxes, as `init` returns it, by path."""
    flat = flatten_dict(boxed, sep="/", is_leaf=lambda path, leaf: isinstance(leaf, Declared))
    weights = {}
    for path in sorted(flat):
        box = flat[path]
        parts = path.split("/")
        stage = "/".join(parts[:2] if parts[1].startswith("stage_") else parts[:1])
        weights[path] = Weight(tuple(box.value.shape), tuple(box.names), box.inputs, box.role, stage)
    return weights


def init_adapters(weights: Mapping[str, Weight], rules: Sequence[AdapterRule], key: jax.Array) -> dict:
    """A tree of LowRank for the matched weights; B is zero, so the model starts as it was.

    Raises:
      InputError: a rule matches no weight, or only weights without an input axis.
    """
    flat: dict[str, LowRank] = {}
    for rule in rules:
        matched = [p for p in weights if fnmatch.fnmatchcase(p, rule.pattern) and weights[p].inputs]
        if not matched:
            raise InputError("adapters", f"{rule.pattern!r} matches no weight with an input axis",
                             "see the paths of tools.inspect_model")
        for path in matched:
            weight = weights[path]
            named = list(zip(weight.shape, weight.axes))
            layers = [n for n, axis in named if axis == LAYERS]
            ins = [n for n, axis in named if axis in weight.inputs]
            outs = [n for n, axis in named if axis not in weight.inputs and axis != LAYERS]
            seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
            a = jax.random.normal(jax.random.fold_in(key, seed), (*layers, *ins, rule.rank)) / math.sqrt(weight.fan_in)
            flat[path] = LowRank(a, jnp.zeros((*layers, rule.rank, *outs)), rule.alpha / rule.rank)
    return unflatten(flat)


def merge_adapters(params: Mapping, adapters: Mapping, weights: Mapping[str, Weight]) -> dict:
    """Parameters with the adapters added in: the same function without the adapters."""
    flat = flatten(params)
    for path, adapter in flatten(adapters).items():
        flat[path] = _adapted(flat[path], adapter, weights[path].axes, weights[path].inputs)
    return unflatten(flat)


def params_sha256(params: Mapping) -> str:
    """Hex digest over the sorted flat dict of float32 bytes; equal digests mean bitwise equal parameters."""
    digest = hashlib.sha256()
    for path, value in flatten(params).items():
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(np.asarray(jax.device_get(value), np.float32)).tobytes())
    return digest.hexdigest()
