"""`linear` and its hand-made gradients against float64, and that the wider side is never transposed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.linear import linear

SHAPES = {"wider": ((2, 5), 3, 7), "narrower": ((2, 5), 7, 3), "square": ((4,), 5, 5), "one token": ((1, 1), 4, 6)}


@pytest.mark.parametrize("tokens, inputs, outputs", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(tokens, inputs, outputs):
    rng = np.random.default_rng(0)
    x, w, d = rng.normal(size=(*tokens, inputs)), rng.normal(size=(inputs, outputs)), rng.normal(size=(*tokens, outputs))
    y, pull = jax.vjp(linear, jnp.float32(x), jnp.float32(w))
    dx, dw = pull(jnp.float32(d))
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, d @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.reshape(-1, inputs).T @ d.reshape(-1, outputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs, outputs", [(8, 64), (64, 8)])
def test_the_narrow_side_comes_first(inputs, outputs):
    """The left operand of the weight's gradient is what a CPU copies into another layout."""
    x, w = jnp.ones((32, inputs)), jnp.ones((inputs, outputs))
    jaxpr = jax.make_jaxpr(lambda x, w, d: jax.vjp(linear, x, w)[1](d)[1])(x, w, jnp.ones((32, outputs)))
    products = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    over_tokens = [eqn for eqn in products if eqn.params["dimension_numbers"][0] == ((0,), (0,))]
    assert len(over_tokens) == 1 and over_tokens[0].invars[0].aval.shape == (32, min(inputs, outputs))


def test_mixed_dtypes_keep_their_gradients_dtypes():
    x, w = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((4, 2), jnp.float32)
    y, pull = jax.vjp(linear, x, w)
    dx, dw = pull(y)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
