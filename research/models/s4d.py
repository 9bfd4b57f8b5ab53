"""S4D (Gu, Gupta, Goel and Re 2022): a diagonal state space in every channel, then GELU and a gated projection."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.config import MixerConfig, Positive, PositiveFloat
from research.errors import InputError
from research.models.context import Context
from research.models.diagonal import Discretization, Implementation, Init, diagonal_weights, run_diagonal
from research.models.ssm import gated_output
from research.params import ones, param


@dataclasses.dataclass(frozen=True)
class S4d(MixerConfig):
    """`state` real numbers a channel: that many real modes (init=real), or half as many complex ones.

    implementation: `fft` is a convolution over the whole row, where there is no state and a row holds one document,
    else the recurrence; None = fft. The steps begin log-uniform in [dt_min, dt_max].
    """

    state: Positive = 64
    init: Init = "lin"
    discretization: Discretization = "zoh"
    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 0.1
    implementation: Implementation | None = None

    def validate(self):
        if self.dt_min > self.dt_max:
            raise InputError("dt_min", f"{self.dt_min} is above dt_max={self.dt_max}", "swap them")
        if self.init != "real" and self.state % 2:
            raise InputError("state", f"{self.state} is odd, complex modes come in pairs", "make it even")

    @property
    def modes(self) -> int:
        return self.state if self.init == "real" else self.state // 2


class S4dMixer(nn.Module):
    cfg: S4d

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, dim = self.cfg, x_BxLxD.shape[-1]
        decay, output = diagonal_weights(self, dim, "mlp", cfg.modes, cfg.init, cfg.discretization, cfg.dt_min, cfg.dt_max)
        before = None if state is None else (state["real_BxIx1xN"], state["imaginary_BxIx1xN"])
        y_BxLxIx1, after = run_diagonal(x_BxLxD[..., None], decay, output, "mlp", ctx, before, cfg.implementation)
        skip_I = param(self, "skip", (dim,), ("mlp",), ones, role="vector")
        y_BxLxI = nn.gelu(y_BxLxIx1[..., 0] + skip_I.astype(x_BxLxD.dtype) * x_BxLxD)
        state = None if after is None else {"real_BxIx1xN": after[0], "imaginary_BxIx1xN": after[1]}
        return gated_output(self, y_BxLxI, dim), state, {}

    @staticmethod
    def init_state(cfg: S4d, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        zeros = jnp.zeros((batch, dim, 1, cfg.modes), jnp.float32)
        return {"real_BxIx1xN": zeros, "imaginary_BxIx1xN": zeros}

    @staticmethod
    def state_axes(cfg: S4d) -> dict:
        return {"real_BxIx1xN": ("batch", "mlp", None, None), "imaginary_BxIx1xN": ("batch", "mlp", None, None)}

    @staticmethod
    def flops(cfg: S4d, dim: int, seq_len: int, causal: bool = True) -> float:
        """Projections, and what is read from the state; its update is elementwise, an FFT isn't a matrix product."""
        return 4.0 * dim * dim + 4.0 * dim * cfg.modes
