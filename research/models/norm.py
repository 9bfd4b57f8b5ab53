"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.params import ones, param, zeros
from research.schema import Norm


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class NormLayer(nn.Module):
    """x_BxLxD -> the same shape and dtype."""

    config: Norm

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        shape = (x_BxLxD.shape[-1],)
        gain_D = param(self, "gain", shape, ("embed",), ones, role="vector").astype(jnp.float32)
        if self.config.kind == "rmsnorm":
            # Only x and the gain are kept for the backward pass: the rest is one pass to make again.
            normalize = jax.checkpoint(lambda x, gain: (rms_normalize(x, self.config.eps) * gain).astype(x.dtype),
                                       prevent_cse=False)
            return normalize(x_BxLxD, gain_D)
        bias_D = param(self, "bias", shape, ("embed",), zeros, role="vector").astype(jnp.float32)
        centered = x_BxLxD.astype(jnp.float32)
        centered = centered - jnp.mean(centered, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.config.eps)
        return (centered * scale * gain_D + bias_D).astype(x_BxLxD.dtype)
