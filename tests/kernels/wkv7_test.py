"""Every implementation of RWKV-7's delta rule against one plain float64 oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.wkv7 import IMPLEMENTATIONS, wkv7
from tests.kernels.recurrences import LAYOUTS, MANY, Problem, check
from tests.models.harness import Layout

TOKENS = ("r", "log_decay", "k", "v", "key", "removal")


def document(tokens: dict, weights: dict, state: dict | None) -> tuple[np.ndarray, dict]:
    """As the paper writes it, one head and one token at a time: S <- S (diag(w) - key removal') + v k'; y = S r."""
    length, heads, key = tokens["r"].shape
    y = np.zeros((length, heads, tokens["v"].shape[-1]))
    after = np.zeros((heads, key, y.shape[-1]))
    for h in range(heads):
        S = np.zeros((y.shape[-1], key)) if state is None else state["S"][h].T
        for t in range(length):
            r, log_decay, k, v, found, removed = (tokens[name][t, h] for name in TOKENS)
            S = S @ (np.diag(np.exp(log_decay)) - np.outer(found, removed)) + np.outer(v, k)
            y[t, h] = S @ r
        after[h] = S.T
    return y, {"S": after}


def make(layout: Layout = MANY, continues=False, heads=2, key=3, value=5) -> Problem:
    random = np.random.default_rng(0)
    B, L = layout.segment_ids_BxL.shape
    tokens = {name: random.normal(size=(B, L, heads, value if name == "v" else key)) for name in TOKENS}
    tokens["key"] /= np.linalg.norm(tokens["key"], axis=-1, keepdims=True)
    tokens["removal"] = tokens["key"] * random.uniform(size=tokens["key"].shape)
    tokens["log_decay"] = -0.61 * random.uniform(size=tokens["key"].shape)
    to32 = lambda tree: {name: x.astype(np.float32) for name, x in tree.items()}
    return Problem(to32(tokens), {}, to32({"S": random.normal(size=(B, heads, key, value))}), layout, continues)


def run(tokens, weights, state, positions_BxL, segment_ids_BxL, implementation=None, chunk=4):
    y, after = wkv7(
        *(tokens[name] for name in TOKENS), positions_BxL=positions_BxL, segment_ids_BxL=segment_ids_BxL,
        state_BxHxKxV=state["S"], chunk=chunk, implementation=implementation,
    )  # fmt: skip
    return y, {"S": after}


@pytest.mark.parametrize(
    "layout, implementation",
    [(layout, name) for layout in LAYOUTS for name in IMPLEMENTATIONS if name != "pallas"]
    + [pytest.param("many documents", "pallas", marks=pytest.mark.slow)],
)
def test_matches_the_oracle(layout, implementation):
    problem = make(LAYOUTS[layout], continues=layout != "one chunk")
    check(functools.partial(run, implementation=implementation), document, problem)


def test_chunks_of_the_default_size_in_bfloat16():
    """All channels at the fastest decay that RWKV-7 has, over chunks of 32."""
    layout = Layout((((1, 100), (2, 200)), ((1, 300),)))
    problem = make(layout, key=16, value=16)
    problem.tokens["log_decay"][...] = -np.exp(-0.5)
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), problem.tokens)
    ids = problem.positions_BxL, layout.segment_ids_BxL
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    expected, _ = jax.jit(functools.partial(run, implementation="reference"))(exact, {}, problem.state, *ids)
    y, state = jax.jit(functools.partial(run, chunk=32))(rounded, {}, problem.state, *ids)
    assert y.dtype == jnp.bfloat16 and state["S"].dtype == jnp.float32
    size = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-12 * size)


BAD = {
    "no such implementation": (dict(implementation="fast"), "reference, chunked"),
    "chunk 0": (dict(chunk=0), "chunk 0"),
    "keys of another width": (dict(key=np.ones((3, 23, 2, 4))), "key_BxLxHxK"),
    "state of another width": (dict(S=np.ones((3, 2, 3, 4))), "state_BxHxKxV"),
}


@pytest.mark.parametrize("change, words", BAD.values(), ids=BAD)
def test_what_it_refuses(change, words):
    problem = make()
    tokens, state = ({**old, **{name: x for name, x in change.items() if name in old}}
                     for old in (problem.tokens, problem.state))  # fmt: skip
    options = {name: x for name, x in change.items() if name in ("implementation", "chunk")}
    with pytest.raises(ValueError, match=words):
        run(tokens, {}, state, problem.positions_BxL, MANY.segment_ids_BxL, **options)
