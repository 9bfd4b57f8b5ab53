"""What to change of a run whose step doesn't fit, as flags to paste."""

from __future__ import annotations

import math
from collections.abc import Mapping

from research.aot.compile import Memory
from research.hardware import SLICES, Topology
from research.schema import Config
from research.training.optimizers import OPTIMIZERS


def what_would_help(config: Config, memory: Memory, mesh: Mapping[str, int], topology: Topology) -> list[str]:
    """Lines of flags, each with a comment as a shell takes it; what takes the most off first. None of them is compiled here.

    mesh: sizes of its axes by name, over all slices.
    """
    optim, train, found = config.optim, config.train, []
    shards = math.prod(size for axis, size in mesh.items() if axis in ("data", "fsdp", "expert"))
    rows = train.batch_size // train.microbatches

    def say(words: str, **sets: object) -> None:
        flags = (f"--set {name.replace('__', '.')}={str(value).lower()}" for name, value in sets.items())
        found.append(" ".join(flags) + f"  # {words}")

    if memory.arguments > memory.hbm / 4:
        if config.mesh.rules == "dp":
            say("splits weights and optimizer state over the chips", mesh__rules="fsdp", **_automatic(config, "data"))
        elif config.mesh.data > 1:
            say("no replicas: weights and optimizer state are split over all chips", **_automatic(config, "data", "fsdp"))
        if not optim.offload:
            say("the optimizer's state rests in the hosts' memory, and each step waits for it", optim__offload=True)
        if OPTIMIZERS["adafactor"] is not OPTIMIZERS[optim.name]:
            say("another optimizer, which keeps next to no state", optim__name="adafactor", optim__b1=0)
    if config.model.remat in ("none", "dots"):
        say("keeps one activation a layer", model__remat="full")
    if config.model.remat != "offload":
        say("keeps that one activation in the hosts' memory", model__remat="offload")
    parts = next((n for n in range(2, rows // shards + 1) if rows % (n * shards) == 0), None)
    if parts:
        say(f"1/{parts} of the activations at one time", train__microbatches=parts * train.microbatches)
    elif mesh["context"] == 1 and config.mesh.rules in ("dp", "fsdp") and shards % 2 == config.data.seq_len % 2 == 0:
        say("half a row a chip at one time, where it is one already", mesh__rules="cp", mesh__context=2,
            **_automatic(config, "data", "fsdp"), train__microbatches=2 * train.microbatches)
    return found + _larger_slice(config, memory, topology, shards)


def _automatic(config: Config, *axes: str) -> dict[str, int]:
    """Sizes that the config gives to these axes, taken back."""
    return {f"mesh__{axis}": 0 for axis in axes if getattr(config.mesh, axis)}


def _larger_slice(config: Config, memory: Memory, topology: Topology, shards: int) -> list[str]:
    """The first usual one that has room for it, if all is split evenly over its chips, in a list; none where none has, or where
    more chips split nothing. A row a chip is the least, so the batch may have to grow with them."""
    room, microbatches = memory.total - memory.excess, config.train.microbatches
    rows = config.train.batch_size // microbatches
    if config.mesh.rules == "dp" or config.mesh.fsdp:
        return []
    for chips, shape in SLICES[topology.chip.axes].items():
        if chips <= topology.chips or shards * chips % topology.chips:
            continue
        more, wider = chips / topology.chips, shards * chips // topology.chips
        kept = rows + -rows % wider
        needed = memory.arguments / more + (memory.total - memory.arguments) * (kept / wider) / (rows / shards)
        if needed > room or config.model.dim % wider:
            continue
        name = f"{topology.chip.name}:{'x'.join(map(str, shape))}"
        batch = "" if kept == rows else f" --set train.batch_size={kept * microbatches}"
        return [f"--topology={name}{batch}  # {chips} chips a slice, if it is split evenly"]
    return []
