"""Trainings as processes of their own: what is finished, what isn't, and running the rest, resumable."""

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Any, Iterator, Mapping, Sequence

from absl import logging
from tqdm import tqdm

from research.errors import Interrupted
from research.schema import COMPILED, CONFIG_FILE, EXIT_INTERRUPTED, RESULT_FILE

CELL_FILE = "cell.json"


def status(run: str) -> str:
    if os.path.exists(os.path.join(run, RESULT_FILE)):
        return "finished"
    return "started" if os.path.exists(os.path.join(run, CONFIG_FILE)) else "missing"


def command(preset: str, cell: Mapping[str, Any], run: str, minutes: float | None) -> list[str]:
    words = [sys.executable, "-m", "experiments.train", f"--config={preset}", f"--workdir={run}"]
    words += [f"--set={key}={_text(value)}" for key, value in cell.items()]
    return words + ([f"--minutes={minutes:.3f}"] if minutes is not None else [])


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_cells(rows: Sequence[dict[str, Any]], preset: str, workdir: str, jobs: int, minutes: float | None) -> list[str]:
    """Runs what isn't finished, `jobs` at a time, each on its share of the cores; returns the cells that failed.

    Args:
      rows: of each cell its name `cell`, its `overrides` of the preset, its run directory `workdir` and its `status`.
      workdir: where what is compiled is kept, for all cells.

    Raises:
      Interrupted: the minutes are over; started cells have saved and go on with the next call.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    waiting = [row for row in rows if row["status"] != "finished"]
    running: dict[subprocess.Popen, tuple[dict[str, Any], set[int]]] = {}
    shares = core_shares(jobs)
    failed, over = [], False
    bar = tqdm(total=len(rows), initial=len(rows) - len(waiting), desc="cells", unit="cell", disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            left = None if deadline is None else (deadline - time.monotonic()) / 60
            over = over or (left is not None and left <= 0)
            while waiting and len(running) < jobs and not over:
                row = waiting.pop(0)
                os.makedirs(row["workdir"], exist_ok=True)
                with open(os.path.join(row["workdir"], CELL_FILE), "w") as file:
                    json.dump(row["overrides"], file)
                log = open(os.path.join(row["workdir"], "log.txt"), "ab")
                shared = {"RUNG_CACHE": os.path.join(workdir, COMPILED)} | os.environ  # cells compile much the same
                cores = shares.pop()
                with on_cores(cores):
                    process = subprocess.Popen(command(preset, row["overrides"], row["workdir"], left), stdout=log, stderr=log,
                                               env=shared)
                log.close()
                running[process] = row, cores
            if over and not running:
                raise Interrupted(f"the minutes are over, {len(waiting) + len(failed)} cells to go; the same command goes on")
            for process in [p for p in running if p.poll() is not None]:
                row, cores = running.pop(process)
                shares.append(cores)
                if process.returncode == EXIT_INTERRUPTED:
                    waiting.append(row)
                    over = True
                elif process.returncode:
                    failed.append(row["cell"])
                    logging.warning("cell %s failed (exit code %d): %s", row["cell"], process.returncode,
                                    last_line(row["workdir"]))
                else:
                    bar.update(1)
                    logging.info("cell %s finished: %s", row["cell"], row["overrides"])
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        bar.close()
    return failed


def core_shares(jobs: int) -> list[set[int]]:
    """The cores of this process in `jobs` parts; where there are too few, or the system doesn't say, none has its own (empty).

    Two trainings of which each takes all cores wait for each other's threads, and a small step isn't faster on two cores than
    on one (docs/scaling.md).
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < jobs:
        return [set() for _ in range(jobs)]
    return [set(cores[number * len(cores) // jobs:(number + 1) * len(cores) // jobs]) for number in range(jobs)]


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Processes that this thread starts inside run on these cores alone; on any, where there are none."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def last_line(run: str) -> str:
    with open(os.path.join(run, "log.txt"), errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "no output"


def total_cost(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all these runs' `result.json`: chip_seconds, cost (USD) and energy_kwh, each {value, low, high} or None where one of
    them doesn't know it (a CPU has no price)."""
    total: dict[str, Any] = {"runs": len(results), "chip_seconds": sum(result["chip_seconds"] for result in results)}
    for name in ("cost", "energy_kwh"):
        parts = [result[name] for result in results]
        total[name] = None if None in parts else {key: sum(part[key] for part in parts) for key in ("value", "low", "high")}
    return total


def cost_in_words(total: Mapping[str, Any]) -> str:
    figures = [f"{total[name]['value']:.3g} ({total[name]['low']:.3g} to {total[name]['high']:.3g}) {unit}"
               for name, unit in (("cost", "USD"), ("energy_kwh", "kWh")) if total[name]]
    return f"{total['runs']} runs took " + ", ".join([f"{total['chip_seconds']:,.0f} chip-seconds", *figures]) + "."
