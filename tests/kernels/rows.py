"""Rows of documents for the kernels that carry a state along them, and how values and gradients are taken."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# A digit a token: odd length, padding before, between, inside and after documents, documents of one token.
ROWS = ("1111122222222", "1101110223305", "0001111100220", "1000001111010", "1234567891200", "0000000000000")


def who(rows: tuple[str, ...] = ROWS) -> dict[str, np.ndarray]:
    """Positions and segment ids. A digit met again after another one is a document that begins again."""
    positions, segments = [], []
    for row in rows:
        last, count, here = "0", 0, []
        for digit in row:
            if digit not in ("0", last):
                last, count = digit, 0
            here.append(0 if digit == "0" else count)
            count += digit != "0"
        positions.append(here)
        segments.append([int(digit) for digit in row])
    return {
        "positions_BxL": np.asarray(positions, np.int32),
        "segment_ids_BxL": np.asarray(segments, np.int32),
    }


def flags(where: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(first_BxL, valid_BxL)."""
    valid = where["segment_ids_BxL"] != 0
    return valid & (where["positions_BxL"] == 0), valid


def sequential(step: Callable, tokens: dict, h: jax.Array, where: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """(y, last state) of h, y = step(token, h), one token of one row after another; padding's y is 0.

    tokens: arrays (B, L, ...); `step` gets a dict of what they hold at one place.
    """

    def one(h, now):
        token, first, valid = now
        new, y = step(token, jnp.where(first, 0.0, h))
        return jnp.where(valid, new, h), jnp.where(valid, y, 0.0)

    h, y = jax.vmap(lambda h, *row: jax.lax.scan(one, h, row))(h, tokens, *map(jnp.asarray, flags(where)))
    return y, h


def values_and_gradients(fn: Callable, arrays: dict, where: dict[str, np.ndarray]) -> tuple:
    """((y with padding's set to 0, last state), gradients of a weighted sum of both)."""
    valid = flags(where)[1]

    def scalar(arrays):
        y, state = fn(arrays)
        y = jnp.where(valid.reshape(*valid.shape, *[1] * (y.ndim - 2)), y, 0.0)
        weights = [np.random.default_rng(i).normal(size=x.shape).astype(x.dtype) for i, x in enumerate((y, state))]
        return jnp.sum(y * weights[0]) + jnp.sum(state * weights[1]), (y, state)

    gradients, values = jax.jit(jax.grad(scalar, has_aux=True))(arrays)
    return jax.tree.map(np.asarray, (values, gradients))


def in_float64(fn: Callable, arrays: dict, where: dict[str, np.ndarray]) -> tuple:
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(array, jnp.float64) for name, array in arrays.items()}
        return values_and_gradients(fn, wide, where)


def assert_near(actual: tuple, expected: tuple, tolerance: float = 2e-5) -> None:
    """Every leaf, up to `tolerance` times its largest entry, at least one."""
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(expected))
    for (path, e), a in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(
            a, e, rtol=0, atol=tolerance * max(1.0, np.abs(e).max()), err_msg=jax.tree_util.keystr(path)
        )
