"""From logical axes to the mesh: one small table of rules, and the few places where activations are constrained.

The model never names a mesh axis. Weights are placed by `weight_shardings`; activations are constrained at the
embedding, at block edges and at the heads by `constrain`; a kernel that can't be partitioned automatically is called
through `local`. All three are no-ops outside `use(mesh, rules)`, so the same code runs on one device.
"""

import contextlib
import contextvars
import dataclasses
import math
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.config import nearest
from research.errors import InputError
from research.params import Weight, unflatten
from research.schema import MeshConfig

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")  # slowest links first, fastest last

Axes = Sequence[str | None]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes, apart for weights (where they rest) and activations (where they are computed).

    `rest` is the mesh axis that takes the devices which the mesh config leaves over.
    """

    weights: Mapping[str, tuple[str, ...]]
    activations: Mapping[str, tuple[str, ...]]
    rest: str


_BATCH = ("data", "fsdp", "expert")  # experts' devices hold different rows outside the MoE layers
_ROWS = {"batch": _BATCH, "expert_batch": _BATCH}  # expert_batch: rows where the expert axis is there too, inside MoE
_ZERO3 = {axis: ("fsdp",) for axis in ("embed", "latent")}
_LENGTH = _ROWS | {"length": ("context",)}
_TENSOR = {axis: ("tensor",) for axis in ("vocab", "heads", "kv_heads", "mlp", "state")}

RULES = {
    "dp": Rules({}, _ROWS, rest="data"),
    "fsdp": Rules(_ZERO3, _ROWS, rest="fsdp"),
    "fsdp_tp": Rules(_ZERO3 | _TENSOR, _ROWS | _TENSOR, rest="fsdp"),
    "ep": Rules(_ZERO3 | {"expert": ("expert",)},
                {"batch": _BATCH, "expert_batch": ("data", "fsdp"), "expert": ("expert",)}, rest="fsdp"),
    "cp": Rules(_ZERO3, _LENGTH, rest="fsdp"),
    "ring": Rules(_ZERO3, _LENGTH | {"keys": ("context",)}, rest="fsdp"),  # attention's keys go round, never whole
}


def rules_named(name: str) -> Rules:
    if name not in RULES:
        raise InputError("mesh.rules", f"unknown {name!r}", nearest(name, list(RULES)))
    return RULES[name]


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """Sizes of MESH_AXES over all slices; the automatic ones (0) are 1, but for the rules' own axis: what is left.

    Raises:
      InputError: the sizes don't multiply to the number of devices.
    """
    rest = rules_named(config.rules).rest
    asked = {axis: getattr(config, axis) for axis in MESH_AXES}
    sizes = {axis: size or 1 for axis, size in asked.items()}
    if not asked[rest]:
        others = math.prod(size for axis, size in sizes.items() if axis != rest)
        sizes[rest] = devices // others
    if math.prod(sizes.values()) != devices:
        fixed = ", ".join(f"{axis}={size}" for axis, size in asked.items() if size)
        raise InputError("mesh", f"{fixed or 'its axes'} do not multiply to the {devices} devices here",
                         f"choose sizes whose product is {devices}, or leave mesh.{rest}=0 to take what is left")
    if devices % config.slices or max(sizes["data"], sizes["fsdp"]) % config.slices:
        raise InputError("mesh.slices", f"{config.slices} does not divide mesh.data or mesh.fsdp ({sizes})",
                         "put the slices on data")
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all); slices go over data, or over fsdp where data can't hold them."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(config, len(devices))
    shape = [sizes[axis] for axis in MESH_AXES]
    if config.slices > 1:
        across = "data" if sizes["data"] % config.slices == 0 else "fsdp"
        dcn = [config.slices if axis == across else 1 for axis in MESH_AXES]
        ici = [size // d for size, d in zip(shape, dcn)]
        found = len({getattr(device, "slice_index", 0) for device in devices})
        if found != config.slices:
            raise InputError("mesh.slices", f"{config.slices} asked, the devices form {found}", "set it to what is there")
        grid = mesh_utils.create_hybrid_device_mesh(ici, dcn, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def weight_specs(weights: Mapping[str, Weight], mesh: Mesh, rules: Rules) -> dict[str, PartitionSpec]:
    """Path -> PartitionSpec. An axis of size 1 (one key/value head) is never split.

    Raises:
      InputError: two axes of a weight fall on one mesh axis, or a size can't be divided.
    """
    specs = {}
    for path, weight in weights.items():
        spec, taken = [], {}
        for size, axis in zip(weight.shape, weight.axes):
            names = tuple(n for n in _lookup(rules.weights, axis) if mesh.shape[n] > 1) if size > 1 else ()
            for name in names:
                if name in taken:
                    raise InputError("mesh.rules", f"{path}: axes {taken[name]} and {axis} both fall on mesh axis {name}",
                                     "change the rule of one of them")
                taken[name] = axis
            parts = math.prod(mesh.shape[n] for n in names)
            if size % parts:
                raise InputError(f"mesh.{names[0]}", f"{parts} does not divide {axis}={size} of {path}",
                                 f"choose a divisor of {size}")
            spec.append(names[0] if len(names) == 1 else names or None)
        specs[path] = PartitionSpec(*spec)
    return specs


def _lookup(table: Mapping[str, tuple[str, ...]], axis: str | None) -> tuple[str, ...]:
    return table[axis] if axis in table else ()


def weight_shardings(weights: Mapping[str, Weight], mesh: Mesh, rules: Rules) -> dict:
    """The tree of NamedShardings of the parameters."""
    return unflatten({path: NamedSharding(mesh, spec) for path, spec in weight_specs(weights, mesh, rules).items()})


_current: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("sharding", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Within it, `constrain` and `local` know where they are. Enter it around tracing, not only around running."""
    token = _current.set((mesh, rules))
    try:
        yield
    finally:
        _current.reset(token)


def activation_spec(axes: Axes, shape: Sequence[int], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The spec of an activation; a size that its mesh axes don't divide (a batch of one) is left whole."""
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        names = tuple(n for n in _lookup(rules.activations, axis) if mesh.shape[n] > 1)
        if size % math.prod(mesh.shape[n] for n in names):
            names = ()
        spec.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*spec)


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes that an activation's logical axis of `size` is split over inside `local`: for collectives there."""
    current = _current.get()
    if current is None or current[0].size == 1:
        return ()
    mesh, rules = current
    names = tuple(n for n in _lookup(rules.activations, axis) if mesh.shape[n] > 1)
    return () if size % math.prod(mesh.shape[n] for n in names) else names


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Pins an activation's layout by its logical axes."""
    current = _current.get()
    if current is None or current[0].size == 1:
        return x
    mesh, rules = current
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, activation_spec(axes, x.shape, mesh, rules)))


def batch_sharding(mesh: Mesh, rules: Rules, axes: Axes) -> NamedSharding:
    """For a batch array of logical `axes`, e.g. (None, "batch", "length") with microbatches in front."""
    names = [tuple(n for n in _lookup(rules.activations, axis) if mesh.shape[n] > 1) or None for axis in axes]
    return NamedSharding(mesh, PartitionSpec(*names))


def batch_divisor(mesh: Mesh, rules: Rules) -> int:
    """The number of parts a batch is split into."""
    return math.prod(mesh.shape[n] for n in rules.activations["batch"])


class AtRest(NamedTuple):
    """In `local`'s in_axes: a weight that comes as it rests, split by the rules of weights and not of activations."""

    axes: Axes


def rest_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that a weight's logical axis is split over where it rests: for collectives inside `local`."""
    current = _current.get()
    if current is None:
        return ()
    mesh, rules = current
    return tuple(n for n in _lookup(rules.weights, axis) if mesh.shape[n] > 1)


def local(function: Callable, in_axes: Sequence[Axes | AtRest | None], out_axes: Any, *, auto: Sequence[str] = ()) -> Callable:
    """`function` on each device's own shard of its arguments, which are laid out by their logical axes.

    What can't be partitioned automatically (a Pallas kernel) or shouldn't be (a scan over chunks of the local tokens) is
    called through this and nowhere else. An axis that isn't split is given whole; the function must not mix rows of
    a split axis.

    Args:
      function: arrays -> array or tuple of arrays. Its collectives name the axes that `mesh_axes` or `rest_axes` gave it.
      in_axes: logical axes of each argument (of a weight that stays split: AtRest); None for an argument that is None.
      out_axes: logical axes of the result, or a list of them for a tuple. The name "shards" stands for a leading axis of
        length 1 on each device, which comes back with one entry for every shard (partial sums).
      auto: mesh axes left to the compiler inside (`("tensor",)`: the function's matmuls stay split over tensor).

    Returns:
      A function of the same arguments. Outside `use`, or on one device, it is `function` itself.
    """
    current = _current.get()
    if current is None or current[0].size == 1:
        return function
    mesh, rules = current

    def call(*args: jax.Array | None) -> Any:
        sizes: dict[str, int] = {}
        for arg, axes in zip(args, in_axes, strict=True):
            if arg is not None and not isinstance(axes, AtRest):
                sizes.update(zip(axes, arg.shape, strict=True))
        sizes["shards"] = mesh.size

        def spec(axes: Axes | AtRest | None) -> PartitionSpec:
            if axes is None:
                return PartitionSpec()
            if isinstance(axes, AtRest):
                return PartitionSpec(*(tuple(n for n in rest_axes(axis) if n not in auto) or None for axis in axes.axes))
            parts = []
            for axis in axes:
                names = MESH_AXES if axis == "shards" else _lookup(rules.activations, axis)
                names = tuple(n for n in names if mesh.shape[n] > 1 and n not in auto)
                if axis is not None and axis != "shards" and sizes[axis] % math.prod(mesh.shape[n] for n in names):
                    names = ()
                parts.append(names or None)
            return PartitionSpec(*parts)

        many = isinstance(out_axes, list)
        out_specs = tuple(spec(a) for a in out_axes) if many else spec(out_axes)
        manual = frozenset(n for n in MESH_AXES if n not in auto)
        mapped = jax.shard_map(function, mesh=mesh, in_specs=tuple(spec(a) for a in in_axes), out_specs=out_specs,
                               axis_names=manual, check_vma=False)
        return mapped(*args)

    return call
