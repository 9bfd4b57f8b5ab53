"""Pallas kernels for TPUs where there is none: in the TPU's interpreter, and through the TPU's compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # the finding has no public name
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding


@pytest.fixture(autouse=True)
def interpret_pallas(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test whose `implementation` is "pallas" runs it here, in memory that holds NaN until it is written; a race fails it."""
    if "implementation" not in request.fixturenames or request.getfixturevalue("implementation") != "pallas":
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert not interpreter.races.races_found


def slow_pallas(names: Iterable[str]) -> list:
    """Parameters of a test that takes long in the interpreter, and whose point a quick test makes, too."""
    return [pytest.param(name, marks=pytest.mark.slow) if name == "pallas" else name for name in names]


def compiled(fn: Callable, shapes: list[jax.ShapeDtypeStruct], topology: str) -> jax.stages.Compiled:
    """`fn` as the compiler of this topology makes it for one of its chips."""
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    chip = SingleDeviceSharding(topologies.get_topology_desc(topology, platform="tpu").devices[0])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip) for x in shapes]
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for a topology can't be read back from it
    try:
        return jax.jit(fn).lower(*shapes).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
