"""What a step must take at least, what it may take, and how far the compiler's own estimate is to be trusted.

Formulas, sources and the calibration: docs/tpu.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from research.aot.hlo import Collective
from research.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Floors:
    """Seconds of a step below which the hardware can't go. collectives: None where the chip's links aren't known."""

    compute: float
    memory: float
    collectives: float | None


def floors(flops: float, state_bytes: float, found: Sequence[Collective], chip: Chip, chips: int, dtype: str) -> Floors:
    """`flops`: of a step on all chips. `state_bytes`: read and written once a step, a chip. `found`: of one device.

    A collective's floor is what a device must receive at the least, over half of its chip's links (the other half sends): of n
    devices in a group each has 1/n already; a reduction that everyone needs moves twice as much.
    """
    received = chip.devices * sum(_received(c) for c in found)
    links = None if chip.link_bandwidth is None else received / (chip.link_bandwidth / 2)
    return Floors(flops / chips / chip.peak(dtype), 2 * state_bytes / chip.hbm_bandwidth, links)


def _received(collective: Collective) -> float:
    """Bytes that a device receives in a step."""
    whole = collective.times * collective.bytes
    if collective.kind == "collective-permute":
        return whole
    share = (collective.group - 1) / collective.group
    return whole * share * (2 if collective.kind == "all-reduce" else 1)
