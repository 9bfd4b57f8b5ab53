"""Holds a recurrence over packed rows to a float64 oracle that knows one document alone: values, state, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.harness import QUICK, Layout

# Odd lengths, several documents within a chunk of 4, one over many chunks, documents of one token, padding inside a
# document, at its end, at the row's ends, and a row of nothing else.
MANY = Layout(
    (
        ((1, 3), (2, 1), (3, 1), (4, 14), (0, 2), (4, 2)),
        ((0, 1), (1, 7), (0, 3), (1, 2), (2, 5), (0, 5)),
        ((0, 23),),
    )
)
LAYOUTS = {"many documents": MANY, "one token": Layout((((1, 1),), ((0, 1),))), "one chunk": Layout((((1, 4),),))}

# (what each token has, what they share, the state before) -> (y, the state after), all of one document, float64
Document = Callable[[dict, dict, dict], tuple[np.ndarray, dict]]


@dataclass(frozen=True)
class Problem:
    """float32 arrays by name. tokens: (B, L, ...); weights: shared by all; state: (B, ...), as after a document that the
    first one of each row continues if `continues`, else starts afresh."""

    tokens: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    layout: Layout
    continues: bool

    @property
    def positions_BxL(self) -> np.ndarray:
        positions = self.layout.positions_BxL.copy()
        if self.continues:
            positions[self.layout.segment_ids_BxL == 1] += 5
        return positions


def oracle(document: Document, problem: Problem) -> tuple[np.ndarray, dict]:
    """One document after the other, cut out of its row; y is 0 in the padding."""
    segments_BxL, y, states = problem.layout.segment_ids_BxL, None, []
    for b, segments_L in enumerate(segments_BxL):
        state = {name: x[b] for name, x in problem.state.items()}
        for segment in sorted(set(segments_L) - {0}):
            where = np.nonzero(segments_L == segment)[0]
            fresh = problem.positions_BxL[b, where[0]] == 0
            before = None if fresh else state
            tokens = {name: x[b, where] for name, x in problem.tokens.items()}
            out, state = document(tokens, problem.weights, before)
            if y is None:
                y = np.zeros((*segments_BxL.shape, *out.shape[1:]), np.float64)
            y[b, where] = out
        states.append(state)
    assert y is not None
    return y, {name: np.stack([state[name] for state in states]) for name in states[0]}


def check(
    kernel: Callable[..., tuple[jax.Array, dict]], document: Document, problem: Problem, tolerance: float = 2e-5
) -> None:
    """kernel(tokens, weights, state, positions_BxL, segment_ids_BxL) -> (y, state); its values are the oracle's, and its
    gradients have the oracle's slopes (central differences in float64) along random directions."""
    random = np.random.default_rng(1)
    double = lambda tree: {name: x.astype(np.float64) for name, x in tree.items()}
    exact = replace(problem, tokens=double(problem.tokens), weights=double(problem.weights), state=double(problem.state))
    y, state = oracle(document, exact)
    valid = problem.layout.segment_ids_BxL != 0
    cotangent = random.normal(size=y.shape) * valid.reshape(*valid.shape, *(1,) * (y.ndim - 2))
    state_cotangent = {name: random.normal(size=x.shape) for name, x in state.items()}

    def total(y, state):
        return (y * cotangent).sum() + sum((state[name] * state_cotangent[name]).sum() for name in state)

    def run(groups):
        out, after = kernel(*groups, problem.positions_BxL, problem.layout.segment_ids_BxL)
        return total(jnp.where(cotangent != 0, out, 0.0), after), (out, after)

    groups = (problem.tokens, problem.weights, problem.state)
    gradients, (out, after) = jax.jit(jax.grad(run, has_aux=True), compiler_options=QUICK)(jax.tree.map(jnp.asarray, groups))
    assert_near(np.asarray(out)[valid], y[valid], tolerance, "y")
    for name in state:
        assert_near(after[name], state[name], tolerance, f"state {name}")

    step = 1e-6
    for kind, group in zip(("tokens", "weights", "state"), gradients):
        for name, gradient in group.items():
            value = getattr(exact, kind)[name]
            for direction in random.normal(size=(3, *value.shape)):
                ends = []
                for sign in (1, -1):
                    moved = {**getattr(exact, kind), name: value + sign * step * direction}
                    ends.append(total(*oracle(document, replace(exact, **{kind: moved}))))
                slope = (ends[0] - ends[1]) / (2 * step)
                size = max(1.0, float(np.linalg.norm(gradient)))
                error = abs(float((np.asarray(gradient, np.float64) * direction).sum()) - slope)
                assert error <= 5 * tolerance * size, f"gradient of {name}: off by {error} of {size}"


def assert_near(actual, expected, tolerance: float, what: str) -> None:
    size = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    np.testing.assert_allclose(np.asarray(actual) / size, expected / size, rtol=0, atol=tolerance, err_msg=what)
