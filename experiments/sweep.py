"""Runs a grid of trainings.

    python -m experiments.sweep plan|run|report --config=debug --workdir=DIR --vary optim.lr=1e-3,3e-3

A sweep is data: a list of override dicts, put together by product, zip and chain.
  --vary KEY=V1,V2            all values; several --vary multiply
  --together "A=1,2 B=3,4"    A and B change together (1,3 then 2,4); multiplies with the rest
  --cells FILE                a JSON list of override dicts; several files are chained
  --seeds N                   every cell with seeds 0..N-1
plan says what would run; run skips finished cells, goes on with unfinished ones, and stops cleanly after --minutes;
report makes results.jsonl, report.md and report.png from what is there.
"""

import hashlib
import itertools
import json
import os
from typing import Any, Iterable, Mapping, Sequence

from absl import flags

from experiments import command_line
from experiments.cells import CELL_FILE, cost_in_words, run_cells, status, total_cost
from research.config import nearest, override, parse_assignments
from research.errors import InputError
from research.schema import RESULT_FILE, Config
from research.training.program import make_program
from research.training.workdir import read_config

Cell = dict[str, Any]  # field path -> value, as research.config.override takes it

command_line.define_config_flags()
command_line.define_json_flag()
flags.DEFINE_string("workdir", None, "Directory of the sweep; each cell has its run directory inside.")
flags.DEFINE_multi_string("vary", [], "KEY=V1,V2,...: one axis of the grid. Repeatable.")
flags.DEFINE_multi_string("together", [], '"A=1,2 B=3,4": fields that change together. Repeatable.')
flags.DEFINE_multi_string("cells", [], "A JSON file with a list of override dicts. Repeatable.")
flags.DEFINE_integer("seeds", 0, "Run every cell with seeds 0..N-1; 0: the preset's seed.", lower_bound=0)
flags.DEFINE_integer("jobs", 1, "Local processes at once.", lower_bound=1)
flags.DEFINE_float("minutes", None, "Stop cleanly after so long (exit code 75); the next call goes on.", lower_bound=0.0)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS

RESULTS_FILE = "results.jsonl"


def product(*axes: Iterable[Mapping]) -> list[Cell]:
    """Every combination; a later axis wins where two set one field."""
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*map(list, axes))]


def together(*axes: Sequence[Mapping]) -> list[Cell]:
    """The first of each, then the second of each, ...

    Raises:
      InputError: the axes differ in length.
    """
    if len({len(axis) for axis in axes}) > 1:
        raise InputError("--together", f"fields have {sorted({len(axis) for axis in axes})} values", "give each as many")
    return [{k: v for part in parts for k, v in part.items()} for parts in zip(*axes)]


def chain(*axes: Iterable[Mapping]) -> list[Cell]:
    """One after the other, each cell once."""
    seen: dict[str, Cell] = {}
    for cell in itertools.chain(*axes):
        seen.setdefault(cell_id(cell), dict(cell))
    return list(seen.values())


def axis(assignment: str, flag: str = "--vary") -> list[Cell]:
    """`optim.lr=1e-3,3e-3` -> [{"optim.lr": "1e-3"}, {"optim.lr": "3e-3"}]."""
    key, equals, values = assignment.partition("=")
    if not equals or not values or not key.strip():
        raise InputError(flag, f"{assignment!r} is not KEY=V1,V2", "e.g. --vary optim.lr=1e-3,3e-3")
    return [{key.strip(): value.strip()} for value in values.split(",")]


def cell_id(cell: Mapping[str, Any]) -> str:
    """A short hash of the overrides; independent of their order."""
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:10]


def grid() -> list[Cell]:
    """The cells that the flags describe, --set included, so that a cell says all that differs from the preset."""
    axes = [axis(text) for text in FLAGS.vary]
    axes += [together(*[axis(part, "--together") for part in text.split()]) for text in FLAGS.together]
    if FLAGS.cells:
        axes.append(chain(*[read_cells(path) for path in FLAGS.cells]))
    if FLAGS.seeds:
        axes.append([{"seed": str(seed)} for seed in range(FLAGS.seeds)])
    if not axes:
        raise InputError("--vary", "the grid is empty", "give --vary, --together, --cells or --seeds")
    return chain(product([parse_assignments(FLAGS["set"].value)], *axes))


def read_cells(path: str) -> list[Cell]:
    try:
        with open(path) as file:
            cells = json.load(file)
    except (OSError, json.JSONDecodeError) as error:
        raise InputError("--cells", f"{path} can't be read ({error})", "give a JSON list of override dicts") from None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise InputError("--cells", f"{path} is not a list of override dicts", 'e.g. [{"optim.lr": 0.001}]')
    return cells


def planned(cells: Sequence[Cell], preset: Config, workdir: str) -> list[dict[str, Any]]:
    """A row a cell: id, overrides, run directory, status, and what it computes. Checks every cell's config."""
    rows = []
    for cell in cells:
        config = override(preset, cell)
        program = make_program(config)
        tokens = config.train.steps * program.tokens_per_step
        run = os.path.join(workdir, f"cell-{cell_id(cell)}")
        rows.append({"cell": cell_id(cell), "overrides": cell, "seed": config.seed, "workdir": run, "status": status(run),
                     "params": program.model.param_counts()["total"], "tokens": tokens,
                     "flops": tokens * program.flops_per_token})
    return rows


def results(workdir: str) -> list[dict[str, Any]]:
    """The finished cells' rows, sorted by loss; written to results.jsonl whole."""
    rows = []
    for name in sorted(os.listdir(workdir)) if os.path.isdir(workdir) else []:
        run = os.path.join(workdir, name)
        if name.startswith("cell-") and status(run) == "finished":
            with open(os.path.join(run, RESULT_FILE)) as file:
                result = json.load(file)
            with open(os.path.join(run, CELL_FILE)) as file:
                overrides = json.load(file)
            rows.append({"cell": name.removeprefix("cell-"), "overrides": overrides, "seed": read_config(run).seed,
                         "workdir": run, **result})
    if not rows:
        raise InputError("--workdir", f"{workdir} holds no finished cell", "run the sweep first")
    rows.sort(key=lambda row: row["final_eval_loss"] if row["final_eval_loss"] is not None else float("inf"))
    beside = os.path.join(workdir, f".{RESULTS_FILE}.partial")
    with open(beside, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(beside, os.path.join(workdir, RESULTS_FILE))
    return rows


def report(workdir: str) -> list[dict[str, Any]]:
    """results.jsonl, report.md and report.png."""
    rows = results(workdir)
    varied = sorted({key for row in rows for key in row["overrides"]
                     if len({json.dumps(r["overrides"][key]) if key in r["overrides"] else "" for r in rows}) > 1})
    lines = ["| cell | " + " | ".join(varied) + " | loss | se | bits/byte | tokens/s |", "|" + " --- |" * (len(varied) + 5)]
    for row in rows:
        values = [str(row["overrides"][key]) if key in row["overrides"] else "-" for key in varied]
        figures = [f"{row[name]:.4f}" if row[name] is not None else "-"
                   for name in ("final_eval_loss", "final_eval_loss_se", "bits_per_byte")]
        lines.append("| " + " | ".join([row["cell"], *values, *figures, f"{row['tokens_per_second']:,.0f}"]) + " |")
    with open(os.path.join(workdir, "report.md"), "w") as file:
        file.write("\n".join([*lines, "", cost_in_words(total_cost(rows))]) + "\n")
    draw(rows, varied, os.path.join(workdir, "report.png"))
    return rows


def draw(rows: Sequence[dict[str, Any]], varied: Sequence[str], path: str) -> None:
    """Final loss with its standard error against each varied field, one panel a field."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [key for key in varied if key != "seed"] or ["seed"]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for plot, key in zip(axes[0], panels):
        shown = [row for row in rows if row["final_eval_loss"] is not None]
        xs = [row["seed"] if key == "seed" else row["overrides"][key] if key in row["overrides"] else "preset" for row in shown]
        if not all(isinstance(x, (int, float)) for x in xs):
            xs = [str(x) for x in xs]
        elif min(xs) > 0 and max(xs) / min(xs) > 5:
            plot.set_xscale("log")
        plot.errorbar(xs, [r["final_eval_loss"] for r in shown], yerr=[r["final_eval_loss_se"] for r in shown], fmt="o",
                      capsize=3)
        plot.set(xlabel=key, ylabel="held-out loss (nats/token)")
        plot.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


VERBS = ("plan", "run", "report")


def main(argv: list[str]) -> int:
    verb = argv[1] if len(argv) > 1 else ""
    if verb not in VERBS or len(argv) > 2:
        raise InputError("verb", f"unknown {verb!r}" if verb else "is missing", nearest(verb, VERBS))
    if not FLAGS.workdir:
        raise InputError("--workdir", "is missing", "name a directory for the sweep")
    if verb == "report":
        rows = report(FLAGS.workdir)
        if FLAGS.json:
            command_line.print_json({"results": rows, "total": total_cost(rows)})
        else:
            print(open(os.path.join(FLAGS.workdir, "report.md")).read() + f"\n{os.path.join(FLAGS.workdir, 'report.png')}")
        return 0
    if not FLAGS.config:
        raise InputError("--config", "is missing", "name a preset")
    rows = planned(grid(), command_line.preset(FLAGS.config), FLAGS.workdir)
    if verb == "plan":
        if FLAGS.json:
            command_line.print_json({"cells": rows})
        else:
            for row in rows:
                print(f"{row['cell']}  {row['status']:8}  {row['params']:,} params, {row['tokens']:,} tokens, "
                      f"{row['flops']:.3g} FLOPs  {row['overrides']}")
            print(f"{len(rows)} cells, {sum(r['flops'] for r in rows if r['status'] != 'finished'):.3g} FLOPs to go")
        return 0
    failed = run_cells(rows, FLAGS.config, FLAGS.workdir, FLAGS.jobs, FLAGS.minutes)
    rows = report(FLAGS.workdir)
    if FLAGS.json:
        command_line.print_json({"results": rows, "total": total_cost(rows), "failed": failed})
    else:
        print(open(os.path.join(FLAGS.workdir, "report.md")).read())
    return 1 if failed else 0


if __name__ == "__main__":
    command_line.run(main, arguments=True)
