"""Every implementation of grouped_matmul against one plain float64 oracle: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul
from kernels.grouped_matmul_pallas import matrix_gradient

M, D, F = 11, 4, 3
SIZES = {
    "all rows": (4, 1, 6),
    "an empty group": (0, 7, 4),
    "empty groups at the end": (11, 0, 0),
    "rows behind": (2, 0, 5),
    "nothing": (0, 0, 0),
}


def arguments(dtype=np.float32):
    random = np.random.default_rng(0)
    return [random.normal(size=shape).astype(dtype) for shape in ((M, D), (3, D, F), (M, F))]


def oracle(x, w, dy, sizes):
    """(y, dx, dw): one row after another."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for row, group in enumerate(np.repeat(np.arange(3), sizes)):
        y[row] = x[row] @ w[group]
        dx[row] = w[group] @ dy[row]
        dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, sizes):
    x, w, dy = arguments()
    x[sum(sizes) :] = 1e30  # what is behind the last group must leave no trace
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes), implementation=implementation), x, w)
    x[sum(sizes) :] = 0.0
    for actual, expected in zip((y, *pull(jnp.asarray(dy))), oracle(x, w, dy, sizes)):
        np.testing.assert_allclose(actual, expected, atol=2e-6)
    assert not np.any(np.asarray(y)[sum(sizes) :])


@pytest.mark.parametrize("rows", [11, 1300])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_tpu_s_gradient_of_the_matrices(sizes, rows):
    """The Pallas kernel, interpreted; with more rows than fit a tile, too."""
    sizes = np.array(sizes) * (rows // M)
    random = np.random.default_rng(1)
    x, dy = random.normal(size=(rows, D)).astype(np.float32), random.normal(size=(rows, F)).astype(np.float32)
    ends = np.cumsum(sizes)
    expected = [x[a:b].astype(np.float64).T @ dy[a:b] for a, b in zip(ends - sizes, ends)]
    dw = matrix_gradient(jnp.asarray(x), jnp.asarray(dy), jnp.asarray(sizes), interpret=True)
    np.testing.assert_allclose(dw, expected, atol=1e-5 * rows**0.5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_errs_no_more_than_the_reference(implementation):
    x, w, _ = (jnp.asarray(a, jnp.bfloat16) for a in arguments())
    sizes = jnp.array((4, 1, 6))
    exact, _, _ = oracle(x, w, np.zeros((M, F)), sizes)
    y = grouped_matmul(x, w, sizes, implementation=implementation)
    own = np.abs(np.asarray(y, np.float64) - exact).max()
    reference = np.abs(np.asarray(IMPLEMENTATIONS["reference"](x, w, sizes), np.float64) - exact).max()
    assert y.dtype == jnp.bfloat16 and own <= 1.5 * reference + 1e-6


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        (((5, 4), (3, 5, 2), (3,)), {}, r"aren't MxD, ExDxF, E$"),
        (((5, 4), (3, 4, 2), (2,)), {}, r"aren't MxD, ExDxF, E$"),
        (((5, 4), (3, 4, 2), (3,)), {"implementation": "fast"}, r"'fast' is none of reference, ragged$"),
    ],
)
def test_bad_calls_are_one_line(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*(jnp.zeros(shape, int if len(shape) == 1 else float) for shape in shapes), **options)
