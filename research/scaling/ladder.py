"""A ladder of small runs: which sizes at which budgets, cut from one trunk a size, and what came out of them.

A trunk trains a size at a constant learning rate; a rung leaves it at some step and decays to zero (WSD: Hu et al. 2024), so
a rung is bitwise the run that warms up, stays and decays by itself, for the price of its decay. Sizes meet budgets on an
isoFLOP grid.
"""

import csv
import dataclasses
import math
from typing import Any, Mapping, Sequence

import numpy as np
from scipy import stats

from research.errors import InputError
from research.scaling.laws import LAWS
from research.scaling.points import Points, budgets
from research.scaling.uncertainty import MOST, interval, predictive

COLUMNS = ("params", "non_embedding", "tokens", "flops", "loss", "loss_se", "seed", "run", "diverged")
DECAY = 0.2  # of a rung's steps
BACKTEST_RESAMPLES = 200
TOKENS_PER_PARAM = 1.0, 250.0  # of the sizes that a budget takes


@dataclasses.dataclass(frozen=True)
class Size:
    """A model of the ladder. `overrides`: of the family's preset; `step_seconds`: on this machine."""

    dim: int
    overrides: Mapping[str, Any]
    params: int
    non_embedding: int
    flops_per_token: float
    tokens_per_step: int
    step_seconds: float


@dataclasses.dataclass(frozen=True)
class Rung:
    """A run of `steps` steps; the last `decay_steps` lower the learning rate to zero."""

    size: Size
    steps: int
    decay_steps: int

    @property
    def tokens(self) -> int:
        return self.steps * self.size.tokens_per_step

    @property
    def flops(self) -> float:
        return self.tokens * self.size.flops_per_token

    @property
    def branch_step(self) -> int:
        return self.steps - self.decay_steps


def rung_at(size: Size, flops: float) -> Rung:
    """The run of `size` that costs `flops`, to a step."""
    steps = max(round(flops / (size.flops_per_token * size.tokens_per_step)), 1)
    return Rung(size, steps, max(math.ceil(DECAY * steps), 1))


def grid(sizes: Sequence[Size], flops: Sequence[float], warmup_steps: int,
         ratios: tuple[float, float] = TOKENS_PER_PARAM) -> list[Rung]:
    """At each budget of `flops` the sizes whose tokens per parameter lie in `ratios`, smallest first.

    Raises:
      InputError: a budget with fewer than 3 sizes (no parabola), or one whose run would decay before it has warmed up.
    """
    found = []
    for budget in sorted(flops):
        at_budget = [rung for rung in (rung_at(size, budget) for size in sizes)
                     if ratios[0] <= rung.tokens / rung.size.params <= ratios[1]]
        if len(at_budget) < 3:
            raise InputError("--budgets", f"{budget:g} FLOPs give {len(at_budget)} of {len(sizes)} sizes from {ratios[0]:g} to "
                             f"{ratios[1]:g} tokens a parameter", "a budget needs 3: change --budgets, --dims or --ratios")
        short = [rung for rung in at_budget if rung.branch_step <= warmup_steps]
        if short:
            raise InputError("--budgets", f"{budget:g} FLOPs are {short[0].steps} steps at width {short[0].size.dim}, "
                             f"of which {warmup_steps} warm up", "raise the budget")
        found += at_budget
    return found


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a rung, the columns of COLUMNS; a diverged run's loss is None here and nan there."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: "nan" if value is None else value for name, value in row.items()} for row in rows)


def forecast(points: Points, approach: str, unseen: Points, bootstrap: int, seed: int = 0) -> list[dict]:
    """What the law of `points` says of each of the `unseen` runs' losses (which aren't looked at), for one new run each:
    [{"value", "low", "high"}], 95%.

    Raises:
      InputError: runs that can't decide the law.
    """
    law = LAWS[approach]
    fitted = law.fit(points, bootstrap, seed)
    log_loss_SxU = law.log_loss(fitted.parameters, unseen.params_P, unseen.tokens_P, unseen.flops_P)
    if not np.isfinite(log_loss_SxU[0]).all():
        raise InputError("points", "fewer than 4 budgets have a minimum", "add budgets, or take --approach=3")
    return [interval(predictive(log_loss_SxU[:, u], fitted.residual_P, fitted.estimated, seed + u)) for u in range(len(unseen))]


def corrected(band: Mapping[str, float], slope: float, times: float, widen: float = 1.0) -> dict[str, float]:
    """The band of a law of a run of `times` the compute that it has seen, moved by the law's `drift` (`slope`), then widened.

    Half of the move is taken as its standard deviation, so the interval holds no move and twice the move.
    """
    move = slope * math.log(max(times, 1.0))
    low, high = (math.hypot(max(side, 0.0), move) * widen
                 for side in (math.log(band["value"] / band["low"]), math.log(band["high"] / band["value"])))
    value = band["value"] * math.exp(move)
    return {"value": value, "low": value * math.exp(-low), "high": value * math.exp(high)}


def drift(tests: Sequence[Mapping[str, Any]]) -> float:
    """What runs had beyond what the laws of earlier budgets said of them: log loss for each factor e of compute.

    A law's error grows with how far it is carried, and mostly in one direction: E comes out too high while a ladder is short.
    Least squares through the origin, on the laws' own values; a test counts by how narrow its law's interval is (1 / width^2).
    0 without tests.
    """
    if not tests:
        return 0.0
    far, errors, widths = np.array([(math.log(row["times"]), math.log(row["observed"] / row["law"]["value"]),
                                     math.log(row["law"]["high"] / row["law"]["low"])) for row in tests]).T
    weights = 1 / np.maximum(widths, 1e-4) ** 2
    return float((weights * far) @ errors / ((weights * far) @ far))


def drift_figure(tests: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`drift` with its 95% interval: Student's, with the jackknife's standard error over the budgets that were predicted (runs
    of one budget err alike). Fewer than 3 of them decide none: it is then from -MOST to MOST."""
    value, predicted = drift(tests), sorted({row["budget"] for row in tests})
    count = len(predicted)
    if count < 3:
        return {"value": value, "low": -MOST, "high": MOST}
    without = np.array([drift([row for row in tests if row["budget"] != budget]) for budget in predicted])
    side = float(stats.t.ppf(0.975, count - 1) * np.sqrt((count - 1) * np.mean((without - without.mean()) ** 2)))
    return {"value": value, "low": value - side, "high": value + side}


def backtests(points: Points, approach: str, bootstrap: int, seed: int = 0) -> list[dict]:
    """Every prefix of the ladder, by compute, predicts every run of the later budgets, as a prediction is made: the law of
    the prefix, corrected by the drift that the prefix's own backtests show.

    Returns:
      A row a prefix and later run: seen (the prefix's FLOPs), next (is it of the next budget?), times (its FLOPs over the
      prefix's), run, law {value, low, high} (uncorrected), drift (the prefix's), predicted {value, low, high}, observed,
      relative_error (predicted / observed - 1) and covered. Prefixes that can't decide the law are left out. A law of the
      optimum alone is held to each budget's best run.
    """
    groups, rows = budgets(points), []
    for count in range(1, len(groups)):
        seen = points.take(np.concatenate(groups[:count]))
        own_drift = drift([row for row in rows if row["budget"] < count])  # of runs that this prefix has
        for later, group in enumerate(groups[count:], count):
            unseen = points.take(group)
            if LAWS[approach].optimal_only:
                unseen = unseen.take(np.array([unseen.loss_P.argmin()]))
            try:
                bands = forecast(seen, approach, unseen, bootstrap, seed)
            except InputError:
                break
            largest = float(seen.flops_P.max())
            for u, law in enumerate(bands):
                observed, times = float(unseen.loss_P[u]), float(unseen.flops_P[u]) / largest
                band = corrected(law, own_drift, times)
                rows.append({"seen": largest, "next": later == count, "budget": later, "times": times, "run": unseen.names[u],
                             "law": law, "drift": own_drift, "predicted": band, "observed": observed,
                             "relative_error": band["value"] / observed - 1,
                             "covered": band["low"] <= observed <= band["high"]})
    return rows


def widening(tests: Sequence[Mapping[str, Any]]) -> float:
    """How much wider the intervals have to be for the backtests' errors to be as they say: the root mean square of the errors
    in standard deviations (a 95% interval is 1.96 to each side), at least 1 (the Birge ratio). The bootstrap knows the noise,
    not that a law is wrong; this is what the law got wrong where it could be checked."""
    if not tests:
        return 1.0
    ratios = []
    for row in tests:
        band, error = row["predicted"], math.log(row["observed"] / row["predicted"]["value"])
        side = math.log(band["high"] / band["value"]) if error > 0 else math.log(band["value"] / band["low"])
        ratios.append(1.96 * abs(error) / max(side, 1e-6))
    return max(1.0, math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios)))
