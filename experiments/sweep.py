"""Runs a grid of trainings.

    python -m experiments.sweep plan|run|report --config=debug --workdir=DIR --vary optim.lr=1e-3,3e-3

A sweep is data: a list of override dicts, put together by product, zip and chain.
  --vary KEY=V1,V2            all values; several --vary multiply
  --together "A=1,2 B=3,4"    A and B change together (1,3 then 2,4); multiplies with the rest
  --cells FILE                a JSON list of override dicts; several files are chained
  --seeds N                   every cell with seeds 0..N-1
plan says what would run, and what difference its seeds could show; run skips finished cells, goes on with unfinished
ones, and stops cleanly after --minutes; report makes results.jsonl, report.md and report.png from what is there: cells that
differ by their seed alone are one group, and every group is compared to the grid's first (docs/statistics.md).
"""

import hashlib
import itertools
import json
import os
from typing import Any, Iterable, Mapping, Sequence

from absl import flags
from etils import epath

from experiments import command_line
from experiments.cells import CELL_FILE, run_cells, status
from experiments.sweep_report import Cell, Row, detectable, write
from research.config import nearest, override, parse_assignments
from research.errors import InputError
from research.schema import RESULT_FILE, Config
from research.training.program import make_program
from research.training.workdir import read_config, write_text

command_line.define_config_flags()
command_line.define_json_flag()
flags.DEFINE_string("workdir", None, "Directory of the sweep; each cell has its run directory inside.")
flags.DEFINE_multi_string("vary", [], "KEY=V1,V2,...: one axis of the grid. Repeatable.")
flags.DEFINE_multi_string("together", [], '"A=1,2 B=3,4": fields that change together. Repeatable.')
flags.DEFINE_multi_string("cells", [], "A JSON file with a list of override dicts. Repeatable.")
flags.DEFINE_integer("seeds", 0, "Run every cell with seeds 0..N-1; 0: the preset's seed.", lower_bound=0)
flags.DEFINE_float("seed_sd", None, "plan: standard deviation of a setting's held-out loss over seeds, where no finished "
                   "cells of the directory tell it.")
flags.DEFINE_integer("jobs", 1, "Local processes at once.", lower_bound=1)
flags.DEFINE_float("minutes", None, "Stop cleanly after so long (exit code 75); the next call goes on.", lower_bound=0.0)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS

GRID_FILE = "cells.json"  # the cells in the grid's order, as --cells takes them: what is the first to compare to


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


def planned(cells: Sequence[Cell], preset: Config, workdir: str) -> list[Row]:
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


def remember(cells: Sequence[Cell], workdir: str) -> None:
    """Adds the cells to the directory's cells.json."""
    path = epath.Path(workdir) / GRID_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(chain(read_cells(os.fspath(path)) if path.exists() else [], cells)) + "\n")


def finished_cells(workdir: str) -> list[Row]:
    """The finished cells' rows, in the order of the grid."""
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
    grid_file = os.path.join(workdir, GRID_FILE)
    order = [cell_id(cell) for cell in read_cells(grid_file)] if os.path.exists(grid_file) else []
    return sorted(rows, key=lambda row: order.index(row["cell"]) if row["cell"] in order else len(order))


def report(workdir: str) -> dict[str, Any]:
    """The report of what has finished, written and as data: experiments.sweep_report.write.

    Raises:
      InputError: no cell has finished.
    """
    rows = finished_cells(workdir)
    if not rows:
        raise InputError("--workdir", f"{workdir} holds no finished cell", "run the sweep first")
    return write(rows, workdir)


VERBS = ("plan", "run", "report")


def main(argv: list[str]) -> int:
    verb = argv[1] if len(argv) > 1 else ""
    if verb not in VERBS or len(argv) > 2:
        raise InputError("verb", f"unknown {verb!r}" if verb else "is missing", nearest(verb, VERBS))
    if not FLAGS.workdir:
        raise InputError("--workdir", "is missing", "name a directory for the sweep")
    if verb == "report":
        summary = report(FLAGS.workdir)
        if FLAGS.json:
            command_line.print_json(summary)
        else:
            print(open(os.path.join(FLAGS.workdir, "report.md")).read() + f"\n{os.path.join(FLAGS.workdir, 'report.png')}")
        return 0
    if not FLAGS.config:
        raise InputError("--config", "is missing", "name a preset")
    cells = grid()
    rows = planned(cells, command_line.preset(FLAGS.config), FLAGS.workdir)
    if verb == "plan":
        seen = detectable(rows, finished_cells(FLAGS.workdir), FLAGS.seed_sd)
        if FLAGS.json:
            command_line.print_json({"cells": rows, "detectable": seen})
        else:
            for row in rows:
                print(f"{row['cell']}  {row['status']:8}  {row['params']:,} params, {row['tokens']:,} tokens, "
                      f"{row['flops']:.3g} FLOPs  {row['overrides']}")
            print(f"{len(rows)} cells, {sum(r['flops'] for r in rows if r['status'] != 'finished'):.3g} FLOPs to go")
            if seen:
                print(f"{seen['seeds']} seeds show a difference of {seen['difference']:.2g} nats/token to the first setting "
                      f"four times in five, {seen['seeds_for_half']} half of it (settings compared: {seen['comparisons']}; "
                      f"a difference's standard deviation over seeds: {seen['sd']:.2g}, from {seen['sd_from']})")
        return 0
    remember(cells, FLAGS.workdir)
    failed = run_cells(rows, FLAGS.config, FLAGS.workdir, FLAGS.jobs, FLAGS.minutes)
    summary = report(FLAGS.workdir)
    if FLAGS.json:
        command_line.print_json(summary | {"failed": failed})
    else:
        print(open(os.path.join(FLAGS.workdir, "report.md")).read())
    return 1 if failed else 0


if __name__ == "__main__":
    command_line.run(main, arguments=True)
