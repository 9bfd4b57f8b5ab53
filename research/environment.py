"""What a process must have in place before JAX is imported: its commands call `prepare` first of all."""

import ctypes
import glob
import importlib.metadata
import os
import sys

from research import tpu_flags

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # names of parameters in glibc's malloc.h
_NAMED_SHARDINGS = "xla_enable_hlo_sharding_v3"


def prepare() -> None:
    """Chooses the CPU where there is no accelerator, and there keeps the memory that XLA frees; a TPU gets its flags."""
    tpu_flags.use(tpu_flags.generation())
    if not accelerators():
        # With libtpu installed (to compile for TPUs that aren't here) JAX would look for one, slowly and with noise.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        keep_freed_memory()
        avoid_named_shardings()


def avoid_named_shardings() -> None:
    """Turns off XLA's new form of shardings in jax 0.12, whose partitioner for CPUs aborts on some programs.

    Seen with jaxlib 0.12.0.1 on a MoE layer over an expert axis: "hlo_sharding.h: Check failed: !UseNamedShardingLeaf()". Only
    that version is known to take the flag (an unknown one ends the process), and a flag that the user gives stays.
    """
    flags = os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
    if importlib.metadata.version("jaxlib").startswith("0.12.") and _NAMED_SHARDINGS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_NAMED_SHARDINGS}=false".strip()


def accelerators() -> list[str]:
    """Device files of TPUs and of NVIDIA and AMD GPUs on this host."""
    patterns = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
    return [path for pattern in patterns for path in glob.glob(pattern)]


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep what is freed: trim_threshold at its maximum, mmap_max 0, arena_max 1; True if it did.

    XLA takes its temporaries on a CPU as one block of hundreds of megabytes a step. glibc maps such a block anew each time and
    gives it back after, and the kernel zeroes it page by page: up to 170,000 page faults a step. The same as
    GLIBC_TUNABLES=glibc.malloc.trim_threshold=...:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1, but from inside.
    Does nothing where the C library isn't glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all([library.mallopt(_TRIM_THRESHOLD, 2**31 - 1), library.mallopt(_MMAP_MAX, 0), library.mallopt(_ARENA_MAX, 1)])
