"""S4 (Gu, Goel and Re 2021): HiPPO-LegS in every channel, diagonal plus rank one, then GELU and a gated projection."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.diagonal_ssm import Pair, long_convolution
from kernels.dplr_ssm import Continuous, Discrete, discretize, dplr_ssm, impulse_response
from research import sharding
from research.config import MixerConfig, Positive, PositiveFloat
from research.errors import InputError
from research.models.context import Context
from research.models.ssm import gated_output, log_uniform
from research.params import Initializer, normal, ones, param


@dataclasses.dataclass(frozen=True)
class S4(MixerConfig):
    """`state` real numbers a channel, as half as many complex modes.

    implementation: `fft` is a convolution over the whole row, where there is no state and a row holds one document,
    else the recurrence; None = fft. The steps begin log-uniform in [dt_min, dt_max].
    """

    state: Positive = 64
    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 0.1
    implementation: Literal["reference", "chunked", "fft"] | None = None

    def validate(self):
        if self.dt_min > self.dt_max:
            raise InputError("dt_min", f"{self.dt_min} is above dt_max={self.dt_max}", "swap them")
        if self.state % 2:
            raise InputError("state", f"{self.state} is odd, complex modes come in pairs", "make it even")


def hippo_legs(state: int) -> tuple[np.ndarray, np.ndarray]:
    """(A_NxN, B_N) of HiPPO-LegS, equation 2."""
    root_N = np.sqrt(2 * np.arange(state) + 1.0)
    return -np.tril(np.outer(root_N, root_N), -1) - np.diag(np.arange(state) + 1.0), root_N


def normal_plus_low_rank(state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rate_N, p_N, b_N), complex: LegS is unitarily diag(rate) - p p* and b; of conjugate modes the one above the axis."""
    a_NxN, b_N = hippo_legs(state)
    p_N = np.sqrt(np.arange(state) + 0.5)
    normal_NxN = a_NxN + np.outer(p_N, p_N)  # -1/2 plus a skew-symmetric matrix
    imaginary_N, vectors_NxN = np.linalg.eigh(-1j * (normal_NxN + 0.5 * np.eye(state)))
    kept = imaginary_N > 0
    project = vectors_NxN[:, kept].conj().T
    return -0.5 + 1j * imaginary_N[kept], project @ p_N, project @ b_N


class S4Mixer(nn.Module):
    cfg: S4

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None) -> tuple[jax.Array, dict | None, dict]:
        dim = x_BxLxD.shape[-1]
        system = self._system(dim)
        if state is None and not ctx.packed and self.cfg.implementation in (None, "fft"):
            y_BxLxI, after = self._convolve(x_BxLxD, system, ctx), None
        else:
            y_BxLxI, after = self._recur(x_BxLxD, discretize(system), ctx, state)
        skip_I = param(self, "skip", (dim,), ("mlp",), ones, role="vector")
        y_BxLxI = nn.gelu(y_BxLxI + skip_I.astype(x_BxLxD.dtype) * x_BxLxD)
        return gated_output(self, y_BxLxI, dim), after, {}

    def _system(self, dim: int) -> Continuous:
        """The weights: log_dt, a_log, a_imaginary, and the parts of p, b and c."""
        rate_N, p_N, b_N = normal_plus_low_rank(self.cfg.state)
        shape, axes = (dim, len(rate_N)), ("mlp", "state_dim")

        def vector(name: str, init: Initializer | np.ndarray, shape: tuple = shape, axes: tuple = axes) -> jax.Array:
            if isinstance(init, np.ndarray):
                values = jnp.asarray(init, jnp.float32)
                return param(self, name, shape, axes, lambda key, shape, fan: jnp.broadcast_to(values, shape),
                             role="vector").astype(jnp.float32)
            return param(self, name, shape, axes, init, role="vector").astype(jnp.float32)

        rate = -jnp.exp(vector("a_log", np.log(-rate_N.real))), vector("a_imaginary", rate_N.imag)
        p = vector("p_real", p_N.real), vector("p_imaginary", p_N.imag)
        b = vector("b_real", b_N.real), vector("b_imaginary", b_N.imag)
        c = vector("c_real", normal(0.5**0.5)), vector("c_imaginary", normal(0.5**0.5))
        steps = log_uniform(self.cfg.dt_min, self.cfg.dt_max)
        return Continuous(rate, p, b, c, jnp.exp(vector("log_dt", steps, shape[:1], axes[:1])))

    def _convolve(self, x_BxLxI: jax.Array, system: Continuous, ctx: Context) -> jax.Array:
        def convolve(x_BxLxI, segment_ids, dt_C, *parts):
            pairs = [parts[i : i + 2] for i in range(0, 8, 2)]
            k_CxL = impulse_response(Continuous(*pairs, dt_C), x_BxLxI.shape[1])
            return long_convolution(x_BxLxI[..., None], k_CxL, segment_ids)[..., 0]

        rows, channels = ("batch", None), ("batch", None, "mlp")
        parts = [x for pair in system[:4] for x in pair]
        convolve = sharding.local(convolve, (channels, rows, ("mlp",), *[("mlp", None)] * 8), channels)
        return convolve(x_BxLxI, ctx.segment_ids_BxL, system.dt_C, *parts)

    def _recur(self, x_BxLxI: jax.Array, system: Discrete, ctx: Context, state: dict | None) -> tuple[jax.Array, dict | None]:
        def recur(x_BxLxI, positions, segment_ids, h_real, h_imaginary, *parts):
            implementation = None if self.cfg.implementation == "fft" else self.cfg.implementation
            before: Pair | None = None if h_real is None else (h_real, h_imaginary)
            y, after = dplr_ssm(
                x_BxLxI, Discrete(*(parts[i : i + 2] for i in range(0, 10, 2))), positions_BxL=positions,
                segment_ids_BxL=segment_ids, state_BxCxN=before, implementation=implementation)
            return y, *after

        rows, channels, hidden = ("batch", None), ("batch", None, "mlp"), ("batch", "mlp", None)
        before = (None, None) if state is None else (state["real_BxIxN"], state["imaginary_BxIxN"])
        axes = (channels, rows, rows, *[None if state is None else hidden] * 2, *[("mlp", None)] * 10)
        recur = sharding.local(recur, axes, [channels, hidden, hidden])
        parts = [x for pair in system for x in pair]
        y, real, imaginary = recur(x_BxLxI, ctx.positions_BxL, ctx.segment_ids_BxL, *before, *parts)
        return y, None if state is None else {"real_BxIxN": real, "imaginary_BxIxN": imaginary}

    @staticmethod
    def init_state(cfg: S4, batch: int, dim: int, max_len: int, dtype: jnp.dtype) -> dict:
        zeros = jnp.zeros((batch, dim, cfg.state // 2), jnp.float32)
        return {"real_BxIxN": zeros, "imaginary_BxIxN": zeros}

    @staticmethod
    def state_axes(cfg: S4) -> dict:
        return {"real_BxIxN": ("batch", "mlp", None), "imaginary_BxIxN": ("batch", "mlp", None)}

    @staticmethod
    def flops(cfg: S4, dim: int, seq_len: int, causal: bool = True) -> float:
        """Projections, and the two reads of the state (output, and the low-rank term); an FFT isn't a matrix product."""
        return 4.0 * dim * dim + 4.0 * dim * cfg.state
