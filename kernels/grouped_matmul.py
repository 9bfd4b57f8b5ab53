"""Rows times the matrix of their group (a mixture's experts): the definition, and `jax.lax.ragged_dot`.

`reference` is the definition. Every other row of IMPLEMENTATIONS gives the same values and gradients: the tests hold all of
them to one float64 oracle.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.grouped_matmul_pallas import matrix_gradient


def reference(x_MxD: jax.Array, w_ExDxF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The definition, with a matrix for every row in memory. Arguments and result as in `grouped_matmul`."""
    group_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_MxD.shape[0]), side="right")
    w_MxDxF = jnp.take(w_ExDxF, group_M, axis=0, mode="fill", fill_value=0)  # behind the last group: zeros
    return jnp.einsum("md,mdf->mf", x_MxD, w_MxDxF)


def ragged(x_MxD: jax.Array, w_ExDxF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot`: on a TPU the compiler's grouped kernel, elsewhere a masked dense product of E times the work."""
    # A kernel that only visits groups may leave anything in the rows behind them, here and in their gradients.
    inside_Mx1 = (jnp.arange(x_MxD.shape[0]) < jnp.sum(sizes_E))[:, None]
    y_MxF = _ragged(jnp.where(inside_Mx1, x_MxD, 0), w_ExDxF, sizes_E.astype(jnp.int32))
    return jnp.where(inside_Mx1, y_MxF, 0)


@jax.custom_vjp
def _ragged(x_MxD: jax.Array, w_ExDxF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x_MxD, w_ExDxF, sizes_E)


def _ragged_forward(x_MxD, w_ExDxF, sizes_E):
    return _ragged(x_MxD, w_ExDxF, sizes_E), (x_MxD, w_ExDxF, sizes_E)


def _ragged_backward(saved, dy_MxF):
    x_MxD, w_ExDxF, sizes_E = saved

    def by_compiler(x_MxD, dy_MxF, sizes_E):
        _, pull = jax.vjp(lambda w: jax.lax.ragged_dot(x_MxD, w, sizes_E), w_ExDxF)
        return pull(dy_MxF)[0]

    dx_MxD = jax.lax.ragged_dot(dy_MxF, jnp.swapaxes(w_ExDxF, 1, 2), sizes_E)
    dw_ExDxF = jax.lax.platform_dependent(x_MxD, dy_MxF, sizes_E, tpu=matrix_gradient, default=by_compiler)
    return dx_MxD, dw_ExDxF, None


_ragged.defvjp(_ragged_forward, _ragged_backward)

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"reference": reference, "ragged": ragged}


def grouped_matmul(
    x_MxD: jax.Array, w_ExDxF: jax.Array, sizes_E: jax.Array, *, implementation: str | None = None,
) -> jax.Array:
    """y_MxF: each of M rows, sorted by group, times its group's matrix; in x's dtype.

    Args:
      x_MxD, w_ExDxF: floating, of one dtype.
      sizes_E: int32, rows of each group, in order; none is negative and their sum is at most M. Rows behind the last group
        give exactly 0, whatever they hold, and gradients of exactly 0.
      implementation: a key of IMPLEMENTATIONS; None: `ragged`.

    Raises:
      ValueError: shapes that don't fit, or an unknown implementation.

    Source: Gale et al. 2023 (MegaBlocks), section 4: experts as one product, without dropping or padding.
    """
    if x_MxD.ndim != 2 or w_ExDxF.ndim != 3 or x_MxD.shape[1] != w_ExDxF.shape[1] or sizes_E.shape != w_ExDxF.shape[:1]:
        raise ValueError(f"grouped_matmul: x {x_MxD.shape}, w {w_ExDxF.shape}, sizes {sizes_E.shape} aren't MxD, ExDxF, E")
    name = implementation or "ragged"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"grouped_matmul: implementation {name!r} is none of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](x_MxD, w_ExDxF, sizes_E)
