"""Every implementation of SSD against a plain float64 loop: values, gradients, last state."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.ssd import IMPLEMENTATIONS, ssd
from tests.kernels.rows import ROWS, assert_near, in_float64, sequential, values_and_gradients, who
from tests.kernels.tpu import slow_pallas

HEADS, GROUPS, WIDTH, STATE = 4, 2, 3, 2


def arrays(rows: tuple[str, ...]) -> dict[str, np.ndarray]:
    random, (B, L) = np.random.default_rng(0), (len(rows), len(rows[0]))
    made = {
        "x": random.normal(size=(B, L, HEADS, WIDTH)),
        "dt": np.exp(random.normal(size=(B, L, HEADS)) - 1),
        "a": -np.exp(random.normal(size=HEADS)),
        "b": random.normal(size=(B, L, GROUPS, STATE)),
        "c": random.normal(size=(B, L, GROUPS, STATE)),
        "h": random.normal(size=(B, HEADS, WIDTH, STATE)),
    }
    return {name: array.astype(np.float32) for name, array in made.items()}


def oracle(x: dict, where: dict) -> tuple[jax.Array, jax.Array]:
    """One head at a time."""

    def step(token, h_HxKxN):
        new, ys = [], []
        for head in range(HEADS):
            group, dt = head // (HEADS // GROUPS), token["dt"][head]
            h = jnp.exp(dt * x["a"][head]) * h_HxKxN[head] + dt * jnp.outer(token["x"][head], token["b"][group])
            new.append(h)
            ys.append(h @ token["c"][group])
        return jnp.stack(new), jnp.stack(ys)

    return sequential(step, {name: x[name] for name in ("x", "dt", "b", "c")}, x["h"], where)


def run(x: dict, where: dict, implementation: str | None, chunk: int = 4) -> tuple[jax.Array, jax.Array]:
    return ssd(
        x["x"], x["dt"], x["a"], x["b"], x["c"], state_BxHxKxN=x["h"], chunk=chunk, implementation=implementation, **where
    )


@functools.cache
def oracle_of(rows: tuple[str, ...]) -> tuple:
    return in_float64(lambda x: oracle(x, who(rows)), arrays(rows), who(rows))


WAYS = [("reference", 4), ("chunked", 4), ("chunked", 1), (None, 64)]


@pytest.mark.parametrize(
    "rows, implementation, chunk",
    [(rows, *way) for rows in (ROWS, ("1",)) for way in WAYS]
    + [(ROWS, "pallas", 4), pytest.param(("1",), "pallas", 4, marks=pytest.mark.slow)],
)
def test_oracle(rows, implementation, chunk):
    where = who(rows)
    got = values_and_gradients(lambda x: run(x, where, implementation, chunk), arrays(rows), where)
    assert_near(got, oracle_of(rows))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_near_the_reference(implementation):
    where = who()
    rounded = {name: jnp.asarray(x, jnp.bfloat16) if name in ("x", "b", "c") else x for name, x in arrays(ROWS).items()}
    exact = {name: x.astype(jnp.float32) for name, x in rounded.items()}
    y_exact, h_exact = run(exact, where, "reference")
    y, h = run(rounded, where, implementation)
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
    valid = where["segment_ids_BxL"] != 0
    for got, true in ((y[valid], y_exact[valid]), (h, h_exact)):
        np.testing.assert_allclose(got.astype(jnp.float32), true, atol=0.02 * np.abs(true).max())


@pytest.mark.parametrize("implementation", slow_pallas(IMPLEMENTATIONS))
def test_long_steps_are_finite(implementation):
    """A decay that underflows, and in the chunk's upper half one that would overflow."""
    where = who()
    far = {name: x * (1e4 if name == "dt" else 1) for name, x in arrays(ROWS).items()}
    for leaf in jax.tree.leaves(values_and_gradients(lambda x: run(x, where, implementation), far, where)):
        assert np.isfinite(leaf).all()


def test_bad_input():
    x, where = arrays(ROWS), who()
    with pytest.raises(ValueError, match="multiple of 3 groups"):
        run({**x, "b": np.zeros((6, 13, 3, STATE))}, where, None)
    with pytest.raises(ValueError, match="state has shape"):
        run({**x, "h": x["h"][:1]}, where, None)
    with pytest.raises(ValueError, match="none of reference, chunked"):
        run(x, where, "fast")
