"""Unit triangular systems against numpy's solve in float64, and that no program of ours waits in LAPACK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gated_delta import gated_delta
from kernels.unit_triangular import solve
from kernels.wkv7 import wkv7


def systems(Q: int, repeated: bool) -> tuple[np.ndarray, np.ndarray]:
    """As the delta rule makes them: products of keys of length 1, all alike in the hard case; garbage above the diagonal."""
    random = np.random.default_rng(0)
    k = random.normal(size=(3, 2, Q, 16))
    k[..., 1 if repeated else Q :, :] = k[..., :1, :]
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    a = np.tril(k @ np.swapaxes(k, -1, -2), -1) + np.triu(np.full((Q, Q), np.nan))
    return a.astype(np.float32), random.normal(size=(3, 2, Q, 5)).astype(np.float32)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("Q", [1, 5, 8, 23, 64])
def test_solution_and_gradients(Q, repeated):
    a, right = systems(Q, repeated)
    exact = np.eye(Q) + np.tril(a.astype(np.float64), -1)
    u = np.linalg.solve(exact, right.astype(np.float64))
    got, pull = jax.vjp(jax.jit(solve), a, right)
    np.testing.assert_allclose(got, u, atol=2e-6 * np.abs(u).max())
    du = np.cos(np.arange(right.size)).reshape(right.shape)
    dright = np.linalg.solve(np.swapaxes(exact, -1, -2), du)
    da = -np.tril(dright @ np.swapaxes(u, -1, -2), -1)
    for one, expected in zip(pull(jnp.asarray(du, jnp.float32)), (da, dright)):
        np.testing.assert_allclose(one, expected, atol=4e-6 * max(np.abs(expected).max(), 1))


@pytest.mark.parametrize("rule", ["gated_delta", "wkv7"])
def test_no_program_calls_a_solver_that_waits_for_its_own_threads(rule):
    """LAPACK's, for a batch that is shared out among the pool's threads: two at a time hang a machine of two cores."""
    x, gate, ids = jnp.ones((1, 16, 2, 8)), -jnp.ones((1, 16, 2)), jnp.ones((1, 16), jnp.int32)

    def total(x):
        where = dict(positions_BxL=ids, segment_ids_BxL=ids, chunk=8)
        y, _ = gated_delta(x, x, x, gate, -gate, **where) if rule == "gated_delta" else wkv7(x, -x, x, x, x, x, **where)
        return jnp.sum(y)

    text = jax.jit(jax.grad(total)).lower(x).as_text()
    assert "stablehlo.dot_general" in text and "lapack" not in text and "triangular_solve" not in text
