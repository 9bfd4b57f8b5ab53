"""RWKV-4's WKV over packed rows: the definition, a form with all tokens at once, and the TPU's kernels.

`reference` is the definition. Every other row of IMPLEMENTATIONS gives the same values and gradients: the
tests hold all of them to one float64 oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import chunks, wkv_pallas
from kernels.lowering import by_platform

CHUNK = 64  # tokens of `sequential` and `pallas` whose sums are alive at one time
NOTHING = -1e38  # exponent of an empty sum: finite, so that the difference of two is no NaN


class Sums(NamedTuple):
    """Two weighted sums, numerator * exp(exponent) and denominator * exp(exponent); float32, of one shape."""

    numerator: jax.Array
    denominator: jax.Array
    exponent: jax.Array


def empty(shape: tuple[int, ...]) -> Sums:
    return Sums(jnp.zeros(shape), jnp.zeros(shape), jnp.full(shape, NOTHING))


def add(first: Sums, second: Sums) -> Sums:
    """Their sum. The exponent only keeps numbers small: no derivative goes through it."""
    top = jax.lax.stop_gradient(jnp.maximum(first.exponent, second.exponent))
    one, two = jnp.exp(first.exponent - top), jnp.exp(second.exponent - top)
    return Sums(
        one * first.numerator + two * second.numerator, one * first.denominator + two * second.denominator, top
    )


def weighted(exponent: jax.Array, value: jax.Array) -> Sums:
    """The sum of one value of weight exp(exponent)."""
    top = jax.lax.stop_gradient(exponent)
    one = jnp.exp(exponent - top)
    return Sums(one * value, one, top)


def choose(condition: jax.Array, yes: Sums, no: Sums) -> Sums:
    """By a condition that broadcasts against them."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def decayed(sums: Sums, log_decay: jax.Array) -> Sums:
    return sums._replace(exponent=sums.exponent + log_decay)


def read(before: Sums, bonus_N: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The mean of v over the document so far; the token itself has the weight exp(bonus + k)."""
    total = add(before, weighted(bonus_N + k, v))
    return total.numerator / total.denominator


def step(sums: Sums, k, v, decay, bonus, valid, reset) -> tuple[Sums, jax.Array]:
    """One token of each of these channels: (the sums after it, y). `valid` and `reset` broadcast against k."""
    sums = choose(reset, empty(k.shape), sums)
    return choose(valid, add(decayed(sums, -decay), weighted(k, v)), sums), read(sums, bonus, k, v)


def reference(k_BxLxN, v_BxLxN, decay_N, bonus_N, valid_BxL, reset_BxL, state: Sums) -> tuple[jax.Array, Sums]:
    """The definition, one token after another. All float32."""

    def token(state, token):
        k_BxN, v_BxN, valid_Bx1, reset_Bx1 = token
        return step(state, k_BxN, v_BxN, decay_N, bonus_N, valid_Bx1, reset_Bx1)

    tokens = (k_BxLxN, v_BxLxN, valid_BxL[..., None], reset_BxL[..., None])
    state, y_LxBxN = jax.lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(y_LxBxN, 0, 1), state


def associative(k_BxLxN, v_BxLxN, decay_N, bonus_N, valid_BxL, reset_BxL, state: Sums) -> tuple[jax.Array, Sums]:
    """`reference` by an associative scan over (log decay, sums): of two stretches the first one's sums are decayed by the
    second one's decay, which is minus infinity where a document begins: nothing is left of what was before, by no bit."""

    def join(first, second):
        (first_decay, first_sums), (second_decay, second_sums) = first, second
        return first_decay + second_decay, add(decayed(first_sums, second_decay), second_sums)

    valid_BxLx1, reset_BxLx1 = valid_BxL[..., None], reset_BxL[..., None]
    decay_BxLxN = jnp.where(reset_BxLx1, -jnp.inf, jnp.where(valid_BxLx1, -decay_N, 0.0))
    sums_BxLxN = choose(valid_BxLx1, weighted(k_BxLxN, v_BxLxN), empty(k_BxLxN.shape))
    decay_BxLxN, sums_BxLxN = jax.lax.associative_scan(join, (decay_BxLxN, sums_BxLxN), axis=1)
    state_Bx1xN = jax.tree.map(lambda x: x[:, None], state)
    after_BxLxN = add(decayed(state_Bx1xN, decay_BxLxN), sums_BxLxN)
    before_BxLxN = jax.tree.map(lambda one, all: jnp.concatenate([one, all[:, :-1]], axis=1), state_Bx1xN, after_BxLxN)
    before_BxLxN = choose(reset_BxLx1, empty(k_BxLxN.shape), before_BxLxN)
    return read(before_BxLxN, bonus_N, k_BxLxN, v_BxLxN), jax.tree.map(lambda x: x[:, -1], after_BxLxN)


def sequential(k_BxLxN, v_BxLxN, decay_N, bonus_N, valid_BxL, reset_BxL, state: Sums) -> tuple[jax.Array, Sums]:
    """`reference`, whose backward pass keeps the inputs and the sums before each chunk, and makes a chunk's sums again."""

    def chunk(state, k_BxQxN, v_BxQxN, valid_BxQ, reset_BxQ):
        return reference(k_BxQxN, v_BxQxN, decay_N, bonus_N, valid_BxQ, reset_BxQ, state)

    return chunks.one_by_one(chunk, state, (k_BxLxN, v_BxLxN, valid_BxL, reset_BxL), CHUNK)


def pallas(*operands) -> tuple[jax.Array, Sums]:
    """The TPU's kernels; arguments and result as of `reference`."""
    return wkv_pallas.pallas(step, *operands, CHUNK)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, Sums]]] = {
    "reference": reference,
    "associative": associative,
    "sequential": sequential,
    "pallas": pallas,
}


def wkv(
    k_BxLxN: jax.Array,
    v_BxLxN: jax.Array,
    decay_N: jax.Array,
    bonus_N: jax.Array,
    *,
    positions_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    state: Sums | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Sums]:
    """A running mean of v, weighted by exp(k) and by age, channel by channel: (y_BxLxN in v's dtype, the new sums).

        y[t] = (sum over s < t of exp(-(t-1-s) decay + k[s]) v[s]  +  exp(bonus + k[t]) v[t]) / (the same without v)

    over the tokens s of t's own document: position 0 begins anew; padding (segment 0) isn't counted, leaves the sums as
    they are, bit by bit, and its y means nothing. Sums are float32 and can't overflow, however large k is.

    Args:
      k_BxLxN, v_BxLxN: floating.
      decay_N: above 0 (transformers' exp(time_decay)); bonus_N: its time_first.
      positions_BxL, segment_ids_BxL: int32, positions from 0 in each document; segment 0 is padding.
      state: the sums before the first token, each (B, N); None: empty.
      implementation: a key of IMPLEMENTATIONS; None: `reference` for one token, else `pallas` where the program is lowered for
        a TPU, `sequential` for a CPU (all tokens at once only cost it memory) and `associative` elsewhere. A TPU's kernel
        runs elsewhere only within `pltpu.force_tpu_interpret_mode`.

    Raises:
      ValueError: shapes that don't fit, an unknown implementation.

    Source: Peng et al. 2023 (RWKV), eq. 16; its RNN form, with the exponents kept apart, is in their appendix.
    """
    B, L, N = k_BxLxN.shape
    given = {
        "v_BxLxN": (v_BxLxN, (B, L, N)), "decay_N": (decay_N, (N,)), "bonus_N": (bonus_N, (N,)),
        "positions_BxL": (positions_BxL, (B, L)), "segment_ids_BxL": (segment_ids_BxL, (B, L)),
    }  # fmt: skip
    given |= {} if state is None else {f"state.{name}": (x, (B, N)) for name, x in state._asdict().items()}
    for name, (array, shape) in given.items():
        if array.shape != shape:
            raise ValueError(f"wkv: {name} has shape {array.shape}, not {shape}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"wkv: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    valid_BxL = segment_ids_BxL != 0
    reset_BxL = valid_BxL & (positions_BxL == 0)
    state = empty((B, N)) if state is None else state
    k, v, decay, bonus = (x.astype(jnp.float32) for x in (k_BxLxN, v_BxLxN, decay_N, bonus_N))
    operands = (k, v, decay, bonus, valid_BxL, reset_BxL, state)
    if implementation is None and L > 1:
        y_BxLxN, state = by_platform(*operands, tpu=pallas, cpu=sequential, otherwise=associative)
    else:
        y_BxLxN, state = IMPLEMENTATIONS[implementation or "reference"](*operands)
    return y_BxLxN.astype(v_BxLxN.dtype), state
