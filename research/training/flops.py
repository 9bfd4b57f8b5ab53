"""Floating-point operations of a program, counted over its jaxpr: exact for scans and rematerialisation.

XLA's own cost analysis counts the body of a scan once, so it can't be quoted for a model with scanned layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

# Flops of one call of a Pallas kernel: a number, or a function of the shapes and dtypes of its operands.
PallasFlops = Mapping[str, float | Callable[..., float]]

# Primitives that run the one jaxpr they hold once, as it stands. The names differ between JAX versions.
CALLS = frozenset(
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr custom_lin named_call eval_jaxpr".split()
)

# Products of BxHxLxSxK in the primitives behind `jax.nn.dot_product_attention(implementation="cudnn")`.
CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def count_flops(
    fn: Callable[..., Any],
    *args: Any,
    platform: str | None = None,
    pallas_flops: PallasFlops = MappingProxyType({}),
) -> float:
    """Flops of `fn(*args)` in matrix products and convolutions, a multiply-add counting as two.

    Counted are dot_general, ragged_dot, conv_general_dilated and cuDNN's attention, wherever they are nested; elementwise
    operations, reductions and decompositions (cholesky, ...) count 0. `fn` is traced, not run: `args` may be
    ShapeDtypeStructs. The count is of the program as written: what fn computes and throws away counts, a
    recomputation under `jax.checkpoint` counts again. All devices together: a shard_map counts once a shard.

      scan: body times length (a `fori_loop` with static bounds is one).
      while: its trip count isn't in the program. One without products counts 0, another is an error.
      cond, switch: the dearest branch.
      jax.lax.platform_dependent: the branch for `platform`, or its default.

    Args:
      platform: "tpu", "cuda", "cpu", ... or None for the default branch (the first, if there is no default).
      pallas_flops: by the kernel's `name`, the flops of one call, or a function that gives them from the
          operands (each with shape and dtype). A kernel that isn't there counts by its own `cost_estimate`, as ours
          do: what their portable form multiplies, and attention's the blocks that a row of one document doesn't skip.

    Raises:
      ValueError: a while loop that multiplies matrices, a Pallas kernel that says nothing of its flops, or a primitive
        unknown here that holds products; the message names it.

    The yardstick (Kaplan et al. 2020, section 2.1): training a stack of N weights on D tokens is 6ND.
    """
    closed = jax.make_jaxpr(fn)(*args)
    return _count(closed.jaxpr, platform, pallas_flops)


def _count(jaxpr: Any, platform: str | None, pallas_flops: PallasFlops) -> float:
    return sum(_count_equation(eqn, platform, pallas_flops) for eqn in jaxpr.eqns)


def _count_equation(eqn: Any, platform: str | None, pallas_flops: PallasFlops) -> float:
    name, params = eqn.primitive.name, eqn.params

    def inner(jaxpr: Any) -> float:
        return _count(_open(jaxpr), platform, pallas_flops)

    if name == "dot_general":
        return _dot_general(eqn)
    if name in ("ragged_dot", "ragged_dot_general"):
        return _ragged_dot(eqn)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name == "scan":
        return params["length"] * inner(params["jaxpr"])
    if name == "cond":
        return _cond(params, platform, inner)
    if name == "shard_map":
        mesh = params["mesh"]
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return math.prod(mesh.shape[axis] for axis in axes) * inner(params["jaxpr"])
    if name == "pallas_call":
        return _pallas_call(eqn, pallas_flops)
    if name in CUDNN_PRODUCTS:  # of q BxLxHxK with k BxSxGxK
        q, k = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
        return 2.0 * CUDNN_PRODUCTS[name] * math.prod(q) * k[1]

    # Everything else: nothing, one call, or something whose number of runs isn't known here.
    flops = [inner(jaxpr) for jaxpr in _jaxprs(params)]
    if sum(flops) == 0:
        return 0.0
    if name == "while":
        raise ValueError(
            "count_flops: a while loop multiplies matrices an unknown number of times; use lax.scan, or "
            "lax.fori_loop with static bounds"
        )
    if name in CALLS and len(flops) == 1:
        return flops[0]
    raise ValueError(f"count_flops: primitive {name!r} holds matrix products and isn't known in flops.py")


def _open(jaxpr: Any) -> Any:
    """A closed jaxpr and an open one are read alike (JAX 0.12 closes none of the nested ones)."""
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


def _jaxprs(params: Mapping[str, Any]) -> list[Any]:
    """Every jaxpr among an equation's parameters, as they are or in tuples."""
    groups = (value if isinstance(value, (tuple, list)) else (value,) for value in params.values())
    return [value for group in groups for value in group if hasattr(_open(value), "eqns")]


def _shapes(eqn: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(lhs, rhs, out)"""
    return eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape


def _dot_general(eqn: Any) -> float:
    lhs, _, out = _shapes(eqn)
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def _ragged_dot(eqn: Any) -> float:
    """Every element of lhs meets the free columns of rhs once, in one group: groups don't multiply."""
    lhs, rhs, _ = _shapes(eqn)
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    taken = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2.0 * math.prod(lhs) * math.prod(size for axis, size in enumerate(rhs) if axis not in taken)


def _convolution(eqn: Any) -> float:
    """Padding counts as data, as in the usual formula; the zeros inside a dilated input don't."""
    _, rhs, out = _shapes(eqn)
    out_features = rhs[eqn.params["dimension_numbers"].rhs_spec[0]]
    per_output = math.prod(rhs) // out_features  # kernel width times the input features of one group
    return 2.0 * math.prod(out) * per_output / math.prod(eqn.params["lhs_dilation"])


def _cond(params: Mapping[str, Any], platform: str | None, inner: Callable[[Any], float]) -> float:
    branches = params["branches"]
    platforms = params["branches_platforms"] if "branches_platforms" in params else None
    if platforms is None:
        return max(inner(branch) for branch in branches)
    # One tuple of names a branch; the default branch has None in place of it.
    own = [i for i, names in enumerate(platforms) if names is not None and platform in names]
    default = [i for i, names in enumerate(platforms) if names is None]
    return inner(branches[(own + default + [0])[0]])


def _pallas_call(eqn: Any, pallas_flops: PallasFlops) -> float:
    name, estimate = eqn.params["name"], eqn.params["cost_estimate"]
    if name not in pallas_flops:
        if estimate is None:
            raise ValueError(f"count_flops: Pallas kernel {name!r} has no cost_estimate and isn't in pallas_flops; add either")
        return float(estimate.flops)
    flops = pallas_flops[name]
    return float(flops(*(v.aval for v in eqn.invars)) if callable(flops) else flops)
