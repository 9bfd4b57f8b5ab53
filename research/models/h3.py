"""H3 (Fu et al. 2022): keys pass a shift state space, key (outer) value a diagonal one, and the query reads: two gates."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear import linear
from research.config import MixerConfig, Positive, PositiveFloat
from research.errors import InputError
from research.models.context import Context
from research.models.diagonal import Discretization, Implementation, Init, diagonal_weights, run_diagonal
from research.models.ssm import short_convolution
from research.params import fan_in, ones, param


@dataclasses.dataclass(frozen=True)
class H3(MixerConfig):
    """dim / head_dim heads; `shift` tokens in the shift state space, `state` numbers in each of head_dim^2 diagonal ones.

    The rest is as in S4d.
    """

    head_dim: Positive = 1
    shift: Positive = 64
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

    def check(self, dim: int) -> None:
        if dim % self.head_dim:
            raise InputError("head_dim", f"{self.head_dim} does not divide dim={dim}", "choose a divisor")

    @property
    def modes(self) -> int:
        return self.state if self.init == "real" else self.state // 2


class H3Mixer(nn.Module):
    cfg: H3

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        cfg, (B, L, D) = self.cfg, x_BxLxD.shape
        H, K = D // cfg.head_dim, cfg.head_dim
        q_BxLxHxK, k_BxLxHxK, v_BxLxHxK = (self._project(name, x_BxLxD, H) for name in ("query", "key", "value"))
        # A shift state space holds the last inputs as they are: its output is a short convolution.
        k_BxLxHxK, shift_BxPxHxK = short_convolution(
            self, "shift", k_BxLxHxK, ("heads", "head_dim"), cfg.shift, False, ctx,
            None if state is None else state["shift_BxPxHxK"])
        u_BxLxHxM = (k_BxLxHxK[..., :, None] * v_BxLxHxK[..., None, :]).reshape(B, L, H, K * K)

        decay, output = diagonal_weights(self, H, "heads", cfg.modes, cfg.init, cfg.discretization, cfg.dt_min, cfg.dt_max)
        before = None if state is None else (state["real_BxHxMxN"], state["imaginary_BxHxMxN"])
        y_BxLxHxM, after = run_diagonal(u_BxLxHxM, decay, output, "heads", ctx, before, cfg.implementation)
        skip_H = param(self, "skip", (H,), ("heads",), ones, role="vector")
        y_BxLxHxM += skip_H.astype(u_BxLxHxM.dtype)[:, None] * u_BxLxHxM
        y_BxLxHxV = jnp.einsum("blhk,blhkv->blhv", q_BxLxHxK, y_BxLxHxM.reshape(B, L, H, K, K))
        output_HxVxD = param(self, "output", (H, K, D), ("heads", "head_dim", "embed"), fan_in(), inputs=("heads", "head_dim"))
        y_BxLxD = linear(y_BxLxHxV, output_HxVxD, 2)
        if state is None:
            return y_BxLxD, None, {}
        return y_BxLxD, {"shift_BxPxHxK": shift_BxPxHxK, "real_BxHxMxN": after[0], "imaginary_BxHxMxN": after[1]}, {}

    def _project(self, name: str, x_BxLxD: jax.Array, heads: int) -> jax.Array:
        shape = (x_BxLxD.shape[-1], heads, self.cfg.head_dim)
        weight_DxHxK = param(self, name, shape, ("embed", "heads", "head_dim"), fan_in(), inputs=("embed",))
        return linear(x_BxLxD, weight_DxHxK)

    @staticmethod
    def init_state(cfg: H3, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        heads = dim // cfg.head_dim
        zeros = jnp.zeros((batch, heads, cfg.head_dim**2, cfg.modes), jnp.float32)
        return {"shift_BxPxHxK": jnp.zeros((batch, cfg.shift - 1, heads, cfg.head_dim), dtype), "real_BxHxMxN": zeros,
                "imaginary_BxHxMxN": zeros}

    @staticmethod
    def state_axes(cfg: H3) -> dict:
        hidden = ("batch", "heads", None, None)
        return {"shift_BxPxHxK": ("batch", None, "heads", None), "real_BxHxMxN": hidden, "imaginary_BxHxMxN": hidden}

    @staticmethod
    def flops(cfg: H3, dim: int, seq_len: int, causal: bool = True) -> float:
        """Projections, what is read from the states, and the query's reading; the rest is elementwise or an FFT."""
        return 8.0 * dim * dim + dim * cfg.head_dim * (4.0 * cfg.modes + 2.0)
