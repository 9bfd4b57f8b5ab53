"""What is asked of one NVIDIA GPU, an H200 above all: `python -m tools.benchmark gpu [--cases=A,B] [--output=FILE] [--json]`.

Parts, each in a process of its own, so that it has the whole memory, and what breaks the device breaks one part alone:

`roofs`: bfloat16 products of normally distributed matrices, and copies. `attention`: what runs where no implementation is
named, against cuDNN's. `train`: the whole step of a dense model of 1.3B, at growing batches until memory's end. `ssd`: SSD,
Mamba's selective scan and attention of one model width, by length. `decode`: generation with the shape of Llama 3 8B.

A part or case that fails is named in `failed` with one line, the others go on, and the command ends with 1. --rehearse goes
through all of it at tiny shapes on the CPU: it shows that the code runs, and its figures mean nothing.
JAX_COMPILATION_CACHE_DIR=DIRECTORY keeps what is compiled for a second call.
"""

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
from absl import logging

from research import hardware
from research.errors import InputError
from tools import benchmark_gpu_parts as parts
from tools.benchmark_gpu_parts import Figures, Turns

BUDGET = 570.0  # seconds of all parts together; each has the share of its weight, and what those before it left
MEMORY = "0.92"  # share of the device's that JAX takes: cuDNN's and cuBLAS's own, and the driver's, come on top
PACKAGES = ("jax", "nvidia-", "rung")
DRIVER = pathlib.Path("/proc/driver/nvidia/version")


class Target(NamedTuple):
    """At least `least` of the figure `key`: of every case that has it, or the best; of rows of `length` and more."""

    what: str
    least: float
    key: str
    of: Callable[..., float] = min
    length: int = 0

    def found(self, cases: Mapping[str, Figures]) -> float | None:
        having = [case for case in cases.values() if self.key in case and case[self.key] is not None]
        values = [case[self.key]["value"] for case in having if "length" not in case or case["length"] >= self.length]
        return self.of(values) if values else None


class Part(NamedTuple):
    cases: Callable[[Turns], parts.Cases]
    weight: float  # of the time
    targets: tuple[Target, ...] = ()


PARTS = {
    "roofs": Part(parts.roofs, 1.0),
    "attention": Part(parts.attention_over_cudnn, 4.0, (
        Target("attention at head width 128 over cuDNN, L >= 2048, the worst case", 0.9, "over_cudnn"),)),
    "train": Part(parts.train, 4.0, (Target("MFU of a 1.3B model's training step, the best batch", 0.5, "mfu", max),)),
    "ssd": Part(parts.ssd_over_others, 3.0, (
        Target("SSD over Mamba's scan, the worst length", 2.0, "over_scan"),
        Target("SSD over attention, L >= 8192, the worst length", 1.0, "over_attention", length=8192))),
    "decode": Part(parts.decode, 3.0, (
        Target("decoding with 8B over the published memory bandwidth, the worst batch", 0.7, "of_published"),)),
}


def about() -> dict[str, Any]:
    """The device that JAX calls its first, and the versions of what drives it."""
    device = jax.devices()[0]
    named = [chip.name for chip in hardware.CHIPS.values() if device.device_kind in chip.device_kinds]
    limits = device.memory_stats()  # a CPU has none
    versions = {one.name: one.version for one in importlib.metadata.distributions() if one.name.startswith(PACKAGES)}
    driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else None
    return {"kind": device.device_kind, "platform": device.platform, "chip": named[0] if named else None,
            "memory_bytes": limits["bytes_limit"] if limits else None, "backend": device.client.platform_version,
            "driver": driver, "versions": dict(sorted(versions.items()))}


def work(pipe: Connection, part: str, turns: Turns) -> None:
    """A process of one part: sends what the device is, each case's name and figures, and None at the end."""
    if turns.rehearse:
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    pipe.send(about())
    for case in PARTS[part].cases(turns):
        pipe.send(case)
    pipe.send(None)


def messages(part: str, turns: Turns, seconds: float) -> Iterator[Any]:
    """What a process of this part sends. Raises TimeoutError after so many seconds, EOFError where the process ends early."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(far, part, turns), daemon=True)
    end = time.monotonic() + seconds
    process.start()
    far.close()
    try:
        while near.poll(max(0.0, end - time.monotonic())):
            message = near.recv()
            if message is None:
                return
            yield message
        raise TimeoutError(f"not done after {seconds:.0f} s")
    except EOFError:
        process.join()
        raise EOFError(f"its process ended with exit code {process.exitcode}; standard error has its last words") from None
    finally:
        process.kill()
        process.join()


def refuse(device: Mapping[str, Any]) -> None:
    if device["platform"] != "gpu":
        raise InputError("gpu", f"JAX finds {device['kind']!r} here, and this needs an NVIDIA GPU",
                         "run it where one is, after pip install -e '.[cuda]'; or --rehearse, for the code alone")
    if device["chip"] is None:
        raise InputError("gpu", f"{device['kind']!r} isn't in the table of chips", "add its row to research/hardware.py")


def judged(part: str, cases: Mapping[str, Figures], whole: bool, rehearsal: bool) -> list[dict[str, Any]]:
    """The part's targets. `reached` is None where it isn't known: in a rehearsal, or of cases that aren't all there."""
    answer = []
    for target in PARTS[part].targets:
        found = target.found(cases)
        reached = None if rehearsal or found is None else found >= target.least
        if reached and not whole:
            reached = None
        answer.append({"what": target.what, "target": target.least, "found": found, "reached": reached})
    return answer


def gpu(names: Sequence[str], turns: Turns, output: str | None) -> dict[str, Any]:
    """The JSON of `tools.benchmark gpu`; `output`: the file that has it, too, as far as it is, after each part.

    Raises:
      InputError: there is no GPU, none that is known, or no directory for the output.
    """
    if output and not pathlib.Path(output).expanduser().parent.is_dir():
        raise InputError("--output", f"{output!r} lies in no directory", "make it, or name another file")
    began = time.monotonic()
    answer: dict[str, Any] = {"rehearsal": turns.rehearse, "device": None, "rounds": turns.rounds, "seconds": 0.0, "failed": [],
                              "parts": {}}
    for index, name in enumerate(names):
        started, left = time.monotonic(), sum(PARTS[other].weight for other in names[index:])
        cases, failure = {}, None
        try:
            seconds = (BUDGET - (started - began)) * PARTS[name].weight / left
            with contextlib.closing(messages(name, turns, seconds)) as stream:
                answer["device"] = next(stream)
                if not turns.rehearse:
                    refuse(answer["device"])
                for case, figures in stream:
                    cases[case] = figures
                    logging.info("%s %s: %s", name, case, figures)
        except (EOFError, TimeoutError) as error:
            failure = str(error)
        failures = [f"{name}: {failure}"] if failure else []
        failures += [f"{name} {case}: {figures['failed']}" for case, figures in cases.items() if "failed" in figures]
        targets = judged(name, cases, not failures, turns.rehearse)
        if not failures and any(target["found"] is None for target in targets) and not turns.rehearse:
            failures = [f"{name}: no case has what its target is about"]
        answer["parts"][name] = {"targets": targets, "seconds": time.monotonic() - started, "cases": cases}
        answer["failed"] += failures
        answer["seconds"] = time.monotonic() - began
        if output:
            pathlib.Path(output).expanduser().write_text(json.dumps(answer, indent=2, allow_nan=False) + "\n")
    return answer
