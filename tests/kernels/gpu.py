"""Pallas kernels for NVIDIA GPUs where there is none: lowered for one, as far as JAX goes without it."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh


def lowered(fn: Callable, *shapes: jax.ShapeDtypeStruct, platform: str = "cuda") -> str:
    """`fn`'s program for a platform, as text. JAX 0.12 asks which GPU it will be, older ones assume a Hopper."""
    hopper = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
    with jax.sharding.use_abstract_mesh(hopper):
        return jax.jit(fn).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def triton_kernels(program: str) -> list[str]:
    """Names of the Triton kernels that a lowered program calls, in its order."""
    calls = [line for line in program.splitlines() if "__gpu$xla.gpu.triton" in line]
    return [re.search(r'name = "(\w+)"', line)[1] for line in calls]
