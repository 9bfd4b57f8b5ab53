"""What differs between runs, and what the difference is worth: `python -m tools.compare RUN RUN... [--json]`

The first run is the base. Shown: the settings that differ; losses, speed and memory; the training loss at equal steps,
tokens, FLOPs and seconds; the difference of the losses with its interval, paired step by step over the end of the training
curve and document by document over each held-out set (p values by Holm where several runs are compared). A sweep's
directory stands for its cells. The curves and intervals are drawn to --output. How the intervals are made and read:
docs/statistics.md.
"""

import os
from typing import Any

import numpy as np
from absl import flags

from experiments import command_line
from research.errors import InputError
from research.evaluation.comparison import compare
from research.evaluation.runs import AXES

command_line.define_json_flag()
flags.DEFINE_string("output", "compare.png", "The picture; empty for none.")
flags.DEFINE_float("tail", 0.25, "The share of the logged steps, at the end, that the training losses are compared over.")
flags.DEFINE_float("confidence", 0.95, "Of the intervals.")
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS

UNITS = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}


def number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):  # a number that isn't finite, or no number
        return value
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}" if abs(value) >= 10 else f"{value:.4f}"


def show(summary: dict[str, Any]) -> None:
    """The tables of the terminal."""
    names = [run["run"] for run in summary["runs"]]
    if summary["config"]:
        command_line.print_table([["setting", *names]] + [
            [path, *(str(values[name]) for name in names)] for path, values in summary["config"].items()])
    else:
        print("the configs are the same")
    sets = list(dict.fromkeys(name for run in summary["runs"] for name in run["evaluations"]))
    head = ["run", "status", "steps", "train loss", *(f"{name} (bits/byte)" for name in sets), "tokens/s", "MFU", "memory"]
    table = [head]
    for run in summary["runs"]:
        cells = []
        for name in sets:
            row = run["evaluations"][name] if name in run["evaluations"] else None
            cells.append(f"{number(row['loss'])} +- {number(row['se'])} ({number(row['bits_per_byte'])})" if row else "-")
        utilization = f"{100 * run['mfu']:.1f}%" if run["mfu"] is not None else "-"
        table.append([run["run"], run["status"], str(run["steps"]), number(run["training_loss"]), *cells,
                      f"{run['tokens_per_second']:,.0f}", utilization, f"{run['device_bytes'] / 1e6:,.0f} MB"])
    print()
    command_line.print_table(table)
    print("\ntraining loss at equal budget")
    command_line.print_table([["budget", "at", *names]] + [
        [UNITS[axis], f"{found['at']:.4g}", *(number(found["training_loss"][name]) for name in names)]
        for axis, found in summary["equal_budget"].items()])
    print(f"\ndifference to {summary['base']} in nats/token, below 0 is better, {100 * summary['confidence']:g}% intervals")
    table = [["run", "over", "difference", "interval", "p (Holm)", ""]]
    for row in summary["differences"]:
        value = row["difference"]
        interval = [f"{value['value']:+.4f}", f"[{value['low']:+.4f}, {value['high']:+.4f}]", f"{row['p_holm']:.2g}"]
        table.append([row["run"], row["what"], *(interval if value else ["-", "-", "-"]), row["note"]])
    command_line.print_table(table)


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a fortieth of the curve, shorter at its beginning."""
    width = max(1, len(values) // 40)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - width, 0)
    return (sums[end] - sums[begin]) / (end - begin)


def draw(summary: dict[str, Any], path: str) -> None:
    """Curves against the four axes, the differences with their intervals, the loss by position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    panels = dict(zip(AXES, (axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1])))
    for axis, plot in panels.items():
        tops = []
        for label, curve in summary["curves"].items():
            loss = smooth(np.array(curve["loss"]))
            plot.plot(curve[axis], loss, label=label, marker="." if len(loss) < 20 else None)
            tops.append(loss[len(loss) // 20])  # the first fall would flatten all that matters
        lowest = min(min(smooth(np.array(curve["loss"]))) for curve in summary["curves"].values())
        plot.set(xlabel=UNITS[axis], ylabel="training loss (nats/token)")
        plot.ticklabel_format(axis="x", scilimits=(-3, 4))  # longer numbers would run into each other
        plot.set_ylim(lowest - 0.05 * (max(tops) - lowest + 1e-3), max(tops) + 0.05 * (max(tops) - lowest + 1e-3))
        plot.grid(alpha=0.3)
    panels["steps"].legend(fontsize="small")
    rows = [row for row in summary["differences"] if row["difference"]]
    values = np.array([[row["difference"][key] for key in ("value", "low", "high")] for row in rows]).reshape(-1, 3)
    spread = np.maximum([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]], 0.0)
    axes[0, 2].errorbar(values[:, 0], np.arange(len(rows)), xerr=spread, fmt="o", capsize=4)
    axes[0, 2].set_yticks(np.arange(len(rows)), [f"{row['run']}\n{row['what']}" for row in rows], fontsize="small")
    axes[0, 2].axvline(0.0, color="gray", linewidth=1)
    axes[0, 2].set_ylim(len(rows) - 0.5, -0.5)
    axes[0, 2].set(xlabel=f"loss difference to {summary['base']} (nats/token)",
                   title=f"{100 * summary['confidence']:g}% intervals; below 0 is better")
    axes[0, 2].grid(alpha=0.3)
    for run in summary["runs"]:
        for name, buckets in run["loss_by_position"].items():
            numeric = {bucket: value for bucket, value in buckets.items() if not isinstance(value, str)}
            axes[1, 2].plot(list(numeric), list(numeric.values()), marker=".", label=f"{run['run']}, {name}")
    axes[1, 2].set(xlabel="position in the document's row", ylabel="held-out loss (nats/token)")
    axes[1, 2].tick_params(axis="x", rotation=45)
    axes[1, 2].grid(alpha=0.3)
    if axes[1, 2].lines:
        axes[1, 2].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> int:
    if len(argv) < 2:
        raise InputError("RUN", "no run is named", "name at least two run directories: tools.compare runs/a runs/b")
    folder = os.path.dirname(FLAGS.output or "") or "."
    if FLAGS.output and not os.path.isdir(folder):
        raise InputError("--output", f"the directory {folder} does not exist", "make it, or name another")
    if FLAGS.output and not FLAGS.output.endswith((".png", ".svg", ".pdf")):
        raise InputError("--output", f"{FLAGS.output} is no picture's name", "end it in .png, .svg or .pdf")
    summary = compare(argv[1:], FLAGS.tail, FLAGS.confidence)
    if FLAGS.output:
        draw(summary, FLAGS.output)
    if FLAGS.json:
        command_line.print_json(summary | {"picture": FLAGS.output or None})
        return 0
    show(summary)
    if FLAGS.output:
        print(f"\n{FLAGS.output}")
    return 0


if __name__ == "__main__":
    command_line.run(main, arguments=True)
