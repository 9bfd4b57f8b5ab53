"""Tries layouts of one config on one slice: every batch is the same, so whatever is chosen trains the same model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from research.aot.compile import compile_for, devices_of, state_bytes
from research.aot.estimate import Floors, Parts
from research.aot.report import report, time_and_money
from research.config import override, to_json
from research.errors import InputError
from research.hardware import Topology
from research.models.moe import Moe
from research.scaling.footprint import activations
from research.schema import Config
from research.sharding import MESH_AXES, mesh_shape
from research.training.program import make_program

REMAT = ("none", "dots", "full", "offload")  # from the fewest FLOPs to the least memory
KEPT = ("memory", "flops", "collectives", "parts", "floors", "step_seconds", "mfu", "compile_seconds")


@dataclasses.dataclass(frozen=True)
class Trial:
    """`sets`: what `--set` would be given. `problem`: why it can't be compiled, in words. `answer`: KEPT of its report."""

    sets: Mapping[str, Any]
    answer: Mapping[str, Any] | None
    problem: str | None = None

    @property
    def fits(self) -> bool:
        return self.answer is not None and self.answer["memory"]["fits"]

    @property
    def seconds(self) -> float:
        """To rank by: the compiler's own time, or the links' where they need longer. Not calibrated: no figure to quote."""
        parts = self.answer["parts"]
        return max(parts["seconds"], self.answer["floors"]["collectives"] or 0.0)


def layouts(config: Config, topology: Topology) -> Iterator[dict[str, Any]]:
    """Meshes, the config's own before others; of each the layout of least memory, for where that doesn't fit none does, then
    from the fewest FLOPs on."""
    devices = topology.devices * config.mesh.slices
    moe = any(isinstance(mixer, Moe) for stage in config.model.stages for mixer in stage.pattern)
    own = {name: getattr(config.mesh, name) for name in ("rules", *MESH_AXES)}
    meshes = [own, {"rules": "fsdp"}, *({"rules": "fsdp", "data": n} for n in (2, 4) if devices % (4 * n) == 0),
              *({"rules": "fsdp_tp", "tensor": n} for n in (2, 4, 8) if devices % n == 0),
              *({"rules": "ep", "expert": n} for n in (2, 4, 8) if moe and devices % n == 0),
              *({"rules": rules, "context": 2} for rules in ("cp", "ring")), {"rules": "dp"}]
    distinct = {}
    for mesh in meshes:
        sets = {f"mesh.{name}": 0 for name in MESH_AXES} | {f"mesh.{name}": value for name, value in mesh.items()}
        try:
            sizes = tuple(mesh_shape(override(config, dict(sets)).mesh, devices).values())
        except InputError:  # is a trial's answer, which says why
            sizes = tuple(sets.values())
        distinct.setdefault((sets["mesh.rules"], sizes), sets)
    splits = [n for n in (1, 2, 4, 8, 16) if config.train.batch_size % n == 0]
    for mesh in distinct.values():
        *others, least_memory = itertools.product(REMAT, splits)
        for remat, microbatches in (least_memory, *others):
            yield {**mesh, "model.remat": remat, "train.microbatches": microbatches}


def search(
    config: Config, topology: Topology, seconds: float, output: str | None = None,
    started: Callable[[Mapping[str, Any]], None] = lambda sets: None,
) -> tuple[list[Trial], int]:
    """(trials, layouts left), for as long as `seconds`; at least one is compiled.

    What can't fit, or can't be faster, by what was compiled already, is not tried. Trials in the file `output` (a line each)
    are not compiled again; new ones are added to it.
    """
    deadline = time.monotonic() + seconds
    key = {"config": to_json(config), "topology": topology.name}
    trials = _read(output, key)
    done, left, fresh = [dict(trial.sets) for trial in trials], 0, 0
    for sets in layouts(config, topology):
        if sets in done or any(_hopeless(sets, trial) for trial in trials):
            continue
        if fresh and time.monotonic() > deadline:
            left += 1
            continue
        started(sets)
        trial = _compile(config, topology, sets)
        fresh += trial.answer is not None
        trials.append(trial)
        _append(output, key, trial)
    return trials, left


def _hopeless(sets: Mapping[str, Any], tried: Trial) -> bool:
    """On the same mesh: less remat and fewer microbatches than what didn't fit; more of either than what does is slower."""
    if any(sets[name] != tried.sets[name] for name in sets if name.startswith("mesh.")):
        return False
    remat = REMAT.index(sets["model.remat"]) - REMAT.index(tried.sets["model.remat"])
    split = sets["train.microbatches"] - tried.sets["train.microbatches"]
    return remat >= 0 and split >= 0 if tried.fits else remat <= 0 and split <= 0


def _compile(config: Config, topology: Topology, sets: Mapping[str, Any]) -> Trial:
    try:
        config = override(config, dict(sets))
        state = topology.chip.devices * state_bytes(make_program(config, devices_of(topology, config.mesh.slices)))
        if state > topology.chip.hbm_bytes:
            return Trial(sets, None, f"needs {state / 1e9:,.0f} GB a chip for the state alone")
        kept = activations(config).low / topology.chips / config.mesh.slices
        if state + kept > topology.chip.hbm_bytes:
            return Trial(sets, None, f"needs {state / 1e9:,.0f} GB a chip for the state, {kept / 1e9:,.0f} for activations")
        answer = report(compile_for(config, topology))
    except InputError as error:
        return Trial(sets, None, str(error))
    return Trial(sets, {name: answer[name] for name in KEPT})


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest by the compiler's cycles, of those that fit."""
    fitting = [trial for trial in trials if trial.fits]
    return min(fitting, key=lambda trial: trial.seconds) if fitting else None


def priced(trial: Trial, config: Config, topology: Topology, price: float | None) -> dict[str, Any]:
    """`time_and_money` of the run in a layout that fits. `price`: USD per chip-hour; None takes the list price.

    From the trial's parts, so one that was kept in a file has today's calibration.
    """
    parts = Parts(**{name: value for name, value in trial.answer["parts"].items() if name != "seconds"})
    return time_and_money(parts, Floors(**trial.answer["floors"]), override(config, dict(trial.sets)), topology, price)


def _read(path: str | None, key: Mapping[str, Any]) -> list[Trial]:
    if path is None or not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]  # a line that was cut short is compiled again
    try:
        rows = [json.loads(line) for line in lines]
        return [Trial(row["sets"], row["answer"], row["problem"]) for row in rows if row["of"] == key]
    except (ValueError, TypeError, KeyError):
        raise InputError("--output", f"{path} holds something else than trials of a search", "name another file") from None


def _append(path: str | None, key: Mapping[str, Any], trial: Trial) -> None:
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"of": key, **vars(trial)}) + "\n")
