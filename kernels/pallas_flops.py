"""Flops of one call of each Pallas kernel, by its name, for who counts a program's (they are those of the form without it)."""

from __future__ import annotations

from collections.abc import Callable

from kernels import gated_delta_pallas, selective_scan_pallas, ssd_pallas, wkv7_pallas

# From the operands, each with shape and dtype.
PALLAS_FLOPS: dict[str, Callable[..., float]] = {
    **gated_delta_pallas.FLOPS,
    **selective_scan_pallas.FLOPS,
    **ssd_pallas.FLOPS,
    **wkv7_pallas.FLOPS,
}
