"""A mixer whose work is one Pallas kernel, called on each device's own rows: y = x * scale.

What every kernel to come needs of the contracts: `sharding.local` around it, a `custom_vjp` within, Mosaic
where the program is lowered for a TPU and the interpreter elsewhere, decided at lowering.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from research import sharding
from research.config import MixerConfig, Positive
from research.models.context import Context
from research.params import ones, param

KERNEL = "spike_scale"  # its name in a jaxpr; elementwise, so it has no FLOPs to count


@dataclasses.dataclass(frozen=True)
class PallasScale(MixerConfig):
    """`block`: rows of the flattened (B * L) that one program of the grid takes."""

    block: Positive = 256


def _multiply(x_ref, scale_ref, y_ref):
    y_ref[...] = (x_ref[...].astype(jnp.float32) * scale_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


def _scale_rows(x_RxD: jax.Array, scale_1xD: jax.Array, block: int, interpret: bool) -> jax.Array:
    rows, dim = x_RxD.shape
    block = min(block, rows)
    whole_rows = pl.BlockSpec((block, dim), lambda i: (i, 0))
    return pl.pallas_call(
        _multiply,
        grid=(math.ceil(rows / block),),
        in_specs=[whole_rows, pl.BlockSpec((1, dim), lambda i: (0, 0))],
        out_specs=whole_rows,
        out_shape=jax.ShapeDtypeStruct(x_RxD.shape, x_RxD.dtype),
        interpret=interpret,
        name=KERNEL,
    )(x_RxD, scale_1xD)


def _run(x: jax.Array, scale_D: jax.Array, block: int) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1]), scale_D[None]
    branches = {
        interpret: functools.partial(_scale_rows, block=block, interpret=interpret)
        for interpret in (False, True)
    }
    return jax.lax.platform_dependent(*flat, tpu=branches[False], default=branches[True]).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale(x_BxLxD: jax.Array, scale_D: jax.Array, block: int) -> jax.Array:
    """x * scale over the last axis, in x's dtype; the gradient of x is the same kernel."""
    return _run(x_BxLxD, scale_D, block)


def _forward(x_BxLxD, scale_D, block):
    return _run(x_BxLxD, scale_D, block), (x_BxLxD, scale_D)


def _backward(block, saved, dy_BxLxD):
    x_BxLxD, scale_D = saved
    dscale_D = jnp.sum(dy_BxLxD.astype(jnp.float32) * x_BxLxD.astype(jnp.float32), axis=(0, 1))
    return _run(dy_BxLxD, scale_D, block), dscale_D.astype(scale_D.dtype)


scale.defvjp(_forward, _backward)


class PallasScaleMixer(nn.Module):
    cfg: PallasScale

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None
    ) -> tuple[jax.Array, dict | None, dict]:
        scale_D = param(self, "scale", x_BxLxD.shape[-1:], ("embed",), ones, role="vector")
        axes = ("batch", "length", "embed")
        kernel = sharding.local(functools.partial(scale, block=self.cfg.block), (axes, axes[2:]), axes)
        return kernel(x_BxLxD, scale_D), state, {}

    @staticmethod
    def init_state(cfg: PallasScale, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        return {}

    @staticmethod
    def state_axes(cfg: PallasScale) -> dict:
        return {}

    @staticmethod
    def flops(cfg: PallasScale, dim: int, seq_len: int, causal: bool = True) -> float:
        return 0.0
