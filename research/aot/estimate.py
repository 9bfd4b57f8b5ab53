"""What a step must take at least, what it may take, and how far the compiler's own estimate carries.

Formulas, sources, and how the calibration was made: docs/tpu.md.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from research.aot import hlo
from research.aot.hlo import Collective
from research.hardware import CHIPS, Chip
from research.models.attention import Attention
from research.models.mlp import GatedMlp
from research.models.moe import Moe
from research.schema import Config

ATTENTION_SHARE, GROUPED_SHARE = 0.5, 0.85  # of a chip's peak, in kernels whose cycles the compiler doesn't know: assumed
LEAST_RUNS = 4  # published ones, below which nothing is shown
MOST_ERROR = 0.15  # of a published run by the others: beyond it nothing is shown
MOST_UNKNOWN = 0.15  # of the cycles, in what no published run has
MOST_COLLECTIVES = 0.25  # of the step, as a floor: the published runs hide theirs, up to 10% of the step
LEAST_DIM = 2048  # half of the narrowest published run's: below it, what a product costs besides its FLOPs is another matter
# Attention's projections, among what the backward pass makes again.
AGAIN = re.compile(r"rematted_computation/.*/attention_\d+/(attention_\d+\._project/)?dot_general")
CALIBRATED_MIXERS = (Attention, GatedMlp, Moe)


@dataclasses.dataclass(frozen=True)
class Floors:
    """Seconds below which no step goes, whatever its batch holds. collectives: None where the chip's links aren't known; what
    a router sends counts as if it were sent evenly."""

    compute: float
    memory: float
    collectives: float | None


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds of a step on one device.

    dense: the compiler's cycles over the clock, but for attention. The kernels are what they say of their FLOPs, at the peak:
    attention, and grouped products. unknown: attention without a kernel (its cycles), kernels that aren't known here, and what
    the compiler has no idea of (what goes in and comes out, over the memory's bandwidth).
    silent: how many kernels say nothing; they are in no sum. unknown_loops: how many loops don't say how often they run; each
    is counted once. again: of dense, attention's projections that the backward pass makes a second time.
    """

    dense: float
    attention: float = 0.0
    grouped: float = 0.0
    unknown: float = 0.0
    silent: int = 0
    unknown_loops: int = 0
    again: float = 0.0

    @property
    def seconds(self) -> float:
        """Before the calibration."""
        return self.dense + self.attention / ATTENTION_SHARE + self.grouped / GROUPED_SHARE + self.unknown


@dataclasses.dataclass(frozen=True)
class Run:
    """A published run, and the parts of our compile of its shapes (calibration.py has the table)."""

    name: str
    chip: str
    seconds: float  # published, or from the published throughput
    parts: Parts


@dataclasses.dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


def floors(flops: float, state_bytes: float, found: Sequence[Collective], chip: Chip, chips: int, dtype: str,
           skippable: float = 0.0) -> Floors:
    """`flops`: of a step on all chips. `state_bytes`: read and written once a step, a chip. `found`: of one device.
    `skippable`: seconds at the peak that a batch may do without: of packed rows, attention's kernels.

    A collective's floor is what a device must receive at the least, over half of its chip's links (the other half sends): of n
    devices in a group each has 1/n already; a reduction that everyone needs moves twice as much.
    """
    received = chip.devices * sum(_received(c) for c in found)
    links = None if chip.link_bandwidth is None else received / (chip.link_bandwidth / 2)
    compute = max(0.0, flops / chips / chip.peak(dtype) - skippable)
    return Floors(compute, 2 * state_bytes / chip.hbm_bandwidth, links)


def _received(collective: Collective) -> float:
    """Bytes that a device receives in a step."""
    whole = collective.times * collective.bytes
    if collective.kind == "collective-permute":
        return whole
    if collective.kind == "ragged-all-to-all":  # of the two buffers, one is a device's rows, one has room for everybody's
        whole = collective.times * min(hlo.size(*array) for array in collective.arrays[:2])
    share = (collective.group - 1) / collective.group
    return whole * share * (2 if collective.kind == "all-reduce" else 1)


def parts(program: hlo.Program, chip: Chip, dtype: str) -> Parts:
    """Of a compiled step; kernels are told apart by name."""
    cycles = {"dense": 0, "unknown": 0, "again": 0}
    flops, moved, silent = {"attention": 0.0, "grouped": 0.0, "unknown": 0.0}, 0, 0
    for where, instruction, times in hlo.walk(program):
        if instruction.attribute(r'custom_call_target="(tpu_custom_call)"'):
            declared = float(instruction.attribute(r'"flops":"(-?\d+)"') or 0)
            flops[_kernel(instruction)] += times * declared
            silent += declared <= 0 and "pallas_call" in instruction.op_name
        elif instruction.is_beyond_it:
            shapes = (instruction.shape, *(program.computations[where][name].shape for name in instruction.operands))
            moved += times * sum(hlo.size(*array) for shape in shapes for array in hlo.arrays(shape))
        else:
            cycles["unknown" if "._attend/" in instruction.op_name else "dense"] += times * instruction.cycles
            cycles["again"] += times * instruction.cycles * bool(AGAIN.search(instruction.op_name))
    peak = chip.peak(dtype) / chip.devices
    unknown = cycles["unknown"] / chip.clock_hz + flops["unknown"] / peak + moved / (chip.hbm_bandwidth / chip.devices)
    return Parts(cycles["dense"] / chip.clock_hz, flops["attention"] / peak, flops["grouped"] / peak, unknown, silent,
                 hlo.unknown_loops(program), cycles["again"] / chip.clock_hz)


def _kernel(instruction: hlo.Instruction) -> str:
    name = f"{instruction.name} {instruction.op_name}"
    if re.search(r"ragged-dot|t?gmm", name):
        return "grouped"
    return "attention" if re.search(r"_attend/|flash|attention", name) else "unknown"


def calibration(runs: Sequence[Run]) -> tuple[float, dict[str, float]]:
    """(scale, residuals): seconds are `Parts.seconds` over the scale, the geometric mean over the runs; and for each run the
    relative error of what the scale of the other runs says of it."""
    logs = {run.name: math.log(run.parts.seconds / run.seconds) for run in runs}
    scale = math.exp(sum(logs.values()) / len(logs))
    others = {name: (sum(logs.values()) - own) / (len(logs) - 1) for name, own in logs.items()}
    return scale, {name: math.exp(own - others[name]) - 1 for name, own in logs.items()}


def step_seconds(
    step: Parts, floor: Floors, config: Config, chip: Chip, runs: Sequence[Run],
) -> tuple[Interval | None, str | None]:
    """(interval, None), or (None, why the calibration doesn't carry it)."""
    if len(runs) < LEAST_RUNS:
        return None, "the estimate isn't calibrated"
    scale, residuals = calibration(runs)
    error = max(map(abs, residuals.values()))
    if error > MOST_ERROR:
        return None, f"the calibration is off by {error:.0%} at its worst"
    known = [name for name in CHIPS if name in {run.chip for run in runs}]
    if chip.name not in known:
        return None, f"no published run on {chip.name} that can be compared (calibrated: {', '.join(known)})"
    mixers = {type(mixer) for stage in (*config.model.stages, *config.model.encoder_stages) for mixer in stage.pattern}
    if strange := sorted(mixer.__name__ for mixer in mixers if mixer not in CALIBRATED_MIXERS):
        return None, f"no published run has {', '.join(strange)}"
    if config.model.dim < LEAST_DIM:
        return None, f"no published run is as narrow as model.dim={config.model.dim}"
    if config.optim.offload or config.model.remat == "offload":
        return None, "what goes to the host and comes back isn't modelled"
    if config.mesh.slices > 1:
        return None, "no published run here is over several slices"
    if config.mesh.rules in ("cp", "ring"):
        return None, "no published run splits rows, of which the last device has the most work"
    if step.silent:
        return None, f"{step.silent} Pallas kernels don't say their cost"
    if step.unknown_loops:
        return None, f"{step.unknown_loops} loops don't say how often they run, and are counted once"
    if step.unknown > MOST_UNKNOWN * step.seconds:
        return None, (f"{step.unknown / step.seconds:.0%} of the compiler's time is attention without a kernel, or in kernels "
                      "that no published run has")
    value = step.seconds / scale
    least = max(floor.compute, floor.memory, floor.collectives or 0.0)
    if (floor.collectives or 0.0) > MOST_COLLECTIVES * value:
        return None, "collectives take more of the step than in any published run"
    low = max(value * (1 - error), least)
    return Interval(max(value, low), low, max(value * (1 + error), low)), None
