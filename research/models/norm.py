"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.models.remade import remade
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
            return remade(lambda x, gain: (rms_normalize(x, self.config.eps) * gain).astype(x.dtype))(x_BxLxD, gain_D)
        bias_D = param(self, "bias", shape, ("embed",), zeros, role="vector").astype(jnp.float32)
        return remade(self._layer_norm)(x_BxLxD, gain_D, bias_D)

    def _layer_norm(self, x_BxLxD: jax.Array, gain_D: jax.Array, bias_D: jax.Array) -> jax.Array:
        centered = x_BxLxD.astype(jnp.float32)
        centered = centered - jnp.mean(centered, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.config.eps)
        return (centered * scale * gain_D + bias_D).astype(x_BxLxD.dtype)
