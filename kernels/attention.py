"""Softmax attention over packed, cached and cross contexts: the definition, and a form with linear memory.

`reference` is the definition. Every other row of IMPLEMENTATIONS gives the same values and gradients: the
tests hold all of them to one float64 oracle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels import attention_cudnn, attention_decode_pallas, attention_pallas, attention_ring, attention_triton
from kernels.lowering import by_platform, say_once
from kernels.varying import vary_alike
from kernels.visibility import MASK_KINDS, Context, Rule, visible

QUERY_CHUNK = 256  # queries whose scores are alive at one time in `chunked`
INTERPRET: bool | pltpu.InterpretParams = True  # how `flash` runs where there is no TPU


class Form(NamedTuple):
    """A way to compute attention whose gradient is written by hand.

    forward: (q, k, v, slopes, context, rule) -> (y_BxLxHxV, lse_BxHxL: log of the sum of exp(scores), float32).
    backward: (q, k, v, slopes, context, y, lse, dy, rule) -> (dq, dk, dv, dslopes), in their dtypes.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple]

    def __call__(
        self,
        q_BxLxHxK: jax.Array,
        k_BxSxGxK: jax.Array,
        v_BxSxGxV: jax.Array,
        alibi_slopes_H: jax.Array | None,
        context: Context,
        rule: Rule,
    ) -> jax.Array:
        """Reverse mode keeps the arguments, y and the log-sum-exp; forward mode: `reference`."""

        @jax.custom_vjp
        def run(*arrays):
            return self.forward(*arrays, rule)[0]

        def forward(*arrays):
            y, lse = self.forward(*arrays, rule)
            return y, (*arrays, y, lse)

        def backward(saved, dy):
            return *self.backward(*saved, dy, rule), None

        run.defvjp(forward, backward)
        return run(*vary_alike(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, alibi_slopes_H), context)


def _scores(
    q_BxGxRxLxK: jax.Array, k_BxGxSxK: jax.Array, alibi_slopes_H: jax.Array | None, context: Context, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """(scores_BxGxRxLxS before the mask, float32; seen_Bx1x1xLxS)."""
    scores = jnp.einsum("bgrlk,bgsk->bgrls", q_BxGxRxLxK, k_BxGxSxK, preferred_element_type=jnp.float32)
    scores *= rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    if alibi_slopes_H is not None:
        scores -= _bias(alibi_slopes_H, scores.shape[1:3], context)
    return scores, visible(context, rule)[:, None, None]


def _bias(alibi_slopes_H: jax.Array, heads: tuple[int, int], context: Context) -> jax.Array:
    """slope * distance: bias_BxGxRxLxS. What a causal mask lets through is never negative; elsewhere, later is as far as
    earlier."""
    distance_BxLxS = jnp.abs(context.q_positions_BxL[:, :, None] - context.k_positions_BxS[:, None, :])
    return alibi_slopes_H.astype(jnp.float32).reshape(1, *heads, 1, 1) * distance_BxLxS[:, None, None]


def reference(
    q_BxLxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxV: jax.Array,
    alibi_slopes_H: jax.Array | None,
    context: Context,
    rule: Rule,
) -> jax.Array:
    """The definition, with all B*H*L*S scores in memory. Arguments and result as in `attention`."""
    B, L, H, K = q_BxLxHxK.shape
    G, V = v_BxSxGxV.shape[2:]
    R = H // G  # query heads per key head: grouped-query attention without repeating the keys
    q_BxGxRxLxK = jnp.moveaxis(q_BxLxHxK.reshape(B, L, G, R, K), 1, 3)
    scores_BxGxRxLxS, seen_Bx1x1xLxS = _scores(q_BxGxRxLxK, jnp.moveaxis(k_BxSxGxK, 1, 2), alibi_slopes_H, context, rule)
    # A finite floor, not -inf: a query that sees nothing then has finite weights, which the second `where`
    # makes 0, so that neither its output nor any gradient through it can be NaN.
    floor = jnp.finfo(jnp.float32).min
    weights_BxGxRxLxS = jax.nn.softmax(jnp.where(seen_Bx1x1xLxS, scores_BxGxRxLxS, floor), axis=-1)
    weights_BxGxRxLxS = jnp.where(seen_Bx1x1xLxS, weights_BxGxRxLxS, 0.0)
    y_BxLxGxRxV = jnp.einsum(
        "bgrls,bsgv->blgrv",
        weights_BxGxRxLxS.astype(v_BxSxGxV.dtype),
        v_BxSxGxV,
        preferred_element_type=jnp.float32,
    )
    return y_BxLxGxRxV.reshape(B, L, H, V).astype(q_BxLxHxK.dtype)


class _Chunks:
    """N chunks of C queries, in front; what fills the last one up is segment 0, which sees nothing."""

    def __init__(self, queries: int, heads: int, groups: int):
        self.L, self.H, self.G = queries, heads, groups
        self.C = min(QUERY_CHUNK, queries)

    def split(self, x_BxLx: jax.Array) -> jax.Array:
        x_BxLx = jnp.pad(x_BxLx, [(0, 0), (0, -self.L % self.C)] + [(0, 0)] * (x_BxLx.ndim - 2))
        return jnp.moveaxis(x_BxLx.reshape(x_BxLx.shape[0], -1, self.C, *x_BxLx.shape[2:]), 1, 0)

    def split_heads(self, x_BxLxHxK: jax.Array) -> jax.Array:
        """x_NxBxGxRxCxK: heads in front of the queries, so that every product below is one of plain matrices."""
        B, L, H = x_BxLxHxK.shape[:3]
        x_NxBxCxGxRxK = self.split(x_BxLxHxK.reshape(B, L, self.G, H // self.G, -1))
        return jnp.moveaxis(x_NxBxCxGxRxK, 2, 4)

    def join_heads(self, x_NxBxGxRxCxK: jax.Array) -> jax.Array:
        x_BxNxCxGxRxK = jnp.moveaxis(x_NxBxGxRxCxK, (1, 4), (0, 2))
        return x_BxNxCxGxRxK.reshape(x_BxNxCxGxRxK.shape[0], -1, self.H, x_BxNxCxGxRxK.shape[-1])[:, : self.L]

    def queries(self, context: Context) -> tuple[jax.Array, jax.Array]:
        return self.split(context.q_positions_BxL), self.split(context.q_segment_ids_BxL)


def _own(context: Context, who: Sequence[jax.Array]) -> Context:
    return context._replace(q_positions_BxL=who[0], q_segment_ids_BxL=who[1])


def _chunked_forward(q, k, v, slopes, context: Context, rule: Rule) -> tuple[jax.Array, jax.Array]:
    chunks = _Chunks(*q.shape[1:3], k.shape[2])
    k_BxGxSxK, v_BxGxSxV = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)

    def body(chunk):
        q_BxGxRxCxK, *who = chunk
        scores, seen = _scores(q_BxGxRxCxK, k_BxGxSxK, slopes, _own(context, who), rule)
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        top = jnp.max(scores, axis=-1, keepdims=True)
        # Exactly 0 where masked, but for a query that sees nothing, whose weights are all 1: it is taken out row by row.
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        sees_none = top == jnp.finfo(jnp.float32).min
        y = jnp.einsum("bgrcs,bgsv->bgrcv", weights.astype(v.dtype), v_BxGxSxV, preferred_element_type=jnp.float32)
        y = jnp.where(sees_none, 0.0, y / total)
        return y.astype(q.dtype), top + jnp.where(sees_none, 0.0, jnp.log(total))

    y_NxBxGxRxCxV, lse_NxBxGxRxCx1 = jax.lax.map(body, (chunks.split_heads(q), *chunks.queries(context)))
    lse_BxLxHx1 = chunks.join_heads(lse_NxBxGxRxCx1)
    return chunks.join_heads(y_NxBxGxRxCxV), jnp.swapaxes(lse_BxLxHx1[..., 0], 1, 2)


def _chunked_backward(q, k, v, slopes, context: Context, y_BxLxHxV, lse_BxHxL, dy_BxLxHxV, rule: Rule) -> tuple:
    (B, _, H, K), (S, G, V) = q.shape, v.shape[1:]
    chunks = _Chunks(*q.shape[1:3], G)
    k_BxGxSxK, v_BxGxSxV = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    pulled_BxLxHx1 = jnp.sum(dy_BxLxHxV.astype(jnp.float32) * y_BxLxHxV.astype(jnp.float32), axis=-1, keepdims=True)
    lse_BxLxHx1 = jnp.swapaxes(lse_BxHxL, 1, 2)[..., None]

    def body(sums, chunk):
        q_BxGxRxCxK, dy_BxGxRxCxV, pulled, lse, *who = chunk
        own = _own(context, who)
        scores, seen = _scores(q_BxGxRxCxK, k_BxGxSxK, slopes, own, rule)
        weights = jnp.where(seen, jnp.exp(scores - lse), 0.0)
        dweights = jnp.einsum("bgrcv,bgsv->bgrcs", dy_BxGxRxCxV, v_BxGxSxV, preferred_element_type=jnp.float32)
        dscores = weights * (dweights - pulled)
        dslopes = None
        if slopes is not None:
            distance_BxCxS = jnp.abs(who[0][:, :, None] - context.k_positions_BxS[:, None, :])
            dslopes = -jnp.sum(dscores * distance_BxCxS[:, None, None], axis=(0, 3, 4)).reshape(H)
        if rule.softcap is not None:  # the bias of ALiBi is added after the cap
            capped = scores if slopes is None else scores + _bias(slopes, scores.shape[1:3], own)
            dscores *= 1 - jnp.square(capped / rule.softcap)
        dscores = (dscores * rule.scale).astype(q.dtype)
        dq = jnp.einsum("bgrcs,bgsk->bgrck", dscores, k_BxGxSxK, preferred_element_type=jnp.float32)
        # The narrow side first: its product with the wide one needs no transposed copy of that.
        dk_BxGxKxS = jnp.einsum("bgrck,bgrcs->bgks", q_BxGxRxCxK, dscores, preferred_element_type=jnp.float32)
        dv_BxGxVxS = jnp.einsum("bgrcv,bgrcs->bgvs", dy_BxGxRxCxV, weights.astype(v.dtype),
                                preferred_element_type=jnp.float32)
        return jax.tree.map(jnp.add, sums, [dk_BxGxKxS, dv_BxGxVxS, dslopes]), dq.astype(q.dtype)

    zeros = [jnp.zeros((B, G, K, S), jnp.float32), jnp.zeros((B, G, V, S), jnp.float32),
             None if slopes is None else jnp.zeros(H, jnp.float32)]
    zeros = jax.tree.map(lambda zero: vary_alike(zero, q)[0], zeros)
    split = [chunks.split_heads(x) for x in (q, dy_BxLxHxV, pulled_BxLxHx1, lse_BxLxHx1)]
    (dk_BxGxKxS, dv_BxGxVxS, dslopes), dq = jax.lax.scan(body, zeros, (*split, *chunks.queries(context)))
    dk, dv = jnp.moveaxis(dk_BxGxKxS, 3, 1), jnp.moveaxis(dv_BxGxVxS, 3, 1)
    dslopes = None if slopes is None else dslopes.astype(slopes.dtype)
    return chunks.join_heads(dq), dk.astype(k.dtype), dv.astype(v.dtype), dslopes


# `reference`, for QUERY_CHUNK queries at a time: memory linear in L and in S, forward and backward. The backward pass keeps q,
# k, v, y and each query's log of the sum, and makes each chunk's weights again from them (Dao et al. 2022, appendix B.2); the
# gradients of k, v and the slopes are summed over chunks in float32.
chunked = Form(_chunked_forward, _chunked_backward)


def _by_platform(own: Mapping[str, Form], otherwise: Form) -> Form:
    """Of each platform its own form and of every other `otherwise`: chosen when the program is lowered."""

    def both(part: Callable[[Form], Callable]) -> Callable:
        def run(*arrays_rule):
            *arrays, rule = arrays_rule
            ways = {platform: functools.partial(part(form), rule=rule) for platform, form in own.items()}
            return by_platform(*arrays, **ways, otherwise=functools.partial(part(otherwise), rule=rule))
        return run

    return Form(both(lambda form: form.forward), both(lambda form: form.backward))


def _flash(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array) -> Form | str:
    """The kernels for a TPU, those for few queries where they fit; or why none can serve these shapes and dtypes."""
    if attention_decode_pallas.refusal(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV) is None:
        return Form(attention_decode_pallas.forward, _chunked_backward)
    reason = attention_pallas.refusal(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV)
    return reason or Form(attention_pallas.forward, attention_pallas.backward)


def _triton(q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxV: jax.Array) -> Form | str:
    """The kernels for an NVIDIA GPU, or why they can't serve these shapes and dtypes."""
    reason = attention_triton.refusal(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV)
    return reason or Form(attention_triton.forward, attention_triton.backward)


# The kernels by name: the platform that compiles them, and what gives them, or says why not, for q, k and v.
KERNELS: dict[str, tuple[str, Callable[..., Form | str]]] = {"flash": ("tpu", _flash), "triton": ("cuda", _triton)}


def named_form(name: str, *qkv: jax.Array) -> Form:
    """The kernels `name`; where their platform isn't, interpreted, and slow.

    Raises:
      ValueError: they can't serve these shapes and dtypes.
    """
    platform, kernels = KERNELS[name]
    form = kernels(*qkv)
    if isinstance(form, str):
        raise ValueError(f"attention: {name} can't serve this: {form}")
    interpret = INTERPRET if platform == "tpu" else True
    slow = [run if run is _chunked_backward else functools.partial(run, interpret=interpret) for run in form]
    return _by_platform({platform: form}, Form(*slow))


def _forced(name: str) -> Callable[..., jax.Array]:
    return lambda q, k, v, *rest: named_form(name, q, k, v)(q, k, v, *rest)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference, "chunked": chunked,
    "flash": _forced("flash"),  # attention_pallas.py, attention_decode_pallas.py: for TPUs
    "triton": _forced("triton"),  # attention_triton.py: for NVIDIA GPUs
    "cudnn": attention_cudnn.attend,
}


def default_implementation(*qkv: jax.Array) -> Form:
    """What runs when none is named: `chunked`, on a TPU `flash` and on an NVIDIA GPU `triton`, if they can; the lowering of the
    program decides. A few queries of a cache take `chunked` on a GPU: one program a head would leave most of it idle."""
    own, refusals = {}, {}
    for name, (platform, kernels) in KERNELS.items():
        if name == "triton" and qkv[0].shape[1] < attention_triton.LEAST:
            continue
        form = kernels(*qkv)
        if isinstance(form, str):
            refusals.setdefault(form, []).append(name)
        else:
            own[platform] = form
    for reason, names in refusals.items():
        say_once(f"attention: {' and '.join(names)} can't serve this: {reason}")
    return _by_platform(own, chunked)


def _ring(run: Callable[..., jax.Array], axis_name: attention_ring.AxisName) -> Form:
    if not isinstance(run, Form):
        raise ValueError("attention: the reference or cudnn doesn't go round a ring; implementation='chunked' does")
    return Form(functools.partial(attention_ring.forward, attend=run.forward, axis_name=axis_name),
                functools.partial(attention_ring.backward, pull=run.backward, axis_name=axis_name))


def attention(
    q_BxLxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxV: jax.Array,
    *,
    q_positions_BxL: jax.Array,
    k_positions_BxS: jax.Array,
    q_segment_ids_BxL: jax.Array,
    k_segment_ids_BxS: jax.Array,
    mask_kind: str = "causal",
    k_prefix_BxS: jax.Array | None = None,
    window: int | None = None,
    alibi_slopes_H: jax.Array | None = None,
    softcap: float | None = None,
    scale: float,
    implementation: str | None = None,
    axis_name: attention_ring.AxisName | None = None,
) -> jax.Array:
    """Attention of L queries to S keys: y_BxLxHxV, in q's dtype.

    Serves self attention (packed rows), cached decoding (S cache slots, empty ones of segment 0) and cross
    attention (`bidirectional`, the memory's own segment ids). Scores and softmax are always float32.

        scale * q.k; softcap * tanh(. / softcap); - slope * |q_position - k_position|; mask; softmax; times v

    A key is visible to a query iff both have the same segment, which isn't 0 (padding), and by `mask_kind`:
    `causal`: k_position <= q_position; `bidirectional`: always; `prefix`: k_position <= q_position or
    k_prefix. With a `window`, also q_position - k_position < window (for `bidirectional` its absolute value).
    A query that sees nothing gives exactly 0 and gradients of exactly 0.

    Args:
      q_BxLxHxK, k_BxSxGxK, v_BxSxGxV: floating; H is a multiple of G, and head h reads group h // (H/G).
      q_positions_BxL, k_positions_BxS: int32, from 0 in each document.
      q_segment_ids_BxL, k_segment_ids_BxS: int32, 0 is padding.
      k_prefix_BxS: bool, the key belongs to its document's bidirectional prefix; read for `prefix` only.
      window: in tokens, the query's own included. alibi_slopes_H: positive, differentiable.
      scale: often K**-0.5.
      implementation: a key of IMPLEMENTATIONS; None chooses by shape, dtype and back end.
      axis_name: inside `jax.shard_map`, the mesh axis along which the arguments hold shards of rows: L queries and S keys of
        each device, in any order. Keys go round (attention_ring.py), nothing is gathered. None: rows are whole.

    Raises:
      ValueError: an unknown mask_kind or implementation, shapes that don't fit, a window below 1, a softcap
        not above 0, `prefix` without k_prefix_BxS, or what the named implementation can't serve.

    Sources: scaled dot-product attention: Vaswani et al. 2017, eq. 1. Grouped queries: Ainslie et al. 2023
    (GQA). Prefix: Raffel et al. 2020 (T5), section 3.2.1. ALiBi: Press et al. 2022, section 3. Soft cap:
    Gemma 2, 2024, section 2. Chunks with recomputation: Rabe and Staats 2021.
    """
    B, L, H, K = q_BxLxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    context = Context(q_positions_BxL, k_positions_BxS, q_segment_ids_BxL, k_segment_ids_BxS, k_prefix_BxS)
    if k_BxSxGxK.shape != (B, S, G, K) or v_BxSxGxV.shape[:3] != (B, S, G) or G == 0 or H % G:
        raise ValueError(
            f"attention: q {q_BxLxHxK.shape}, k {k_BxSxGxK.shape}, v {v_BxSxGxV.shape} aren't BxLxHxK, "
            "BxSxGxK, BxSxGxV with H a multiple of G"
        )
    for name, array in context._asdict().items():
        expected = (B, L) if name.endswith("L") else (B, S)
        if array is not None and array.shape != expected:
            raise ValueError(f"attention: {name} has shape {array.shape}, not {expected}")
    if mask_kind not in MASK_KINDS:
        raise ValueError(f"attention: mask_kind {mask_kind!r} is none of {', '.join(MASK_KINDS)}")
    if mask_kind == "prefix" and k_prefix_BxS is None:
        raise ValueError("attention: mask_kind 'prefix' needs k_prefix_BxS")
    if window is not None and window < 1:
        raise ValueError(f"attention: window {window} is below 1; a query sees itself")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap {softcap} isn't above 0; None turns it off")
    if alibi_slopes_H is not None and alibi_slopes_H.shape != (H,):
        raise ValueError(f"attention: alibi_slopes_H has shape {alibi_slopes_H.shape}, not {(H,)}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention: implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    arrays = (q_BxLxHxK, k_BxSxGxK, v_BxSxGxV)
    if implementation is None:
        run = default_implementation(*arrays)
    else:
        run = named_form(implementation, *arrays) if implementation in KERNELS else IMPLEMENTATIONS[implementation]
    if axis_name is not None:
        run = _ring(run, axis_name)
    rule = Rule(mask_kind, window, softcap, scale)
    return run(q_BxLxHxK, k_BxSxGxK, v_BxSxGxV, alibi_slopes_H, context, rule)
