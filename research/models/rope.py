"""Rotary position embedding (Su et al. 2021), halves rotated as in Llama, and what stretches it to longer contexts.

linear: Chen et al. 2023, positions divided by a factor. llama3: Llama 3.1 (2024), long wavelengths divided, short ones kept,
a smooth passage between. yarn: Peng et al. 2023, section 3.2, the same idea over dimensions, and attention's temperature.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels.lowering import by_platform
from research.config import Node, Positive, PositiveFloat
from research.errors import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling(Node):
    """`factor`: by how much longer than `original_len` tokens, the length of pretraining (not read by linear).

    A wavelength that turns fewer than `low` times in original_len is divided by the factor, one that turns more than
    `high` times is kept (None: as published, 4 for llama3, 32 for yarn). `magnitude` multiplies rotated queries and
    rotated keys; None: yarn_magnitude(factor) for yarn, 1 for the others.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: PositiveFloat
    original_len: Positive | None = None
    low: PositiveFloat = 1.0
    high: PositiveFloat | None = None
    magnitude: PositiveFloat | None = None

    def validate(self):
        if self.kind == "linear":
            return
        if self.original_len is None:
            raise InputError("original_len", f"{self.kind} needs the length of pretraining", "set it in tokens")
        if self.turns_kept <= self.low:
            raise InputError("high", f"{self.turns_kept} is not above low={self.low}", "raise it")

    @property
    def turns_kept(self) -> float:
        return self.high or {"linear": math.inf, "llama3": 4.0, "yarn": 32.0}[self.kind]


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's 0.1 ln(factor) + 1, times `weight` in its first term (DeepSeek's mscale); 1 where nothing is stretched."""
    return 1.0 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0


def frequencies(width: int, base: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """(radians a token for each of the width / 2 pairs, float64; the factor on what is rotated)."""
    half = width // 2
    frequency = base ** (-np.arange(half) / half)
    if scaling is None:
        return frequency, 1.0
    stretched = frequency / scaling.factor
    magnitude = scaling.magnitude or (yarn_magnitude(scaling.factor) if scaling.kind == "yarn" else 1.0)
    if scaling.kind == "linear":
        return stretched, magnitude
    if scaling.kind == "llama3":
        turns = scaling.original_len * frequency / (2 * math.pi)
        kept = (turns - scaling.low) / (scaling.turns_kept - scaling.low)
    else:  # a straight line over the pairs, between the ones that turn `high` and `low` times

        def pair(turns: float) -> float:
            return half * math.log(scaling.original_len / (turns * 2 * math.pi)) / math.log(base)

        first, last = max(math.floor(pair(scaling.turns_kept)), 0), min(math.ceil(pair(scaling.low)), width - 1)
        kept = 1.0 - (np.arange(half) - first) / max(last - first, 1e-3)
    kept = np.clip(kept, 0.0, 1.0)
    return kept * frequency + (1.0 - kept) * stretched, magnitude


def _turns(positions_BxL: jax.Array, frequency_K: jax.Array, magnitude: float) -> tuple[jax.Array, jax.Array]:
    """(cos_BxLx1xK, sin_BxLx1xK), float32."""
    angle_BxLx1xK = positions_BxL[..., None, None].astype(jnp.float32) * frequency_K
    return jnp.cos(angle_BxLx1xK) * magnitude, jnp.sin(angle_BxLx1xK) * magnitude


def _turns_looped(positions_BxL: jax.Array, frequency_K: jax.Array, magnitude: float) -> tuple[jax.Array, jax.Array]:
    """The same in a loop over two halves of K: else XLA, on a CPU, makes each angle's cosine again for every head."""
    if frequency_K.shape[0] % 2:
        return _turns(positions_BxL, frequency_K, magnitude)
    halves = jax.lax.map(lambda half_K: _turns(positions_BxL, half_K, magnitude), frequency_K.reshape(2, -1))
    return tuple(jnp.concatenate(list(half), axis=-1) for half in halves)


def rotate(
    x_BxLxHxK: jax.Array, positions_BxL: jax.Array, base: float, scaling: RopeScaling | None = None, width: int | None = None,
) -> jax.Array:
    """RoPE: rotates the pairs (k, k + width/2) by positions * base^(-2k/width), scaled; float32 inside.

    Only the first `width` features are rotated (None: all K), the rest passes through.
    """
    width = width or x_BxLxHxK.shape[-1]
    frequency, magnitude = frequencies(width, base, scaling)
    plain, looped = (functools.partial(form, magnitude=magnitude) for form in (_turns, _turns_looped))
    cos, sin = by_platform(positions_BxL, jnp.asarray(frequency, jnp.float32), cpu=looped, otherwise=plain)
    a, b = jnp.split(x_BxLxHxK[..., :width].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxLxHxK.dtype)
    return rotated if width == x_BxLxHxK.shape[-1] else jnp.concatenate([rotated, x_BxLxHxK[..., width:]], axis=-1)
