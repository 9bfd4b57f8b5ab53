"""What `tools.aot --calibrate` does: compiles the published runs of research/aot/calibration.py, one after another."""

import json
import os
import subprocess
import sys
import time
from typing import Any

from experiments import command_line
from research import tpu_flags
from research.aot import calibration
from research.aot.calibration import Published
from research.aot.compile import check_libtpu
from research.errors import InputError


def calibrate(path: str, seconds: float) -> dict[str, Any]:
    """Writes a row at a time into `path`, nothing new after so many seconds; a row of these versions and this code stays.

    Returns the JSON: the calibration's summary, and `left`, how many runs have no such row.
    """
    deadline, left = time.monotonic() + seconds, 0
    for published in calibration.PUBLISHED:
        rows = calibration.read(path)
        if published.name in rows and rows[published.name]["made_with"] == calibration.made_with():
            continue
        if time.monotonic() >= deadline:
            left += 1
            continue
        check_libtpu()
        calibration.write(path, published, compiled(published))
    return {**calibration.summary(path), "left": left}


def compiled(published: Published) -> dict[str, Any]:
    """The answer of `tools.aot --json`, in a process of its own, with the flags of research/tpu_flags.py alone."""
    words = [sys.executable, "-m", "tools.aot", *published.words, "--json"]
    alone = {name: value for name, value in os.environ.items() if name != tpu_flags.VARIABLE}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=alone)
    if done.returncode:
        raise InputError("--calibrate", f"the compile of {published.name} ended with exit code {done.returncode}",
                         "its lines are above; it was: python -m tools.aot " + " ".join(published.words))
    answer = json.loads(done.stdout)
    if not answer["memory"]["fits"]:
        raise InputError("--calibrate", f"{published.name} doesn't fit any more", "it did when it was published: mind the step")
    return answer


def show_calibration(answer: dict[str, Any]) -> None:
    figure = lambda value, form: "-" if value is None else format(value, form)
    rows = [["run (MaxText)", "published", "step", "dense", "attention", "grouped", "unknown", "again", "formula, unscaled",
             "by the others' scale", "compiled in", "made with"]]
    for one in answer["runs"]:
        measured = one["measured"]
        parts = measured["parts"] if measured else {}
        made = measured["made_with"] if measured else {}
        aside = ", not in the scale: offloads" if one["offloads"] else ""
        rows.append([one["name"], one["figure"].partition(":")[0], f"{one['seconds']:.2f} s", *(
            figure(parts[name] if parts else None, ".3f") for name in ("dense", "attention", "grouped", "unknown", "again")),
            figure(one["formula"], ".2f"), figure(one["residual"], "+.1%") + aside,
            f"{measured['compile_seconds']:.0f} s" if measured else "-",
            " ".join(f"{name} {str(value)[:9]}" for name, value in made.items()) or "not measured"])
    command_line.print_table(rows)
    print(f"\nscale: {figure(answer['scale'], '.4f')}; the worst run is off by {figure(answer['worst'], '.1%')} by the others' "
          f"scale, of {answer['limit']:.0%} at most: an estimate is {'' if answer['shown'] else 'not '}shown")
    if answer["left"]:
        print(f"{answer['left']} runs have no row of these versions and this code: give more --minutes")
