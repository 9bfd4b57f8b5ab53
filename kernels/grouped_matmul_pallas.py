"""The gradient of a group's matrix on a TPU, by the Pallas kernel that JAX ships (megablox).

Of a grouped product the compiler has kernels for the values and the rows' gradient; the matrices' gradient it expands to
a masked product of E times the work (seen in the program that it makes for v5e: estimated cycles grow with E).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

TILE = 512  # of rows, inputs and outputs: about half of a v5e core's scoped VMEM in float32


def matrix_gradient(x_MxD: jax.Array, dy_MxF: jax.Array, sizes_E: jax.Array, *, interpret: bool = False) -> jax.Array:
    """dw_ExDxF: for each group, its rows of x, transposed, times its rows of dy; in x's dtype, summed in float32.

    Shapes, sizes and source as in `grouped_matmul`; rows behind the last group count nothing.
    """
    rows = x_MxD.shape[0]
    tile = min(TILE, rows + -rows % 128)
    x_MxD, dy_MxF = (jnp.pad(a, ((0, -rows % tile), (0, 0))) for a in (x_MxD, dy_MxF))
    tiling = (tile, min(TILE, x_MxD.shape[1]), min(TILE, dy_MxF.shape[1]))
    return tgmm(x_MxD.T, dy_MxF, sizes_E.astype(jnp.int32), x_MxD.dtype, tiling, num_actual_groups=sizes_E.shape[0],
                interpret=interpret)
