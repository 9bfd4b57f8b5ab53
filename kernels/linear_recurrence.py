"""A diagonal linear recurrence over packed rows, h <- a h + x: the definition, and a form with all tokens at once.

`reference` is the definition. Every other row of IMPLEMENTATIONS gives the same values and gradients: the
tests hold all of them to one float64 oracle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.lowering import by_platform
from kernels.varying import vary_alike


def reference(a_BxLxN: jax.Array, x_BxLxN: jax.Array, state_BxN: jax.Array) -> jax.Array:
    """The definition, one token after another: h_BxLxN. All float32."""

    def step(h_BxN, token):
        a_BxN, x_BxN = token
        h_BxN = a_BxN * h_BxN + x_BxN
        return h_BxN, h_BxN

    _, h_LxBxN = jax.lax.scan(step, state_BxN, (jnp.moveaxis(a_BxLxN, 1, 0), jnp.moveaxis(x_BxLxN, 1, 0)))
    return jnp.moveaxis(h_LxBxN, 0, 1)


@jax.custom_vjp
def associative(a_BxLxN: jax.Array, x_BxLxN: jax.Array, state_BxN: jax.Array) -> jax.Array:
    """`reference` by an associative scan. a = 0 where a document begins: nothing of what was before is left in any sum.

    The derivative is the same recurrence from the end, g[t] = dh[t] + a[t+1] g[t+1] (Martin and Cundy 2018): it
    keeps a and h, and not the sums of every level of the scan.
    """
    return _sums(a_BxLxN, x_BxLxN.at[:, 0].add(a_BxLxN[:, 0] * state_BxN))


def _sums(a_BxLxN: jax.Array, x_BxLxN: jax.Array, reverse: bool = False) -> jax.Array:
    def join(first, second):
        (a1, h1), (a2, h2) = first, second
        return a1 * a2, a2 * h1 + h2

    return jax.lax.associative_scan(join, (a_BxLxN, x_BxLxN), axis=1, reverse=reverse)[1]


def _forward(a_BxLxN, x_BxLxN, state_BxN):
    h_BxLxN = associative(a_BxLxN, x_BxLxN, state_BxN)
    return h_BxLxN, (a_BxLxN, h_BxLxN, state_BxN)


def _backward(saved, dh_BxLxN):
    a_BxLxN, h_BxLxN, state_BxN = saved
    after_BxLxN = jnp.concatenate([a_BxLxN[:, 1:], jnp.zeros_like(a_BxLxN[:, :1])], axis=1)
    g_BxLxN = _sums(after_BxLxN, dh_BxLxN, reverse=True)
    before_BxLxN = jnp.concatenate([state_BxN[:, None], h_BxLxN[:, :-1]], axis=1)
    return g_BxLxN * before_BxLxN, g_BxLxN, a_BxLxN[:, 0] * g_BxLxN[:, 0]


associative.defvjp(_forward, _backward)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"reference": reference, "associative": associative}


def linear_recurrence(
    a_BxLxN: jax.Array,
    x_BxLxN: jax.Array,
    *,
    positions_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    state_BxN: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h[t] = a[t] h[t-1] + x[t], channel by channel, within each document: (h_BxLxN, the last h_BxN), both float32.

    Position 0 clears h first; padding (segment 0) leaves it as it is, bit by bit.

    Args:
      a_BxLxN: 0 to 1. x_BxLxN: floating.
      positions_BxL, segment_ids_BxL: int32, positions from 0 in each document; segment 0 is padding.
      state_BxN: h before the first token; None: 0.
      implementation: a key of IMPLEMENTATIONS; None: `reference` for one token, and where the program is lowered for a CPU
        (it goes over memory once, an associative scan once a level); `associative` elsewhere.

    Raises:
      ValueError: shapes that don't fit, an unknown implementation.

    Sources: Blelloch 1990 (scans); Martin and Cundy 2018 (linear recurrences by scans).
    """
    B, L, N = a_BxLxN.shape
    given = {
        "x_BxLxN": (x_BxLxN, (B, L, N)), "positions_BxL": (positions_BxL, (B, L)),
        "segment_ids_BxL": (segment_ids_BxL, (B, L)), "state_BxN": (state_BxN, (B, N)),
    }  # fmt: skip
    for name, (array, shape) in given.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"linear_recurrence: {name} has shape {array.shape}, not {shape}")
    if implementation is None:
        run = reference if L == 1 else functools.partial(by_platform, cpu=reference, otherwise=associative)
    elif implementation in IMPLEMENTATIONS:
        run = IMPLEMENTATIONS[implementation]
    else:
        raise ValueError(
            f"linear_recurrence: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}"
        )
    valid_BxLx1 = (segment_ids_BxL != 0)[..., None]
    first_BxLx1 = (positions_BxL == 0)[..., None]
    a_BxLxN = jnp.where(valid_BxLx1, jnp.where(first_BxLx1, 0.0, a_BxLxN.astype(jnp.float32)), 1.0)
    x_BxLxN = jnp.where(valid_BxLx1, x_BxLxN.astype(jnp.float32), 0.0)
    state_BxN = jnp.zeros((B, N), jnp.float32) if state_BxN is None else state_BxN.astype(jnp.float32)
    h_BxLxN = run(*vary_alike(a_BxLxN, x_BxLxN, state_BxN))
    return h_BxLxN, h_BxLxN[:, -1]
