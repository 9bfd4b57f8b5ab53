"""Cross entropy from hidden states: the definition, and a form that never holds the logits.

`reference` is the definition. Every other row of IMPLEMENTATIONS gives the same values and gradients: the
tests hold all of them to one float64 oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.varying import vary_alike

MAX_CHUNK_LOGITS = 2**27  # float32 logits alive at one time: half a GiB


class Rule(NamedTuple):
    """The static part: hashable, so that a custom derivative can take it."""

    logit_scale: float
    softcap: float | None
    z_loss: float
    chunk: int


def logits(
    hidden_BxLxD: jax.Array,
    unembedding_DxV: jax.Array,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> jax.Array:
    """logits_BxLxV, float32: logit_scale * hidden @ unembedding, then softcap * tanh(. / softcap).

    hidden may have any leading axes. The product is in hidden's dtype, summed in float32.
    """
    logits_BxLxV = logit_scale * jnp.einsum(
        "...d,dv->...v",
        hidden_BxLxD,
        unembedding_DxV.astype(hidden_BxLxD.dtype),
        preferred_element_type=jnp.float32,
    )
    return logits_BxLxV if softcap is None else softcap * jnp.tanh(logits_BxLxV / softcap)


def _score(logits_BxLxV: jax.Array, targets_BxL: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(nll_BxL, logsumexp_BxL, correct_BxL). A target outside the vocabulary has a logit of 0: finite."""
    V = logits_BxLxV.shape[-1]
    # A comparison, not a gather: it stays local when the vocabulary is sharded.
    target_BxLxV = jnp.arange(V) == targets_BxL[..., None]
    lse_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    target_logit_BxL = jnp.sum(jnp.where(target_BxLxV, logits_BxLxV, 0.0), axis=-1)
    # The largest is known from the logsumexp: comparing with it costs nothing, an argmax a pass of its own.
    correct_BxL = (target_logit_BxL >= jnp.max(logits_BxLxV, axis=-1)) & (targets_BxL >= 0) & (targets_BxL < V)
    return lse_BxL - target_logit_BxL, lse_BxL, correct_BxL


def _total(nll_BxL: jax.Array, lse_BxL: jax.Array, weights_BxL: jax.Array, z_loss: float) -> jax.Array:
    return jnp.sum(weights_BxL * (nll_BxL + z_loss * lse_BxL**2))


def reference(
    hidden_BxLxD: jax.Array,
    unembedding_DxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    rule: Rule,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The definition, with all logits in memory. Arguments and results as in `cross_entropy`."""
    logits_BxLxV = logits(hidden_BxLxD, unembedding_DxV, rule.logit_scale, rule.softcap)
    nll_BxL, lse_BxL, correct_BxL = _score(logits_BxLxV, targets_BxL)
    loss_sum = _total(nll_BxL, lse_BxL, jax.lax.stop_gradient(weights_BxL), rule.z_loss)
    return loss_sum, jax.lax.stop_gradient(nll_BxL), correct_BxL


def chunked(
    hidden_BxLxD: jax.Array,
    unembedding_DxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    rule: Rule,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`reference`, for `rule.chunk` tokens of every row at a time: never more logits than one chunk's.

    When differentiated, the forward pass makes both gradients from the logits it has at hand, so there are
    three matrix products and not four; when it isn't, it makes none. Reverse mode only (custom_vjp).
    """

    @jax.custom_vjp
    def run(hidden, unembedding, targets, weights):
        return _forward_only(hidden, unembedding, targets, weights, rule)

    def forward(hidden, unembedding, targets, weights):
        results, (dhidden, dunembedding) = _with_gradients(hidden, unembedding, targets, weights, rule)
        return results, (dhidden, dunembedding.astype(unembedding.dtype))

    def backward(gradients, cotangents):
        dloss_sum = cotangents[0]  # nll and correct carry no gradient
        dhidden, dunembedding = jax.tree.map(lambda d: (dloss_sum * d).astype(d.dtype), gradients)
        return dhidden, dunembedding, None, None

    run.defvjp(forward, backward)
    hidden_BxLxD, unembedding_DxV = vary_alike(hidden_BxLxD, unembedding_DxV)
    return run(hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL)


def _split(x_BxLx: jax.Array, chunk: int) -> jax.Array:
    """x_NxBxCx: N chunks of C tokens of every row, the last filled up with zeros."""
    x_BxLx = jnp.pad(x_BxLx, [(0, 0), (0, -x_BxLx.shape[1] % chunk)] + [(0, 0)] * (x_BxLx.ndim - 2))
    return jnp.moveaxis(x_BxLx.reshape(x_BxLx.shape[0], -1, chunk, *x_BxLx.shape[2:]), 1, 0)


def _join(x_NxBxCx: jax.Array, length: int) -> jax.Array:
    x_BxNxCx = jnp.moveaxis(x_NxBxCx, 0, 1)
    return x_BxNxCx.reshape(x_BxNxCx.shape[0], -1, *x_BxNxCx.shape[3:])[:, :length]


def _forward_only(hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL, rule: Rule):
    """(loss_sum, nll_BxL, correct_BxL)"""
    unembedding_DxV = unembedding_DxV.astype(hidden_BxLxD.dtype)  # once, not in every chunk

    def body(chunk):
        hidden_BxCxD, targets_BxC = chunk
        return _score(logits(hidden_BxCxD, unembedding_DxV, rule.logit_scale, rule.softcap), targets_BxC)

    scores = jax.lax.map(body, (_split(hidden_BxLxD, rule.chunk), _split(targets_BxL, rule.chunk)))
    nll_BxL, lse_BxL, correct_BxL = (_join(x, targets_BxL.shape[1]) for x in scores)
    return _total(nll_BxL, lse_BxL, weights_BxL, rule.z_loss), nll_BxL, correct_BxL


def _with_gradients(hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL, rule: Rule):
    """The same, and its loss_sum's (dhidden_BxLxD in hidden's dtype, dunembedding_DxV in float32)."""
    dtype = hidden_BxLxD.dtype
    unembedding_DxV = unembedding_DxV.astype(dtype)  # once, not in every chunk

    def body(dunembedding_DxV, chunk):
        hidden_BxCxD, targets_BxC, weights_BxC = chunk
        logits_BxCxV = logits(hidden_BxCxD, unembedding_DxV, rule.logit_scale, rule.softcap)
        nll_BxC, lse_BxC, correct_BxC = _score(logits_BxCxV, targets_BxC)

        # d/dlogits of nll + z_loss * lse^2, where dlse is the softmax p:
        # p * (1 + 2 * z_loss * lse) - one_hot(target)
        p_BxCxV = jnp.exp(logits_BxCxV - lse_BxC[..., None])
        target_BxCxV = jnp.arange(p_BxCxV.shape[-1]) == targets_BxC[..., None]
        d_BxCxV = p_BxCxV * (1 + 2 * rule.z_loss * lse_BxC)[..., None] - target_BxCxV
        if rule.softcap is not None:
            d_BxCxV *= 1 - (logits_BxCxV / rule.softcap) ** 2  # d tanh = 1 - tanh^2
        d_BxCxV = (d_BxCxV * (rule.logit_scale * weights_BxC)[..., None]).astype(dtype)

        dhidden_BxCxD = jnp.einsum(
            "bcv,dv->bcd", d_BxCxV, unembedding_DxV, preferred_element_type=jnp.float32
        )
        dunembedding_DxV += jnp.einsum(
            "bcd,bcv->dv", hidden_BxCxD, d_BxCxV, preferred_element_type=jnp.float32
        )
        return dunembedding_DxV, (nll_BxC, lse_BxC, correct_BxC, dhidden_BxCxD.astype(dtype))

    zeros_DxV = jnp.zeros_like(unembedding_DxV, dtype=jnp.float32)
    chunks = tuple(_split(x, rule.chunk) for x in (hidden_BxLxD, targets_BxL, weights_BxL))
    dunembedding_DxV, results = jax.lax.scan(body, zeros_DxV, chunks)
    nll_BxL, lse_BxL, correct_BxL, dhidden_BxLxD = (_join(x, targets_BxL.shape[1]) for x in results)
    loss_sum = _total(nll_BxL, lse_BxL, weights_BxL, rule.z_loss)
    return (loss_sum, nll_BxL, correct_BxL), (dhidden_BxLxD, dunembedding_DxV)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array, jax.Array]]] = {
    "reference": reference,
    "chunked": chunked,
}


def default_chunk(batch: int, length: int, vocab: int) -> int:
    """Tokens of every row in a chunk: together with the other rows 512 to 1024, the fewer the larger V is."""
    tokens = min(max(MAX_CHUNK_LOGITS // vocab, 512), 1024)
    chunk = min(max(tokens // batch, 1), length)
    chunks = -(-length // chunk)
    return -(-length // chunks)  # as even as can be: less to fill up


def cross_entropy(
    hidden_BxLxD: jax.Array,
    unembedding_DxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted cross entropy of the next token, without holding the logits: (loss_sum, nll_BxL, correct_BxL).

        logits = logit_scale * hidden @ unembedding;  softcap * tanh(logits / softcap)
        loss_sum = sum(weights * (nll + z_loss * logsumexp(logits)^2))

    Args:
      hidden_BxLxD: floating; the product with the unembedding is in its dtype, summed in float32.
      unembedding_DxV: floating, cast to hidden's dtype; its gradient is summed in float32 and returned in its
        own dtype, so hand over float32 parameters as they are.
      targets_BxL: int32. Where the weight is 0 a target may be any number. weights_BxL: float32.
      chunk: tokens of every row at a time, in `chunked`; None chooses by shape.
      implementation: a key of IMPLEMENTATIONS; None is `chunked`.

    Returns:
      loss_sum: float32 scalar in nats, the only result with a gradient, for hidden and unembedding. Weights
        count as constants: their gradient is 0. nll_BxL: float32 nats, unweighted, without z_loss.
        correct_BxL: bool, the target is the likeliest token.

    Raises:
      ValueError: an unknown implementation, shapes that don't fit, a chunk below 1, a softcap not above 0.

    On several devices, call it where B and L are local (shard_map): there, the unembedding is gathered, and
    its gradient summed over devices, once and not in every chunk.

    Sources: z loss: PaLM, Chowdhery et al. 2022, section 5. Soft cap: Gemma 2, 2024, section 2. Gradients in
    the forward pass: Liger kernels, Hsu et al. 2024.
    """
    (B, L), V = targets_BxL.shape, unembedding_DxV.shape[-1]
    if (
        hidden_BxLxD.shape[:2] != (B, L)
        or weights_BxL.shape != (B, L)
        or unembedding_DxV.shape != (hidden_BxLxD.shape[-1], V)
    ):
        raise ValueError(
            f"cross_entropy: hidden {hidden_BxLxD.shape}, unembedding {unembedding_DxV.shape}, targets "
            f"{targets_BxL.shape}, weights {weights_BxL.shape} aren't BxLxD, DxV, BxL, BxL"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"cross_entropy: softcap {softcap} isn't above 0; None turns it off")
    if chunk is not None and chunk < 1:
        raise ValueError(f"cross_entropy: chunk {chunk} is below 1")
    name = "chunked" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"cross_entropy: implementation {name!r} is none of {', '.join(IMPLEMENTATIONS)}")
    chunk = default_chunk(B, L, V) if chunk is None else min(chunk, L)
    rule = Rule(logit_scale, softcap, z_loss, chunk)
    return IMPLEMENTATIONS[name](hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL, rule)
