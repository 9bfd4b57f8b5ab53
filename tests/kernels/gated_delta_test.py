"""Every implementation of the gated delta rule against one plain float64 oracle, and against transformers'."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gated_delta import IMPLEMENTATIONS, gated_delta
from tests.kernels.recurrences import LAYOUTS, MANY, Problem, check

HEADS, KEY, VALUE = 2, 3, 5


def document(tokens: dict, weights: dict, state: dict | None) -> tuple[np.ndarray, dict]:
    """Eq. 10 of the paper, one head and one token at a time: S <- S a (1 - b k k') + b v k'."""
    length, heads, key = tokens["q"].shape
    y = np.zeros((length, heads, tokens["v"].shape[-1]))
    after = np.zeros((heads, key, y.shape[-1]))
    for h in range(heads):
        S = np.zeros((y.shape[-1], key)) if state is None else state["S"][h].T
        for t in range(length):
            q, k, v, a = (tokens[name][t, h] for name in ("q", "k", "v", "log_decay"))
            if "write" in tokens:
                b = tokens["write"][t, h]
                S = S @ (np.exp(a) * (np.eye(key) - b * np.outer(k, k))) + b * np.outer(v, k)
            else:
                S = np.exp(a) * S + np.outer(v, k)
            y[t, h] = S @ q
        after[h] = S.T
    return y, {"S": after}


def make(layout=MANY, write=True, continues=False, heads=HEADS, key=KEY, value=VALUE) -> Problem:
    random = np.random.default_rng(0)
    B, L = layout.segment_ids_BxL.shape
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    tokens = {
        "q": random.normal(size=(B, L, heads, key)),
        "k": unit(random.normal(size=(B, L, heads, key))),
        "v": random.normal(size=(B, L, heads, value)),
        "log_decay": -3 * random.uniform(size=(B, L, heads)) ** 2,
    }
    if write:
        tokens["write"] = 1.5 * random.uniform(size=(B, L, heads))
    state = {"S": random.normal(size=(B, heads, key, value))}
    to32 = lambda tree: {name: x.astype(np.float32) for name, x in tree.items()}
    return Problem(to32(tokens), {}, to32(state), layout, continues)


def run(tokens, weights, state, positions_BxL, segment_ids_BxL, implementation=None, chunk=4):
    write = tokens["write"] if "write" in tokens else None
    y, after = gated_delta(
        tokens["q"], tokens["k"], tokens["v"], tokens["log_decay"], write, positions_BxL=positions_BxL,
        segment_ids_BxL=segment_ids_BxL, state_BxHxKxV=state["S"], chunk=chunk, implementation=implementation,
    )  # fmt: skip
    return y, {"S": after}


@pytest.mark.parametrize(
    "layout, write, implementation",
    [(layout, write, name) for layout in LAYOUTS for write in (True, False) for name in IMPLEMENTATIONS if name != "pallas"]
    + [pytest.param("many documents", write, "pallas", marks=pytest.mark.slow) for write in (True, False)],
)
def test_matches_the_oracle(layout, write, implementation):
    problem = make(LAYOUTS[layout], write, continues=layout != "one chunk")
    check(functools.partial(run, implementation=implementation), document, problem)


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_repeated_keys_keep_their_digits(implementation):
    """One key for 64 tokens, written in full without decay: an inverse by powers of the matrix would overflow."""
    problem = make(LAYOUTS["one chunk"])
    tokens = {name: np.repeat(x[:, :1], 64, axis=1) for name, x in problem.tokens.items()}
    tokens["v"] = np.random.default_rng(3).normal(size=tokens["v"].shape).astype(np.float32)
    tokens["write"], tokens["log_decay"] = np.ones_like(tokens["write"]), np.zeros_like(tokens["log_decay"])
    ones = np.ones((1, 64), np.int32)
    y, _ = jax.jit(functools.partial(run, implementation=implementation, chunk=64))(tokens, {}, problem.state, ones, ones)
    projection = np.einsum("blhk,blhk->blh", tokens["q"], tokens["k"])[..., None]
    other = np.einsum("blhk,bhkv->blhv", tokens["q"], problem.state["S"])
    other -= projection * np.einsum("blhk,bhkv->blhv", tokens["k"], problem.state["S"])
    np.testing.assert_allclose(y, other + projection * tokens["v"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("write", [True, False], ids=["delta", "linear"])
def test_chunks_of_the_default_size_in_bfloat16(write):
    """300 tokens: five chunks of 64. bfloat16 rounds the arguments and the result only."""
    layout = type(MANY)((((1, 100), (2, 200)), ((1, 300),)))
    problem = make(layout, write, key=16, value=16)
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), problem.tokens)
    ids = problem.positions_BxL, layout.segment_ids_BxL
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    expected, _ = jax.jit(functools.partial(run, implementation="reference"))(exact, {}, problem.state, *ids)
    y, state = jax.jit(functools.partial(run, chunk=64))(rounded, {}, problem.state, *ids)
    assert y.dtype == jnp.bfloat16 and state["S"].dtype == jnp.float32
    size = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-7, atol=2**-12 * size)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "pallas"])
def test_transformers_gated_delta_rule(implementation):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    layout = type(MANY)((((1, 13),), ((1, 13),)))
    problem = make(layout, continues=True, key=8, value=6)
    arrays = [torch.tensor(problem.tokens[name]) for name in ("q", "k", "v", "log_decay", "write")]
    options = dict(initial_state=torch.tensor(problem.state["S"]), output_final_state=True)
    y, state = theirs.torch_recurrent_gated_delta_rule(*arrays, **options)
    got, after = jax.jit(functools.partial(run, implementation=implementation))(
        {**problem.tokens, "q": problem.tokens["q"] * 8**-0.5}, {}, problem.state, problem.positions_BxL,
        layout.segment_ids_BxL,
    )  # fmt: skip
    np.testing.assert_allclose(got, y.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(after["S"], state.numpy(), rtol=0, atol=1e-5)


BAD = {
    "no such implementation": (dict(implementation="fast"), "reference, chunked"),
    "chunk 0": (dict(chunk=0), "chunk 0"),
    "keys of another width": (dict(k=np.ones((3, 23, 2, 4))), "k_BxLxHxK"),
    "state of another width": (dict(S=np.ones((3, 2, 3, 4))), "state_BxHxKxV"),
}


@pytest.mark.parametrize("change, words", BAD.values(), ids=BAD)
def test_what_it_refuses(change, words):
    problem = make()
    tokens = {**problem.tokens, **{name: x for name, x in change.items() if name in problem.tokens}}
    state = {**problem.state, **{name: x for name, x in change.items() if name in problem.state}}
    options = {name: x for name, x in change.items() if name in ("implementation", "chunk")}
    with pytest.raises(ValueError, match=words) as error:
        run(tokens, {}, state, problem.positions_BxL, MANY.segment_ids_BxL, **options)
    assert "\n" not in str(error.value)
