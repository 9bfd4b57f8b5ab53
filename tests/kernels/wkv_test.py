"""Every implementation of WKV against one plain float64 oracle, and against transformers'."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import wkv as module
from kernels.wkv import IMPLEMENTATIONS, NOTHING, Sums, wkv
from tests.kernels.recurrences import LAYOUTS, MANY, Problem, check
from tests.models.harness import QUICK, Layout

N = 3


def document(tokens: dict, weights: dict, state: dict | None) -> tuple[np.ndarray, dict]:
    """The two sums as they are written, without exponents kept apart."""
    k, v = tokens["k"], tokens["v"]
    decay, bonus = weights["decay"], weights["bonus"]
    over, under = np.zeros(k.shape[1]), np.zeros(k.shape[1])
    if state is not None:
        over = state["numerator"] * np.exp(state["exponent"])
        under = state["denominator"] * np.exp(state["exponent"])
    y = np.zeros_like(k)
    for t in range(len(k)):
        own = np.exp(bonus + k[t])
        y[t] = (over + own * v[t]) / (under + own)
        over = np.exp(-decay) * over + np.exp(k[t]) * v[t]
        under = np.exp(-decay) * under + np.exp(k[t])
    return y, {"mean": over / under, "log": np.log(under)}


def make(layout: Layout = MANY, continues: bool = False, size: float = 1.0) -> Problem:
    random = np.random.default_rng(0)
    B, L = layout.segment_ids_BxL.shape
    tokens = {"k": size * random.normal(size=(B, L, N)), "v": random.normal(size=(B, L, N))}
    weights = {"decay": np.array([0.01, 0.5, 3.0]), "bonus": random.normal(size=N)}
    state = {"numerator": random.normal(size=(B, N)), "denominator": 1 + random.uniform(size=(B, N)),
             "exponent": random.normal(size=(B, N))}  # fmt: skip
    to32 = lambda tree: {name: x.astype(np.float32) for name, x in tree.items()}
    return Problem(to32(tokens), to32(weights), to32(state), layout, continues)


def run(tokens, weights, state, positions_BxL, segment_ids_BxL, implementation=None):
    y, after = wkv(
        tokens["k"], tokens["v"], weights["decay"], weights["bonus"], positions_BxL=positions_BxL,
        segment_ids_BxL=segment_ids_BxL, state=Sums(**state), implementation=implementation,
    )  # fmt: skip
    return y, {"mean": after.numerator / after.denominator, "log": jnp.log(after.denominator) + after.exponent}


def sums_of(problem: Problem, implementation: str) -> tuple[jax.Array, Sums]:
    """y and the sums themselves, whose exponents `run` takes away."""
    ids = dict(positions_BxL=problem.positions_BxL, segment_ids_BxL=problem.layout.segment_ids_BxL)
    fn = functools.partial(wkv, **ids, implementation=implementation)
    arrays = (*problem.tokens.values(), *problem.weights.values())
    return jax.jit(fn, compiler_options=QUICK)(*arrays, state=Sums(**problem.state))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_oracle(layout, implementation, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    rows = LAYOUTS[layout].rows
    written = Layout(tuple(row for row in rows if any(segment for segment, _ in row)))  # else there is no mean
    problem = make(written, continues=layout != "one chunk", size=3.0)
    check(functools.partial(run, implementation=implementation), document, problem)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_alone_changes_no_bit(implementation):
    problem = make(Layout((((0, 5),),) * 2))
    _, after = sums_of(problem, implementation)
    for name, value in after._asdict().items():
        np.testing.assert_array_equal(value, problem.state[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_huge_keys_stay_finite(implementation, dtype):
    """Keys of a thousand, whose exponentials are beyond float32: the largest one's value is what is read."""
    problem = make(Layout((((1, 12), (2, 9)),)), size=1000.0)
    tokens = {name: jnp.asarray(x, dtype) for name, x in problem.tokens.items()}
    state = {**problem.state, "exponent": np.full((1, N), NOTHING, np.float32)}

    def loss(tokens):
        y, _ = run(tokens, problem.weights, state, problem.positions_BxL, problem.layout.segment_ids_BxL, implementation)
        return jnp.sum(y.astype(jnp.float32)), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(tokens)
    assert all(bool(jnp.all(jnp.isfinite(x.astype(jnp.float32)))) for x in (y, *grads.values())) and y.dtype == dtype
    assert float(jnp.max(jnp.abs(y.astype(jnp.float32)))) <= float(jnp.max(jnp.abs(tokens["v"].astype(jnp.float32))))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transformers_wkv(implementation):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    problem = make(Layout((((1, 13),),) * 2), continues=True)
    log_decay = np.log(problem.weights["decay"])
    state = [torch.tensor(problem.state[name]) for name in ("numerator", "denominator", "exponent")]
    y, after = theirs.rwkv_linear_attention_cpu(
        *(torch.tensor(x) for x in (log_decay, problem.weights["bonus"], problem.tokens["k"], problem.tokens["v"])), state
    )
    got, sums = sums_of(problem, implementation)
    np.testing.assert_allclose(got, y.numpy(), rtol=0, atol=1e-5)
    for ours, value in zip(sums, after):
        np.testing.assert_allclose(ours, value.numpy(), rtol=1e-5, atol=1e-5)


BAD = {
    "no such implementation": (dict(implementation="fast"), "reference, associative"),
    "values of another width": (dict(v=np.ones((3, 23, 4))), "v_BxLxN"),
    "state of another batch": (dict(numerator=np.ones((1, N))), "state.numerator"),
}


@pytest.mark.parametrize("change, words", BAD.values(), ids=BAD)
def test_what_it_refuses(change, words):
    problem = make()
    groups = [{**old, **{name: x for name, x in change.items() if name in old}}
              for old in (problem.tokens, problem.weights, problem.state)]  # fmt: skip
    implementation = change["implementation"] if "implementation" in change else None
    with pytest.raises(ValueError, match=words):
        run(*groups, problem.positions_BxL, MANY.segment_ids_BxL, implementation)
