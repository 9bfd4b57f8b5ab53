"""Compiles the very step that `experiments.train` would run, for a TPU slice, on whatever machine this is.

Nothing is allocated: the program is made of shapes (`training/program.py`), the compiler is libtpu's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from research import sharding
from research.errors import InputError
from research.hardware import Topology, parse_topology
from research.schema import Config
from research.training.flops import count_flops
from research.training.program import Program, make_program
from research.training.state import HOST

TPUS = ("v5e", "v5p", "v6e", "tpu7x")
MOST_CHIPS = 9216  # tpu7x's pod, the largest
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a chip. `total`: arguments (the state and a batch), temporaries, and outputs without what they reuse.

    temporaries are as the compiler's summary counts them, which is more than it sets aside (docs/tpu.md). `peak` is what is
    alive at one time, arguments included; None where the compiler gave up, or counts the host's with it. `fits`: its verdict,
    it refuses what it can't place; `excess`: by how much that is more than it has room for, which is less than `hbm`; 0 if it
    fits. `host`: arguments and temporaries in the host's memory, which the others don't count.
    """

    arguments: int
    temporaries: int
    total: int
    peak: int | None
    hbm: int
    fits: bool
    host: int = 0
    excess: int = 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """`text`: the optimized HLO, None where the compiler gave up because the memory is too small."""

    program: Program
    topology: Topology
    slices: int
    memory: Memory
    text: str | None
    seconds: float

    @property
    def chips(self) -> int:
        return self.topology.chips * self.slices


def tpu_topology(text: str, where: str = "--topology") -> Topology:
    """Raises InputError, naming `where`: an unknown chip, one that is no TPU, a shape that it doesn't come in."""
    topology = parse_topology(text, where, TPUS)
    if topology.chip.name not in TPUS:
        raise InputError(where, f"nothing is compiled for {topology.chip.name} here",
                         f"one of {', '.join(TPUS)}, as v5p:4x4x4 or v6e-256")
    if topology.chips > MOST_CHIPS:
        raise InputError(where, f"{topology.name} has {topology.chips:,} chips", f"at most {MOST_CHIPS:,}, as many as a pod")
    return topology


def check_libtpu() -> None:
    """Raises InputError where the compiler isn't installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu", "the TPU compiler is not installed", 'pip install "rung[tpu]"')


def devices_of(topology: Topology, slices: int = 1) -> Sequence[Any]:
    """The devices of so many slices that aren't there.

    Raises:
      InputError: libtpu isn't installed, or knows no such slice.
    """
    check_libtpu()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.chips == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu", **more).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("--topology", f"the compiler knows no slice {topology.name} ({reason})",
                         "whole hosts of 4 chips, as v5e:2x2, v5p:2x2x1, v6e:16x16") from None


def compile_for(config: Config, topology: Topology) -> Compiled:
    """Raises InputError for a mesh, batch or row that doesn't fit the slice. Too little memory is an answer, not an error."""
    slices = config.mesh.slices
    sharding.mesh_shape(config.mesh, topology.devices * slices)  # before libtpu, which writes lines of its own
    program = make_program(config, devices_of(topology, slices))
    started = time.perf_counter()
    text, failure = None, ""
    with no_cache():
        try:
            compiled = program.compile()
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            failure = str(error)
            if "RESOURCE_EXHAUSTED" not in failure:
                raise
    seconds = time.perf_counter() - started
    memory = _memory(compiled, topology) if text is not None else _too_much(failure, topology, state_bytes(program))
    return Compiled(program, topology, slices, memory, text, seconds)


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """Without the persistent cache. What is compiled for a topology can't be read back from it: JAX would try, and warn."""

    def use(cache: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()  # else what the first compile of this process found stays true

    before = jax.config.jax_enable_compilation_cache
    use(False)
    try:
        yield
    finally:
        use(before)


def _memory(compiled: Any, topology: Topology) -> Memory:
    found, devices = compiled.memory_analysis(), topology.chip.devices
    arguments, temporaries = devices * found.argument_size_in_bytes, devices * found.temp_size_in_bytes
    outputs = devices * (found.output_size_in_bytes - found.alias_size_in_bytes)
    host = devices * (found.host_argument_size_in_bytes + found.host_temp_size_in_bytes)
    peak = None if host else devices * found.peak_memory_in_bytes  # which counts the host's, too
    return Memory(arguments, temporaries, arguments + temporaries + outputs, peak, topology.chip.hbm_bytes, True, host)


def _too_much(message: str, topology: Topology, state: int) -> Memory:
    """What the compiler says of a program that is too large, of one device. Its short message has the total only: `state` bytes
    of it are then the arguments."""

    def told(pattern: str) -> int:
        match = re.search(pattern, message)
        return round(float(match[1]) * _UNITS[match[2]]) * topology.chip.devices if match else 0

    arguments, temporaries = told(r"arguments\s+([\d.]+)([KMGT]?)"), told(r"program\s+([\d.]+)([KMGT]?)")
    total = max(told(rf"{words} \(?([\d.]+)([KMGT]?)") for words in ("Used", "usage >=", "HLO temporaries"))
    total = max(total, arguments + temporaries)
    if not arguments:
        arguments = min(state * topology.chip.devices, total)
        temporaries = total - arguments
    room = max(told(rf"{words} \(?([\d.]+)([KMGT]?)") for words in (r"Used [\d.]+[KMGT]? of", "available HBM"))
    excess = told(r"capacity by ([\d.]+)([KMGT]?)") or total - (room or topology.chip.hbm_bytes)
    # Its numbers are rounded: one may be told as the other, and yet it is too much.
    return Memory(arguments, temporaries, total, None, topology.chip.hbm_bytes, False, excess=max(1, excess))


def state_bytes(program: Program) -> int:
    """Of the state on one device, from shapes: without the tiles that a compiler rounds up to, and what rests on the host."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(program.abstract) if leaf.sharding.memory_kind != HOST)


def step_flops(program: Program) -> float:
    """Of matrix products in one step on all chips, as compiled for TPU: with what remat does again.

    Raises ValueError for a Pallas kernel that says nothing of its cost.
    """
    with sharding.use(program.layout.mesh, program.layout.rules):
        return count_flops(program.step, program.abstract, None, program.abstract_batch(), platform="tpu")
