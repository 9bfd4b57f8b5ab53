"""Every implementation of the selective scan against a plain float64 loop: values, gradients, last state."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import selective_scan as module
from kernels.selective_scan import IMPLEMENTATIONS, selective_scan
from tests.kernels.rows import ROWS, assert_near, in_float64, sequential, values_and_gradients, who
from tests.kernels.tpu import slow_pallas

WIDTH, STATE = 3, 2


def arrays(rows: tuple[str, ...]) -> dict[str, np.ndarray]:
    random, (B, L) = np.random.default_rng(0), (len(rows), len(rows[0]))
    made = {
        "x": random.normal(size=(B, L, WIDTH)),
        "dt": np.exp(random.normal(size=(B, L, WIDTH)) - 1),
        "a": -np.exp(random.normal(size=(WIDTH, STATE))),
        "b": random.normal(size=(B, L, STATE)),
        "c": random.normal(size=(B, L, STATE)),
        "h": random.normal(size=(B, WIDTH, STATE)),
    }
    return {name: array.astype(np.float32) for name, array in made.items()}


def oracle(x: dict, where: dict) -> tuple[jax.Array, jax.Array]:
    def step(token, h):
        h = jnp.exp(token["dt"][:, None] * x["a"]) * h + jnp.outer(token["dt"] * token["x"], token["b"])
        return h, h @ token["c"]

    return sequential(step, {name: x[name] for name in ("x", "dt", "b", "c")}, x["h"], where)


def run(x: dict, where: dict, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    return selective_scan(
        x["x"], x["dt"], x["a"], x["b"], x["c"], state_BxIxN=x["h"], implementation=implementation, **where
    )


@functools.cache
def oracle_of(rows: tuple[str, ...]) -> tuple:
    return in_float64(lambda x: oracle(x, who(rows)), arrays(rows), who(rows))


@pytest.mark.parametrize(
    "rows, implementation",
    [(rows, name) for rows in (ROWS, ("1",)) for name in (*IMPLEMENTATIONS, None) if name != "pallas"]
    + [(ROWS, "pallas"), pytest.param(("1",), "pallas", marks=pytest.mark.slow)],
)
def test_oracle(rows, implementation, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    where = who(rows)
    assert_near(values_and_gradients(lambda x: run(x, where, implementation), arrays(rows), where), oracle_of(rows))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    """Inputs are rounded once; the recurrence is float32."""
    where = who()
    rounded = {name: jnp.asarray(x, jnp.bfloat16) if name in ("x", "b", "c") else x for name, x in arrays(ROWS).items()}
    exact = {name: x.astype(jnp.float32) for name, x in rounded.items()}
    (y, h), (y_exact, h_exact) = run(rounded, where, implementation), run(exact, where, "reference")
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(h, h_exact, atol=1e-5)
    np.testing.assert_allclose(y.astype(jnp.float32), y_exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("implementation", slow_pallas(IMPLEMENTATIONS))
def test_long_steps_are_finite(implementation):
    """A decay that underflows: values and gradients of everything stay finite."""
    where = who()
    far = {name: x * (1e4 if name == "dt" else 1) for name, x in arrays(ROWS).items()}
    for leaf in jax.tree.leaves(values_and_gradients(lambda x: run(x, where, implementation), far, where)):
        assert np.isfinite(leaf).all()


def test_bad_input():
    x, where = arrays(ROWS), who()
    with pytest.raises(ValueError, match="dt has shape"):
        run({**x, "dt": x["dt"][:, :1]}, where, None)
    with pytest.raises(ValueError, match="none of reference, chunked"):
        run(x, where, "fast")
