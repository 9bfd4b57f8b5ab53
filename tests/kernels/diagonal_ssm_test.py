"""Diagonal and DPLR state spaces: recurrences and long convolutions against plain float64 loops."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import diagonal_ssm as diagonal
from kernels import dplr_ssm as dplr
from tests.kernels.rows import ROWS, assert_near, in_float64, sequential, values_and_gradients, who

CHANNELS, COPIES, MODES = 2, 3, 2
ONE_DOCUMENT = ("1111111111111", "1111111110000", "0001101110011")
KERNELS = {"diagonal": diagonal, "dplr": dplr}


def arrays(rows: tuple[str, ...], kind: str) -> dict[str, np.ndarray]:
    """Weights are continuous, so that any of them makes a stable system."""
    random, (B, L) = np.random.default_rng(0), (len(rows), len(rows[0]))
    copies = () if kind == "dplr" else (COPIES,)
    made = {"u": random.normal(size=(B, L, CHANNELS, *copies)), "dt": np.array([0.1, 0.9]),
            "rate_re": -np.exp(random.normal(size=(CHANNELS, MODES)))}  # fmt: skip
    for name in ("rate_im", "p_re", "p_im", "b_re", "b_im", "c_re", "c_im"):
        if kind == "dplr" or name[0] in "rc":
            made[name] = random.normal(size=(CHANNELS, MODES))
    for name in ("h_re", "h_im"):
        made[name] = random.normal(size=(B, CHANNELS, *copies, MODES))
    return {name: array.astype(np.float32) for name, array in made.items()}


def complex_of(x: dict, name: str) -> jax.Array:
    return x[f"{name}_re"] + 1j * x[f"{name}_im"]


def oracle(x: dict, where: dict, kind: str) -> tuple[jax.Array, jax.Array]:
    """Complex, and for the DPLR system with dense matrices of all modes, inverted."""
    h = complex_of(x, "h")
    if kind == "diagonal":
        a, c = jnp.exp(x["dt"][:, None] * complex_of(x, "rate")), complex_of(x, "c")

        def step(token, h_CxMxN):
            h_CxMxN = a[:, None] * h_CxMxN + token["u"][..., None]
            return h_CxMxN, jnp.sum(c[:, None] * h_CxMxN, axis=-1).real
    else:
        both = lambda name: jnp.concatenate([complex_of(x, name), complex_of(x, name).conj()], axis=-1)
        p, eye = both("p"), jnp.eye(2 * MODES)
        a = jax.vmap(jnp.diag)(both("rate")) - p[:, :, None] * p[:, None, :].conj()
        half = x["dt"][:, None, None] / 2
        decay = jnp.linalg.solve(eye - half * a, eye + half * a)
        inputs = jnp.linalg.solve(eye - half * a, 2 * half * both("b")[..., None])[..., 0]
        h = jnp.concatenate([h, h.conj()], axis=-1)

        def step(token, h_CxN):
            h_CxN = jnp.einsum("cmn,cn->cm", decay, h_CxN) + inputs * token["u"][:, None]
            return h_CxN, jnp.sum(both("c") * h_CxN, axis=-1).real

    y, h = sequential(step, {"u": x["u"]}, h, where)
    return y, jnp.stack([h[..., :MODES].real, h[..., :MODES].imag])


def pair(x: dict, name: str) -> diagonal.Pair:
    return x[f"{name}_re"], x[f"{name}_im"]


def decay_of(x: dict) -> diagonal.Pair:
    rate = x["dt"][:, None] * x["rate_re"], x["dt"][:, None] * x["rate_im"]
    return jnp.exp(rate[0]) * jnp.cos(rate[1]), jnp.exp(rate[0]) * jnp.sin(rate[1])


def continuous_of(x: dict) -> dplr.Continuous:
    return dplr.Continuous(*(pair(x, name) for name in ("rate", "p", "b", "c")), x["dt"])


def recur(x: dict, where: dict, kind: str, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    if kind == "diagonal":
        y, h = diagonal.diagonal_ssm(
            x["u"], decay_of(x), pair(x, "c"), state_BxCxMxN=pair(x, "h"), implementation=implementation, **where
        )
    else:
        system = dplr.discretize(continuous_of(x))
        y, h = dplr.dplr_ssm(x["u"], system, state_BxCxN=pair(x, "h"), implementation=implementation, **where)
    return y, jnp.stack(h)


def convolve(x: dict, where: dict, kind: str) -> tuple[jax.Array, jax.Array]:
    L = x["u"].shape[1]
    if kind == "diagonal":
        k = diagonal.impulse_response(decay_of(x), pair(x, "c"), L)
        y = diagonal.long_convolution(x["u"], k, where["segment_ids_BxL"])
    else:
        k = dplr.impulse_response(continuous_of(x), L)
        y = diagonal.long_convolution(x["u"][..., None], k, where["segment_ids_BxL"])[..., 0]
    return y, jnp.zeros((), y.dtype)


@functools.cache
def oracle_of(rows: tuple[str, ...], kind: str, state: bool) -> tuple:
    def run(x):
        y, h = oracle(x if state else {**x, "h_re": 0 * x["h_re"], "h_im": 0 * x["h_im"]}, who(rows), kind)
        return (y, h) if state else (y, jnp.zeros((), y.dtype))

    return in_float64(run, arrays(rows, kind), who(rows))


@pytest.mark.parametrize(
    "kind, implementation", [(kind, name) for kind in KERNELS for name in (*KERNELS[kind].IMPLEMENTATIONS, None)]
)
def test_recurrence(kind, implementation, monkeypatch):
    monkeypatch.setattr(KERNELS[kind], "CHUNK", 4)
    where = who(ROWS)
    got = values_and_gradients(lambda x: recur(x, where, kind, implementation), arrays(ROWS, kind), where)
    assert_near(got, oracle_of(ROWS, kind, True))


@pytest.mark.parametrize("rows", [ONE_DOCUMENT, ("11",), ("1",)], ids=["odd, padded", "two tokens", "one token"])
@pytest.mark.parametrize("kind", KERNELS)
def test_long_convolution(kind, rows):
    """One document a row: with padding before, inside and after it; an even length has -1 among its roots of unity."""
    where = who(rows)
    got = values_and_gradients(lambda x: convolve(x, where, kind), arrays(rows, kind), where)
    assert_near(got, oracle_of(rows, kind, False))


def test_what_is_gone_at_once_has_finite_gradients():
    """A decay of exactly 0 has no logarithm."""
    zero, one = jnp.zeros((1, 2)), jnp.ones((1, 2))
    response = lambda a, b: diagonal.impulse_response((a, b), (one, one), 5)
    np.testing.assert_allclose(response(zero, zero), [[2, 0, 0, 0, 0]], atol=1e-12)
    gradients = jax.grad(lambda a, b: jnp.sum(response(a, b)), argnums=(0, 1))(zero, zero)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)


def test_bad_input():
    x, where = arrays(ROWS, "diagonal"), who(ROWS)
    with pytest.raises(ValueError, match="c has shape"):
        recur({**x, "c_im": x["c_im"][:1], "c_re": x["c_re"][:1]}, where, "diagonal", None)
    with pytest.raises(ValueError, match="none of reference, chunked"):
        recur(x, where, "diagonal", "fast")
    x = arrays(ROWS, "dplr")
    with pytest.raises(ValueError, match="state has shape"):
        recur({**x, "h_re": x["h_re"][:1]}, where, "dplr", None)
    with pytest.raises(ValueError, match="none of reference, chunked"):
        recur(x, where, "dplr", "fast")
