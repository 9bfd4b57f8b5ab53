"""Adafactor: the second moment of a matrix kept as a row and a column, so that its memory grows with the sides' sum."""

from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.params import LAYERS, Weight, flatten, unflatten
from research.training.muon import matrix_axes

DECAY_EXPONENT = 0.8
EPS = 1e-30  # on squared gradients: keeps a row that never saw a gradient finite
CLIP = 1.0  # largest root mean square of an update, a matrix


class FactoredState(NamedTuple):
    """count: int32. row, col: by path, running means of squared gradients, with the parameter's rank: `row` has size 1 along
    the outputs, `col` along the inputs; what isn't factored is whole in `row` and has no `col`."""

    count: jax.Array
    row: Any
    col: Any


def scale_by_factored_moment(weights: Mapping[str, Weight], b2: float) -> optax.GradientTransformation:
    """g / sqrt(v) with v_ij = row_i * col_j / mean(row), each update's root mean square at most 1 (Shazeer and Stern 2018).

    A weight is factored between its declared inputs and outputs, each layer's and expert's matrix by itself (the two
    largest axes, which libraries take, may be the layers). v's decay is min(1 - t^-0.8, b2) (Zhai et al. 2022, section
    3.5), which starts without a bias. There is no scaling by the parameter: AdamW's learning rate is of the right order.
    """
    factored = {path: axes for path, weight in weights.items() if (axes := matrix_axes(weight))}

    def init(params: Any) -> FactoredState:
        row, col = {}, {}
        for path, p in flatten(params).items():
            axes = factored[path] if path in factored else None
            row[path] = jnp.zeros(_without(p.shape, axes[2]) if axes else p.shape, jnp.float32)
            col[path] = jnp.zeros(_without(p.shape, axes[1]), jnp.float32) if axes else optax.MaskedNode()
        return FactoredState(jnp.zeros([], jnp.int32), unflatten(row), unflatten(col))

    def update(updates: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        count = state.count + 1
        decay = jnp.minimum(1.0 - count.astype(jnp.float32) ** -DECAY_EXPONENT, b2)
        row, col, out = flatten(state.row), flatten(state.col), {}
        for path, g in flatten(updates).items():
            square = jnp.square(g.astype(jnp.float32)) + EPS
            axes = factored[path] if path in factored else None
            if axes:
                stacked, inputs, outputs = axes
                row[path] = decay * row[path] + (1 - decay) * jnp.mean(square, outputs, keepdims=True)
                col[path] = decay * col[path] + (1 - decay) * jnp.mean(square, inputs, keepdims=True)
                mean = jnp.mean(row[path], inputs, keepdims=True)
                scaled = g * jax.lax.rsqrt(row[path] / mean) * jax.lax.rsqrt(col[path])
                rms = jnp.sqrt(jnp.mean(jnp.square(scaled), inputs + outputs, keepdims=True))
            else:
                row[path] = decay * row[path] + (1 - decay) * square
                scaled = g * jax.lax.rsqrt(row[path])
                own = tuple(i for i, axis in enumerate(weights[path].axes) if axis != LAYERS)
                rms = jnp.sqrt(jnp.mean(jnp.square(scaled), own, keepdims=True))
            out[path] = (scaled / jnp.maximum(1.0, rms / CLIP)).astype(g.dtype)
        return unflatten(out), FactoredState(count, unflatten(row), unflatten(col))

    return optax.GradientTransformation(init, update)


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if i in axes else n for i, n in enumerate(shape))
