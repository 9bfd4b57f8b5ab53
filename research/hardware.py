"""The only table of chips: peaks, memory, links, clocks, power, prices; and the names that people give them.

Figures are of one chip, as its vendor publishes them, dense (no sparsity). A chip may be several JAX devices:
`devices` says how many, so a rate of one device is the chip's over that.

Sources:
  TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "System architecture" and "Configurations". Clocks:
    docs/design.md, section 7; of v4, and its mean power (170 W): Jouppi et al. 2023 (ISCA), table 4. Power of
    tpu7x: "nearly 10 MW" for 9,216 chips (Google, April 2025), so with its share of the machine around it.
    The power of v5e, v5p and v6e isn't published: None.
  GPUs: NVIDIA's data sheets for the SXM boards; the clock is the one at which the tensor peak is reached.
  Prices: lists of on-demand prices in the United States, at their date: Google Cloud for TPUs, AWS for GPUs
    (p4de, p5, p5en, a machine's price over its eight GPUs). They change: look before you quote one.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import jax
import numpy as np

from research.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One row. None is a figure that isn't published, or that this kind of chip doesn't have."""

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    peak_flops: Mapping[str, float] = field(hash=False)  # dtype name: FLOP/s; none for cpu: it is measured
    hbm_bytes: int
    hbm_bandwidth: float | None  # bytes/s
    link_bandwidth: float | None  # bytes/s, all links between chips, both directions together
    clock_hz: float | None
    power_watts: float | None
    price_per_hour: float | None  # USD
    price_date: str
    aliases: tuple[str, ...]  # what else a person may call it
    device_kinds: tuple[str, ...]  # what JAX calls it
    cores: int  # TensorCores, which Google's names count for v4, v5p and tpu7x
    devices: int  # JAX devices
    counts_cores: bool  # is the number in `name-N` one of cores?
    axes: int  # of the network between chips

    def peak(self, dtype: str) -> float:
        """FLOP/s of one chip for products of this dtype ("bfloat16"); a CPU is measured, as float32."""
        if self.kind == "cpu":
            return measured_cpu_peak()
        if dtype not in self.peak_flops:
            raise InputError("dtype", f"{self.name} has no published peak for {dtype!r}",
                             f"one of {', '.join(self.peak_flops)}")
        return self.peak_flops[dtype]


def _peaks(**tera: float) -> Mapping[str, float]:
    """float32 is what JAX's default precision gives it: one bfloat16 pass on TPUs, TensorFloat-32 on GPUs."""
    return MappingProxyType({name: value * 1e12 for name, value in tera.items()})


# The same die in both boards; H200 has more and faster memory.
_HOPPER = _peaks(bfloat16=989.4, float16=989.4, float32=494.7, float8_e4m3fn=1978.9, int8=1978.9)

_ROWS = (
    Chip("v4", "tpu", _peaks(bfloat16=275, float32=275, int8=275),
         32 * GIB, 1228e9, 600e9, 1.05e9, 170.0, 3.22, "2025-12",
         ("tpu-v4",), ("TPU v4",), cores=2, devices=1, counts_cores=True, axes=3),
    Chip("v5e", "tpu", _peaks(bfloat16=197, float32=197, int8=393),
         16 * GIB, 819e9, 400e9, 1.50e9, None, 1.20, "2025-12",
         ("v5litepod", "v5lite", "tpu-v5e"), ("TPU v5 lite", "TPU v5e"),
         cores=1, devices=1, counts_cores=False, axes=2),
    Chip("v5p", "tpu", _peaks(bfloat16=459, float32=459, float8_e4m3fn=459, int8=918),
         95 * GIB, 2765e9, 1200e9, 1.75e9, None, 4.20, "2025-12",
         ("tpu-v5p",), ("TPU v5", "TPU v5p"), cores=2, devices=1, counts_cores=True, axes=3),
    Chip("v6e", "tpu", _peaks(bfloat16=918, float32=918, float8_e4m3fn=918, int8=1836),
         32 * GIB, 1638e9, 800e9, 1.75e9, None, 2.70, "2025-12",
         ("trillium", "tpu-v6e"), ("TPU v6 lite", "TPU v6e"),
         cores=1, devices=1, counts_cores=False, axes=2),
    Chip("tpu7x", "tpu", _peaks(bfloat16=2307, float32=2307, float8_e4m3fn=4614),
         192 * GIB, 7380e9, 1200e9, 2.20e9, 1085.0, 12.00, "2025-12",
         ("ironwood", "v7x", "tpu-v7x"), ("TPU7x",), cores=2, devices=2, counts_cores=True, axes=3),
    Chip("a100", "gpu", _peaks(bfloat16=312, float16=312, float32=156, int8=624),
         80 * GIB, 2039e9, 600e9, 1.41e9, 400.0, 3.43, "2025-06",
         ("a100-80gb",), ("NVIDIA A100-SXM4-80GB",), cores=1, devices=1, counts_cores=False, axes=1),
    Chip("h100", "gpu", _HOPPER,
         80 * GIB, 3350e9, 900e9, 1.83e9, 700.0, 6.88, "2025-06",
         ("h100-80gb",), ("NVIDIA H100 80GB HBM3",), cores=1, devices=1, counts_cores=False, axes=1),
    Chip("h200", "gpu", _HOPPER,
         141 * 10**9, 4800e9, 900e9, 1.83e9, 700.0, 7.91, "2025-06",
         ("h200-141gb",), ("NVIDIA H200",), cores=1, devices=1, counts_cores=False, axes=1),
    Chip("cpu", "cpu", _peaks(),
         os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None, None, None, None, None, "",
         (), ("cpu",), cores=1, devices=1, counts_cores=False, axes=1),
)

CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in _ROWS})

# The shape of a slice that is asked for by its size, by number of axes: Google's tables of configurations.
SLICES: Mapping[int, Mapping[int, tuple[int, ...]]] = {
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
        256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16),
        6144: (16, 16, 24)},
}


@dataclass(frozen=True)
class Topology:
    """A slice: `chips` of one kind in a grid of `shape`."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        """Its canonical name, which `jax.experimental.topologies` takes for TPUs: "v5p:4x4x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def chip(name: str, where: str = "chip", known: Iterable[str] = ()) -> Chip:
    """The row of a name or alias, in any case. Raises InputError, naming `where` and the `known` names, all if not given."""
    for row in _ROWS:
        if name.lower() in (row.name, *row.aliases):
            return row
    raise InputError(where, f"unknown chip {name!r}", f"one of {', '.join(known or CHIPS)}")


def parse_topology(text: str, where: str = "topology", known: Iterable[str] = ()) -> Topology:
    """The slice that a person names.

    "v5p:4x4x4" gives the shape. "v6e-256" counts chips; so do "v5litepod-16" and "h100-8". "v5p-128" counts
    cores, two a chip, as Google does for v4, v5p and tpu7x: 64 chips. A name alone is one chip.

    Raises InputError, naming `where`: an unknown chip (with the `known` names, as `chip`), no shape of its axes, a size
    without a usual shape.
    """
    rows = {alias: row for row in _ROWS for alias in (row.name, *row.aliases)}
    # The longest name first: "a100-80gb" is a chip, not a100 in a size of 80gb.
    name = next((alias for alias in sorted(rows, key=len, reverse=True)
                 if text.lower() == alias or text.lower().startswith((alias + ":", alias + "-"))), None)
    if name is None:
        chip(text.split(":")[0], where, known)  # raises
        raise AssertionError(text)
    row, rest = rows[name], text[len(name):]
    if not rest:
        return Topology(row, (1,) * row.axes)
    example = f"a shape like {row.name}:{'x'.join('4' * row.axes)}"
    if rest[0] == ":":
        sizes = rest[1:].lower().split("x")
        if not all(size.isdecimal() and int(size) > 0 for size in sizes) or len(sizes) != row.axes:
            raise InputError(where, f"{rest[1:]!r} isn't a shape of {row.axes} axes", example)
        return Topology(row, tuple(int(size) for size in sizes))
    count, cores = rest[1:], row.cores if row.counts_cores else 1
    if not count.isdecimal() or int(count) == 0 or int(count) % cores:
        unit = "cores, two a chip" if cores > 1 else "chips"
        raise InputError(where, f"{count!r} isn't a number of {unit}", example)
    chips = int(count) // cores
    if row.axes == 1:
        return Topology(row, (chips,))
    if chips not in SLICES[row.axes]:
        raise InputError(where, f"no usual slice of {row.name} has {chips} chips",
                         f"one of {', '.join(map(str, SLICES[row.axes]))}, or {example}")
    return Topology(row, SLICES[row.axes][chips])


def chip_of(device: jax.Device) -> Chip:
    """The row of a JAX device. Raises InputError for a chip that isn't in the table."""
    for row in _ROWS:
        if device.device_kind in row.device_kinds:
            return row
    known = ", ".join(kind for row in _ROWS for kind in row.device_kinds)
    raise InputError("device", f"{device.device_kind!r} isn't in the table of chips ({known})",
                     "add its row to research/hardware.py")


def chip_count(devices: Iterable[jax.Device]) -> float:
    """How many chips JAX devices make up: a tpu7x is two devices, a host's CPU devices are one."""
    devices = list(devices)
    cpus = {device.process_index for device in devices if device.platform == "cpu"}
    return len(cpus) + sum(1 / chip_of(device).devices for device in devices if device.platform != "cpu")


@functools.cache
def measured_cpu_peak() -> float:
    """FLOP/s of this host's cores in float32: the best of a few matrix products, about 0.2 s, once a process.

    It is of the whole host, however many CPU devices JAX was told to show.
    """
    size, budget, least = 768, 0.15, 3
    cpu = jax.local_devices(backend="cpu")[0]
    x = jax.device_put(np.full((size, size), 1 / size, np.float32), cpu)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()  # compile
    best, spent, runs = float("inf"), 0.0, 0
    while spent < budget or runs < least:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        took = time.perf_counter() - start
        best, spent, runs = min(best, took), spent + took, runs + 1
    return 2 * size**3 / best
