"""Compiles a run's step for a TPU slice that isn't there: `python -m tools.aot --config=llama3_8b --topology=v5p:4x4x4`

Builds exactly the step that `experiments.train` would run, from shapes alone, and compiles it with the TPU's own compiler, on
any machine: memory per chip, FLOPs, collectives over each mesh axis, the compiler's cycles. `--set mesh.slices=2` compiles for
two slices. What each figure is and how far to trust it: docs/tpu.md.

`--search [--minutes=30] [--output=FILE]` compiles layouts of it (rules, remat, microbatches) and prints the best that fits, and
what the run costs in it. `--calibrate [--minutes=30]` compiles the published runs that times are calibrated on, one after
another, and writes what was measured where the estimate reads it; `--minutes=0` prints what is there.
"""

import os
import sys
import threading
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments import command_line
from research import tpu_flags
from research.aot import calibration
from research.aot.compile import compile_for, tpu_topology
from research.aot.report import report
from research.aot.search import Trial, best, priced, search
from research.errors import InputError
from research.hardware import Topology
from research.schema import Config
from tools.aot_calibration import calibrate, show_calibration

command_line.define_config_flags()
command_line.define_json_flag()
flags.DEFINE_string("topology", None, "A slice of research/hardware.py: v5p:4x4x4, v5e:16x16, v6e-256.")
flags.DEFINE_float("price", None, "USD per chip-hour, instead of the list price.")
flags.DEFINE_boolean("search", False, "Compile layouts (rules, remat, microbatches) of the same batch; name the best.")
flags.DEFINE_boolean("calibrate", False, "Compile the published runs that times are calibrated on; print how far they carry.")
flags.DEFINE_float("minutes", 30.0, "With --search and --calibrate: no new compile after so long.")
flags.DEFINE_string("output", None, "With --search: a file of what was tried; the next search goes on from it. With "
                    "--calibrate: a file of rows, instead of the one that the estimate reads.")
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS


class Waiting:
    """A line on standard error that counts the seconds, where someone is looking; else one line at the start."""

    def __init__(self, what: str):
        self.what, self.done = what, threading.Event()

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self._count, daemon=True)
        self.thread.start()

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()

    def _count(self) -> None:
        if not sys.stderr.isatty():
            print(self.what, file=sys.stderr)
            return
        with tqdm(desc=self.what, bar_format="{desc}: {elapsed}", leave=False) as line:
            while not self.done.wait(1.0):
                line.refresh()


def size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.3f} MB"


def seconds(value: Any) -> str:
    if value is None:
        return "not shown"
    if isinstance(value, dict):
        return f"{value['value']:.3g} s ({value['low']:.3g} to {value['high']:.3g})"
    return f"{value:.3g} s"


def number(interval: dict | None) -> str:
    return "not shown" if interval is None else "{value:.3g} ({low:.3g} to {high:.3g})".format(**interval)


def verdict(answer: dict) -> str:
    memory = answer["memory"]
    if memory["fits"]:
        if memory["peak"] is None:
            return f"fits: {size(memory['total'])} of {size(memory['hbm'])} a chip at most; {size(memory['host'])} on the host"
        return f"fits: {size(memory['peak'])} of {size(memory['hbm'])} a chip are alive at the fullest moment"
    over = size(memory["excess"]) if memory["excess"] >= 1e7 else "less than 0.01 GB"
    verdict = f"does not fit: {size(memory['total'])} a chip, {over} more than the compiler finds room for"
    return "\n".join([verdict, *(["what would help, not tried:"] if answer["help"] else []), *(
        f"  {line}" for line in answer["help"])])


def show(answer: dict) -> None:
    memory, flops = answer["memory"], answer["flops"]
    mesh = ", ".join(f"{axis}={size}" for axis, size in answer["mesh"].items()) or "one device"
    print(f"{answer['config']} on {answer['chips']} chips of {answer['topology']} ({mesh})\n")
    rows = [["figure", "value"], *([f"memory.{name}", size(memory[name])] for name in (
        "arguments", "temporaries", "total", "peak", "hbm", "host")),
        ["flops.step", "unknown" if flops["step"] is None else f"{flops['step']:.4g}"],
        ["flops.model", f"{flops['model']:.4g}"],
        ["flops.ratio", "unknown" if flops["ratio"] is None else f"{flops['ratio']:.3f}"],
        ["estimated_cycles", "-" if answer["estimated_cycles"] is None else f"{answer['estimated_cycles']:,}"],
        *([f"floors.{name}", seconds(value)] for name, value in (answer["floors"] or {}).items()),
        ["step_seconds", seconds(answer["step_seconds"])], *([name, number(answer[name])] for name in (
            "mfu", "chip_hours", "cost")), ["compile_seconds", f"{answer['compile_seconds']:.0f}"]]
    command_line.print_table(rows)
    if answer["collectives"]:
        print()
        command_line.print_table([["collective", "over", "a step", "bytes a chip"], *(
            [one["kind"], one["axis"], str(one["count"]), size(one["bytes"])] for one in answer["collectives"])])
    print(f"\n{verdict(answer)}")
    print(f"time, MFU and cost aren't shown: {answer['not_shown']}" if answer["not_shown"] else
          "time, MFU and cost are a compiler's estimate, calibrated on published runs (docs/tpu.md)")
    for line in answer["warnings"]:
        print(f"warning: {line}")


def layout(sets: dict) -> str:
    """As `--set` takes it, without what is automatic."""
    return " ".join(f"{name}={value}" for name, value in sets.items() if value != 0)


def show_search(trials: list[Trial], left: int, money: dict | None) -> None:
    rows = [["layout", "fits", "total", "FLOPs ratio", "links, at least", "compiler's seconds", ""]]
    chosen = best(trials)
    for trial in trials:
        if trial.answer is None:
            rows.append([layout(trial.sets), "-", "-", "-", "-", "-", trial.problem])
            continue
        memory, ratio = trial.answer["memory"], trial.answer["flops"]["ratio"]
        floors = trial.answer["floors"]
        times = [f"{floors['collectives']:.3g} s", f"{trial.seconds:.3g} s"] if floors else ["-", "-"]
        rows.append([layout(trial.sets), "yes" if trial.fits else "no", size(memory["total"]),
                     "-" if ratio is None else f"{ratio:.2f}", *times, "<- best" if trial is chosen else ""])
    command_line.print_table(rows)
    print(f"\nbest: {layout(chosen.sets)}" if chosen else "\nnothing that was tried fits")
    if money:
        price = "no list price" if money["price"] is None else f"at {money['price']:.2f} USD a chip-hour"
        print(f"its step takes {seconds(money['step_seconds'])}, the run {number(money['chip_hours'])} chip-hours, "
              f"{number(money['cost'])} USD {price}" if money["step_seconds"] else
              f"its time and cost aren't shown: {money['not_shown']}")
    print("the compiler's seconds rank layouts; they are no estimate of a step (docs/tpu.md)")
    if left:
        print(f"{left} layouts are left: give more --minutes, with --output to keep these")


def check_output(path: str | None) -> None:
    if path and (os.path.isdir(path) or not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK)):
        raise InputError("--output", f"{path} can't be written", "name a file in a directory that is there")


def run_search(config: Config, topology: Topology) -> None:
    if not 0 < FLAGS.minutes < float("inf"):
        raise InputError("--minutes", f"{FLAGS.minutes:g} isn't positive", "after so many, nothing new is compiled")
    check_output(FLAGS.output)

    def started(sets: dict) -> None:
        print(f"compiling {layout(sets)}", file=sys.stderr)

    trials, left = search(config, topology, 60 * FLAGS.minutes, FLAGS.output, started)
    chosen = best(trials)
    money = None if chosen is None else priced(chosen, config, topology, FLAGS.price)
    if FLAGS.json:
        command_line.print_json({"trials": [vars(trial) for trial in trials], "left": left,
                                 "best": None if chosen is None else dict(chosen.sets), "best_figures": money})
    else:
        show_search(trials, left, money)


def run_calibration() -> None:
    """Each in a process of its own: the compiler reads its flags, which are the chip's, once in a process's life."""
    if given := [f"--{name}" for name in ("config", "set", "topology", "price", "search") if FLAGS[name].present]:
        raise InputError(given[0], "doesn't go with --calibrate", "the published runs have their own flags")
    if not 0 <= FLAGS.minutes < float("inf"):
        raise InputError("--minutes", f"{FLAGS.minutes:g} is negative", "0 compiles nothing and prints what is there")
    path = FLAGS.output or str(calibration.FILE)
    check_output(path)
    answer = calibrate(path, 60 * FLAGS.minutes)
    command_line.print_json(answer) if FLAGS.json else show_calibration(answer)


def main(_: list[str]) -> int:
    if FLAGS.calibrate:
        run_calibration()
        return 0
    if FLAGS.topology is None:
        raise InputError("--topology", "is missing", "name a slice, e.g. --topology=v5p:4x4x4")
    if not FLAGS.search and (given := [f"--{name}" for name in ("minutes", "output") if FLAGS[name].present]):
        raise InputError(given[0], "belongs to a search", "add --search")
    if FLAGS.price is not None and not 0 < FLAGS.price < float("inf"):
        raise InputError("--price", f"{FLAGS.price:g} isn't positive", "give USD per chip-hour")
    topology = tpu_topology(FLAGS.topology)
    tpu_flags.use(topology.chip.name, to_run=False)
    config = command_line.configured()[0]
    if FLAGS.search:
        run_search(config, topology)
        return 0
    with Waiting(f"compiling {config.name} for {topology.name}"):
        answer = report(compile_for(config, topology), FLAGS.price)
    command_line.print_json(answer) if FLAGS.json else show(answer)
    return 0


if __name__ == "__main__":
    command_line.run(main)
