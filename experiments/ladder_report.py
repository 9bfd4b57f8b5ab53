"""What a ladder says, as a table, pictures and words: WORKDIR/report/{report.md, report.json, report.png}."""

import json
import os
from typing import Any, Mapping, Sequence

import numpy as np

from experiments.cells import status
from experiments.ladder import counted
from research.errors import InputError
from research.scaling.analysis import analyse
from research.scaling.analysis import crossing as compare_families
from research.scaling.ladder import BACKTEST_RESAMPLES, backtests
from research.scaling.laws import LAWS, Fitted, Law, optimum
from research.scaling.points import Points, budgets
from research.scaling.uncertainty import MOST, interval
from research.schema import METRICS_PREFIX
from research.training.workdir import read_rows

CURVE = 40  # budgets that bands are drawn at
BEYOND = 1e3  # how far outside of their runs two laws are followed to where they cross
Row = dict[str, Any]


def summarise(points: Points, approach: str, bootstrap: int, seed: int) -> Row:
    """All laws that the runs decide, the backtests of `approach`, the verdict in words."""
    fits, refused = {}, {}
    for name in LAWS:
        try:
            fits[name] = analyse(points, name, bootstrap=bootstrap, seed=seed)
        except InputError as error:
            refused[name] = error.problem
    if approach not in fits:
        raise InputError("points", refused[approach] if approach in refused else f"unknown approach {approach!r}",
                         f"these runs decide {', '.join(fits) or 'no law'}")
    tests = backtests(points, approach, min(bootstrap, BACKTEST_RESAMPLES), seed)
    flops = points.flops_P
    answer = {"approach": approach, "runs": len(points), "budgets": len(budgets(points)),
              "decades": float(np.log10(flops.max() / flops.min())), "fits": fits, "refused": refused, "backtests": tests,
              "counted": counted(tests)}
    return answer | {"verdict": verdict(answer)}


def verdict(answer: Mapping[str, Any]) -> list[str]:
    """Sentences; every figure with its interval."""
    fit = answer["fits"][answer["approach"]]
    words = [f"{answer['runs']} runs over {answer['decades']:.2f} decades of compute; {fit['formula']} leaves "
             f"{fit['residual_rms']:.2%} of the loss (rms)."]
    exponents = [f"{_figure(found['parameters']['a_opt'])} by approach {name}" for name, found in answer["fits"].items()]
    words.append(f"The best size grows as compute to the power {'; '.join(exponents)}.")
    lows, highs = zip(*((found["parameters"]["a_opt"]["low"], found["parameters"]["a_opt"]["high"])
                        for found in answer["fits"].values()))
    if len(lows) > 1:
        words.append("These intervals overlap." if max(lows) <= min(highs) else
                     "These intervals don't all overlap: the ladder doesn't settle the exponent.")
    tests = answer["counted"]["later"]
    if tests["runs"]:
        share = tests["covered"] / tests["runs"]
        words.append(f"In {tests['runs']} backtests {tests['covered']} intervals ({share:.0%}) held the loss, with a mean "
                     f"error of {tests['mean_absolute_error']:.2%} and a worst of {tests['worst']:.2%}: " +
                     ("such intervals can be believed here." if share >= 0.9 else
                      "such intervals are too narrow here; predictions widen them."))
    else:
        words.append("No prefix of the ladder decides the law, so nothing could be backtested.")
    words += [f"Approach {name} is undecided: {problem}." for name, problem in answer["refused"].items()]
    return words


def _figure(figure: Mapping[str, float]) -> str:
    """A bound of MOST is one that the resamples don't give."""
    low, high = (f"{figure[name]:.3f}" if abs(figure[name]) < MOST else "unbounded" for name in ("low", "high"))
    return f"{figure['value']:.3f} ({low} to {high})"


def crossing(ours: Points, theirs: Points, approach: str, bootstrap: int, seed: int, names: tuple[str, str]) -> Row:
    """Which of two families' laws is lower at its own best, at which budget: `analysis.crossing` of what both were measured at,
    followed by a factor of BEYOND to each side.

    Raises:
      InputError: no budgets that both were measured at, or runs that can't decide a law.
    """
    low, high = max(ours.flops_P.min(), theirs.flops_P.min()), min(ours.flops_P.max(), theirs.flops_P.max())
    if low >= high:
        raise InputError("--against", f"of {names[0]} and {names[1]} one ends at {high:.3g} FLOPs, the other begins at "
                         f"{low:.3g}", "compare ladders whose budgets overlap")
    first, second = ((name, LAWS[approach], LAWS[approach].fit(points, bootstrap, seed + number))
                     for number, (name, points) in enumerate(zip(names, (ours, theirs))))
    return compare_families(first, second, float(low), float(high), BEYOND)


def loss_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Run -> (FLOPs, training loss) of each logged step."""
    curves = {}
    for row in rows:
        if status(row["workdir"]) != "missing":
            logged = [found for found in read_rows(row["workdir"], METRICS_PREFIX) if "set" not in found]
            logged = [found for found in logged if isinstance(found["loss"], float)]
            curves[row["cell"]] = [found["flops"] for found in logged], [found["loss"] for found in logged]
    return curves


def _lower(row: Mapping[str, Any], ours: str, theirs: str) -> str:
    """Which is lower at this budget, by how much; or, where the interval holds 0, the difference with its sign."""
    difference, at = row["difference"], f"At {row['flops']:.2g} FLOPs"
    if row["prefers"] is None:
        return (f"{at} neither is lower beyond the interval: {ours} less {theirs} is {difference['value']:+.3f} "
                f"({difference['low']:+.3f} to {difference['high']:+.3f}).")
    value, low, high = (abs(difference[key]) for key in ("value", "low", "high"))
    return f"{at} the best of {row['prefers']} is lower by {value:.3f} ({min(low, high):.3f} to {max(low, high):.3f})."


def compared(found: Mapping[str, Any]) -> list[str]:
    """The crossings in words."""
    (ours, theirs), (low, high) = found["families"], found["measured"]
    words = [_lower(row, ours, theirs) for row in (found["at"][0], found["at"][-1])]
    for turn in found["crossings"]:
        where = f" (extrapolated: both were measured from {low:.2g} to {high:.2g} only)" if turn["extrapolated"] else ""
        words.append(f"The laws of {ours} and {theirs} cross at {_flops(turn['flops'])} FLOPs{where}; above, {turn['to']} is "
                     f"lower. {turn['share']:.0%} of the resamples cross so.")
    if not found["crossings"]:
        words.append(f"The laws of {ours} and {theirs} don't cross within {BEYOND:,.0f} times of what both were measured at "
                     f"({low:.2g} to {high:.2g} FLOPs); {found['crossing_share']:.0%} of the resamples do.")
    return words


def _flops(figure: Mapping[str, float]) -> str:
    """Bounds of 0 and MOST lie outside of what was searched."""
    low = f"{figure['low']:.2g}" if figure["low"] > 0 else "below all that was searched"
    high = f"{figure['high']:.2g}" if figure["high"] < MOST else "above all that was searched"
    return f"{figure['value']:.2g} ({low} to {high})"


def write(directory: str, answer: Mapping[str, Any], points: Points, lost: Sequence[str]) -> None:
    """report.md and report.json."""
    with open(os.path.join(directory, "report.json"), "w") as file:
        json.dump(answer, file, indent=1)
    lines = ["# A ladder", "", *answer["verdict"], ""]
    lines += [f"Left out, diverged: {', '.join(lost)}.", ""] if lost else []
    lines += ["| run | params | tokens | FLOPs | held-out loss |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {name} | {params:,.0f} | {tokens:,.0f} | {flops:.3g} | {loss:.4f} |" for name, params, tokens, flops, loss in
              zip(points.names, points.params_P, points.tokens_P, points.flops_P, points.loss_P)]
    lines += ["", "| approach | parameter | value | 95% |", "| --- | --- | --- | --- |"]
    for name, found in answer["fits"].items():
        lines += [f"| {name} | {parameter} | {figure['value']:.4g} | {figure['low']:.4g} to {figure['high']:.4g} |"
                  for parameter, figure in found["parameters"].items()]
    lines += ["", "Backtests: what runs up to a budget predict of later ones.", "",
              "| seen up to | run | times | predicted | 95% | observed | error | |", "| --- |" + " --- |" * 7]
    for row in answer["backtests"]:
        band = row["predicted"]
        lines.append(f"| {row['seen']:.3g} | {row['run']} | {row['times']:.1f} | {band['value']:.4f} | {band['low']:.4f} to "
                     f"{band['high']:.4f} | {row['observed']:.4f} | {row['relative_error']:+.2%} | "
                     f"{'covered' if row['covered'] else 'not covered'} |")
    if "crossing" in answer:
        lines += ["", "| FLOPs | this ladder's best loss - the other's | 95% | lower |", "| --- | --- | --- | --- |"]
        for row in answer["crossing"]["at"]:
            band = row["difference"]
            lines.append(f"| {row['flops']:.3g} | {band['value']:+.4f} | {band['low']:+.4f} to {band['high']:+.4f} | "
                         f"{row['prefers'] or 'undecided'} |")
    with open(os.path.join(directory, "report.md"), "w") as file:
        file.write("\n".join(lines) + "\n")


def draw(path: str, points: Points, approach: str, bootstrap: int, seed: int, tests: Sequence[Mapping[str, Any]],
         curves: Mapping[str, tuple[list[float], list[float]]], scored: Sequence[Mapping[str, Any]], largest: float) -> None:
    """Eight panels. `largest`: FLOPs that the laws are drawn to; `scored`: predictions with flops and what was observed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    law = LAWS[approach]
    fitted = law.fit(points, bootstrap, seed)
    figure, axes = plt.subplots(2, 4, figsize=(22, 10), layout="constrained")
    _draw_curves(axes[0, 0], curves)
    _draw_isoflop(axes[0, 1], points, fitted, law)
    grid_G = np.geomspace(points.flops_P.min(), max(largest, points.flops_P.max()), CURVE)
    best = [optimum(law, fitted.parameters, flops) for flops in grid_G]
    _draw_band(axes[0, 2], grid_G, [found["loss"] for found in best], f"best at a budget, approach {approach}")
    axes[0, 2].scatter(points.flops_P, points.loss_P, c=np.log(points.params_P), s=14)
    for row in scored:
        band = row["predicted"]
        sides = [[band["value"] - band["low"]], [band["high"] - band["value"]]]
        axes[0, 2].errorbar([row["flops"]], [band["value"]], yerr=sides, fmt="s", color="tab:red", capsize=4)
        if row["observed"] is not None:
            axes[0, 2].plot([row["flops"]], [row["observed"]], "x", color="black", markersize=9)
    axes[0, 2].set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="held-out loss",
                   title="envelope; red: predicted, x: observed")
    _draw_contours(axes[0, 3], points, fitted, law, grid_G, [found["N_opt"] for found in best])
    for plot, name, values_P in ((axes[1, 0], "N_opt", points.params_P), (axes[1, 1], "D_opt", points.tokens_P)):
        _draw_band(plot, grid_G, [found[name] for found in best], f"{name}, approach {approach}")
        plot.scatter(points.flops_P, values_P, s=8, color="gray")
        plot.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel=name, title=f"{name} and its 95% band")
    axes[1, 2].bar(range(len(fitted.residual_P)), 100 * fitted.residual_P)
    axes[1, 2].set_xticks(range(len(fitted.names)), fitted.names, rotation=90, fontsize="x-small")
    axes[1, 2].set(ylabel="observed - fitted, % of the loss", title="residuals")
    _draw_backtests(axes[1, 3], tests)
    for plot in axes.flat:
        plot.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_curves(plot: Any, curves: Mapping[str, tuple[list[float], list[float]]]) -> None:
    curves = {name: curve for name, curve in curves.items() if curve[1]}
    for name, (flops, loss) in curves.items():
        width = max(1, len(loss) // 30)
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        plot.plot(flops[width - 1:], smooth, linewidth=1 if name.startswith("trunk") else 0.7, label=name)
    if curves:
        plot.set(xscale="log", xlabel="FLOPs", ylabel="training loss (smoothed)", title="trunks and their branches")
        plot.set_ylim(top=max(np.quantile(loss, 0.9) for _, loss in curves.values()))


def _draw_isoflop(plot: Any, points: Points, fitted: Fitted, law: Law) -> None:
    for index in budgets(points):
        x_P = points.params_P[index]
        dots = plot.scatter(x_P, points.loss_P[index], s=16, label=f"{points.flops_P[index].mean():.2g} FLOPs")
        color = dots.get_facecolor()[0]
        if len(np.unique(x_P)) > 2:
            parabola = np.polynomial.Polynomial.fit(np.log(x_P), points.loss_P[index], 2)
            fine = np.geomspace(x_P.min(), x_P.max(), 40)
            plot.plot(fine, parabola(np.log(fine)), color=color, linewidth=1)
        if not law.optimal_only:
            fine = np.geomspace(x_P.min() / 1.5, x_P.max() * 1.5, 40)
            flops = points.flops_P[index].mean()
            tokens = flops / (points.flops_per_weight_token * fine)
            log_loss = law.log_loss({k: v[:1] for k, v in fitted.parameters.items()}, fine, tokens, np.full(40, flops))[0]
            plot.plot(fine, np.exp(log_loss), color=color, linewidth=1, linestyle=":")
    plot.set(xscale="log", xlabel="parameters", ylabel="held-out loss", title="isoFLOP: parabolas, and the law (dotted)")
    plot.legend(fontsize="x-small")


def _draw_band(plot: Any, grid_G: np.ndarray, values_GxT: Sequence[np.ndarray], label: str) -> None:
    if np.isnan([values_T[0] for values_T in values_GxT]).any():
        plot.set_title(f"{label}: not decided")
        return
    found = [interval(values_T) for values_T in values_GxT]
    low, value, high = (np.array([band[name] for band in found]) for name in ("low", "value", "high"))
    plot.plot(grid_G, value, label=label)
    plot.fill_between(grid_G, low, high, alpha=0.25)
    plot.set_ylim(0.8 * value.min(), 1.25 * value.max())
    plot.legend(fontsize="small")


def _draw_contours(plot: Any, points: Points, fitted: Fitted, law: Law, grid_G: np.ndarray,
                   best_GxT: Sequence[np.ndarray]) -> None:
    if law.optimal_only:
        plot.set_title("this law has no contours off the optimum")
        return
    sizes_N = np.geomspace(points.params_P.min() / 2, max(values_T[0] for values_T in best_GxT) * 3, 60)
    n_NxG, c_NxG = np.meshgrid(sizes_N, grid_G, indexing="ij")
    first = {name: values[:1] for name, values in fitted.parameters.items()}
    tokens = c_NxG / (points.flops_per_weight_token * n_NxG)
    loss = np.exp(law.log_loss(first, n_NxG.ravel(), tokens.ravel(), c_NxG.ravel())[0]).reshape(n_NxG.shape)
    levels = np.quantile(loss, np.linspace(0.02, 0.8, 14))
    plot.contour(c_NxG, n_NxG, loss, levels=np.unique(levels))
    plot.plot(grid_G, [values_T[0] for values_T in best_GxT], color="tab:blue", label="optimum")
    plot.scatter(points.flops_P, points.params_P, c=points.loss_P, s=14)
    plot.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="parameters", title="contours of the fitted loss")
    plot.legend(fontsize="small")


def _draw_backtests(plot: Any, tests: Sequence[Mapping[str, Any]]) -> None:
    for row in tests:
        value, band = row["observed"], row["predicted"]
        low, middle, high = (100 * (band[name] / value - 1) for name in ("low", "value", "high"))
        plot.errorbar([row["times"]], [middle], yerr=[[middle - low], [high - middle]], fmt="o", markersize=3,
                      color="tab:blue" if row["covered"] else "tab:red", alpha=0.7)
    plot.axhline(0.0, color="gray", linewidth=1)
    plot.set(xlabel="FLOPs over the largest that was seen", ylabel="predicted / observed - 1, %",
             title="backtests; red: not covered")
