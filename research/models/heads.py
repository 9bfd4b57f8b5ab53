"""What reads hidden states: the unembedding and the scalar heads, and the next-token loss that never makes the logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.cross_entropy import cross_entropy
from research import sharding
from research.params import fan_in, param
from research.schema import ModelConfig

WHOLE_UNEMBEDDING = 2**28  # bytes of its float32 gradient that a device may hold: blocks cost one more product


class Unembedding(nn.Module):
    """() -> W_DxV."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.cfg.dim, self.cfg.vocab_size)
        return param(self, "kernel", shape, ("embed", "vocab"), fan_in(), inputs=("embed",), role="output")


class ScalarHead(nn.Module):
    """() -> w_D: a reward or a value is hidden @ w."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        return param(self, "kernel", (self.cfg.dim,), ("embed",), fan_in(), inputs=("embed",), role="output")


HEADS = {"unembedding": Unembedding, "reward": ScalarHead, "value": ScalarHead}


def scalar(params: dict, name: str, hidden_BxLxD: jax.Array) -> jax.Array:
    """hidden @ the scalar head called `name`: (B, L) float32."""
    return hidden_BxLxD.astype(jnp.float32) @ params[name]["kernel"].astype(jnp.float32)


def token_loss(
    cfg: ModelConfig, hidden_BxLxD: jax.Array, unembedding_DxV: jax.Array, targets_BxL: jax.Array, weights_BxL: jax.Array,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of weighted losses, nll_BxL without gradient, correct_BxL), each device on its own tokens in chunks.

    The vocabulary stays split over `tensor`; sums over devices are made once, after the chunks. A large unembedding that
    rests split over `fsdp` alone is never whole on a device: gathered, its gradient scattered, a block of words at a time.
    """
    large = unembedding_DxV.size * 4 > WHOLE_UNEMBEDDING and not sharding.rest_axes("vocab")
    split_over = sharding.rest_axes("embed") if large else ()

    def kernel(hidden, unembedding, targets, weights):
        loss, nll, correct = cross_entropy(hidden, unembedding, targets, weights, logit_scale=cfg.scales.logits, z_loss=z_loss,
                                           split_over=split_over)
        return loss[None], nll, correct

    rows = ("batch", "length")
    unembedding = sharding.AtRest(("embed", None)) if split_over else (None, None)
    kernel = sharding.local(kernel, ((*rows, None), unembedding, rows, rows), [("shards",), rows, rows], auto=("tensor",))
    loss_S, nll_BxL, correct_BxL = kernel(hidden_BxLxD, unembedding_DxV, targets_BxL, weights_BxL)
    return jnp.sum(loss_S), nll_BxL, correct_BxL
