"""The causal convolution against a plain loop in float64: values, gradients, and the state at any split."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.convolution import causal_convolution
from tests.kernels.rows import ROWS, who

CHANNELS = 3


def oracle(x: np.ndarray, kernel: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Token by token: the list of the document's inputs so far."""
    W, y = len(kernel), np.zeros_like(x)
    for b in range(len(x)):
        inputs: list[np.ndarray] = []
        for t in range(x.shape[1]):
            if segments[b, t] == 0:
                continue
            inputs = [x[b, t]] if positions[b, t] == 0 else [*inputs, x[b, t]]
            y[b, t] = sum(kernel[W - 1 - j] * tap for j, tap in enumerate(reversed(inputs[-W:])))
    return y


def arrays(width: int, rows: tuple[str, ...] = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (len(rows), len(rows[0]), CHANNELS)
    return random.normal(size=shape), random.normal(size=(width, CHANNELS)), random.normal(size=shape)


@jax.jit
def value_and_grads(x, kernel, probe, where):
    def total(x, kernel):
        y, _ = causal_convolution(x, kernel, **where)
        return jnp.sum(y * probe), y

    grads, y = jax.grad(total, argnums=(0, 1), has_aux=True)(x, kernel)
    return y, grads


@pytest.mark.parametrize("width", [1, 2, 4, 15])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ("1",)], ids=["padding inside", "packed", "one token"])
def test_oracle(width, rows):
    x, kernel, probe = arrays(width, rows)
    where = who(rows)
    positions, segments = where["positions_BxL"], where["segment_ids_BxL"]
    y, (d_x, d_kernel) = value_and_grads(*(a.astype(np.float32) for a in (x, kernel, probe)), where)
    np.testing.assert_allclose(y, oracle(x, kernel, positions, segments), atol=1e-5)
    # Linear in each: gradients are the oracle's values along unit vectors, in random directions.
    random = np.random.default_rng(1)
    dx, dk = random.normal(size=x.shape), random.normal(size=kernel.shape)
    np.testing.assert_allclose(
        np.sum(d_x * dx), np.sum(probe * oracle(dx, kernel, positions, segments)), atol=2e-4
    )
    np.testing.assert_allclose(
        np.sum(d_kernel * dk), np.sum(probe * oracle(x, dk, positions, segments)), atol=2e-4
    )


@pytest.mark.parametrize("splits", [(1,) * 13, (5, 8), (2, 1, 1, 9)], ids=str)
@pytest.mark.parametrize("width", [1, 4])
def test_state_carries_across_calls(splits, width):
    x, kernel, _ = (a.astype(np.float32) for a in arrays(width))
    where = who(ROWS)
    whole, last = causal_convolution(x, kernel, **where)
    state, start, parts = jnp.zeros((len(ROWS), width - 1, CHANNELS)), 0, []
    step = jax.jit(causal_convolution)
    for size in splits:
        here = {name: array[:, start : start + size] for name, array in where.items()}
        y, state = step(x[:, start : start + size], kernel, **here, state_BxPxC=state)
        parts.append(y)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-6)
    np.testing.assert_array_equal(state, last)


def test_huge_values_leave_no_trace():
    """Not even NaN: what another document or padding holds is selected away, not multiplied by 0."""
    x, kernel, probe = (a.astype(np.float32) for a in arrays(4, ROWS[1:2]))
    where = who(ROWS[1:2])
    third = where["segment_ids_BxL"] == 3
    probe = probe * third[..., None]
    other = np.where(third[..., None], x, np.nan)
    clean, dirty = value_and_grads(x, kernel, probe, where), value_and_grads(other, kernel, probe, where)
    np.testing.assert_array_equal(clean[0][third], dirty[0][third])
    np.testing.assert_array_equal(clean[1][0][third], dirty[1][0][third])


def test_dtypes():
    x, kernel, _ = arrays(4)
    state = jnp.zeros((len(ROWS), 3, CHANNELS), jnp.float32)
    y, after = causal_convolution(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel), **who(ROWS), state_BxPxC=state
    )
    assert (y.dtype, after.dtype) == (jnp.bfloat16, jnp.float32)


def test_bad_shapes():
    x, kernel, _ = (a.astype(np.float32) for a in arrays(4))
    with pytest.raises(ValueError, match="kernel"):
        causal_convolution(x, kernel[:, :1], **who(ROWS))
    with pytest.raises(ValueError, match="segment ids"):
        causal_convolution(x, kernel, **who(ROWS[:1]))
