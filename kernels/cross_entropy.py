"""Cross entropy from hidden states: the definition, and two forms that never hold the logits.

`reference` is the definition. Every other row of IMPLEMENTATIONS gives the same values and gradients: the
tests hold all of them to one float64 oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.chunks import chunks_first, join
from kernels.varying import vary_alike

MAX_CHUNK_LOGITS = 2**27  # float32 logits alive at one time: half a GiB
MAX_BLOCK_LOGITS = 2**25  # of a block of words, for all tokens: 128 MiB; more where that is too few words
MIN_BLOCK = 1024  # words: each block reads and writes the whole gradient of hidden, which few words' products don't outweigh

BLOCK_GATHER = "unembedding_block"  # the scope of the collective that gathers a part of a weight of no even size


class Rule(NamedTuple):
    """The static part: hashable, so that a custom derivative can take it."""

    logit_scale: float
    softcap: float | None
    z_loss: float
    chunk: int
    block: int
    split_over: tuple[str, ...]


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


def _dlogits(logits_BxLxV, lse_BxL, target_BxLxV, weights_BxL, rule: Rule) -> jax.Array:
    """The derivative of `_total` for what comes out of the product, before scale and soft cap.

    Of nll + z_loss * lse^2, where dlse is the softmax p: p * (1 + 2 * z_loss * lse) - one_hot(target).
    """
    p_BxLxV = jnp.exp(logits_BxLxV - lse_BxL[..., None])
    d_BxLxV = p_BxLxV * (1 + 2 * rule.z_loss * lse_BxL)[..., None] - target_BxLxV
    if rule.softcap is not None:
        d_BxLxV *= 1 - (logits_BxLxV / rule.softcap) ** 2  # d tanh = 1 - tanh^2
    return d_BxLxV * (rule.logit_scale * weights_BxL)[..., None]


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


def _forward_only(hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL, rule: Rule):
    """(loss_sum, nll_BxL, correct_BxL)"""
    unembedding_DxV = unembedding_DxV.astype(hidden_BxLxD.dtype)  # once, not in every chunk

    def body(chunk):
        hidden_BxCxD, targets_BxC = chunk
        return _score(logits(hidden_BxCxD, unembedding_DxV, rule.logit_scale, rule.softcap), targets_BxC)

    scores = jax.lax.map(body, (chunks_first(hidden_BxLxD, rule.chunk), chunks_first(targets_BxL, rule.chunk)))
    nll_BxL, lse_BxL, correct_BxL = (join(x, targets_BxL.shape[1]) for x in scores)
    return _total(nll_BxL, lse_BxL, weights_BxL, rule.z_loss), nll_BxL, correct_BxL


def _with_gradients(hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL, rule: Rule):
    """The same, and its loss_sum's (dhidden_BxLxD in hidden's dtype, dunembedding_DxV in float32)."""
    dtype = hidden_BxLxD.dtype
    unembedding_DxV = unembedding_DxV.astype(dtype)  # once, not in every chunk

    def body(dunembedding_DxV, chunk):
        hidden_BxCxD, targets_BxC, weights_BxC = chunk
        logits_BxCxV = logits(hidden_BxCxD, unembedding_DxV, rule.logit_scale, rule.softcap)
        nll_BxC, lse_BxC, correct_BxC = _score(logits_BxCxV, targets_BxC)

        target_BxCxV = jnp.arange(logits_BxCxV.shape[-1]) == targets_BxC[..., None]
        d_BxCxV = _dlogits(logits_BxCxV, lse_BxC, target_BxCxV, weights_BxC, rule).astype(dtype)
        dhidden_BxCxD = jnp.einsum(
            "bcv,dv->bcd", d_BxCxV, unembedding_DxV, preferred_element_type=jnp.float32
        )
        dunembedding_DxV += jnp.einsum(
            "bcd,bcv->dv", hidden_BxCxD, d_BxCxV, preferred_element_type=jnp.float32
        )
        return dunembedding_DxV, (nll_BxC, lse_BxC, correct_BxC, dhidden_BxCxD.astype(dtype))

    zeros_DxV = jnp.zeros_like(unembedding_DxV, dtype=jnp.float32)
    chunks = tuple(chunks_first(x, rule.chunk) for x in (hidden_BxLxD, targets_BxL, weights_BxL))
    dunembedding_DxV, results = jax.lax.scan(body, zeros_DxV, chunks)
    nll_BxL, lse_BxL, correct_BxL, dhidden_BxLxD = (join(x, targets_BxL.shape[1]) for x in results)
    loss_sum = _total(nll_BxL, lse_BxL, weights_BxL, rule.z_loss)
    return (loss_sum, nll_BxL, correct_BxL), (dhidden_BxLxD, dunembedding_DxV)


def blocked(
    hidden_BxLxD: jax.Array,
    unembedding_DxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    rule: Rule,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`reference`, for all tokens and `rule.block` words of the vocabulary at a time.

    The unembedding may come as this device's rows of D, split over the mesh axes `rule.split_over`: a block is gathered
    when it is needed and its gradient scattered as soon as it is made, so that neither is ever whole on a device. It
    costs one product more than `chunked`: the logits again, once the sum over all words is known.
    """

    @jax.custom_vjp
    def run(hidden, unembedding, targets, weights):
        return forward(hidden, unembedding, targets, weights)[0]

    def forward(hidden, unembedding, targets, weights):
        nll_BxL, lse_BxL, correct_BxL = _score_blocks(hidden, unembedding, targets, rule)
        results = _total(nll_BxL, lse_BxL, weights, rule.z_loss), nll_BxL, correct_BxL
        return results, (hidden, unembedding, targets, weights, lse_BxL)

    def backward(residuals, cotangents):
        return *_block_gradients(*residuals, cotangents[0], rule), None, None

    run.defvjp(forward, backward)
    hidden_BxLxD, unembedding_DxV = vary_alike(hidden_BxLxD, unembedding_DxV)
    return run(hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL)


def _blocks(unembedding_DxV: jax.Array, dtype: jnp.dtype, block: int) -> tuple[jax.Array, jax.Array]:
    """(first word, columns) of each block: (starts_N, unembedding_NxDxW), the last filled up with zeros."""
    unembedding_NxDxW = chunks_first(unembedding_DxV.astype(dtype), block)
    return block * jnp.arange(len(unembedding_NxDxW)), unembedding_NxDxW


def _block_logits(hidden_BxLxD, targets_BxL, start, unembedding_DxW, vocab: int, rule: Rule):
    """(logits_BxLxW, target_BxLxW, word_W, unembedding_DxW) of a whole block; what is no word of the vocabulary has -inf."""
    if rule.split_over:
        with jax.named_scope(BLOCK_GATHER):
            unembedding_DxW = jax.lax.all_gather(unembedding_DxW, rule.split_over, axis=0, tiled=True)
    words_W = start + jnp.arange(unembedding_DxW.shape[1])
    word_W = words_W < vocab
    logits_BxLxW = logits(hidden_BxLxD, unembedding_DxW, rule.logit_scale, rule.softcap)
    return jnp.where(word_W, logits_BxLxW, -jnp.inf), (words_W == targets_BxL[..., None]) & word_W, word_W, unembedding_DxW


def _score_blocks(hidden_BxLxD, unembedding_DxV, targets_BxL, rule: Rule):
    """`_score`, by blocks: the sum of exponentials is rescaled whenever a larger logit comes."""
    V = unembedding_DxV.shape[1]

    def body(carry, block):
        max_BxL, sum_BxL, target_BxL = carry
        logits_BxLxW, target_BxLxW, *_ = _block_logits(hidden_BxLxD, targets_BxL, *block, V, rule)
        new_BxL = jnp.maximum(max_BxL, jnp.max(logits_BxLxW, axis=-1))
        sum_BxL = sum_BxL * jnp.exp(max_BxL - new_BxL) + jnp.sum(jnp.exp(logits_BxLxW - new_BxL[..., None]), axis=-1)
        return (new_BxL, sum_BxL, target_BxL + jnp.sum(jnp.where(target_BxLxW, logits_BxLxW, 0.0), axis=-1)), None

    zeros_BxL = jnp.zeros_like(hidden_BxLxD[..., 0], jnp.float32)
    blocks = _blocks(unembedding_DxV, hidden_BxLxD.dtype, rule.block)
    (max_BxL, sum_BxL, target_BxL), _ = jax.lax.scan(body, (zeros_BxL - jnp.inf, zeros_BxL, zeros_BxL), blocks)
    lse_BxL = max_BxL + jnp.log(sum_BxL)
    return lse_BxL - target_BxL, lse_BxL, (target_BxL >= max_BxL) & (targets_BxL >= 0) & (targets_BxL < V)


def _block_gradients(hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL, lse_BxL, dloss_sum, rule: Rule):
    """(dhidden_BxLxD, dunembedding_DxV: of this device's rows, where they are split)"""
    dtype, V = hidden_BxLxD.dtype, unembedding_DxV.shape[1]

    def body(dhidden_BxLxD, block):
        logits_BxLxW, target_BxLxW, word_W, unembedding_DxW = _block_logits(hidden_BxLxD, targets_BxL, *block, V, rule)
        d_BxLxW = _dlogits(logits_BxLxW, lse_BxL, target_BxLxW, dloss_sum * weights_BxL, rule)
        d_BxLxW = jnp.where(word_W, d_BxLxW, 0.0).astype(dtype)  # the soft cap makes 0 * inf of what is no word
        dhidden_BxLxD += jnp.einsum("blw,dw->bld", d_BxLxW, unembedding_DxW, preferred_element_type=jnp.float32)
        dblock_DxW = jnp.einsum("bld,blw->dw", hidden_BxLxD, d_BxLxW, preferred_element_type=jnp.float32)
        dblock_DxW = dblock_DxW.astype(unembedding_DxV.dtype)
        if rule.split_over:
            dblock_DxW = jax.lax.psum_scatter(dblock_DxW, rule.split_over, scatter_dimension=0, tiled=True)
        return dhidden_BxLxD, dblock_DxW

    zeros_BxLxD = jnp.zeros_like(hidden_BxLxD, jnp.float32)
    dhidden_BxLxD, dblocks_NxDxW = jax.lax.scan(body, zeros_BxLxD, _blocks(unembedding_DxV, dtype, rule.block))
    return dhidden_BxLxD.astype(dtype), join(dblocks_NxDxW, V)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array, jax.Array]]] = {
    "reference": reference,
    "chunked": chunked,
    "blocked": blocked,
}


def default_chunk(batch: int, length: int, vocab: int) -> int:
    """Tokens of every row in a chunk: together with the other rows 512 to 1024, the fewer the larger V is."""
    tokens = min(max(MAX_CHUNK_LOGITS // vocab, 512), 1024)
    chunk = min(max(tokens // batch, 1), length)
    chunks = -(-length // chunk)
    return -(-length // chunks)  # as even as can be: less to fill up


def default_block(tokens: int, vocab: int) -> int:
    """Words in a block: multiples of a TPU register's 128, as even as can be."""
    blocks = -(-vocab // max(MAX_BLOCK_LOGITS // tokens, MIN_BLOCK))
    return min(-(-vocab // (128 * blocks)) * 128, vocab)


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
    block: int | None = None,
    split_over: tuple[str, ...] = (),
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted cross entropy of the next token, without holding the logits: (loss_sum, nll_BxL, correct_BxL).

        logits = logit_scale * hidden @ unembedding;  softcap * tanh(logits / softcap)
        loss_sum = sum(weights * (nll + z_loss * logsumexp(logits)^2))

    Args:
      hidden_BxLxD: floating; the product with the unembedding is in its dtype, summed in float32.
      unembedding_DxV: floating, cast to hidden's dtype; its gradient is summed in float32 (over tokens; over
        devices in its own dtype) and returned in its own dtype, so hand over float32 parameters as they are.
      targets_BxL: int32. Where the weight is 0 a target may be any number. weights_BxL: float32.
      chunk: tokens of every row at a time, in `chunked`; None chooses by shape.
      block: words of the vocabulary at a time, in `blocked`; None chooses by shape.
      split_over: inside shard_map, the mesh axes over which the unembedding's D is split, as is its gradient then.
        For `blocked` only.
      implementation: a key of IMPLEMENTATIONS; None is `blocked` where the unembedding is split, else `chunked`.

    Returns:
      loss_sum: float32 scalar in nats, the only result with a gradient, for hidden and unembedding. Weights
        count as constants: their gradient is 0. nll_BxL: float32 nats, unweighted, without z_loss.
        correct_BxL: bool, the target is the likeliest token.

    Raises:
      ValueError: an unknown implementation, or one that takes no split unembedding; shapes that don't fit; a chunk or
        block below 1; a softcap not above 0.

    On several devices, call it where B and L are local (shard_map): there, the unembedding is gathered, and
    its gradient summed over devices, once and not in every chunk; or block by block (`split_over`).

    Sources: z loss: PaLM, Chowdhery et al. 2022, section 5. Soft cap: Gemma 2, 2024, section 2. Gradients in
    the forward pass: Liger kernels, Hsu et al. 2024.
    """
    (B, L), V = targets_BxL.shape, unembedding_DxV.shape[-1]
    if (
        hidden_BxLxD.shape[:2] != (B, L)
        or weights_BxL.shape != (B, L)
        or unembedding_DxV.shape != (hidden_BxLxD.shape[-1] // math.prod(map(jax.lax.axis_size, split_over)), V)
    ):
        raise ValueError(
            f"cross_entropy: hidden {hidden_BxLxD.shape}, unembedding {unembedding_DxV.shape}, targets "
            f"{targets_BxL.shape}, weights {weights_BxL.shape} aren't BxLxD, DxV, BxL, BxL"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"cross_entropy: softcap {softcap} isn't above 0; None turns it off")
    for size, value in (("chunk", chunk), ("block", block)):
        if value is not None and value < 1:
            raise ValueError(f"cross_entropy: {size} {value} is below 1")
    name = ("blocked" if split_over else "chunked") if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"cross_entropy: implementation {name!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if split_over and name != "blocked":
        raise ValueError(f"cross_entropy: {name} takes the unembedding whole; blocked takes it split")
    chunk = default_chunk(B, L, V) if chunk is None else min(chunk, L)
    block = default_block(B * L, V) if block is None else min(block, V)
    rule = Rule(logit_scale, softcap, z_loss, chunk, block, tuple(split_over))
    return IMPLEMENTATIONS[name](hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL, rule)
