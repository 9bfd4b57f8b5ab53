"""The product of tokens with a weight, and a backward pass that never transposes the larger side.

`dot_general`'s own transpose rule makes the weight's gradient as (gradient^T @ x)^T: on a CPU that copies the whole
incoming gradient into another layout, and what was computed elementwise before it (a gate, an activation) is then
computed in that slow order. Here the narrower of the two is transposed; accelerators don't care.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels.varying import vary_alike


def linear(x_BxLxI: jax.Array, weight_IxO: jax.Array, inputs: int = 1) -> jax.Array:
    """x @ weight: y_BxLxO, for any leading axes of x. Reverse mode only (custom_vjp).

    The last `inputs` axes of x meet the first ones of the weight; O: all that it has behind them.
    Floating; the result is in the wider of the two dtypes, each gradient in the dtype of what it is for.
    """
    dtype = jnp.result_type(x_BxLxI, weight_IxO)
    tokens, outputs = x_BxLxI.shape[:-inputs], weight_IxO.shape[inputs:]
    x = x_BxLxI.astype(dtype).reshape(*tokens, -1)
    weight = weight_IxO.astype(dtype).reshape(x.shape[-1], math.prod(outputs))
    return _product(*vary_alike(x, weight)).reshape(*tokens, *outputs)


def _matmul(x_BxLxI: jax.Array, weight_IxO: jax.Array) -> jax.Array:
    """A bare dot_general, which a rematerialisation policy can see."""
    return jax.lax.dot_general(x_BxLxI, weight_IxO, (((x_BxLxI.ndim - 1,), (0,)), ((), ())))


_product = jax.custom_vjp(_matmul)


def _forward(x_BxLxI: jax.Array, weight_IxO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x_BxLxI, weight_IxO), (x_BxLxI, weight_IxO)


def _backward(saved: tuple[jax.Array, jax.Array], dy_BxLxO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BxLxI, weight_IxO = saved
    tokens = tuple(range(x_BxLxI.ndim - 1))
    over_tokens = ((tokens, tokens), ((), ()))
    narrow_first = weight_IxO.shape[0] <= weight_IxO.shape[1]
    if narrow_first:
        dweight_IxO = jax.lax.dot_general(x_BxLxI, dy_BxLxO, over_tokens)
    else:
        dweight_IxO = jax.lax.dot_general(dy_BxLxO, x_BxLxI, over_tokens).T
    return _matmul(dy_BxLxO, weight_IxO.T), dweight_IxO


_product.defvjp(_forward, _backward)
