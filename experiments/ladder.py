"""The ladder's runs on this machine: what they would cost, and running them: one trunk a size, a branch a budget."""

import json
import math
import os
import statistics
import time
from typing import Any, Mapping, Sequence

import jax
import numpy as np

from configs import preset
from configs.ladder import FAMILIES, HEAD_DIM
from experiments.cells import run_cells, status
from research import hardware
from research.config import nearest, override
from research.errors import InputError
from research.evaluation.statistics import over_seeds
from research.scaling.analysis import analyse
from research.scaling.divergence import without_diverged
from research.scaling.ladder import (
    BACKTEST_RESAMPLES,
    Rung,
    Size,
    backtests,
    corrected,
    drift_figure,
    forecast,
    grid,
    rung_at,
    widening,
    write_csv,
)
from research.scaling.laws import LAWS
from research.scaling.points import Points, make, read_csv
from research.scaling.prediction import config_sha256, score, stored_prediction
from research.schema import COMPILED, LEDGER_PREFIX, RESULT_FILE, Config
from research.training.loop import put_batch
from research.training.program import BATCH_FIELDS, Program, make_program
from research.training.state import init_state
from research.training.workdir import read_config, read_rows

PLAN_FILE, CSV_FILE = "plan.json", "ladder.csv"
STARTUP_SECONDS = 15.0  # a run's imports, compilation, evaluation and saves on two cores
UTILIZATION = 0.3  # of the matmul peak, where steps aren't measured
DECIDED = ("seed", "train.steps", "train.branch_from", "optim.schedule", "optim.decay_steps", "checkpoint.keep_at")
LARGEST_DIM = 1024  # of a target that the law chooses
Row = dict[str, Any]


def asked(family: str, data: str | None, dims: Sequence[int], budgets: Sequence[float], ratios: tuple[float, float], seed: int,
          changes: Mapping[str, str]) -> dict[str, Any]:
    """What a plan is made of, by the names of the flags, as plan.json keeps it.

    Args:
      data: a glob of text files in place of the preset's source.
      dims, budgets: widths and FLOPs; the family's where empty.
      changes: overrides of the preset for all runs.

    Raises:
      InputError: an unknown family, or a change of what the ladder decides.
    """
    if family not in FAMILIES:
        raise InputError("--family", f"unknown {family!r}", nearest(family, list(FAMILIES)))
    chosen = FAMILIES[family]
    taken = sorted(set(changes) & {*DECIDED, *chosen.size(chosen.dims[0])})
    if taken:
        raise InputError("--set", f"{', '.join(taken)}: the ladder decides that for each run", "see --dims, --budgets, --seed")
    return {"family": family, "data": data, "dims": sorted(dims or chosen.dims), "budgets": sorted(budgets or chosen.budgets),
            "ratios": list(ratios), "seed": seed, "set": dict(changes)}


def check_asked(workdir: str, plan: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises InputError where WORKDIR's plan was made of something else than is wanted now."""
    kept = plan["asked"] if "asked" in plan else {name: plan[name] for name in ("family", "seed")}  # older plans kept no more
    for name, value in wanted.items():
        if name not in kept or kept[name] != value:
            has = f"has {json.dumps(kept[name])}" if name in kept else "doesn't say which it has"
            raise InputError(f"--{name}", f"{os.path.join(workdir, PLAN_FILE)} {has}, not {json.dumps(value)}",
                             "leave the flag out, or choose another --workdir")


def make_plan(workdir: str, wanted: Mapping[str, Any], measured: bool) -> dict[str, Any]:
    """The ladder as data, written to WORKDIR/plan.json: trunks and rungs, each with what it computes and costs.

    Args:
      wanted: as `asked` gives it.
      measured: time a few steps of each size, else take UTILIZATION of the matmul peak.

    Raises:
      InputError: a grid that no law could be fitted to, or runs of another plan in WORKDIR.
    """
    before = read_plan(workdir)
    if before and any(status(row["workdir"]) != "missing" for row in before["trunks"] + before["rungs"]):
        check_asked(workdir, before, wanted)
    chosen, data = FAMILIES[wanted["family"]], wanted["data"]
    shared = {**wanted["set"], "seed": wanted["seed"]}
    if data:
        shared |= {"data.sources.0.name": "text", "data.sources.0.args": json.dumps({"paths": [data]})}
    os.makedirs(workdir, exist_ok=True)
    if measured and "RUNG_CACHE" not in os.environ:  # what is compiled to be measured isn't compiled again by the runs
        jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.abspath(workdir), COMPILED, "xla"))
    base = override(preset(chosen.preset), shared)
    peak = None if measured else hardware.measured_cpu_peak()
    sizes = lambda peak: [size_of(chosen.preset, dim, shared | chosen.size(dim), peak) for dim in wanted["dims"]]
    grid_of = lambda sizes: grid(sizes, wanted["budgets"], base.optim.warmup_steps, wanted["ratios"])
    if measured:
        grid_of(sizes(1.0))  # a grid that can't be is refused before anything is timed
    rungs = grid_of(sizes(peak))
    plan = {"family": wanted["family"], "preset": chosen.preset, "seed": wanted["seed"], "asked": wanted, "shared": shared,
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
    return Size(dim, dict(overrides), counts["total"], counts["non_embedding"], program.flops_per_token,
                program.tokens_per_step, seconds)


def step_seconds(program: Program, seconds: float = 1.0) -> float:
    """The median time of a step over `seconds`, at least 3 steps, after 2; compiles it into the runs' cache."""
    compiled = program.compile()
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    shape = next(iter(program.abstract_batch().values())).shape
    tokens = np.random.default_rng(0).integers(0, program.config.model.vocab_size, shape)
    values = {"tokens_BxL": tokens, "targets_BxL": tokens, "positions_BxL": np.broadcast_to(np.arange(shape[-1]), shape)}
    values |= {"weights_BxL": np.ones(shape), "segment_ids_BxL": np.ones(shape)}
    batch = put_batch({name: np.asarray(values[name], dtype) for name, dtype in BATCH_FIELDS.items()}, program.layout.batch())
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
    size, trained = rung.size, steps * rung.size.tokens_per_step
    return {"cell": cell, "workdir": os.path.join(workdir, cell), "overrides": {**size.overrides, **changes}, "dim": size.dim,
            "params": size.params, "non_embedding": size.non_embedding, "tokens": rung.tokens, "flops": rung.flops,
            "trained_tokens": trained, "trained_flops": trained * size.flops_per_token,
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
            ready.sort(key=lambda row: -row["seconds"])  # the longest first, so that no job ends alone
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0) / 60
            failed += run_cells(ready, plan["preset"], workdir, jobs, left)
    finally:
        collect(workdir, plan)
    return failed


def results_of(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `result.json` of every finished trunk and rung."""
    found = []
    for row in plan["trunks"] + plan["rungs"]:
        if status(row["workdir"]) == "finished":
            with open(os.path.join(row["workdir"], RESULT_FILE)) as file:
                found.append(json.load(file))
    return found


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
        loss = se = None
        if not lost:
            with open(os.path.join(row["workdir"], RESULT_FILE)) as file:
                result = json.load(file)
            loss, se = result["final_eval_loss"], result["final_eval_loss_se"]
        found.append({**{name: row[name] for name in ("params", "non_embedding", "tokens", "flops")}, "loss": loss,
                      "loss_se": se, "seed": plan["seed"], "run": row["cell"], "diverged": int(loss is None)})
    write_csv(os.path.join(workdir, CSV_FILE), found)
    return found


def ladder_points(path: str, columns: Mapping[str, str], exclude: Sequence[str]) -> tuple[Points, dict[str, int], list[str]]:
    """The runs of a ladder's CSV, or any other: (points, how many each condition of `exclude` left out, diverged runs).

    Diverged runs are left out and named, those that say so and those that `without_diverged` finds.
    """
    points, excluded = read_csv(path, columns, exclude)
    points = without_diverged(points)
    return points, excluded, [run for run, reason in points.left_out if reason.startswith("diverged")]


def target_of(plan: Mapping[str, Any], flops: float, params: float, n_used: str, dim: int | None) -> tuple[Rung, Config]:
    """The run of `flops` whose size, counted as `n_used`, is nearest to `params` (or of width `dim`), by the ladder's rules."""
    family, shared = FAMILIES[plan["family"]], plan["shared"]
    at = lambda width: size_of(family.preset, width, {**shared, **family.size(width)}, 1.0)
    if dim is None:
        size = smaller = at(HEAD_DIM)
        while getattr(size, n_used) < params and size.dim < LARGEST_DIM:
            smaller, size = size, at(size.dim + HEAD_DIM)
        size = min((smaller, size), key=lambda found: abs(math.log(getattr(found, n_used) / params)))
    else:
        size = at(dim)
    rung = rung_at(size, flops)
    return rung, override(preset(family.preset), target_overrides(rung))


def target_overrides(rung: Rung) -> dict[str, Any]:
    return {**rung.size.overrides, "train.steps": rung.steps, "optim.decay_steps": rung.decay_steps}


def predict(points: Points, plan: Mapping[str, Any] | None, approach: str, flops: float, dim: int | None, n_used: str,
            bootstrap: int, seed: int) -> Row:
    """What the law of `points` says of a run of `flops` FLOPs, to be sealed; without a ladder's plan, of the size that the law
    finds best there, of which there is no config.

    Its value is the law's, corrected by the drift that the backtests show; its interval is that of one new run, wide enough
    for no drift or twice as much, and widened until the backtests' errors are as their intervals say (`widening`).
    """
    if approach not in LAWS:
        raise InputError("--approach", f"{approach!r} says nothing of a ladder's runs", nearest(approach, list(LAWS)))
    law = LAWS[approach]
    found = analyse(points, approach, bootstrap=bootstrap, seed=seed, budget=flops)
    tests = backtests(points, approach, min(bootstrap, BACKTEST_RESAMPLES), seed)
    widen = widening(tests)
    best = found["optimum"]
    if best["N_opt"] is None or best["D_opt"] is None:
        raise InputError("points", f"these runs decide no best size at {flops:.3g} FLOPs", "add sizes or budgets")
    if plan is None:
        target = {"preset": None, "overrides": {}, "params": best["N_opt"]["value"], "tokens": best["D_opt"]["value"],
                  "flops": flops, "config_sha256": None}
    else:
        target = _planned_target(plan, flops, best["N_opt"]["value"], n_used, dim)
    counted_as = target["params" if plan is None else n_used]
    said, = forecast(points, approach, make([counted_as], [1.0], [target["tokens"]], [target["flops"]]), bootstrap, seed)
    moved, times = drift_figure(tests), target["flops"] / float(points.flops_P.max())
    band = corrected(said, moved["value"], times, widen)
    columns = (values_P.tolist() for values_P in (points.params_P, points.tokens_P, points.flops_P, points.loss_P))
    runs = [dict(zip(("run", n_used, "tokens", "flops", "loss"), row)) for row in zip(points.names, *columns)]
    return {**band, "of_law": said, "drift": moved,
            "law": law.formula, "approach": approach, "n_used": n_used, "parameters": found["parameters"],
            "residual_rms": found["residual_rms"], "bootstrap": bootstrap, "bootstrap_seed": seed, "widened": widen,
            "backtests": counted(tests), "optimum": found["optimum"], "notes": found["notes"], "left_out": found["left_out"],
            "runs": runs,
            "target": target | {"times": times}}


def _planned_target(plan: Mapping[str, Any], flops: float, params: float, n_used: str, dim: int | None) -> Row:
    rung, config = target_of(plan, flops, params, n_used, dim)
    return {"preset": plan["preset"], "overrides": target_overrides(rung), "params": rung.size.params,
            "non_embedding": rung.size.non_embedding, "tokens": rung.tokens, "flops": rung.flops,
            "config_sha256": config_sha256(config)}


def counted(tests: Sequence[Mapping[str, Any]]) -> Row:
    """How many of the backtests' intervals held, and their errors, for the next budget and for all later ones."""
    told = {}
    for name, rows in (("next", [row for row in tests if row["next"]]), ("later", tests)):
        errors = [abs(row["relative_error"]) for row in rows]
        told[name] = {"runs": len(rows), "covered": sum(row["covered"] for row in rows),
                      "mean_absolute_error": sum(errors) / len(errors) if errors else None, "worst": max(errors, default=None)}
    return told


def scores(runs: Sequence[str]) -> list[Row]:
    """A row a finished or diverged run with a prediction: what was predicted, what came, the error, whether the interval
    covered it. One that diverged has no loss: its prediction missed."""
    rows = []
    for run_directory in runs:
        finished = status(run_directory) == "finished"
        lost = not finished and diverged(run_directory)
        prediction = stored_prediction(run_directory) if finished or lost else None
        if prediction is None:
            continue
        result = {"flops": prediction["target"]["flops"], "final_eval_loss": None, "final_eval_loss_se": None}
        if finished:
            with open(os.path.join(run_directory, RESULT_FILE)) as file:
                result = json.load(file)
        rows.append({"run": run_directory, "seed": read_config(run_directory).seed, "flops": result["flops"], "diverged": lost,
                     "observed_se": result["final_eval_loss_se"], **score(prediction, result["final_eval_loss"])})
    return rows


def score_summary(rows: Sequence[Row]) -> Row:
    """scores, how many runs were covered, which diverged, and the mean relative error of each prediction that 2 runs or more
    ended with a loss for."""
    means = []
    for sealed in dict.fromkeys(row["sha256"] for row in rows):
        errors = [row["relative_error"] for row in rows if row["sha256"] == sealed and row["relative_error"] is not None]
        if len(errors) > 1:
            found = over_seeds(errors)
            means.append({"sha256": sealed, "runs": len(errors),
                          "relative_error": {"value": found.value, "low": found.low, "high": found.high}})
    return {"scores": list(rows), "covered": sum(row["covered"] for row in rows), "runs": len(rows),
            "diverged": [row["run"] for row in rows if row["diverged"]], "mean_relative_errors": means}
