"""What correcting a law's drift gains and costs, at ten times a ladder's compute: docs/results/scaling-drift.json.

    python -m tests.scaling.drift 40 > docs/results/scaling-drift.json

`made_up`: the law is exactly right, so all drift is noise. `ladders`: the real ones under docs/results, where the last budget
is predicted from those before. Errors are of the log loss, root mean squares.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

from research.scaling.ladder import backtests, corrected, drift, forecast, widening
from research.scaling.points import make, read_csv
from tests.scaling.ladder_test import climb, law

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"
LADDERS = "ladder-transformer.csv", "ladder-transformer-2.csv", "ladder-transformer-3.csv"


def rms(errors: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def made_up(trials: int, noise: float) -> dict[str, Any]:
    errors: dict[str, list[float]] = {"law": [], "corrected": []}
    covered = {"law": 0, "corrected": 0}
    for seed in range(trials):
        points = climb(noise, seed=seed)
        flops = 10 * points.flops_P.max()
        params = np.sqrt(flops / 120)
        target = make([params], [1.0], [flops / 6 / params])
        observed = law(params, flops / 6 / params) * np.exp(noise * np.random.default_rng(seed).standard_normal())
        tests = backtests(points, "3", 64)
        said, = forecast(points, "3", target, 128)
        for name, moved in (("law", 0.0), ("corrected", drift(tests))):
            band = corrected(said, moved, 10.0, widening(tests))
            errors[name].append(np.log(observed / band["value"]))
            covered[name] += bool(band["low"] <= observed <= band["high"])
    return {"noise": noise, "trials": trials, "error": {name: rms(found) for name, found in errors.items()}, "covered": covered}


def of_ladder(name: str) -> dict[str, Any]:
    points, _ = read_csv(str(RESULTS / name), {}, [])
    rows = backtests(points, "3", 64)
    last = [row for row in rows if row["next"] and row["budget"] == max(row["budget"] for row in rows)]
    return {"ladder": name, "drift": drift(rows), "runs": len(last), "error": {
        key: rms([np.log(row["observed"] / row[band]["value"]) for row in last])
        for key, band in (("law", "law"), ("corrected", "predicted"))}}


if __name__ == "__main__":
    count = int(sys.argv[1])
    print(json.dumps({"made_up": [made_up(count, noise) for noise in (0.002, 0.005)],
                      "ladders": [of_ladder(name) for name in LADDERS]}, indent=1))
