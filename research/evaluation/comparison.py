"""Everything that is said when runs are compared, as `tools.compare --json` prints it."""

from typing import Any, Sequence

import numpy as np

from research.errors import InputError
from research.evaluation import runs
from research.evaluation.runs import Difference, Run
from research.training.metrics import finite


def figures(run: Run) -> dict[str, Any]:
    """A run's line: how far it is, its losses, speed (median over logged rows) and memory (largest)."""
    curves, rows = run.curves(), list(run.rows.values())
    utilizations = [row["mfu"] for row in rows if row["mfu"] is not None]  # None where the chip isn't known
    return {
        "run": run.label, "workdir": run.path, "status": run.result["status"] if run.result else "unfinished",
        "steps": int(curves["steps"][-1]), "tokens": int(curves["tokens"][-1]), "flops": float(curves["flops"][-1]),
        "seconds": float(curves["seconds"][-1]), "params": run.result["params"] if run.result else None,
        "training_loss": float(curves["loss"][-1]),
        "evaluations": {name: {key: row[key] for key in ("step", "loss", "se", "bits_per_byte")}
                        for name, row in run.evaluations.items()},
        "loss_by_position": {name: row["loss_by_position"] for name, row in run.evaluations.items()
                             if "loss_by_position" in row},
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in rows])),
        "mfu": float(np.median(utilizations)) if utilizations else None,
        "device_bytes": int(max(row["device_bytes"] for row in rows)),
    }


def difference_json(row: Difference, p_holm: float | None) -> dict[str, Any]:
    estimate = row.estimate
    return {"run": row.run, "base": row.base, "what": row.what, "note": row.note,
            "difference": {"value": estimate.value, "low": estimate.low, "high": estimate.high} if estimate else None,
            "se": estimate.se if estimate else None, "p": estimate.p if estimate else None, "p_holm": p_holm,
            "n": estimate.n if estimate else None}


def compare(paths: Sequence[str], tail: float = 0.25, confidence: float = 0.95) -> dict[str, Any]:
    """The runs (directories, or a sweep's for its cells) against the first of them.

    Args:
      tail: share of the common logged steps, at the end, over which the training losses are compared.
      confidence: of the intervals.

    Raises:
      InputError: a path is no run, there are fewer than two, two have no logged step in common, or a share isn't one.
    """
    for name, value in (("--tail", tail), ("--confidence", confidence)):
        if not 0 < value <= 1 or (name == "--confidence" and value == 1):
            raise InputError(name, f"{value} is not a share", "choose one above 0 and below 1")
    expanded = runs.expand(paths)
    loaded = [runs.load(path, label) for path, label in zip(expanded, runs.labels(expanded))]
    rows, curves = runs.differences(loaded, tail, confidence), [run.curves() for run in loaded]
    return {
        "base": loaded[0].label, "confidence": confidence, "runs": [figures(run) for run in loaded],
        "config": {path: dict(zip([run.label for run in loaded], map(plain, values)))
                   for path, values in runs.config_difference(loaded).items()},
        "same_data_order": {run.label: runs.shares_data_order(run, loaded[0]) for run in loaded[1:]},
        "differences": [difference_json(row, p) for row, p in zip(rows, runs.adjusted(rows))],
        "equal_budget": {axis: {"at": found["at"], "training_loss": dict(zip([run.label for run in loaded], found["losses"]))}
                         for axis, found in runs.at_equal_budget(curves).items()},
        "curves": {run.label: {name: values.tolist() for name, values in curve.items()} for run, curve in zip(loaded, curves)},
    }


def plain(value: Any) -> Any:
    """A config value as JSON has it."""
    return finite(value) if isinstance(value, (bool, int, float, str, type(None))) else str(value)
