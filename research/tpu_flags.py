"""Flags of the TPU's compiler by generation of chip: what launches run with, and `tools.aot` compiles with, but for one.

They are read once, when libtpu is loaded, from LIBTPU_INIT_ARGS; a flag that the user has there stays as it is. A libtpu that
doesn't know one of them ends the process: RUNG_TPU_FLAGS=0 adds none.

Source: MaxText (Google), benchmarks/xla_flags_library.py, as its published runs of dense models on each chip combine them. None
of it was measured on a chip by this project.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

VARIABLE, OFF = "LIBTPU_INIT_ARGS", "RUNG_TPU_FLAGS"

# Gathers of weights run beside products, and are fused into them; so do reductions between slices.
_OVERLAP = (
    "--xla_tpu_enable_async_collective_fusion=true", "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true", "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true", "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true")
# Of 128 MiB of VMEM, 96 for the operation that runs: for programs bound by products. Layouts that reduce-scatters want.
_LARGE_VMEM = (
    "--xla_tpu_scoped_vmem_limit_kib=98304", "--xla_tpu_use_minor_sharding_for_major_trivial_input=true",
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1", "--xla_tpu_assign_all_reduce_scatter_layout=true")

# tpu7x has its collectives on another core by default, and no published set that fits every model.
FLAGS: dict[str, tuple[str, ...]] = {"v4": (), "v5e": _OVERLAP, "v5p": _OVERLAP, "v6e": _OVERLAP + _LARGE_VMEM, "tpu7x": ()}

# What `tools.aot` compiles with in place of a launch's: with 96 MiB the compiler makes so much more machine code that an 8B's
# step takes it five times as long, and its cycles come to a fifth less than the published run; with 32 MiB they agree. The
# memory differs by 2% (docs/tpu.md).
COMPILED_WITH: dict[str, tuple[str, ...]] = {"v6e": ("--xla_tpu_scoped_vmem_limit_kib=32768",)}

_GOOGLE = "0x1ae0"
_DEVICES = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}  # as jax knows them


def generation(devices: str = "/sys/bus/pci/devices") -> str | None:
    """The kind of TPU on this host's PCI bus, a key of FLAGS; None where there is none that is known."""
    for vendor in sorted(glob.glob(os.path.join(devices, "*", "vendor"))):
        if Path(vendor).read_text().strip() == _GOOGLE:
            device = Path(vendor).with_name("device").read_text().strip()
            if device in _DEVICES:
                return _DEVICES[device]
    return None


def use(chip: str | None, to_run: bool = True) -> None:
    """Adds this chip's flags to the user's. Must come before libtpu is loaded. Not `to_run`: COMPILED_WITH goes first."""
    if OFF in os.environ and os.environ[OFF] == "0":
        return
    given = os.environ[VARIABLE].split() if VARIABLE in os.environ else []
    found = {_name(flag): flag for flag in (FLAGS[chip] if chip in FLAGS else ())}
    if not to_run and chip in COMPILED_WITH:
        found |= {_name(flag): flag for flag in COMPILED_WITH[chip]}
    ours = [flag for name, flag in found.items() if name not in map(_name, given)]
    if ours or given:
        os.environ[VARIABLE] = " ".join([*ours, *given])


def _name(flag: str) -> str:
    return flag.partition("=")[0]
