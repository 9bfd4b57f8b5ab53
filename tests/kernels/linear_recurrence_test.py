"""Every implementation of the linear recurrence against one plain float64 oracle."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from kernels.linear_recurrence import IMPLEMENTATIONS, linear_recurrence
from tests.kernels.recurrences import LAYOUTS, MANY, Problem, check

N = 3


def document(tokens: dict, weights: dict, state: dict | None) -> tuple[np.ndarray, dict]:
    h = np.zeros(N) if state is None else state["h"]
    y = np.zeros_like(tokens["x"])
    for t in range(len(y)):
        # A document's first token doesn't look back: its own a is not used.
        h = tokens["x"][t] if t == 0 and state is None else tokens["a"][t] * h + tokens["x"][t]
        y[t] = h
    return y, {"h": h}


def make(layout=MANY, continues=False) -> Problem:
    random = np.random.default_rng(0)
    B, L = layout.segment_ids_BxL.shape
    tokens = {
        "a": random.uniform(size=(B, L, N)).astype(np.float32) ** 0.2,
        "x": random.normal(size=(B, L, N)).astype(np.float32),
    }
    return Problem(tokens, {}, {"h": random.normal(size=(B, N)).astype(np.float32)}, layout, continues)


def run(tokens, weights, state, positions_BxL, segment_ids_BxL, implementation=None):
    h, after = linear_recurrence(
        tokens["a"], tokens["x"], positions_BxL=positions_BxL, segment_ids_BxL=segment_ids_BxL,
        state_BxN=state["h"], implementation=implementation,
    )  # fmt: skip
    return h, {"h": after}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_oracle(layout, implementation):
    problem = make(LAYOUTS[layout], continues=layout != "one chunk")
    check(functools.partial(run, implementation=implementation), document, problem)


BAD = {
    "no such implementation": (dict(implementation="fast"), "reference, associative"),
    "inputs of another width": (dict(x=np.ones((3, 23, 4))), "x_BxLxN"),
    "state of another batch": (dict(h=np.ones((1, N))), "state_BxN"),
}


@pytest.mark.parametrize("change, words", BAD.values(), ids=BAD)
def test_what_it_refuses(change, words):
    problem = make()
    tokens, state = ({**old, **{name: x for name, x in change.items() if name in old}}
                     for old in (problem.tokens, problem.state))  # fmt: skip
    implementation = change["implementation"] if "implementation" in change else None
    with pytest.raises(ValueError, match=words):
        run(tokens, {}, state, problem.positions_BxL, MANY.segment_ids_BxL, implementation)
