"""Where a budget's loss is lowest: parabolas over its sizes (approach 2), the envelope of all sizes' curves (approach 1)."""

import dataclasses
import math

import numpy as np

from research.scaling.points import Points, budgets, rungs

WIDTH = math.log(10.0)  # a loss is much like a parabola over sizes from a tenth of the best one to ten times it


def vertex(x_P: np.ndarray, y_TxP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place, value), each (T,), of the minimum of the parabola through y over x; NaN where it has none. A place further
    beyond the ends of x than they are apart is set there."""
    middle, span = x_P.mean(), np.ptp(x_P)
    c, b, a = np.linalg.pinv(np.vander(x_P - middle, 3, increasing=True)) @ y_TxP.T
    with np.errstate(invalid="ignore", divide="ignore"):
        place_T, value_T = middle - b / (2 * a), c - b**2 / (4 * a)
    place_T = np.clip(place_T, x_P.min() - span, x_P.max() + span)
    return np.where(a > 0, place_T, np.nan), np.where(a > 0, value_T, np.nan)


def vertex_variance(x_P: np.ndarray, y_P: np.ndarray) -> tuple[float, float]:
    """Of the minimum's place, and of its value over itself, for noise that is proportional to y (the delta method)."""
    design = np.vander(x_P - x_P.mean(), 3, increasing=True)
    c, b, a = np.linalg.pinv(design) @ y_P / y_P.mean()
    covariance, t = np.linalg.pinv(design.T @ design), -b / (2 * a)
    place, value = np.array([0, 1, 2 * t]) / (2 * a), np.array([1, t, t * t])
    return float(place @ covariance @ place), float(value @ covariance @ value)


@dataclasses.dataclass(frozen=True)
class Budget:
    """One isoFLOP slice, a run a rung (the geometric mean of its seeds)."""

    index: np.ndarray  # of its runs, among the points
    rung: np.ndarray  # of each of these, which of the arrays below it is in
    log_flops: float
    log_n_S: np.ndarray
    log_d_S: np.ndarray
    loss_S: np.ndarray

    @property
    def name(self) -> str:
        return f"{np.exp(self.log_flops):.3g} FLOPs"

    def take(self, near_S: np.ndarray) -> "Budget":
        """The rungs where a mask is true."""
        runs = near_S[self.rung]
        return dataclasses.replace(self, index=self.index[runs], rung=np.cumsum(near_S)[self.rung[runs]] - 1,
                                   log_n_S=self.log_n_S[near_S], log_d_S=self.log_d_S[near_S], loss_S=self.loss_S[near_S])

    def has_minimum(self) -> bool:
        """Among its sizes, and among its token counts; a parabola that opens downwards has none."""
        (place_n,), (value,) = vertex(self.log_n_S, self.loss_S[None])
        (place_d,), _ = vertex(self.log_d_S, self.loss_S[None])
        between = lambda place, x_S: x_S.min() <= place <= x_S.max()  # false for NaN
        return bool(between(place_n, self.log_n_S) and between(place_d, self.log_d_S) and value > 0)

    def smooth_S(self) -> tuple[np.ndarray, np.ndarray]:
        """The parabola at each size, and each size's leverage."""
        design = np.vander(self.log_n_S - self.log_n_S.mean(), 3, increasing=True)
        hat_SxS = design @ np.linalg.pinv(design)
        return hat_SxS @ self.loss_S, np.diag(hat_SxS)


def slices(points: Points) -> list[Budget]:
    """The budgets. Runs whose FLOPs differ a little from their budget's mean are moved to it along the slope of the lowest
    losses (near the optimum, the loss depends on C alone as the optimum's does)."""
    groups, rung_P = budgets(points), rungs(points)
    log_c_P, log_loss_P = np.log(points.flops_P), np.log(points.loss_P)
    lowest = [index[log_loss_P[index].argmin()] for index in groups if len(index) > 2]
    slope = min(0.0, np.polyfit(log_c_P[lowest], log_loss_P[lowest], 1)[0]) if len(lowest) > 1 else 0.0
    found = []
    for index in groups:
        rung = np.unique(rung_P[index], return_inverse=True)[1].reshape(-1)
        mean = lambda values_P: np.bincount(rung, values_P[index]) / np.bincount(rung)
        log_c_S = mean(log_c_P)
        loss_S = np.exp(mean(log_loss_P) - slope * (log_c_S - log_c_S.mean()))
        found.append(Budget(index, rung, log_c_S.mean(), mean(np.log(points.params_P)), mean(np.log(points.tokens_P)), loss_S))
    return found


def near_minimum(budget: Budget, width: float = WIDTH) -> Budget:
    """Its sizes within `width` (in log N) of the minimum of the parabola through just these; all where that leaves fewer than
    4 sizes, or no minimum."""
    kept, centre = budget, budget.log_n_S[budget.loss_S.argmin()]
    for _ in range(4):
        near_S = np.abs(budget.log_n_S - centre) <= width  # false for NaN
        if len(np.unique(np.round(budget.log_n_S[near_S], 6))) < 4:
            return budget
        kept = budget.take(near_S)
        centre = vertex(kept.log_n_S, kept.loss_S[None])[0][0]
    return kept


def with_minimum(slices: list[Budget]) -> tuple[list[Budget], list[str]]:
    """Those that have a minimum among 3 sizes or more, each near it, and a note on what was left out."""
    few = [s for s in slices if len(np.unique(np.round(s.log_n_S, 6))) < 3]
    kept, notes = [], []
    if few:
        notes.append(f"{len(few)} of {len(slices)} budgets have fewer than 3 sizes ({sum(len(s.index) for s in few)} runs): "
                     f"left out: {', '.join(s.name for s in few)}")
    for s in slices:
        near = near_minimum(s)
        if any(s is other for other in few):
            continue
        if near.has_minimum():
            kept.append(near)
            if len(near.index) < len(s.index):
                notes.append(f"the budget of {s.name}: {len(s.index) - len(near.index)} of {len(s.index)} runs are more than "
                             f"{math.exp(WIDTH):.0f} times larger or smaller than its best size: not in its parabola")
        else:
            notes.append(f"the budget of {s.name} has no minimum among its sizes ({len(s.index)} runs): left out")
    return kept, notes


def envelope(points: Points, log_flops_G: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log N, log D, log loss), each (G,), of the lowest loss over sizes at each budget; NaN where it isn't between sizes.

    Runs of one size (within 2%) are a curve of log loss over log FLOPs, interpolated. A budget counts if 3 sizes have one there
    and neither the smallest nor the largest of them wins: an optimum at the edge isn't one.
    """
    order_P = np.argsort(points.params_P, kind="stable")
    sizes = np.split(order_P, np.flatnonzero(np.diff(np.log(points.params_P[order_P])) > 0.02) + 1)
    curves, log_n = [], []
    for index in sizes:
        index = index[np.argsort(points.flops_P[index], kind="stable")]
        x = np.log(points.flops_P[index])
        if x[-1] - x[0] > 1e-6:
            curves.append(np.interp(log_flops_G, x, np.log(points.loss_P[index]), left=np.nan, right=np.nan))
            log_n.append(np.log(points.params_P[index]).mean())
    if len(curves) < 3:
        return (np.full(len(log_flops_G), np.nan),) * 3
    curves_NxG, log_n_N = np.stack(curves), np.array(log_n)
    there_NxG = np.isfinite(curves_NxG)
    filled = np.where(there_NxG, curves_NxG, np.inf)
    best_G, first_G = filled.argmin(0), there_NxG.argmax(0)
    last_G = len(log_n_N) - 1 - there_NxG[::-1].argmax(0)
    good_G = (there_NxG.sum(0) > 2) & (best_G > first_G) & (best_G < last_G)
    log_k = math.log(points.flops_per_weight_token)
    pick = lambda values_G: np.where(good_G, values_G, np.nan)
    return pick(log_n_N[best_G]), pick(log_flops_G - log_k - log_n_N[best_G]), pick(filled.min(0))
