"""What `tools.aot` says of a compiled step: figures and warnings."""

from __future__ import annotations

import collections
import math
from typing import Any, Mapping, Sequence

from kernels.cross_entropy import BLOCK_GATHER
from research.aot import calibration, estimate, hlo
from research.aot.advice import what_would_help
from research.aot.compile import Compiled, state_bytes, step_flops
from research.aot.estimate import Floors, Parts
from research.aot.hlo import Collective
from research.hardware import Topology
from research.schema import Config
from research.training.program import Program

SHARE = 0.01  # of the bytes of a step's collectives, below which one is no matter
NAMED = 3  # of a kind, in a warning


def report(compiled: Compiled, price: float | None = None) -> dict[str, Any]:
    """The JSON of `tools.aot`: docs/interfaces.md. `price`: USD per chip-hour; None takes the list price."""
    program, chip = compiled.program, compiled.topology.chip
    mesh = dict(program.layout.mesh.shape)
    warnings: list[str] = []
    flops, dtype = _flops(program, warnings), program.config.model.compute_dtype
    found, cycles, parts, floors = None, None, None, None
    if compiled.text is not None:
        parsed = hlo.parse(compiled.text)
        found, cycles = hlo.collectives(parsed, mesh), hlo.cycles(parsed)
        warnings += collective_warnings(found, program)
        if compiled.memory.total > compiled.memory.hbm:
            warnings.append("the compiler's own sum of the memory is above the chip's, and yet it placed the program: it "
                            "counts buffers that share their place; peak says what is alive at one time")
        parts = estimate.parts(parsed, chip, dtype)
        if parts.unknown_loops:
            warnings.append(f"{parts.unknown_loops} loops don't say how often they run: what is in them is counted once, so "
                            "cycles, collectives and parts are too low")
        # Documents in a packed row hide blocks of keys from each other, which the kernels then skip; how many, a batch decides.
        floors = estimate.floors(
            flops["step"] or flops["model"], chip.devices * state_bytes(program), found, chip, compiled.chips, dtype,
            skippable=parts.attention if program.config.data.packed else 0.0)
    figures = time_and_money(parts, floors, program.config, compiled.topology, price)
    seconds = figures["step_seconds"]
    if seconds and (strangers := calibration.strangers()):
        warnings.append(f"the times' calibration was measured with {', '.join(strangers)}, not with what is installed here: "
                        "python -m tools.aot --calibrate measures it again")
    return {
        "config": program.config.name, "topology": compiled.topology.name, "slices": compiled.slices, "chips": compiled.chips,
        "mesh": {axis: size for axis, size in mesh.items() if size > 1}, "memory": dict(vars(compiled.memory)), "flops": flops,
        "collectives": None if found is None else summed(found), "estimated_cycles": cycles,
        "parts": parts and {**vars(parts), "seconds": parts.seconds}, "floors": floors and dict(vars(floors)),
        **figures, "mfu": seconds and _over(flops["model"] / compiled.chips / chip.peak(dtype), seconds),
        "tokens_per_step": program.tokens_per_step, "steps": program.config.train.steps,
        "compile_seconds": compiled.seconds, "warnings": warnings,
        "help": [] if compiled.memory.fits else what_would_help(program.config, compiled.memory, mesh, compiled.topology)}


def time_and_money(
    parts: Parts | None, floors: Floors | None, config: Config, topology: Topology, price: float | None,
) -> dict[str, Any]:
    """step_seconds, chip_hours and cost of the run that `config` is ({value, low, high}; None where not_shown says why), by the
    calibration that is shipped. No parts: the step doesn't fit. `price` as in `report`."""
    seconds, reason = None, "the step doesn't compile: it doesn't fit"
    if parts is not None and floors is not None:
        seconds, reason = estimate.step_seconds(parts, floors, config, topology.chip, calibration.runs())
    price = topology.chip.price_per_hour if price is None else price
    hours = seconds and _times(vars(seconds), config.train.steps * topology.chips * config.mesh.slices / 3600)
    return {"step_seconds": seconds and dict(vars(seconds)), "not_shown": reason, "chip_hours": hours, "price": price,
            "cost": None if hours is None or price is None else _times(hours, price)}


def _times(interval: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in interval.items()}


def _over(number: float, interval: Mapping[str, float]) -> dict[str, float]:
    return {"value": number / interval["value"], "low": number / interval["high"], "high": number / interval["low"]}


def _flops(program: Program, warnings: list[str]) -> dict[str, float | None]:
    """step: as written, with what remat does again; model: the algorithm's. Of all chips."""
    model = program.flops_per_token * program.tokens_per_step
    try:
        step = step_flops(program)
    except ValueError as error:
        warnings.append(str(error))
        return {"step": None, "model": model, "ratio": None}
    return {"step": step, "model": model, "ratio": step / model}


def summed(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """By kind and axis, of one step on one device; the most bytes first."""
    counts, total = collections.Counter(), collections.Counter()
    for one in found:
        counts[one.kind, one.axis] += one.times
        total[one.kind, one.axis] += one.times * one.bytes
    return [{"kind": kind, "count": counts[kind, axis], "bytes": size, "axis": axis}
            for (kind, axis), size in sorted(total.items(), key=lambda item: (-item[1], item[0]))]


def collective_warnings(found: Sequence[Collective], program: Program) -> list[str]:
    """All-gathers of activations (other than context parallelism's keys), sums in float32, sums in place of gathers."""
    gathers = [one for one in found if one.kind == "all-gather" and one.axis != "context" and gathers_activations(one, program)]
    least = SHARE * sum(one.times * one.bytes for one in found)
    wide = [one for one in found if one.times * sum(hlo.size(*a) for a in one.arrays if a[0] == "f32") > least]
    padded = [one for one in found if one.kind == "all-reduce" and one.padded and one.times * one.bytes > least]
    size = sum(one.times * one.bytes for one in padded) / 1e9
    instead = [f"{sum(one.times for one in padded)} all-gathers a step are written as all-reduces of zero-filled arrays, "
               f"{size:,.1f} GB: twice the bytes; the compiler does so over all axes of a v5p torus, not over a plane of it "
               "(docs/tpu.md)"] if padded else []
    return [*_named("all-gather of activations", gathers), *_named("float32 collective", wide), *instead]


def gathers_activations(one: Collective, program: Program) -> bool:
    """Is what it gathers as large as a device's rows, and no weight's size, nor what a mesh axis leaves of one?

    The loss says of its own gathers that they are the unembedding's, a block of words at a time.
    """
    if one.op_name and BLOCK_GATHER in one.op_name:
        return False
    config, devices = program.config, math.prod(program.layout.mesh.shape.values())
    rows = config.train.batch_size // config.train.microbatches * config.data.seq_len * config.model.dim / devices
    weights = {weight.size // (weight.shape[weight.axes.index("layers")] if "layers" in weight.axes else 1)
               for weight in program.model.weights.values()}
    sizes = [math.prod(shape) for _, shape in one.arrays]
    parts = {size // part for size in weights for part in range(1, devices + 1) if devices % part == 0}
    return any(size >= rows / 2 and size not in parts for size in sizes)


def _named(what: str, found: Sequence[Collective]) -> list[str]:
    found = sorted(found, key=lambda one: -one.times * one.bytes)
    lines = [f"{what}: {one.kind} over {one.axis} of {', '.join(f'{d}{list(s)}' for d, s in one.arrays[:2])}, {one.times} a "
             f"step, {one.times * one.bytes / 1e6:,.1f} MB ({one.op_name or 'no name'})" for one in found[:NAMED]]
    return lines + ([f"{what}: and {len(found) - NAMED} smaller ones"] if len(found) > NAMED else [])
