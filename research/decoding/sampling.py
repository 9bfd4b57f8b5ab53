"""From logits to the next token: greedy, temperature, top-k, nucleus."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from research.config import Natural, Node, NonNegative, Range


@dataclasses.dataclass(frozen=True)
class Sampling(Node):
    """temperature 0 is greedy. top_k 0 keeps all. top_p: the nucleus of Holtzman et al. 2020, 1 keeps all."""

    temperature: NonNegative = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, Range(above=0.0, most=1.0)] = 1.0


def filtered(logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits at the temperature with what top-k and top-p cut set to -inf; the most likely token always stays."""
    logits_BxV = logits_BxV / sampling.temperature
    vocab = logits_BxV.shape[-1]
    if sampling.top_k and sampling.top_k < vocab:
        kth_Bx1 = jax.lax.top_k(logits_BxV, sampling.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < kth_Bx1, -jnp.inf, logits_BxV)
    if sampling.top_p < 1.0:
        order_BxV = jnp.argsort(-logits_BxV, axis=-1)
        probability_BxV = jax.nn.softmax(jnp.take_along_axis(logits_BxV, order_BxV, axis=-1), axis=-1)
        before_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
        keep_BxV = jnp.put_along_axis(jnp.zeros_like(order_BxV, bool), order_BxV, before_BxV < sampling.top_p, axis=-1,
                                      inplace=False)
        logits_BxV = jnp.where(keep_BxV, logits_BxV, -jnp.inf)
    return logits_BxV


def sample(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """(token_B int32, logprob_B: log-probability of the token under the model itself, at temperature 1 and uncut)."""
    if sampling.temperature == 0.0:
        token_B = jnp.argmax(logits_BxV, axis=-1)
    else:
        token_B = jax.random.categorical(key, filtered(logits_BxV, sampling), axis=-1)
    logprob_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
    return token_B.astype(jnp.int32), jnp.take_along_axis(logprob_BxV, token_B[:, None], axis=-1)[:, 0]
