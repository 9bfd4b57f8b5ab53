"""S4, S4D and H3: the published systems, and that convolution and recurrence are one model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.models import mixers
from research.models.context import one_document
from research.models.diagonal import continuous_modes, discretize
from research.models.h3 import H3
from research.models.s4 import S4, hippo_legs, normal_plus_low_rank
from research.models.s4d import S4d
from tests.models.cases import DIM
from tests.models.harness import apply, assert_close, random

CONFIGS = {"S4": S4(state=16), "S4d": S4d(state=16, init="inv"), "H3": H3(head_dim=2, shift=4, state=8)}
every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


@functools.cache
def init(cfg) -> dict:
    boxes = jax.jit(mixers.row(cfg).module(cfg).init)(jax.random.key(0), jnp.zeros((1, 2, DIM)), one_document(1, 2))
    return {name: box.value for name, box in boxes["params"].items()}


@every_config
def test_convolution_is_recurrence(cfg):
    """As they are when training begins, over a few hundred tokens: slow modes see all of them."""
    x, ctx = random(2, 300, DIM), one_document(2, 300)
    run = jax.jit(apply, static_argnums=0)
    y_fft, _, _ = run(cfg, init(cfg), x, ctx)
    y, _, _ = run(cfg, init(cfg), x, ctx.replace(packed=True))
    assert_close(y_fft, y, 2e-5)


@every_config
def test_packed_rows_and_states_use_no_fft(cfg):
    ctx = one_document(1, 8)
    state = mixers.row(cfg).module.init_state(cfg, 1, DIM, 8, jnp.float32)
    has_fft = lambda ctx, state: "fft" in str(jax.make_jaxpr(functools.partial(apply, cfg))(
        init(cfg), jnp.zeros((1, 8, DIM)), ctx, state))
    assert has_fft(ctx, None)
    assert not has_fft(ctx.replace(packed=True), None)
    assert not has_fft(ctx, state)


def test_modes_are_the_published():
    """S4D, section 4, N = 8: Lin, Inv and Real."""
    real, imaginary = continuous_modes("lin", 4)
    np.testing.assert_allclose((real, imaginary), ([-0.5] * 4, np.pi * np.arange(4)))
    real, imaginary = continuous_modes("inv", 4)
    np.testing.assert_allclose((real, imaginary), ([-0.5] * 4, 8 / np.pi * np.array([7, 5 / 3, 3 / 5, 1 / 7])))
    np.testing.assert_allclose(continuous_modes("real", 4), ([-1, -2, -3, -4], np.zeros(4)))


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("step", [1e-4, 0.1, 3.0])
def test_discretization(rule, step):
    a = np.array([[-0.5 + 0.01j, -2 + 30j, -1e-3 + 0j]])
    decay, inputs = discretize((jnp.asarray(a.real), jnp.asarray(a.imag)), jnp.array([step]), rule)
    if rule == "zoh":
        expected = np.exp(step * a), np.expm1(step * a) / a
    else:
        expected = (1 + step * a / 2) / (1 - step * a / 2), step / (1 - step * a / 2)
    for (real, imaginary), value in zip((decay, inputs), expected):
        np.testing.assert_allclose(real + 1j * np.asarray(imaginary), value, rtol=2e-5)


@pytest.mark.parametrize("state", [2, 16, 64])
def test_legs_is_normal_plus_low_rank(state):
    """The same Markov parameters, from all modes: c A^k b for a c that the change of basis keeps (b itself)."""
    a, b = hippo_legs(state)
    both = lambda x: np.concatenate([x, x.conj()])
    rate, p, b_modes = map(both, normal_plus_low_rank(state))
    assert len(rate) == state
    ours = np.diag(rate) - np.outer(p, p.conj())
    for k in range(5):
        expected = b @ np.linalg.matrix_power(a / state, k) @ b
        got = b_modes.conj() @ np.linalg.matrix_power(ours / state, k) @ b_modes
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_s4_begins_as_legs():
    params = init(CONFIGS["S4"])
    rate, p, b = normal_plus_low_rank(16)
    for name, value in {"p": p, "b": b}.items():
        np.testing.assert_allclose(params[f"{name}_real"], np.tile(value.real, (DIM, 1)), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(params[f"{name}_imaginary"], np.tile(value.imag, (DIM, 1)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(-np.exp(params["a_log"]), np.full((DIM, 8), -0.5), rtol=1e-6)
    steps = np.exp(params["log_dt"])
    assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 0.1 * 1.001


@every_config
def test_the_state_does_not_grow(cfg):
    sizes = {mixers.state_bytes(cfg, DIM, length, jnp.float32) for length in (1, 1024, 1 << 20)}
    numbers = {"S4": DIM * 16, "S4d": DIM * 16, "H3": 3 * DIM + 2 * DIM * 8}[type(cfg).__name__]
    assert sizes == {4 * numbers}


@pytest.mark.slow
@every_config
@pytest.mark.parametrize("packed", [False, True])
def test_8192_tokens_are_finite_in_bfloat16(cfg, packed):
    matrices = ("output", "output_gate", "query", "key", "value")
    params = {name: value.astype(jnp.bfloat16) if name in matrices else value for name, value in init(cfg).items()}
    x = jnp.asarray(random(1, 8192, DIM) * 4, jnp.bfloat16)
    y, _, _ = jax.jit(apply, static_argnums=0)(cfg, params, x, one_document(1, 8192).replace(packed=packed))
    y = np.asarray(y, np.float32)
    assert np.isfinite(y).all() and y.std() > 1e-3


def test_bad_input():
    with pytest.raises(InputError, match="dt_min"):
        S4(dt_min=1.0)
    for kind in (S4, S4d, H3):
        with pytest.raises(InputError, match="odd"):
            kind(state=3)
    assert S4d(state=3, init="real").modes == 3
    with pytest.raises(InputError, match="head_dim"):
        H3(head_dim=3).check(DIM)
