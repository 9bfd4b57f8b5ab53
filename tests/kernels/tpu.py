"""Pallas kernels for TPUs where there is none: through the TPU's compiler. (In its interpreter: conftest.py.)"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from research.aot.compile import no_cache


def slow_pallas(names: Iterable[str]) -> list:
    """Parameters of a test that takes long in the interpreter, and whose point a quick test makes, too."""
    return [pytest.param(name, marks=pytest.mark.slow) if name == "pallas" else name for name in names]


def compiled(fn: Callable, shapes: list[jax.ShapeDtypeStruct], topology: str) -> jax.stages.Compiled:
    """`fn` as the compiler of this topology makes it for one of its chips."""
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    chip = SingleDeviceSharding(topologies.get_topology_desc(topology, platform="tpu").devices[0])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip) for x in shapes]
    with no_cache():
        return jax.jit(fn).lower(*shapes).compile()
