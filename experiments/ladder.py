"""The ladder's runs on this machine: what they would cost, and running them: one trunk a size, a branch a budget."""

import json
import os
import statistics
import time
from typing import Any, Mapping, Sequence

import jax
import numpy as np

from configs import preset
from configs.ladder import FAMILIES
from experiments.cells import run_cells, status
from research import hardware
from research.config import nearest, override
from research.errors import InputError
from research.scaling.ladder import Rung, Size, grid, write_csv
from research.schema import COMPILED, LEDGER_PREFIX, RESULT_FILE, Config
from research.training.loop import put_batch
from research.training.program import BATCH_FIELDS, Program, make_program
from research.training.state import init_state
from research.training.workdir import read_rows

PLAN_FILE, CSV_FILE = "plan.json", "ladder.csv"
STARTUP_SECONDS = 15.0  # a run's imports, compilation, evaluation and saves on two cores
UTILIZATION = 0.3  # of the matmul peak, where steps aren't measured
Row = dict[str, Any]


def make_plan(workdir: str, family: str, data: str | None, dims: Sequence[int], budgets: Sequence[float],
              ratios: tuple[float, float], seed: int, changes: Mapping[str, str], measured: bool) -> dict[str, Any]:
    """The ladder as data, written to WORKDIR/plan.json: trunks and rungs, each with what it computes and costs.

    Args:
      data: a glob of text files in place of the preset's source.
      dims, budgets: widths and FLOPs; the family's where empty.
      changes: overrides of the preset for all runs.
      measured: time a few steps of each size, else take UTILIZATION of the matmul peak.

    Raises:
      InputError: an unknown family; a grid that no law could be fitted to.
    """
    if family not in FAMILIES:
        raise InputError("--family", f"unknown {family!r}", nearest(family, list(FAMILIES)))
    chosen = FAMILIES[family]
    shared = {**changes, "seed": seed}
    if data:
        shared |= {"data.sources.0.name": "text", "data.sources.0.args": json.dumps({"paths": [data]})}
    os.makedirs(workdir, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.abspath(workdir), COMPILED, "xla"))  # the runs' own
    base = override(preset(chosen.preset), shared)
    peak = None if measured else hardware.measured_cpu_peak()
    sizes = [size_of(chosen.preset, dim, shared | chosen.size(dim), peak) for dim in sorted(dims or chosen.dims)]
    rungs = grid(sizes, budgets or chosen.budgets, base.optim.warmup_steps, ratios)
    plan = {"family": family, "preset": chosen.preset, "seed": seed, "shared": shared,
            "seconds_from": ("measured steps of this machine" if measured else
                             f"{UTILIZATION:g} of this machine's matmul peak, {peak / 1e9:.0f} GFLOP/s"),
            "startup_seconds": STARTUP_SECONDS, **cells(workdir, rungs)}
    with open(os.path.join(workdir, PLAN_FILE), "w") as file:
        json.dump(plan, file, indent=1)
    return plan


def size_of(preset_name: str, dim: int, overrides: Mapping[str, Any], peak: float | None) -> Size:
    config = override(preset(preset_name), {**overrides, "optim.schedule": "constant"})
    program = make_program(config)
    counts = program.model.param_counts()
    cost = program.flops_per_token * program.tokens_per_step
    seconds = cost / (UTILIZATION * peak) if peak else step_seconds(program)
    return Size(dim, dict(overrides), counts["total"], counts["non_embedding"], program.flops_per_token, program.tokens_per_step,
                seconds)


def step_seconds(program: Program, seconds: float = 1.0) -> float:
    """The median time of a step over `seconds`, at least 3 steps, after 2; compiles it into the runs' cache."""
    compiled = program.compile()
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    shape = next(iter(program.abstract_batch().values())).shape
    tokens = np.random.default_rng(0).integers(0, program.config.model.vocab_size, shape)
    values = {"tokens_BxL": tokens, "targets_BxL": tokens, "positions_BxL": np.broadcast_to(np.arange(shape[-1]), shape)}
    batch = {name: np.asarray(values[name] if name in values else np.ones(shape), dtype) for name, dtype in BATCH_FIELDS.items()}
    batch = put_batch(batch, program.layout.batch())
    times: list[float] = []
    while len(times) < 5 or sum(times[2:]) < seconds:
        began = time.perf_counter()
        state, metrics = compiled(state, None, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def cells(workdir: str, rungs: Sequence[Rung]) -> dict[str, list[Row]]:
    """{"trunks", "rungs"}: a row a training, as experiments.cells runs it."""
    trunks, branches = [], []
    for size in dict.fromkeys(rung.size.dim for rung in rungs):
        own = [rung for rung in rungs if rung.size.dim == size]
        steps = sorted({rung.branch_step for rung in own})
        trunk = f"trunk-d{size:04d}"
        ends = {"optim.schedule": "constant", "train.steps": steps[-1], "checkpoint.keep_at": ",".join(map(str, steps))}
        trunks.append(_row(workdir, trunk, own[-1], ends, steps[-1]))
        for rung in own:
            ends = {"train.steps": rung.steps, "optim.decay_steps": rung.decay_steps,
                    "train.branch_from": f"{os.path.join(workdir, trunk)}@{rung.branch_step}"}
            branches.append(_row(workdir, f"d{size:04d}-{rung.tokens / 1e6:.3f}M", rung, ends, rung.decay_steps))
    return {"trunks": trunks, "rungs": branches}


def _row(workdir: str, cell: str, rung: Rung, changes: Mapping[str, Any], steps: int) -> Row:
    size = rung.size
    return {"cell": cell, "workdir": os.path.join(workdir, cell), "overrides": {**size.overrides, **changes}, "dim": size.dim,
            "params": size.params, "non_embedding": size.non_embedding, "tokens": rung.tokens, "flops": rung.flops,
            "trained_tokens": steps * size.tokens_per_step, "trained_flops": steps * size.tokens_per_step * size.flops_per_token,
            "seconds": steps * size.step_seconds + STARTUP_SECONDS}


def read_plan(workdir: str) -> dict[str, Any] | None:
    path = os.path.join(workdir, PLAN_FILE)
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


def run(workdir: str, plan: Mapping[str, Any], jobs: int, minutes: float | None) -> list[str]:
    """Trunks, then branches; writes WORKDIR/ladder.csv of what is finished. Returns what failed, diverged runs included.

    Raises:
      Interrupted: the minutes are over; the next call goes on.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    failed: list[str] = []
    try:
        for rows in (plan["trunks"], plan["rungs"]):
            ready = [row | {"status": status(row["workdir"])} for row in rows if not _hopeless(row)]
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0) / 60
            failed += run_cells(ready, plan["preset"], workdir, jobs, left)
    finally:
        collect(workdir, plan)
    return failed


def diverged(run_directory: str) -> bool:
    """Did the guard give the run up? Its ledger's last alarm has the story."""
    rows = read_rows(run_directory, LEDGER_PREFIX) if os.path.isdir(run_directory) else []
    return bool(rows) and rows[-1]["event"] == "alarm" and "story" in rows[-1]


def _trunk(row: Row) -> str | None:
    if "train.branch_from" not in row["overrides"]:
        return None
    return row["overrides"]["train.branch_from"].rpartition("@")[0]


def _hopeless(row: Row) -> bool:
    """It has diverged, or its trunk isn't there: it diverged or failed."""
    trunk = _trunk(row)
    return diverged(row["workdir"]) or (trunk is not None and status(trunk) != "finished")


def collect(workdir: str, plan: Mapping[str, Any]) -> list[Row]:
    """The finished and the diverged rungs, to WORKDIR/ladder.csv."""
    found = []
    for row in plan["rungs"]:
        trunk = _trunk(row)
        lost = diverged(row["workdir"]) or (trunk is not None and diverged(trunk))
        if status(row["workdir"]) != "finished" and not lost:
            continue
        result = {"final_eval_loss": None, "final_eval_loss_se": None}
        if not lost:
            with open(os.path.join(row["workdir"], RESULT_FILE)) as file:
                result = json.load(file)
        loss, se = (float("nan") if result[name] is None else result[name] for name in ("final_eval_loss", "final_eval_loss_se"))
        found.append({**{name: row[name] for name in ("params", "non_embedding", "tokens", "flops")}, "loss": loss, "loss_se": se,
                      "seed": plan["seed"], "run": row["cell"], "diverged": int(lost)})
    write_csv(os.path.join(workdir, CSV_FILE), found)
    return found
